"""What a decoding step reads and writes: rows at fixed addresses, and what a step drew on its way to the host.

Shapes: B rows, M blocks of a row's table, S most tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from finesight.models.decoding import BLOCK_TOKENS, Decoder
from finesight.sampling.drawing import Draw, RowSettings, draw, kept_tokens, likeliest_tokens, scores_of, unpacked
from finesight.sampling.types import SamplingSettings

# Alternatives to a drawn token that can be asked for; what OpenAI's interface offers.
MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class StepKind:
    """What any of the rows asks of a step; with the number of rows, what a captured step depends on."""

    truncates: bool = False  # top-k, top-p or min-p
    penalises: bool = False  # a penalty against repetition
    alternatives: bool = False  # the likeliest tokens beside the one drawn
    constrained: bool = False  # a grammar

    @staticmethod
    def of(settings: SamplingSettings, top_logprobs: int, *, constrained: bool = False) -> StepKind:
        """What one row asks."""
        truncates = settings.temperature > 0 and (settings.top_k > 0 or settings.top_p < 1 or settings.min_p > 0)
        return StepKind(truncates, settings.repetition_penalty != 1, top_logprobs > 0, constrained)

    def __or__(self, other: StepKind) -> StepKind:
        return StepKind(*(getattr(self, field.name) or getattr(other, field.name) for field in fields(self)))


class Rows:
    """State of B rows, (B, …) tensors that keep their addresses.

    Args:
        rows: B; blocks: M; steps: S; vocabulary: V.
        forbidden: ids that are never drawn.
        draw_tokens: `drawing.draw`, compiled or not.
    """

    def __init__(
        self,
        rows: int,
        blocks: int,
        steps: int,
        vocabulary: int,
        device: torch.device,
        forbidden: torch.Tensor,
        draw_tokens: Callable[..., Draw] = draw,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens, self.positions, self.lengths, self.steps = (zeros(rows) for _ in range(4))
        self.in_use = zeros(rows)  # 1, or 0 for an idle row, whose length must not grow: a step would read so many tokens
        self.table = zeros(rows, blocks)
        self.prompt_blocks = zeros(rows)  # at the front of a row's table, in common with other answers to its prompt
        self.uniform = zeros(rows, steps, dtype=torch.float64)
        self.logprobs = zeros(rows, dtype=torch.float32)
        self.settings = RowSettings.empty(rows, device)
        self.top = min(MOST_TOP_LOGPROBS, vocabulary)
        self.top_tokens, self.top_logprobs = zeros(rows, self.top), zeros(rows, self.top, dtype=torch.float32)
        self.seen: torch.Tensor | None = None  # (B, V) bool, once a row has a penalty
        self.allowed: torch.Tensor | None = None  # (B, ceil(V / 32)) int32, bits of what grammars let rows draw, once a row has one
        self.landings: list[tuple[torch.Tensor, ...]] = []  # pinned memory that flights have left: allocating it anew costs time
        self.forbidden, self.vocabulary, self.device, self.draw_tokens = forbidden, vocabulary, device, draw_tokens

    def clear(self, row: int) -> None:
        """An idle row: it goes on in the idle block, read by nobody."""
        self.lengths[row] = self.in_use[row] = 0
        self.table[row] = 0
        self.prompt_blocks[row] = 0

    def fill(
        self, row: int, prompt: np.ndarray, next_position: int, blocks: list[int], settings: SamplingSettings, uniform: np.ndarray
    ) -> None:
        """A row for an answer that goes on from a prompt.

        Args:
            prompt: (L,) token ids; next_position: where the answer goes on.
            blocks: of the whole row, prompt included.
            uniform: numbers that decide its tokens, one each, at most S.
        """
        self.settings.write(row, settings)
        # Without waiting: a step may be under way. Ordinary memory is read before the call returns.
        self.uniform[row, : len(uniform)].copy_(torch.from_numpy(uniform), non_blocking=True)
        table = torch.zeros(self.table.shape[1], dtype=torch.int64)
        table[: len(blocks)] = torch.tensor(blocks)
        self.table[row].copy_(table, non_blocking=True)
        if settings.repetition_penalty != 1:
            if self.seen is None:
                self.seen = torch.zeros(len(self.tokens), self.vocabulary, dtype=torch.bool, device=self.device)
            self.seen[row] = False
            self.seen[row, torch.from_numpy(np.unique(prompt)).to(self.device, non_blocking=True)] = True
        self.prompt_blocks[row] = len(prompt) // BLOCK_TOKENS
        self.steps[row], self.lengths[row], self.positions[row], self.in_use[row] = 1, len(prompt), next_position, 1

    def allow(self, row: int, bits: np.ndarray | None) -> None:
        """What a row may draw next.

        Args:
            bits: (ceil(V / 32),) int32; None: everything.
        """
        if self.allowed is None:
            if bits is None:
                return
            self.allowed = torch.full((len(self.tokens), len(bits)), -1, dtype=torch.int32, device=self.device)
        self.allowed[row] = -1 if bits is None else torch.from_numpy(bits).to(self.device)

    def draw_first(self, begun: list[int], logits: torch.Tensor, kind: StepKind) -> None:
        """The first tokens of rows, from what followed their prompts: (len(begun), V)."""
        index = torch.tensor(begun).to(self.device, non_blocking=True)
        seen = self.seen[index] if kind.penalises and self.seen is not None else None
        self._draw(index, logits, self.uniform[index, 0], seen, kind)

    def step(self, decoder: Decoder, count: int, kind: StepKind) -> None:
        """One more token of each of the first rows."""
        state = (self.tokens, self.positions, self.lengths, self.table, self.prompt_blocks)
        logits = decoder.step(*(values[:count] for values in state))
        seen = None
        if kind.penalises and self.seen is not None:
            seen = self.seen[:count].scatter_(1, self.tokens[:count, None], True)
        uniform = self.uniform[:count].gather(1, self.steps[:count, None].clamp(max=self.uniform.shape[1] - 1)).squeeze(1)
        self._draw(slice(count), logits, uniform, seen, kind)
        # A row that nobody reads any more stays within its blocks.
        room = (self.table.shape[1] * BLOCK_TOKENS) - 1
        self.lengths[:count] = (self.lengths[:count] + self.in_use[:count]).clamp(max=room)
        self.positions[:count] += 1
        self.steps[:count] += 1

    def _draw(
        self, where: slice | torch.Tensor, logits: torch.Tensor, uniform: torch.Tensor, seen: torch.Tensor | None, kind: StepKind
    ) -> None:
        """Writes what rows draw.

        Args:
            logits: (B, V), nobody else's; those of tokens that must not be drawn are overwritten.
        """
        settings = self.settings.of(where)
        logits.index_fill_(1, self.forbidden, -torch.inf)
        if kind.constrained and self.allowed is not None:
            logits.masked_fill_(~unpacked(self.allowed[where], self.vocabulary), -torch.inf)
        scores = scores_of(logits, settings, seen) if kind.truncates or kind.alternatives else None
        kept = kept_tokens(scores, settings) if kind.truncates and scores is not None else None
        drawn = self.draw_tokens(logits, uniform, settings, seen, kept)
        self.tokens[where], self.logprobs[where] = drawn.token, drawn.logprob
        if kind.alternatives and scores is not None:
            self.top_logprobs[where], self.top_tokens[where] = likeliest_tokens(scores, drawn, self.top)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Puts back what steps within change: capturing a step runs it for nothing."""
        names = ("tokens", "positions", "lengths", "steps", "logprobs", "top_tokens", "top_logprobs", "seen")
        kept = {name: values.clone() for name in names if (values := getattr(self, name)) is not None}
        try:
            yield
        finally:
            for name, values in kept.items():
                getattr(self, name).copy_(values)


