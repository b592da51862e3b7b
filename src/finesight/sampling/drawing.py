"""From scores to tokens: pure functions over all rows at once, each row with settings of its own.

Nothing is drawn here: the uniform number that decides a row's token is an argument, so that an answer depends on its
own seed and place alone, never on its neighbours or on a global generator.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import numpy as np
import torch

from finesight.sampling.types import SamplingSettings

# Scores divided by less would leave the range of float32.
LEAST_TEMPERATURE = 1e-5


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


def draw(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    settings: RowSettings,
    forbidden: torch.Tensor,
    *,
    seen: torch.Tensor | None = None,
    truncate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row, and its log-probability.

    The log-probability is that of the whole distribution under the row's temperature (1 where the most likely token is
    taken), repetition penalty and forbidden tokens; truncation (top-k, top-p, min-p) narrows only what can be drawn.
    A token is drawn where the running sum of probabilities first exceeds the uniform number.

    Args:
        logits: (B, V).
        uniform: (B,) float64 in [0, 1).
        forbidden: (F,) int64 ids that cannot be drawn.
        seen: (B, V) bool, tokens that the repetition penalty counts; None: no row has one.
        truncate: whether any row truncates.

    Returns:
        (B,) int64 and (B,) float32.
    """
    token, logprobs = draw_from_all(logits, uniform, settings, forbidden, seen=seen, truncate=truncate)
    return token, logprobs.gather(1, token[:, None]).squeeze(1)


def draw_from_all(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    settings: RowSettings,
    forbidden: torch.Tensor,
    *,
    seen: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    truncate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`draw`, with the log-probabilities of all tokens: (B,) int64 and (B, V) float32.

    Args:
        allowed: (B, ceil(V / 32)) int32, a bit for each token that a row's grammar lets it draw; None: no row has a grammar.
    """
    scores = logits.float().index_fill(1, forbidden, -torch.inf)
    if allowed is not None:
        scores = scores.masked_fill(~unpacked(allowed, logits.shape[1]), -torch.inf)
    if seen is not None:
        penalty = settings.repetition_penalty[:, None]
        # Keskar et al. 2019 (CTRL), in transformers' form: towards less likely, whatever the sign.
        scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    greedy = settings.temperature < LEAST_TEMPERATURE
    scores = scores / torch.where(greedy, 1.0, settings.temperature)[:, None]
    logprobs = torch.log_softmax(scores, dim=-1)
    kept = logprobs if not truncate else torch.where(_kept(logprobs, settings), logprobs, -torch.inf)
    # float64: over a large vocabulary the running sum must still tell small probabilities apart.
    running = kept.double().exp_().cumsum_(dim=-1)
    wanted = uniform[:, None] * running[:, -1:]
    # Tokens of no probability do not move the sum, so the first place past the number is one that can be drawn.
    drawn = torch.searchsorted(running, wanted, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
    return torch.where(greedy, scores.argmax(dim=-1), drawn), logprobs


def unpacked(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Bits, the lowest of each word first: (B, ceil(count / 32)) int32 -> (B, count) bool."""
    place = torch.arange(count, dtype=torch.int32, device=bits.device)
    return (bits[:, place >> 5] >> (place & 31)).bitwise_and_(1).bool()


def _kept(logprobs: torch.Tensor, settings: RowSettings) -> torch.Tensor:
    """(B, V) bool: what top-k, then top-p, then min-p leave, each over what the one before left."""
    ordered, places = logprobs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logprobs.shape[1], device=logprobs.device)
    kept = (settings.top_k[:, None] == 0) | (rank < settings.top_k[:, None])
    weights = torch.where(kept, ordered.exp(), 0.0)
    shares = weights / weights.sum(dim=-1, keepdim=True)
    # The smallest set whose probability reaches top_p (Holtzman et al. 2020): what comes before a token is below it.
    # A row without top-p keeps its tail whatever the sums round to: it draws as it would beside rows that truncate nothing.
    kept &= (shares.cumsum(dim=-1) - shares < settings.top_p[:, None]) | (rank == 0) | (settings.top_p[:, None] >= 1)
    kept &= shares >= settings.min_p[:, None] * shares[:, :1]
    return torch.zeros_like(kept).scatter_(1, places, kept)
