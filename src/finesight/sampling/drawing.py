"""From scores to tokens: pure functions over all rows at once, each row with settings of its own.

Nothing is drawn here: the uniform number that decides a row's token is an argument, so that an answer depends on its
own seed and place alone, never on its neighbours or on a global generator.

Probabilities are summed as whole numbers (:data:`_ONE` stands for the probability of the likeliest token), because such sums
are exact in any order: a row over 151,936 tokens is summed in blocks, side by side, and the running sum over blocks agrees to
the last digit with the one within a block. Running sums of rounded numbers would not: computed in parallel they need not even
grow with each token, so that one of no probability could be drawn.

Shapes: B rows, V vocabulary, N blocks of the vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from finesight.sampling.types import SamplingSettings

# Scores divided by less would leave the range of float32.
LEAST_TEMPERATURE = 1e-5
# Tokens that are summed together; vocabularies of checkpoints are multiples of it, others are padded.
_BLOCK = 128
# The probability of a row's likeliest token as a whole number. Smaller ones are cut to whole numbers as well, each by less
# than 2.3e-13 of the likeliest: over 150,000 tokens together less than the rounding of one float32. Sums of up to 2^20
# tokens stay below 2^62.
_ONE = 2**42


@dataclass(frozen=True, eq=False)
class RowSettings:
    """How each row draws; (B,) tensors."""

    temperature: torch.Tensor  # float32; 0, or below LEAST_TEMPERATURE: the most likely token
    top_k: torch.Tensor  # int64; 0: all
    top_p: torch.Tensor  # float32
    min_p: torch.Tensor  # float32: only tokens at least this share as likely as the likeliest
    repetition_penalty: torch.Tensor  # float32; 1: none

    @staticmethod
    def empty(rows: int, device: torch.device) -> RowSettings:
        """Rows that take the most likely token."""

        def full(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        return RowSettings(full(0.0), full(0, torch.int64), full(1.0), full(0.0), full(1.0))

    def write(self, row: int, settings: SamplingSettings) -> None:
        """Settings of one row."""
        for field in fields(self):
            getattr(self, field.name)[row] = getattr(settings, field.name)

    def of(self, rows: slice | torch.Tensor) -> RowSettings:
        """Those of some rows: views for a slice, copies for indices."""
        return RowSettings(*(getattr(self, field.name)[rows] for field in fields(self)))


def uniform_draws(seed: int, prompt: int, completion: int, count: int) -> np.ndarray:
    """Numbers in [0, 1) that decide the tokens of one completion; (count,) float64.

    Args:
        prompt: place of the prompt; completion: which answer to it.
    """
    digest = hashlib.blake2b(f"{seed}/{prompt}/{completion}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64))).random(count)


class Draw(NamedTuple):
    """What each row drew, and what turns its scores into log-probabilities: (score - peak) - log_total."""

    token: torch.Tensor  # (B,) int64
    logprob: torch.Tensor  # (B,) float32
    peak: torch.Tensor  # (B, 1) float32: the largest score
    log_total: torch.Tensor  # (B, 1) float32: logarithm of the sum of exp(score - peak) over all tokens


def draw(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    settings: RowSettings,
    seen: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
) -> Draw:
    """One token for each row, and its log-probability.

    The log-probability is that of the whole distribution under the row's temperature (1 where the most likely token is
    taken) and repetition penalty; truncation (top-k, top-p, min-p) narrows only what can be drawn.
    A token is drawn where the running sum of probabilities first exceeds the uniform number, by its block and then within it.

    Args:
        logits: (B, V); what must not be drawn is -inf.
        uniform: (B,) float64 in [0, 1).
        seen: (B, V) bool, tokens that the repetition penalty counts; None: no row has one.
        kept: (B, V) bool of :func:`kept_tokens`; None: no row truncates.
    """
    blocks = _in_blocks(scores_of(logits, settings, seen), -torch.inf)
    block_peaks = blocks.amax(dim=-1)
    peak = block_peaks.amax(dim=-1, keepdim=True)
    sums = _weights(blocks, peak[:, :, None]).sum(dim=-1)
    log_total = (sums.sum(dim=-1, keepdim=True).double() / _ONE).log().float()
    if kept is not None:
        blocks = torch.where(_in_blocks(kept, False), blocks, -torch.inf)
        sums = _weights(blocks, peak[:, :, None]).sum(dim=-1)
    running = sums.cumsum(dim=-1)
    total = running[:, -1:]
    wanted = torch.minimum((uniform[:, None] * total).to(torch.int64), total - 1)  # rounding could reach the total
    greedy = (settings.temperature < LEAST_TEMPERATURE)[:, None]

    # Clamped here and below for scores that are no numbers: what is drawn from them is a token all the same.
    block = torch.where(greedy, block_peaks.argmax(dim=-1, keepdim=True), _first_above(running, wanted)).clamp(max=blocks.shape[1] - 1)
    scores = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK)).squeeze(1)
    own_running = _weights(scores, peak).cumsum(dim=-1)
    own_total = own_running[:, -1:]
    # Should weights that are computed again differ in the last digit (other code for another shape), what is wanted still lies within
    # their sum; should nothing be left of it, the likeliest token of the block is one that can be drawn.
    own_wanted = torch.minimum(wanted - (running - sums).gather(1, block), own_total - 1)
    likeliest = scores.argmax(dim=-1, keepdim=True)
    place = torch.where(greedy | (own_total <= 0), likeliest, _first_above(own_running, own_wanted)).clamp(max=_BLOCK - 1)
    token = (block * _BLOCK + place).clamp(max=logits.shape[1] - 1)
    logprob = (scores.gather(1, place) - peak) - log_total
    return Draw(token.squeeze(1), logprob.squeeze(1), peak, log_total)


def scores_of(logits: torch.Tensor, settings: RowSettings, seen: torch.Tensor | None) -> torch.Tensor:
    """Logits under repetition penalty and temperature: (B, V) float32."""
    temperature = torch.where(settings.temperature < LEAST_TEMPERATURE, 1.0, settings.temperature)[:, None]
    if seen is None:
        return logits / temperature  # float32, since the temperature is
    penalty = settings.repetition_penalty[:, None]
    # Keskar et al. 2019 (CTRL), in transformers' form: towards less likely, whatever the sign.
    scores = logits.float()
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores) / temperature


def likeliest_tokens(scores: torch.Tensor, drawn: Draw, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the likeliest tokens, and the tokens: (B, count) float32 and int64.

    Args:
        scores: (B, V) of :func:`scores_of`.
    """
    top, tokens = scores.topk(count, dim=-1)
    return (top - drawn.peak) - drawn.log_total, tokens


