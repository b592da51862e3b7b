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

from finesight.models.compilation import CompiledFunction
from finesight.sampling.drawing import Draw, RowSettings, draw, kept_tokens, likeliest_tokens, scores_of, uniform_draws
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
    tokens, logprobs, *_ = draw(scores, torch.tensor([0.0, 0.3, 0.6, 0.999], dtype=torch.float64), rows, seen)
    assert torch.isfinite(logprobs).all()
    assert penalty == 1e6 or (tokens == 0).all()


def running_sums(scores: torch.Tensor) -> torch.Tensor:
    """(B, V) float64: probabilities up to and with each token, one token after another."""
    return scores.double().softmax(-1).cumsum(-1)


def nearest_below_one() -> float:
    return float(np.nextafter(1.0, 0.0))


@pytest.mark.parametrize("vocabulary", [6, 1000])
def test_draws_follow_the_softmax(vocabulary: int) -> None:
    """Pearson's statistic over tokens that are expected ten times or more."""
    torch.manual_seed(0)
    scores = torch.randn(vocabulary) * 2
    scores[[4, vocabulary - 1]] = -torch.inf
    count = 8_000
    uniform = torch.from_numpy(uniform_draws(0, 0, 0, count))
    tokens, logprobs, *_ = draw(scores.expand(count, -1), uniform, rows_of(count, temperature=2.0))
    expected = (scores / 2).softmax(-1)
    found = torch.bincount(tokens, minlength=vocabulary)
    assert found[4] == found[vocabulary - 1] == 0
    often = expected * count >= 10
    statistic = ((found - expected * count) ** 2 / (expected * count))[often].sum()
    degrees = float(often.sum()) - 1
    assert float(torch.special.gammaincc(torch.tensor(degrees / 2), statistic / 2)) > 1e-3  # so large by chance
    torch.testing.assert_close(logprobs, expected.log()[tokens])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [7, 128, 129, 5000, 151_936])
def test_draws_are_those_of_one_running_sum(vocabulary: int, dtype: torch.dtype) -> None:
    """Where they are not, the number lies at the border of the two tokens: closer than weights round."""
    torch.manual_seed(vocabulary)
    rows = 2000 if vocabulary < 151_936 else 48
    scores = (torch.randn(rows, vocabulary) * torch.rand(rows, 1) * 6).to(dtype)
    scores[:, torch.randperm(vocabulary)[: vocabulary // 3]] = -torch.inf
    uniform = torch.rand(rows, dtype=torch.float64)
    tokens, logprobs, *_ = draw(scores, uniform, rows_of(rows, temperature=1.0))
    running = running_sums(scores)
    expected = torch.searchsorted(running, uniform[:, None] * running[:, -1:], right=True).squeeze(1)
    exact = scores.double().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs.double(), exact, atol=3e-6, rtol=0)
    assert logprobs.isfinite().all()
    other = (tokens != expected).nonzero().squeeze(1)
    assert len(other) <= rows // 500
    for row in other.tolist():
        assert abs(uniform[row] - running[row, min(tokens[row], expected[row])]) < 1e-6


@pytest.mark.parametrize("uniform", [0.0, nearest_below_one()])
@pytest.mark.parametrize("places", [(0,), (127,), (128,), (17, 500), (127, 128), (0, 999), (255, 999), (999,)], ids=str)
def test_the_ends_of_the_interval_draw_what_can_be_drawn(places: tuple[int, ...], uniform: float) -> None:
    scores = torch.full((1, 1000), -torch.inf)
    scores[0, list(places)] = 1.0
    drawn = draw(scores, torch.tensor([uniform], dtype=torch.float64), rows_of(1, temperature=1.0))
    assert int(drawn.token) == places[0 if uniform == 0 else -1]
    assert float(drawn.logprob) == pytest.approx(-np.log(len(places)), abs=1e-6)


def test_what_is_forbidden_is_never_drawn() -> None:
    """Uniform numbers at the borders of tokens of ragged scores, forbidden ones beside them and around blocks; equal bfloat16 scores too."""
    torch.manual_seed(0)
    vocabulary = 700
    for case in range(6):
        scores = torch.randn(vocabulary) * 5
        if case % 2:
            scores = scores.bfloat16().float().round()
        scores[torch.rand(vocabulary) < 0.5] = -torch.inf
        scores[[0, 127, 128, 255, 256, 699]] = -torch.inf
        borders = running_sums(scores[None])[0].clamp(max=nearest_below_one())
        uniform = torch.cat([borders, torch.nextafter(borders, torch.zeros(())), torch.nextafter(borders, torch.ones(())), torch.rand(300)])
        uniform = uniform.double().clamp(0, nearest_below_one())
        tokens = draw(scores.expand(len(uniform), -1), uniform, rows_of(len(uniform), temperature=1.0)).token
        assert scores[tokens].isfinite().all()
        assert (tokens[uniform.argsort()].diff() >= 0).all()


def test_all_mass_on_one_token() -> None:
    for place in (0, 127, 128, 300, 301):
        scores = torch.zeros(3, 302)
        scores[:, place] = 1e4
        uniform = torch.tensor([0.0, 0.5, nearest_below_one()], dtype=torch.float64)
        drawn = draw(scores, uniform, rows_of(3, temperature=1.0))
        assert drawn.token.tolist() == [place] * 3 and drawn.logprob.tolist() == [0.0] * 3


def test_the_likeliest_is_the_first_of_equal_ones() -> None:
    scores = torch.zeros(4, 400)
    for row, places in enumerate([(5, 127, 128), (128, 129), (399,), (0, 399)]):
        scores[row, list(places)] = 3.0
    tokens = draw(scores.bfloat16(), torch.full((4,), 0.9, dtype=torch.float64), rows_of(4)).token
    assert tokens.tolist() == scores.argmax(-1).tolist() == [5, 128, 399, 0]


def test_neighbours_do_not_matter() -> None:
    """To the bit: beside others or alone, penalised and truncated ones among them."""
    torch.manual_seed(0)
    scores = (torch.randn(6, 3000) * 3).bfloat16()
    uniform = torch.rand(6, dtype=torch.float64)
    asked = [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}, {"repetition_penalty": 1.3}, {"min_p": 0.1, "temperature": 0.3}]
    seen = torch.rand(6, 3000) < 0.1
    seen[[0, 1, 2, 3, 5]] = False
    rows = RowSettings.empty(6, torch.device("cpu"))
    for row, one in enumerate(asked):
        rows.write(row, SamplingSettings(**{"temperature": 1.0, **one}))
    together = draw(scores, uniform, rows, seen, kept_tokens(scores_of(scores, rows, seen), rows))
    for row, one in enumerate(asked):
        alone = rows.of(slice(row, row + 1))
        its_scores, its_seen = scores[row : row + 1], seen[row : row + 1] if "repetition_penalty" in one else None
        kept = kept_tokens(scores_of(its_scores, alone, its_seen), alone) if {"top_p", "top_k", "min_p"} & one.keys() else None
        found = draw(its_scores, uniform[row : row + 1], alone, its_seen, kept)
        for name in Draw._fields:
            assert torch.equal(getattr(found, name)[0], getattr(together, name)[row]), (name, one)


