"""The currency before tokens: what a row of data means, whatever format it came in.

Nothing here is opened or decoded. A :class:`MediaRef` says where an image or video is; `media.py` opens it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class RowSource:
    """Where a row came from, for messages to people."""

    file: str
    row: int  # counted from 0

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


@dataclass(frozen=True, eq=False)
class MediaRef:
    """Where an image or video is. Exactly one of the fields is set.

    `path` is already resolved and allowed; `url` only exists when the user allowed fetching; `data` holds encoded
    bytes (a data URL, an Arrow image column); `image` an already decoded PIL image; `frames` the frames of a video
    given one by one.
    """

    path: str | None = None
    url: str | None = None
    data: bytes | None = None
    image: Any = None  # PIL.Image.Image
    frames: tuple[MediaRef, ...] | None = None


@dataclass(frozen=True)
class Part:
    """One piece of a turn: text, an image or a video.

    Per-item settings, where given, go before those of the recipe. `fps` and `num_frames` exclude each other.
    """

    type: Literal["text", "image", "video"]
    text: str = ""  # only for type "text"
    media: MediaRef | None = None  # only for images and videos
    resized_height: int | None = None
    resized_width: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None  # for a video to be sampled: frames a second; for given frames: their rate
    num_frames: int | None = None


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Role
    parts: tuple[Part, ...]
    train: bool = True  # an assistant turn with train=False is context only

    @property
    def text(self) -> str:
        """The text parts joined, media left out."""
        return "".join(part.text for part in self.parts if part.type == "text")


@dataclass(frozen=True)
class Conversation:
    """One row of data. `extra` holds the columns that graders and rewards read (`ground_truth`, `answers`, …)."""

    turns: tuple[Turn, ...]
    source: RowSource
    weight: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def media(self) -> tuple[Part, ...]:
        """Every image and video part, in reading order."""
        return tuple(part for turn in self.turns for part in turn.parts if part.type != "text")

    def prompt(self) -> Conversation:
        """What a model is asked: the conversation without the answer that it ends with, if it ends with one."""
        return replace(self, turns=self.turns[:-1]) if self._answered else self

    @property
    def answer(self) -> str | None:
        """The text of the answer that the conversation ends with, or None for a prompt-only row."""
        return self.turns[-1].text if self._answered else None

    @property
    def _answered(self) -> bool:
        return bool(self.turns) and self.turns[-1].role == "assistant"
