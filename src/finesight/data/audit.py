"""What `finesight check` says of a dataset: what it holds, what is wrong with it, and what training on it will cost.

:func:`audit` computes the figures, :meth:`DatasetAudit.to_dict` gives them as JSON, `audit_view.py` shows them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from finesight.data.audit_settings import AuditSettings
from finesight.data.conversation import Conversation, MediaRef, RowSource
from finesight.data.group_cost import GroupCostFigures, group_cost
from finesight.data.media import describe, image_size, media_key, video_info
from finesight.data.sample import Sample
from finesight.data.steps import compose_steps, leading_media, plan_packs
from finesight.errors import BadRow

if TYPE_CHECKING:
    from rich.console import Console

READABLE_SCALE = 0.5  # below this share of its side, small print in an image is usually lost
VERY_SHORT_CHARACTERS = 1
_MOST_STEPS_PLANNED = 1000  # enough for a share to within a percent; planning takes some ms a step
_COMMON_ANSWERS = 5


@dataclass(frozen=True)
class Distribution:
    """A summary of numbers; all zero where there are none."""

    count: int
    total: float
    min: float
    median: float
    p95: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution:
        array = np.asarray(list(values), dtype=np.float64)
        if not len(array):
            return cls(0, 0, 0, 0, 0, 0)
        median, p95 = np.percentile(array, [50, 95])
        return cls(len(array), float(array.sum()), float(array.min()), float(median), float(p95), float(array.max()))

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True)
class BadRowGroup:
    """Bad rows of one kind of reason."""

    reason: str  # of the first one
    rows: tuple[BadRow, ...]


@dataclass(frozen=True)
class RowFigures:
    rows: int  # bad ones included
    usable: int
    formats: Mapping[str, str]  # of each file
    roles: Mapping[str, int]  # turns of each role
    turns: Distribution  # of a row
    text_only: int
    prompt_only: int
    zero_weight: int
    bad: tuple[BadRowGroup, ...]  # most frequent first


@dataclass(frozen=True)
class MediaFigures:
    """Of images or of videos."""

    count: int
    distinct: int  # by content
    width: Distribution  # pixels, of distinct ones
    height: Distribution
    rows_of_one: Distribution  # rows in which one image appears
    rows_sharing: int  # rows with an image that another row has as well
    frames: Distribution  # of a video


@dataclass(frozen=True)
class TooLong:
    source: RowSource
    tokens: int


@dataclass(frozen=True)
class TokenFigures:
    samples: int
    tokens: Distribution  # of a sample
    text: Distribution
    visual: Distribution
    trained: Distribution
    histogram: tuple[tuple[int, int], ...]  # (upper bound, samples up to it and above the one before)
    longest_allowed: int
    too_long: tuple[TooLong, ...]


@dataclass(frozen=True)
class CostFigures:
    """Tokens of one epoch under different ways to batch; of `steps` of its `steps_per_epoch` steps where there are many."""

    steps_per_epoch: int
    steps: int
    samples: int
    tokens: int  # each sample by itself, without padding
    shared_tokens: int  # as they are computed: packed, what samples of a step share once
    padded_tokens: int  # batches of train_batch_size drawn at random and padded to the longest, as is usual elsewhere
    packs: int

    @property
    def saved_by_sharing(self) -> float:
        """Share of the tokens that need not be computed because samples share them."""
        return 1 - self.shared_tokens / self.tokens if self.tokens else 0.0

    @property
    def padding(self) -> float:
        """Share of a usual padded batch that would be padding."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def times_fewer(self) -> float:
        """How many times fewer tokens are computed than in padded batches."""
        return self.padded_tokens / self.shared_tokens if self.shared_tokens else 1.0


@dataclass(frozen=True)
class DuplicateGroup:
    """Rows with the same images and the same question (everything before the last answer)."""

    rows: tuple[RowSource, ...]
    question: str
    answers: tuple[str, ...]  # distinct ones


