"""What the decoding engine is asked, and what it keeps of each request while it answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from finesight.data.sample import Sample
from finesight.errors import FinesightError
from finesight.models.decoding import BLOCK_TOKENS
from finesight.sampling.grammar import Constraint, Grammar
from finesight.sampling.rows import Rows, StepKind
from finesight.sampling.text import TextStream
from finesight.sampling.types import Completion, SamplingSettings


def blocks_for(tokens: int) -> int:
    """Blocks of the pool that so many tokens take."""
    return -(-tokens // BLOCK_TOKENS)


@dataclass(frozen=True)
class Token:
    """One token of an answer as it is drawn."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and their log-probabilities, as many as asked for


@dataclass(eq=False)
class Request:
    """A prompt, and the answers to it that are asked for. Belongs to one engine from `submit` on.

    `on_token` and `on_end` are called from within `DecodingEngine.step` with the number of the answer; the token that ends
    a turn is handed on too. `on_error` is called once if there will be no more answers; without it the error leaves `step`. None of
    them must call the engine.
    """

    sample: Sample
    settings: SamplingSettings
    adapter: str | None = None  # which lane; None: the base, or the model as it is where adapters are not switched
    place: int = 0  # decides the draws, together with the seed
    top_logprobs: int = 0
    grammar: Grammar | None = None  # that each answer follows
    on_token: Callable[[int, Token], None] | None = None
    on_end: Callable[[int, Completion], None] | None = None
    on_error: Callable[[FinesightError], None] | None = None
    arrival: int = field(default=-1, init=False)
    waiting: deque[int] = field(default_factory=deque, init=False)  # numbers of answers not begun
    blocks: list[int] = field(default_factory=list, init=False)  # of the prompt, held until the last answer has begun
    logits: torch.Tensor | None = field(default=None, init=False)  # (V,) after its last token

    @property
    def own_blocks(self) -> int:
        """Blocks of one answer alone: what of the prompt fills no block, and room for its longest form."""
        return blocks_for(len(self.sample) + self.settings.max_completion_length) - len(self.sample) // BLOCK_TOKENS


@dataclass(eq=False)
class Answer:
    """One answer being drawn."""

    request: Request
    number: int
    blocks: list[int]
    kind: StepKind
    stream: TextStream | None  # where stop texts are watched for
    constraint: Constraint | None = None  # where the request has a grammar
    text: str = ""  # of the stream
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Lane:
    """Requests for one adapter."""

    adapter: str | None
    rows: Rows
    answers: list[Answer | None]
    waiting: deque[Request] = field(default_factory=deque)
    begun: deque[Request] = field(default_factory=deque)  # prefilled, with answers that have found no row yet

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.begun) or any(self.answers)

    @property
    def constrained(self) -> bool:
        """Whether what an answer may draw next depends on what it drew last."""
        return any(answer is not None and answer.constraint is not None for answer in self.answers)

    def free_row(self) -> int | None:
        return next((row for row, answer in enumerate(self.answers) if answer is None), None)


@dataclass(frozen=True)
class EngineSize:
    """What an engine has room for."""

    rows: int  # answers side by side, in each lane
    length_tokens: int  # longest prompt and answer together
    completion_tokens: int  # longest answer
    blocks: int  # of keys and values, the idle one included


def asked_of(answers: Sequence[Answer]) -> StepKind:
    """What answers ask of a step together."""
    kind = StepKind()
    for answer in answers:
        kind = kind | answer.kind
    return kind
