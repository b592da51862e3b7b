"""What rewards are called with and what comes of it. Plain values; no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, Literal, overload

from finesight.data.conversation import Conversation, Part, RowSource
from finesight.errors import RecipeError
from finesight.tasks.grading import Grader

Message = dict[str, Any]  # {"role": …, "content": text or a list of parts}, as TRL has them


class LazyImages(Sequence[list[Any]]):
    """The pictures of each completion's prompt (PIL), opened when a reward asks for them, and once for a group."""

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self._conversations = conversations
        self._opened: dict[int, list[Any]] = {}

    def __len__(self) -> int:
        return len(self._conversations)

    @overload
    def __getitem__(self, index: int) -> list[Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Any]]: ...
    def __getitem__(self, index: int | slice) -> list[Any] | list[list[Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        conversation = self._conversations[index]
        if id(conversation) not in self._opened:
            from finesight.data.media import open_image

            media = [part.media for part in conversation.prompt().media if part.type == "image" and part.media is not None]
            self._opened[id(conversation)] = [open_image(ref) for ref in media]
        return list(self._opened[id(conversation)])

    def __iter__(self) -> Iterator[list[Any]]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, eq=False)
class RewardCall:
    """The completions of a step, B of them, and what their rows say."""

    conversations: tuple[Conversation, ...]  # (B,) the row of each completion; one and the same within a group
    texts: tuple[str, ...]  # (B,) completions without special tokens
    completion_ids: tuple[tuple[int, ...], ...]  # (B,) as sampled
    group: tuple[int, ...]  # (B,) completions of one prompt share a number
    step: int = 0  # optimizer steps done
    max_steps: int | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.conversations), len(self.texts), len(self.completion_ids), len(self.group)}
        if len(lengths) != 1:
            raise RecipeError(f"Rewards need as many rows, texts, token lists and groups as there are completions, not {sorted(lengths)}.")

    def __len__(self) -> int:
        return len(self.texts)

    def only(self, index: int) -> RewardCall:
        """The call for one completion alone."""
        return RewardCall(
            self.conversations[index : index + 1],
            self.texts[index : index + 1],
            self.completion_ids[index : index + 1],
            self.group[index : index + 1],
            self.step,
            self.max_steps,
        )

    def keywords(self) -> dict[str, Any]:
        """Everything that a reward function can ask for, by name: what TRL gives, and every column of the rows.

        `prompts` and `completions` are conversations (`completion[0]["content"]` is the text), `images` the pictures of each
        prompt; a column that a row lacks is None there. `answer` is the row's own answer, unless a column is called so.
        """
        columns: dict[str, Any] = {name: [] for conversation in self.conversations for name in conversation.extra}
        for name in columns:
            columns[name] = [conversation.extra.get(name) for conversation in self.conversations]
        given = {
            "prompts": [prompt_messages(conversation) for conversation in self.conversations],
            "completions": [[{"role": "assistant", "content": text}] for text in self.texts],
            "completion_ids": [list(ids) for ids in self.completion_ids],
        }
        return {"images": LazyImages(self.conversations), "answer": [c.answer for c in self.conversations], **columns, **given}


def prompt_messages(conversation: Conversation) -> list[Message]:
    """A prompt as TRL gives it: the content of a turn is its text, or a list of parts where pictures are among them."""

    def content(parts: tuple[Part, ...]) -> str | list[dict[str, str]]:
        if all(part.type == "text" for part in parts):
            return "".join(part.text for part in parts)
        return [{"type": "text", "text": part.text} if part.type == "text" else {"type": part.type} for part in parts]

    return [{"role": turn.role, "content": content(turn.parts)} for turn in conversation.prompt().turns]