def test_scores_that_are_no_numbers_draw_some_token() -> None:
    scores = torch.full((2, 300), torch.nan)
    drawn = draw(scores, torch.tensor([0.0, 0.9], dtype=torch.float64), rows_of(2, temperature=1.0))
    assert all(0 <= token < 300 for token in drawn.token.tolist()) and drawn.logprob.isnan().all()


def test_alternatives_are_the_whole_distribution() -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 500) * 3
    rows = rows_of(4, temperature=0.7, top_k=3)
    scaled = scores_of(scores, rows, None)
    drawn = draw(scores, torch.rand(4, dtype=torch.float64), rows, None, kept_tokens(scaled, rows))
    logprobs, tokens = likeliest_tokens(scaled, drawn, 20)
    expected = (scores / 0.7).log_softmax(-1).topk(20)
    assert torch.equal(tokens, expected.indices)
    torch.testing.assert_close(logprobs, expected.values)
    torch.testing.assert_close(drawn.logprob, (scores / 0.7).log_softmax(-1).gather(1, drawn.token[:, None]).squeeze(1))
    assert (drawn.token[:, None] == tokens[:, :3]).any(dim=1).all()


def test_compiled_draws_are_the_same() -> None:
    torch.manual_seed(0)
    told: list[str] = []
    compiled = CompiledFunction(draw, told.append, what="Draws")
    for rows in (40, 25):
        scores = (torch.randn(rows, 1000) * 4).bfloat16()
        scores[:, ::3] = -torch.inf
        settings = rows_of(rows, temperature=0.8)
        settings.write(3, SamplingSettings())
        uniform = torch.rand(rows, dtype=torch.float64)
        expected, found = draw(scores, uniform, settings), compiled(scores, uniform, settings)
        assert torch.equal(found.token, expected.token)
        torch.testing.assert_close(found.logprob, expected.logprob)
    assert not told


def test_temperature_zero_takes_the_likeliest_beside_rows_that_draw() -> None:
    scores = torch.randn(8, 50)
    rows = rows_of(8, temperature=1.0)
    rows.write(3, SamplingSettings())
    tokens, logprobs, *_ = draw(scores, torch.rand(8, dtype=torch.float64), rows, None, kept_tokens(scores, rows))
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
    kept = kept_tokens(scores / 0.7, rows_of(16, temperature=0.7, **settings))
    assert torch.equal(kept, warped.isfinite())


def test_the_penalty_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 30)
    before = torch.randint(0, 30, (4, 5))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(before, scores.clone())
    seen = torch.zeros(4, 30, dtype=torch.bool).scatter_(1, before, True)
    uniform = torch.rand(4, dtype=torch.float64)
    found = draw(scores, uniform, rows_of(4, temperature=1.0, repetition_penalty=1.7), seen)
    plain = draw(expected, uniform, rows_of(4, temperature=1.0))
    assert torch.equal(found[0], plain[0])
    torch.testing.assert_close(found[1], plain[1])


def test_answers_have_numbers_of_their_own() -> None:
    assert np.array_equal(uniform_draws(1, 2, 3, 8), uniform_draws(1, 2, 3, 8))
    seen = {uniform_draws(seed, prompt, number, 1)[0] for seed in range(3) for prompt in range(3) for number in range(3)}
    assert len(seen) == 27