@dataclass(frozen=True)
class AnswerFigures:
    characters: Distribution
    empty: tuple[RowSource, ...]
    very_short: tuple[RowSource, ...]  # a single character; right for counting, suspect for descriptions
    common: tuple[tuple[str, int], ...]  # the most frequent answers and how often


@dataclass(frozen=True)
class Leak:
    """An image or video that stands in the training rows and in the held-out rows."""

    media: str
    train: tuple[RowSource, ...]
    held_out: tuple[RowSource, ...]


@dataclass(frozen=True)
class Shrunk:
    """An image that is made much smaller before the model sees it. Sizes are (width, height) in pixels."""

    source: RowSource
    media: str
    size: tuple[int, int]
    resized: tuple[int, int]
    scale: float  # of a side


@dataclass(frozen=True)
class DatasetAudit:
    """All figures. `tokens`, `cost`, `group_cost` and `shrunk` need encoded samples and are None or empty without them.

    `cost` is of supervised training, `group_cost` of reinforcement.
    """

    rows: RowFigures
    images: MediaFigures
    videos: MediaFigures
    answers: AnswerFigures
    repeated: tuple[DuplicateGroup, ...]  # same question, same answer
    contradictions: tuple[DuplicateGroup, ...]  # same question, different answers
    held_out: int  # rows
    leaks: tuple[Leak, ...]
    tokens: TokenFigures | None = None
    cost: CostFigures | None = None
    group_cost: GroupCostFigures | None = None
    shrunk: tuple[Shrunk, ...] = ()
    settings: AuditSettings = field(default_factory=AuditSettings)

    @property
    def can_train(self) -> bool:
        """Whether training with these settings would start at all as far as the data go."""
        blocked = bool(self.rows.bad) and self.settings.on_bad_row == "stop"
        return self.rows.usable > 0 and not blocked and not (self.tokens is not None and self.tokens.too_long)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it, derived figures included."""
        result = dataclasses.asdict(self)
        result["can_train"] = self.can_train
        if self.cost is not None:
            result["cost"] |= {name: getattr(self.cost, name) for name in ("saved_by_sharing", "padding", "times_fewer")}
        return result

    def render(self, console: Console) -> None:
        """Shows the figures on a terminal."""
        from finesight.data.audit_view import show

        show(self, console)


def audit(
    conversations: Sequence[Conversation],
    samples: Sequence[Sample] | None = None,
    bad_rows: Sequence[BadRow] = (),
    settings: AuditSettings | None = None,
    *,
    held_out: Sequence[Conversation] = (),
    formats: Mapping[str, str] | None = None,
) -> DatasetAudit:
    """Looks through a dataset. Opens image headers and hashes files; decodes no pixels.

    Args:
        conversations: the rows to train on.
        samples: the same rows encoded, for figures in tokens.
        held_out: rows to evaluate on.
        formats: of each file, the format that it was read as.

    Raises:
        MediaError: an image or video is no longer there.
    """
    settings = settings or AuditSettings()
    keys = _MediaKeys()
    repeated, contradictions = _duplicates(conversations, keys)
    return DatasetAudit(
        rows=_row_figures(conversations, bad_rows, formats or {}),
        images=_media_figures(conversations, "image", keys),
        videos=_media_figures(conversations, "video", keys),
        answers=_answer_figures(conversations),
        repeated=repeated,
        contradictions=contradictions,
        held_out=len(held_out),
        leaks=_leaks(conversations, held_out, keys),
        tokens=None if samples is None else _token_figures(samples, settings),
        cost=_cost_figures(samples, settings) if samples and settings.supervised else None,
        group_cost=group_cost(samples, settings, settings.groups) if samples and settings.groups is not None else None,
        shrunk=_shrunk(samples or ()),
        settings=settings,
    )


class _MediaKeys:
    """Content keys, each reference hashed once, with one reference kept for each key."""

    def __init__(self) -> None:
        self._keys: dict[MediaRef, str] = {}
        self.first: dict[str, MediaRef] = {}

    def of(self, ref: MediaRef) -> str:
        if ref not in self._keys:
            self._keys[ref] = media_key(ref)
            self.first.setdefault(self._keys[ref], ref)
        return self._keys[ref]


def _row_figures(conversations: Sequence[Conversation], bad_rows: Sequence[BadRow], formats: Mapping[str, str]) -> RowFigures:
    groups: dict[str, list[BadRow]] = {}
    for bad in bad_rows:
        # Reasons differ in names and numbers; what remains is their kind.
        kind = re.sub(r"'[^']*'|\"[^\"]*\"|\S*[/\\]\S+|\d+", "…", bad.reason)
        groups.setdefault(kind, []).append(bad)
    roles = Counter[str](turn.role for conversation in conversations for turn in conversation.turns)
    return RowFigures(
        rows=len(conversations) + len(bad_rows),
        usable=len(conversations),
        formats=dict(formats),
        roles=dict(roles),
        turns=Distribution.of(len(conversation.turns) for conversation in conversations),
        text_only=sum(not conversation.media for conversation in conversations),
        prompt_only=sum(conversation.answer is None for conversation in conversations),
        zero_weight=sum(conversation.weight == 0 for conversation in conversations),
        bad=tuple(BadRowGroup(rows[0].reason, tuple(rows)) for rows in sorted(groups.values(), key=len, reverse=True)),
    )


def _media_figures(conversations: Sequence[Conversation], kind: str, keys: _MediaKeys) -> MediaFigures:
    count, rows_with, sharing = 0, Counter[str](), 0
    per_row: list[set[str]] = []
    for conversation in conversations:
        found = [keys.of(part.media) for part in conversation.media if part.type == kind and part.media is not None]
        count += len(found)
        per_row.append(set(found))
        rows_with.update(per_row[-1])
    sharing = sum(any(rows_with[key] > 1 for key in found) for found in per_row)
    if kind == "video":
        infos = [video_info(keys.first[key]) for key in rows_with]
        sizes, frames = [(info.width, info.height) for info in infos], [info.num_frames for info in infos]
    else:
        sizes, frames = [image_size(keys.first[key]) for key in rows_with], []
    return MediaFigures(
        count, len(rows_with), Distribution.of(w for w, _ in sizes), Distribution.of(h for _, h in sizes), Distribution.of(rows_with.values()),
        sharing, Distribution.of(frames),
    )  # fmt: skip


def _answer_figures(conversations: Sequence[Conversation]) -> AnswerFigures:
    answers = [(conversation.answer.strip(), conversation.source) for conversation in conversations if conversation.answer is not None]
    common = Counter(text for text, _ in answers).most_common(_COMMON_ANSWERS)
    return AnswerFigures(
        characters=Distribution.of(len(text) for text, _ in answers),
        empty=tuple(source for text, source in answers if not text),
        very_short=tuple(source for text, source in answers if 0 < len(text) <= VERY_SHORT_CHARACTERS),
        common=tuple((text, number) for text, number in common if number > 1),
    )


def _duplicates(conversations: Sequence[Conversation], keys: _MediaKeys) -> tuple[tuple[DuplicateGroup, ...], tuple[DuplicateGroup, ...]]:
    """(same question and answer, same question but different answers)."""
    groups: dict[Hashable, list[Conversation]] = {}
    for conversation in conversations:
        if conversation.answer is None:
            continue
        question = tuple(
            (turn.role, *(part.text.strip() if part.media is None else keys.of(part.media) for part in turn.parts))
            for turn in conversation.prompt().turns
        )
        groups.setdefault(question, []).append(conversation)
    repeated: list[DuplicateGroup] = []
    contradictions: list[DuplicateGroup] = []
    for members in groups.values():
        if len(members) < 2:
            continue
        answers = tuple(dict.fromkeys((c.answer or "").strip() for c in members))
        asked = next((turn.text.strip() for turn in reversed(members[0].prompt().turns) if turn.role == "user"), "")
        group = DuplicateGroup(tuple(c.source for c in members), asked, answers)
        (repeated if len(answers) == 1 else contradictions).append(group)
    return tuple(repeated), tuple(contradictions)


def _leaks(train: Sequence[Conversation], held_out: Sequence[Conversation], keys: _MediaKeys) -> tuple[Leak, ...]:
    if not held_out:
        return ()
    sides: list[dict[str, dict[RowSource, None]]] = []
    for side in (train, held_out):
        rows_of: dict[str, dict[RowSource, None]] = {}
        for conversation in side:
            for part in conversation.media:
                if part.media is not None:
                    rows_of.setdefault(keys.of(part.media), {})[conversation.source] = None
        sides.append(rows_of)
    return tuple(Leak(describe(keys.first[key]), tuple(rows), tuple(sides[1][key])) for key, rows in sides[0].items() if key in sides[1])


def _token_figures(samples: Sequence[Sample], settings: AuditSettings) -> TokenFigures:
    lengths = [len(sample) for sample in samples]
    visual = [sum(count for item in sample.visual_items for _, count in item.runs) for sample in samples]
    return TokenFigures(
        samples=len(samples),
        tokens=Distribution.of(lengths),
        text=Distribution.of(a - b for a, b in zip(lengths, visual, strict=True)),
        visual=Distribution.of(visual),
        trained=Distribution.of(int(sample.trained.sum()) for sample in samples),
        histogram=_histogram(lengths),
        longest_allowed=settings.longest,
        too_long=tuple(TooLong(sample.source, len(sample)) for sample in samples if len(sample) > settings.longest),
    )


def _histogram(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Counts between powers of two, from the first that is not empty to the last."""
    counts = Counter(max(0, math.ceil(math.log2(length))) for length in lengths if length > 0)
    if not counts:
        return ()
    return tuple((2**power, counts[power]) for power in range(min(counts), max(counts) + 1))