@dataclass(frozen=True)
class Drawn:
    """What a step drew, on the host; one entry a row."""

    tokens: list[int]
    logprobs: list[float]
    top_tokens: list[list[int]] | None
    top_logprobs: list[list[float]] | None

    def alternatives(self, row: int, count: int) -> tuple[tuple[int, float], ...]:
        """(token, log-probability) of the likeliest tokens of a row."""
        if not count or self.top_tokens is None or self.top_logprobs is None:
            return ()
        return tuple(zip(self.top_tokens[row][:count], self.top_logprobs[row][:count], strict=True))


@dataclass(frozen=True, eq=False)
class Flight:
    """What a step draws, on its way to the host."""

    rows: Rows
    values: tuple[torch.Tensor, ...]
    answers: list[Any]  # whose each row was
    arrived: torch.cuda.Event | None

    @staticmethod
    def of(rows: Rows, answers: list[Any], kind: StepKind) -> Flight:
        wanted = (rows.tokens, rows.logprobs, *((rows.top_tokens, rows.top_logprobs) if kind.alternatives else ()))
        if not rows.tokens.is_cuda:
            return Flight(rows, tuple(values.clone() for values in wanted), answers, None)
        fitting = next((number for number, landing in enumerate(rows.landings) if len(landing) == len(wanted)), None)
        if fitting is None:
            copies = tuple(torch.empty(values.shape, dtype=values.dtype, pin_memory=True) for values in wanted)
        else:
            copies = rows.landings.pop(fitting)
        for copy, values in zip(copies, wanted, strict=True):
            copy.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Flight(rows, copies, answers, event)

    def wait(self) -> Drawn:
        """What was drawn, once it is there; to be called once."""
        if self.arrived is not None:
            self.arrived.synchronize()
        tokens, logprobs, *top = (values.tolist() for values in self.values)
        if self.arrived is not None:
            self.rows.landings.append(self.values)
        return Drawn(tokens, logprobs, *(top or (None, None)))
