"""The thread that owns the engine, and jobs: requests as the server's event loop sees them."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, cast

from torch import nn

from finesight.data.sample import Sample
from finesight.errors import FinesightError
from finesight.sampling.engine import DecodingEngine, answering
from finesight.sampling.grammar import Grammar
from finesight.sampling.requests import Request, Token
from finesight.sampling.types import Completion, SamplingSettings
from finesight.serve.errors import ApiError

logger = logging.getLogger(__name__)

Event = tuple[int, Token | Completion] | Exception  # (number of the answer, what is new of it), or why there will be none


class Job:
    """One request and what is heard of it.

    Args:
        adapter: that answers; None: the base.
        tokens: whether each token is wanted, or only whole answers.
        grammar: that the answers follow.
        loop: that events are handed to.
    """

    def __init__(
        self,
        sample: Sample,
        settings: SamplingSettings,
        adapter: str | None,
        *,
        tokens: bool,
        top_logprobs: int,
        grammar: Grammar | None = None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.told: list[Event] = []  # by the engine, not handed on yet; the worker's alone
        self.loop = loop
        self._left = settings.num_generations
        on_token: Callable[[int, Token], None] | None = self._on_token if tokens else None
        self.request = Request(
            sample,
            settings,
            adapter,
            top_logprobs=top_logprobs,
            grammar=grammar,
            on_token=on_token,
            on_end=self._on_end,
            on_error=self._on_error,
        )

    @property
    def ended(self) -> bool:
        """Whether every answer has been handed on, or none will be."""
        return self._left == 0

    def fail(self, error: Exception) -> None:
        """Called by the worker: there will be no answer."""
        self._left = 0
        self.told.append(error)
        hand_on([self])

    def _on_token(self, number: int, token: Token) -> None:
        self.told.append((number, token))

    def _on_end(self, number: int, completion: Completion) -> None:
        self._left -= 1
        self.told.append((number, completion))

    def _on_error(self, error: FinesightError) -> None:
        self.fail(ApiError(400, str(error), code="invalid_json_schema", param="response_format"))


def hand_on(jobs: Iterable[Job]) -> None:
    """Hands what jobs have been told to their event loops, each of which is woken once: every wake is a call of the system."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, list[Event]]]] = {}
    for job in jobs:
        if job.told:
            by_loop.setdefault(job.loop, []).append((job, job.told))
            job.told = []
    for loop, news in by_loop.items():
        try:
            loop.call_soon_threadsafe(_deliver, news)
        except RuntimeError:  # the loop has been closed: nobody listens any more
            logger.debug("events came after the server's end")


def _deliver(news: list[tuple[Job, list[Event]]]) -> None:
    for job, events in news:
        for event in events:
            job.events.put_nowait(event)


@dataclass(frozen=True, eq=False)
class _Order:
    kind: Literal["submit", "cancel", "stop", "change"]
    job: Job | None = None
    action: Callable[[], None] | None = None
    done: Future[None] | None = None


class Worker:
    """Runs an engine in a thread of its own.

    Args:
        model: is put into evaluation mode while the thread runs.
        make_engine: makes the engine; called again if it fails in the middle of a step.
    """

    def __init__(self, model: nn.Module, make_engine: Callable[[], DecodingEngine]) -> None:
        self._model, self._make_engine = model, make_engine
        self._engine = make_engine()
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._jobs: set[Job] = set()
        self._change: _Order | None = None  # waits for the answers under way; orders behind it wait for it
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="finesight-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are still answered."""
        return self._thread.is_alive() and not self._stopping

    @property
    def running(self) -> int:
        """Answers being drawn."""
        return self._engine.running

    @property
    def waiting(self) -> int:
        """Answers that have found no row yet."""
        return self._engine.waiting

    def submit(self, job: Job) -> None:
        """Hands a job to the engine; from any thread."""
        self._orders.put(_Order("submit", job))

    def cancel(self, job: Job) -> None:
        """Ends a job; from any thread."""
        self._orders.put(_Order("cancel", job))

    def change(self, action: Callable[[], None]) -> Future[None]:
        """Has the models changed in the engine's thread; from any thread.

        What came before is answered first, what comes afterwards waits. A new engine is made then.

        Returns:
            When it is done; holds what the action raised.
        """
        done: Future[None] = Future()
        self._orders.put(_Order("change", action=action, done=done))
        return done

    def stop(self) -> None:
        """Answers what it holds, then ends the thread."""
        self._orders.put(_Order("stop"))
        self._thread.join()

    def _run(self) -> None:
        with answering(self._model):
            while not (self._stopping and not self._engine.busy):
                self._take_orders()
                if self._change is not None and not self._engine.busy:
                    change, self._change = self._change, None
                    if not self._carry_out(change):
                        return
                    continue
                if not self._engine.busy:
                    continue
                try:
                    self._engine.step()
                except Exception as error:  # whatever it was, the requests that it holds must not wait for ever
                    if not self._recover(error):
                        return
                hand_on(self._jobs)
                self._jobs = {job for job in self._jobs if not job.ended}

    def _take_orders(self) -> None:
        """Carries out what has been ordered; waits for an order where there is nothing else to do."""
        wait = not self._engine.busy and not self._stopping
        while self._change is None:
            try:
                order = self._orders.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if order.kind == "stop":
                self._stopping = True
            elif order.kind == "change":
                self._change = order
            elif order.job is not None and order.kind == "cancel":
                self._engine.cancel(order.job.request)
                self._jobs.discard(order.job)
            elif order.job is not None:
                try:
                    self._engine.submit(order.job.request)
                    self._jobs.add(order.job)
                except FinesightError as error:
                    order.job.fail(ApiError(400, str(error), code="context_length_exceeded"))

    def _carry_out(self, change: _Order) -> bool:
        """Changes the models and makes a new engine for them; False if that cannot be made."""
        if change.action is None or change.done is None:
            return True
        self._engine.finish()
        self._engine = _NO_ENGINE  # its cache makes room for the next one's
        failure: BaseException | None = None
        try:
            change.action()
        except Exception as error:
            failure = error
        renewed = self._renew()
        if failure is None and not renewed:
            failure = ApiError(503, "No new engine can be made.", code="engine_failure")
        if failure is None:
            change.done.set_result(None)
        else:
            change.done.set_exception(failure)
        return renewed

    def _recover(self, error: Exception) -> bool:
        """Fails what is held and begins anew with an empty engine; False if that cannot be made."""
        logger.error("The engine failed; %d requests that it held are not answered.", len(self._jobs), exc_info=error)
        for job in self._jobs:
            job.fail(ApiError(500, "The server failed while computing the answer.", code="engine_failure"))
        self._jobs.clear()
        error.with_traceback(None)  # its frames hold the engine, whose cache makes room for the next one's
        self._engine = _NO_ENGINE
        return self._renew()

    def _renew(self) -> bool:
        """Makes an engine; False, and the worker ends, if that fails."""
        try:
            self._engine = self._make_engine()
        except Exception as again:
            logger.critical("No new engine can be made; the server must be started again.", exc_info=again)
            self._stopping = True
            return False
        return True


class _NoEngine:
    """Stands where there is no engine for the moment, or for ever."""

    busy, running, waiting = False, 0, 0


_NO_ENGINE = cast(DecodingEngine, _NoEngine())
