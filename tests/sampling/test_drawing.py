"""Draws follow the softmax, and truncation is that of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from finesight.sampling.drawing import RowSettings, _kept, draw, uniform_draws
from finesight.sampling.types import SamplingSettings

NONE = torch.empty(0, dtype=torch.int64)


def rows_of(count: int, **settings) -> RowSettings:
    rows = RowSettings.empty(count, torch.device("cpu"))
    for row in range(count):
        rows.write(row, SamplingSettings(**settings))
    return rows


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6, 1e-5, 1e-4])
@pytest.mark.parametrize("penalty", [0.01, 1.0, 1e6])
def test_settings_at_their_ends_give_numbers(temperature: float, penalty: float) -> None:
    """Nothing leaves the range of float32, where a log-probability would be no number."""
    scores = torch.tensor([300.0, -300.0, 0.0]).expand(4, -1)
    seen = torch.tensor([[True, True, False]]).expand(4, -1)
    rows = rows_of(4, temperature=temperature, repetition_penalty=penalty)
    tokens, logprobs = draw(scores, torch.tensor([0.0, 0.3, 0.6, 0.999], dtype=torch.float64), rows, NONE, seen=seen)
    assert torch.isfinite(logprobs).all()
    assert penalty == 1e6 or (tokens == 0).all()


def test_draws_follow_the_softmax() -> None:
    scores = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf, 0.5])
    count = 20_000
    uniform = torch.from_numpy(np.concatenate([uniform_draws(0, place, 0, 4) for place in range(count // 4)]))
    tokens, logprobs = draw(scores.expand(count, -1), uniform, rows_of(count, temperature=2.0), torch.tensor([5]))
    expected = (scores / 2).index_fill(0, torch.tensor(5), -torch.inf).softmax(-1)
    found = torch.bincount(tokens, minlength=6) / count
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)
    assert found[4] == found[5] == 0
    torch.testing.assert_close(logprobs, expected.log()[tokens])


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(1.0, 0.0)])
def test_the_ends_of_the_interval_draw_what_can_be_drawn(uniform: float) -> None:
    scores = torch.full((1, 1000), -torch.inf)
    scores[0, [17, 500]] = 1.0
    token, _ = draw(scores, torch.tensor([uniform], dtype=torch.float64), rows_of(1, temperature=1.0), NONE)
    assert int(token) == (17 if uniform == 0 else 500)


def test_temperature_zero_takes_the_likeliest_beside_rows_that_draw() -> None:
    scores = torch.randn(8, 50)
    rows = rows_of(8, temperature=1.0)
    rows.write(3, SamplingSettings())
    tokens, logprobs = draw(scores, torch.rand(8, dtype=torch.float64), rows, NONE, truncate=True)
    assert tokens[3] == scores[3].argmax()
    torch.testing.assert_close(logprobs[3], scores[3].log_softmax(-1).max())


@pytest.mark.parametrize(
    "settings", [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.7, "min_p": 0.05}, {"top_p": 1e-6}], ids=str
)
def test_truncation_is_that_of_transformers(settings: dict[str, float]) -> None:
    torch.manual_seed(0)
    scores = torch.randn(16, 200) * 2
    warped = TemperatureLogitsWarper(0.7)(NONE, scores)
    if "top_k" in settings:
        warped = TopKLogitsWarper(int(settings["top_k"]))(NONE, warped)
    if "top_p" in settings:
        warped = TopPLogitsWarper(settings["top_p"])(NONE, warped)
    if "min_p" in settings:
        warped = MinPLogitsWarper(settings["min_p"])(NONE, warped)
    kept = _kept((scores / 0.7).log_softmax(-1), rows_of(16, temperature=0.7, **settings))
    assert torch.equal(kept, warped.isfinite())


def test_the_penalty_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 30)
    before = torch.randint(0, 30, (4, 5))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(before, scores.clone())
    seen = torch.zeros(4, 30, dtype=torch.bool).scatter_(1, before, True)
    uniform = torch.rand(4, dtype=torch.float64)
    found = draw(scores, uniform, rows_of(4, temperature=1.0, repetition_penalty=1.7), NONE, seen=seen)
    plain = draw(expected, uniform, rows_of(4, temperature=1.0), NONE)
    assert torch.equal(found[0], plain[0])
    torch.testing.assert_close(found[1], plain[1])


def test_answers_have_numbers_of_their_own() -> None:
    assert np.array_equal(uniform_draws(1, 2, 3, 8), uniform_draws(1, 2, 3, 8))
    seen = {uniform_draws(seed, prompt, number, 1)[0] for seed in range(3) for prompt in range(3) for number in range(3)}
    assert len(seen) == 27