def kept_tokens(scores: torch.Tensor, settings: RowSettings) -> torch.Tensor:
    """(B, V) bool: what top-k, then top-p, then min-p leave, each over what the one before left; the likeliest token always.

    Args:
        scores: (B, V) of :func:`scores_of`.
    """
    ordered, places = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[1], device=scores.device)
    kept = (settings.top_k[:, None] == 0) | (rank < settings.top_k[:, None])
    weights = torch.where(kept, (ordered - ordered[:, :1]).exp(), 0.0)
    shares = weights / weights.sum(dim=-1, keepdim=True)
    # The smallest set whose probability reaches top_p (Holtzman et al. 2020): what comes before a token is below it.
    # A row without top-p keeps its tail whatever the sums round to: it draws as it would beside rows that truncate nothing.
    kept &= (shares.cumsum(dim=-1) - shares < settings.top_p[:, None]) | (rank == 0) | (settings.top_p[:, None] >= 1)
    kept &= shares >= settings.min_p[:, None] * shares[:, :1]
    return torch.zeros_like(kept).scatter_(1, places, kept)


def unpacked(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Bits, the lowest of each word first: (B, ceil(count / 32)) int32 -> (B, count) bool."""
    place = torch.arange(count, dtype=torch.int32, device=bits.device)
    return (bits[:, place >> 5] >> (place & 31)).bitwise_and_(1).bool()


def _in_blocks(values: torch.Tensor, blank: float | bool) -> torch.Tensor:
    """(B, V) -> (B, N, _BLOCK), filled up with a blank."""
    spare = -values.shape[1] % _BLOCK
    if spare:
        values = F.pad(values, (0, spare), value=blank)
    return values.unflatten(1, (-1, _BLOCK))


def _weights(scores: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """Probabilities over that of the peak as whole numbers."""
    return (scores - peak).exp_().mul_(_ONE).to(torch.int64)


def _first_above(running: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """(B, 1): where a sum that never falls first exceeds what is wanted, (B, 1)."""
    return (running <= wanted).sum(dim=-1, keepdim=True)