def _cost_figures(samples: Sequence[Sample], settings: AuditSettings) -> CostFigures:
    """Plans the first epoch as the feed will, and padded batches beside it."""
    order: dict[str, Any] = {"batch_size": settings.train_batch_size, "seed": settings.seed, "epoch": 0}
    groups = [leading_media(sample) for sample in samples]
    all_steps = compose_steps(groups, shuffle=settings.shuffle, **order)
    planned = [all_steps[i] for i in np.unique(np.linspace(0, len(all_steps) - 1, min(len(all_steps), _MOST_STEPS_PLANNED)).astype(int))]
    shared = packs = tokens = 0
    for step in planned:
        plans, _ = plan_packs([samples[i] for i in step], token_budget=settings.token_budget, share=settings.share)
        shared += sum(plan.num_tokens for plan in plans)
        tokens += sum(plan.unshared_tokens for plan in plans)
        packs += len(plans)
    num_samples = sum(map(len, planned))
    lengths = np.array([len(sample) for sample in samples])
    random_steps = compose_steps([None] * len(samples), shuffle=settings.shuffle, **order)
    padded = sum(len(step) * int(lengths[step].max()) for step in random_steps) * tokens / int(lengths.sum())
    return CostFigures(len(all_steps), len(planned), num_samples, tokens, shared, round(padded), packs)


def _shrunk(samples: Iterable[Sample]) -> tuple[Shrunk, ...]:
    """Distinct images whose sides shrink below what stays readable, the worst first."""
    found: dict[str, Shrunk] = {}
    for sample in samples:
        for item in sample.visual_items:
            if item.kind != "image" or item.key in found or item.part.media is None:
                continue
            width, height = image_size(item.part.media)
            scale = math.sqrt(item.resized_height * item.resized_width / (height * width))
            if scale < READABLE_SCALE:
                resized = (item.resized_width, item.resized_height)
                found[item.key] = Shrunk(sample.source, describe(item.part.media), (width, height), resized, scale)
    return tuple(sorted(found.values(), key=lambda shrunk: shrunk.scale))
