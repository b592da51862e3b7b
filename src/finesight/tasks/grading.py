"""What a grader is: it judges one answer to one conversation, as a metric and as a reward alike."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from finesight.data.conversation import Conversation
from finesight.errors import EvaluationError
from finesight.tasks import boxes, documents
from finesight.tasks.final_answer import final_answer
from finesight.tasks.frames import FrameName, Frames


class Grader(Protocol):
    """Judges one answer: a score in [0, 1], 1 for right."""

    def __call__(self, answer: str, conversation: Conversation) -> float: ...

    def check(self, conversation: Conversation) -> None:
        """Refuses a row that has nothing to judge by.

        Raises:
            EvaluationError: what is missing, and where.
        """
        ...

    def expected(self, conversation: Conversation) -> tuple[str, ...]:
        """What counts as right, for people to read."""
        ...


@dataclass(frozen=True)
class LibraryGrader(ABC):
    """A grader of the library: a pure function, and where it finds what is right.

    Options that all have: `part`, whether the whole answer is judged, or the final one (behind `</think>`, in `<answer>` or
    `\\boxed{}`); `column`, where the row holds what is right (empty: see :func:`accepted_answers`, :func:`structured_truth`).
    """

    metric: Callable[..., float]
    description: str
    part: Literal["whole", "final"] = "whole"
    column: str = ""
    libraries: tuple[str, ...] = ()  # of the extra `graders`, as they are imported
    OWN_OPTIONS: ClassVar[tuple[str, ...]] = ("part", "column")

    def __call__(self, answer: str, conversation: Conversation) -> float:
        return float(self.score(final_answer(answer) if self.part == "final" else answer, conversation))

    @abstractmethod
    def score(self, answer: str, conversation: Conversation) -> float:
        """The score of the part of the answer that is judged."""

    def check(self, conversation: Conversation) -> None:
        self.expected(conversation)

    @abstractmethod
    def expected(self, conversation: Conversation) -> tuple[str, ...]: ...

    def require_libraries(self, name: str) -> None:
        """Refuses a grader whose libraries are not installed.

        Raises:
            EvaluationError: which are missing, and how to install them.
        """
        if missing := [library for library in self.libraries if importlib.util.find_spec(library) is None]:
            raise EvaluationError(f"Grader {name!r} needs {', '.join(missing)}, which is not installed: pip install 'finesight[graders]'.")

    def with_frames(self, frames: Frames) -> Self:
        """See :func:`seeing`."""
        return self

    def options(self) -> dict[str, Any]:
        """Every option with its value."""
        own = {name: getattr(self, name) for name in self.OWN_OPTIONS}
        parameters = inspect.signature(self.metric).parameters.values()
        return own | {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def with_options(self, options: Mapping[str, Any], *, name: str) -> Self:
        """The same grader with other values of its options.

        Raises:
            EvaluationError: there is no such option, or the value is of the wrong kind or out of range.
        """
        known = self.options()
        function = self.metric.func if isinstance(self.metric, functools.partial) else self.metric
        hints = get_type_hints(type(self), include_extras=True) | get_type_hints(function, include_extras=True)
        for key, value in options.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"It has: {', '.join(known)}."
                raise EvaluationError(f"Grader {name!r} has no option {key!r}. {hint}")
            if (wanted := _refused(value, hints[key])) is not None:
                raise EvaluationError(f"Grader {name!r}: option {key} is {value!r}; it must be {wanted}.")
        limits = {**known, **options}
        if limits.get("minimum", 0) > limits.get("maximum", math.inf):
            raise EvaluationError(
                f"Grader {name!r}: minimum {limits['minimum']} is above maximum {limits['maximum']}; no answer fits both."
            )
        own = {key: value for key, value in options.items() if key in self.OWN_OPTIONS}
        others = {key: value for key, value in options.items() if key not in own}
        return replace(self, **own, metric=functools.partial(self.metric, **others) if others else self.metric)


@dataclass(frozen=True)
class TextGrader(LibraryGrader):
    """Compares the answer with the accepted ones of the conversation."""

    def score(self, answer: str, conversation: Conversation) -> float:
        return self.metric(answer, accepted_answers(conversation, self.column))

    def expected(self, conversation: Conversation) -> tuple[str, ...]:
        return accepted_answers(conversation, self.column)


@dataclass(frozen=True)
class FormGrader(LibraryGrader):
    """Judges the form of the answer; nothing of the row is needed."""

    OWN_OPTIONS: ClassVar[tuple[str, ...]] = ("part",)

    def score(self, answer: str, conversation: Conversation) -> float:
        return self.metric(answer)

    def expected(self, conversation: Conversation) -> tuple[str, ...]:
        return () if conversation.answer is None else (conversation.answer,)


@dataclass(frozen=True)
class DocumentGrader(LibraryGrader):
    """Compares the JSON of the answer with the document of the row: a mapping, a list, or JSON as text."""

    def score(self, answer: str, conversation: Conversation) -> float:
        return self.metric(answer, self.truth(conversation))

    def truth(self, conversation: Conversation) -> Any:
        value = structured_truth(conversation, self.column)
        if isinstance(value, str):
            value = documents.find_json(value)
            if value is documents.MISSING:
                raise EvaluationError(f"{conversation.source}: its answer or ground_truth holds no JSON to compare fields with.")
        return value

    def expected(self, conversation: Conversation) -> tuple[str, ...]:
        return (_as_json(self.truth(conversation)),)


@dataclass(frozen=True)
class SchemaGrader(LibraryGrader):
    """Checks the JSON of the answer against a schema: that of the option `json_schema`, else the row's column of this name."""

    column: str = "json_schema"
    json_schema: Mapping[str, Any] = field(default_factory=dict)
    OWN_OPTIONS: ClassVar[tuple[str, ...]] = ("part", "column", "json_schema")

    def score(self, answer: str, conversation: Conversation) -> float:
        return self.metric(answer, self.schema(conversation))

    def check(self, conversation: Conversation) -> None:
        schema = self.schema(conversation)
        if self.json_schema:  # looked at with the options
            return
        try:
            documents.schema_validator(schema)
        except EvaluationError as error:
            raise EvaluationError(f"{conversation.source}: {error}") from None

    def with_options(self, options: Mapping[str, Any], *, name: str) -> Self:
        grader = super().with_options(options, name=name)
        if grader.json_schema:
            documents.schema_validator(grader.json_schema)
        return grader

    def schema(self, conversation: Conversation) -> Any:
        found = self.json_schema or conversation.extra.get(self.column)
        if isinstance(found, str):
            found = documents.find_json(found)
        if not isinstance(found, Mapping):
            raise EvaluationError(
                f"{conversation.source} has no JSON schema. Set the option json_schema, or give the rows a column {self.column!r}."
            )
        return found

    def expected(self, conversation: Conversation) -> tuple[str, ...]:
        return (_as_json(self.schema(conversation)),)