@dataclass(frozen=True, eq=False)
class Reward:
    """One reward, ready to be called: a grader, or a function in TRL's shape."""

    name: str
    weight: float
    timeout_s: float
    grader: Grader | None = None
    function: Callable[..., Any] | None = None
    takes: tuple[str, ...] = ()  # keywords that the function must have
    may_take: tuple[str, ...] | None = ()  # further keywords that it has a default for; None: all (`**kwargs`)
    is_async: bool = False

    @property
    def label(self) -> str:
        """A short name for figures: of code of the user the function's, or the file's where it stands for its one function."""
        place, colon, function = self.name.rpartition(":")
        if colon and place:
            return function
        return PurePath(self.name).stem if self.name.endswith(".py") else self.name

    @property
    def ceiling(self) -> float | None:
        """The largest value that it can give, where that is known."""
        return None if self.grader is None else 1.0


@dataclass(frozen=True)
class RewardFailure:
    """A reward that a completion did not get because something went wrong. It counts as not applicable."""

    reward: str
    index: int  # of the completion in the call
    source: RowSource
    kind: Literal["error", "timeout", "value"]  # value: it gave something that is no reward
    message: str

    def __str__(self) -> str:
        return f"{self.reward}, {self.source}: {self.message}"


@dataclass(frozen=True)
class RewardStatistics:
    """One reward over the completions of a call; figures of values are nan where there are none."""

    count: int  # completions that got it
    failed: int
    mean: float
    spread: float  # standard deviation (n - 1); 0 of a single value
    minimum: float
    maximum: float
    saturation: float  # share of values at the ceiling: the largest possible value, or the largest one met so far
    constant_groups: float  # share of groups (with two values or more) whose values are all the same: they teach nothing
    seconds: float = 0.0


@dataclass(frozen=True)
class RewardTally:
    """How many of the completions that a reward was asked for it gave a number, and for how many it failed; the rest were None."""

    asked: int = 0
    given: int = 0
    failed: int = 0

    def __add__(self, other: RewardTally) -> RewardTally:
        return RewardTally(self.asked + other.asked, self.given + other.given, self.failed + other.failed)

    @property
    def always_failed(self) -> bool:
        """Whether it failed and gave no number at all."""
        return self.failed > 0 and not self.given


@dataclass(frozen=True)
class Earned:
    """What rewards gave for some completions, B of them."""

    count: int  # B
    values: Mapping[str, list[float | None]]  # by reward, (B,); None: not applicable, or failed
    failures: tuple[RewardFailure, ...]
    seconds: Mapping[str, float]  # by reward
    metrics: Mapping[str, list[float]] = field(default_factory=dict)  # what functions logged with log_metric
    extra: Mapping[str, list[Any]] = field(default_factory=dict)  # columns that functions logged with log_extra, (B,)

    @staticmethod
    def joined(parts: Sequence[Earned]) -> Earned:
        """One after the other, as if it had been one call; seconds are those of the slowest."""
        places = [sum(part.count for part in parts[:number]) for number in range(len(parts))]
        return Earned(
            count=sum(part.count for part in parts),
            values={name: [value for part in parts for value in part.values[name]] for name in parts[0].values},
            failures=tuple(
                replace(failure, index=failure.index + place)
                for part, place in zip(parts, places, strict=True)
                for failure in part.failures
            ),
            seconds={name: max(part.seconds[name] for part in parts) for name in parts[0].seconds},
            metrics={
                name: [value for part in parts for value in part.metrics.get(name, [])]
                for name in dict.fromkeys(name for part in parts for name in part.metrics)
            },
            extra={
                name: [value for part in parts for value in part.extra.get(name, [None] * part.count)]
                for name in dict.fromkeys(name for part in parts for name in part.extra)
            },
        )


@dataclass(frozen=True)
class RewardResult:
    """What the rewards of a step are."""

    values: Mapping[str, tuple[float | None, ...]]  # by reward, (B,); None: not applicable, or failed
    totals: tuple[float | None, ...]  # (B,) weighted sum of those that apply; None where none does
    failures: tuple[RewardFailure, ...]
    statistics: Mapping[str, RewardStatistics]
    total_statistics: RewardStatistics
    metrics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # what functions logged with log_metric
    extra: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # columns that functions logged with log_extra, (B,)

    @property
    def tallies(self) -> dict[str, RewardTally]:
        """By reward."""
        return {name: RewardTally(len(self.totals), found.count, found.failed) for name, found in self.statistics.items()}
