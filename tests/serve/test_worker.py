"""What the engine's thread hands to event loops: everything, in order, and with one wake of a loop for all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from finesight.data.conversation import RowSource
from finesight.data.sample import Sample
from finesight.sampling.requests import Token
from finesight.sampling.types import Completion, SamplingSettings
from finesight.serve.worker import Job, hand_on


class Loop:
    """An event loop that only counts how often it is woken."""

    def __init__(self) -> None:
        self.wakes = 0

    def call_soon_threadsafe(self, callback: Callable[..., None], *arguments: Any) -> None:
        self.wakes += 1
        callback(*arguments)


class ClosedLoop:
    def call_soon_threadsafe(self, callback: Callable[..., None], *arguments: Any) -> None:
        raise RuntimeError("Event loop is closed")


def job(loop: Any) -> Job:
    ids = np.arange(3)
    sample = Sample(ids, np.zeros((3, 3), dtype=np.int64), np.zeros(3, dtype=bool), (), 3, RowSource("prompts", 0))
    return Job(sample, SamplingSettings(), None, tokens=True, top_logprobs=0, loop=loop)


def heard(of: Job) -> list[Any]:
    return [of.events.get_nowait() for _ in range(of.events.qsize())]


def test_a_step_wakes_a_loop_once() -> None:
    loop = Loop()
    jobs = [job(loop) for _ in range(5)]
    for one in jobs:
        for token in (7, 8):
            one.request.on_token(0, Token(token, -1.0))
        one.request.on_end(0, Completion("x", (7, 8), "length"))
    assert all(one.events.empty() for one in jobs)
    hand_on(jobs)
    assert loop.wakes == 1
    for one in jobs:
        first, second, end = heard(one)
        assert (first[1].token_id, second[1].token_id, end[1].text) == (7, 8, "x")
        assert one.ended
    hand_on(jobs)
    assert loop.wakes == 1 and all(one.events.empty() for one in jobs)


def test_a_failure_comes_at_once_and_after_what_was_told() -> None:
    loop = Loop()
    one = job(loop)
    one.request.on_token(0, Token(7, -1.0))
    one.fail(ValueError("the engine failed"))
    token, error = heard(one)
    assert token[1].token_id == 7 and isinstance(error, ValueError) and one.ended


@pytest.mark.parametrize("closed_first", [True, False])
def test_a_closed_loop_keeps_nobody_else_from_hearing(closed_first: bool) -> None:
    gone, here = job(ClosedLoop()), job(Loop())
    for one in (gone, here):
        one.request.on_token(0, Token(7, -1.0))
    hand_on([gone, here] if closed_first else [here, gone])
    assert len(heard(here)) == 1 and gone.events.empty()