@dataclass(frozen=True)
class BoxGrader(LibraryGrader):
    """Compares the boxes of the answer with those of the row.

    Options: `boxes_in`, the frame of the row's boxes (`answer`: that of the answers, as where the same data was trained
    on); `box_format`, xyxy, or xywh (COCO).
    """

    boxes_in: FrameName = "answer"
    box_format: boxes.BoxFormat = "xyxy"
    frames: Frames | None = None  # how the model writes coordinates; needed where the two frames differ
    OWN_OPTIONS: ClassVar[tuple[str, ...]] = ("part", "column", "boxes_in", "box_format")

    def with_frames(self, frames: Frames) -> Self:
        return replace(self, frames=frames)

    def score(self, answer: str, conversation: Conversation) -> float:
        width, height = self._sides("answer", conversation)
        return self.metric([box.scaled(width, height) for box in boxes.read_boxes(answer)], self.truth(conversation))

    def truth(self, conversation: Conversation) -> list[boxes.Box]:
        """The row's boxes, as parts of the picture's sides where its frame is not that of the answers."""
        width, height = self._sides(self.boxes_in, conversation)
        return [box.scaled(width, height) for box in self._row_boxes(conversation)]

    def check(self, conversation: Conversation) -> None:
        self._row_boxes(conversation)

    def expected(self, conversation: Conversation) -> tuple[str, ...]:
        value = structured_truth(conversation, self.column)
        return (value if isinstance(value, str) else _as_json(value),)

    def _row_boxes(self, conversation: Conversation) -> list[boxes.Box]:
        """An empty list in the row means that nothing is to be found; a row without boxes is refused."""
        value = structured_truth(conversation, self.column)
        found = boxes.boxes_of(value, self.box_format)
        if not found and not (value == [] or str(value).strip() == "[]"):
            raise EvaluationError(
                f"{conversation.source}: what is right there holds no box of four numbers, such as [12, 40, 200, 310]; [] if there is none to find."
            )
        return found

    def _sides(self, frame: FrameName, conversation: Conversation) -> tuple[float, float]:
        """What coordinates are divided by; where both are in one frame they can stay as they are."""
        if self.boxes_in == "answer":
            return 1.0, 1.0
        if self.frames is None:
            raise EvaluationError(
                f"boxes_in: {self.boxes_in} can be used only where the model is known, since families write boxes in frames of their own."
            )
        return self.frames.sides(frame, conversation)


@dataclass(frozen=True)
class PointGrader(BoxGrader):
    """Compares the point of the answer with the boxes of the row."""

    def score(self, answer: str, conversation: Conversation) -> float:
        width, height = self._sides("answer", conversation)
        point = boxes.read_point(answer)
        return self.metric(None if point is None else (point[0] / width, point[1] / height), self.truth(conversation))


@dataclass(frozen=True)
class UserGrader:
    """A user's function `(answer, conversation) -> number in [0, 1]` (or true and false)."""

    name: str
    function: Callable[..., Any]
    description: str = "a function of the recipe"

    def __call__(self, answer: str, conversation: Conversation) -> float:
        try:
            score = self.function(answer, conversation)
        except Exception as error:
            raise EvaluationError(f"Grader {self.name} failed on {conversation.source}: {type(error).__name__}: {error}") from error
        try:
            value = float(score)
        except (TypeError, ValueError):
            value = math.nan
        if not 0 <= value <= 1:
            raise EvaluationError(f"Grader {self.name} gave {score!r} for {conversation.source}; it must give a number from 0 to 1.")
        return value

    def check(self, conversation: Conversation) -> None:
        """A user's function may need no answer."""

    def expected(self, conversation: Conversation) -> tuple[str, ...]:
        value = conversation.extra.get("answers", conversation.extra.get("ground_truth", conversation.answer))
        return (_as_json(value),) if isinstance(value, Mapping) else _as_texts(value)


def seeing(grader: Grader, frames: Frames) -> Grader:
    """The same grader knowing in which frame a model writes coordinates; only graders of boxes make use of it."""
    return grader.with_frames(frames) if isinstance(grader, LibraryGrader) else grader


def accepted_answers(conversation: Conversation, column: str = "") -> tuple[str, ...]:
    """Every answer that counts as right: the `answers` of the row, else its `ground_truth`, else its own answer.

    Args:
        column: the column of the row to take instead.

    Raises:
        EvaluationError: the row has none of these, or holds a mapping there.
    """
    for name in (column,) if column else ("answers", "ground_truth"):
        value = conversation.extra.get(name)
        if isinstance(value, Mapping):
            raise EvaluationError(
                f"{conversation.source}: {name} is a mapping; graders of texts cannot compare it. Take field_f1, or give a module:function grader."
            )
        if accepted := _as_texts(value):
            return accepted
    return (_own_answer(conversation, column),)


def structured_truth(conversation: Conversation, column: str = "") -> Any:
    """What is right as a value, boxes or a document: the row's `ground_truth`, else its own answer as text.

    Args:
        column: the column of the row to take instead.

    Raises:
        EvaluationError: the row has none of these.
    """
    value = conversation.extra.get(column or "ground_truth")
    return _own_answer(conversation, column) if value is None else _plain(value)


def _own_answer(conversation: Conversation, column: str) -> str:
    if column:
        has = ", ".join(conversation.extra) or "none"
        raise EvaluationError(
            f"{conversation.source} has nothing in column {column!r}, which a grader reads. Its columns for graders: {has}."
        )
    if conversation.answer is not None:
        return conversation.answer
    raise EvaluationError(f"{conversation.source} has no answer to compare with. Give an answer, `answers` or `ground_truth`.")


def _plain(value: Any) -> Any:
    """A numpy array or number, as Parquet readers give, as Python's own."""
    return value.tolist() if hasattr(value, "tolist") else value


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _as_texts(value: Any) -> tuple[str, ...]:
    value = _plain(value)
    if value is None:
        return ()
    if isinstance(value, (list, tuple)):
        return tuple(text for entry in value for text in _as_texts(entry))
    return (str(value),)


def _refused(value: Any, hint: Any) -> str | None:
    """What a value must be and is not: of the type of a hint, and in the range that it is annotated with."""
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if not _is_of_kind(value, kind):
        return _kind_in_words(kind)
    if kind is not hint:
        try:
            TypeAdapter(hint).validate_python(value)
        except ValidationError as error:
            return str(error.errors()[0]["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    return None


def _is_of_kind(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind)


def _kind_in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    names: dict[Any, str] = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    return names.get(kind, "a mapping")
