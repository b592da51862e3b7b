"""The pieces that rows of every format are made of: media values, tags in text, settings of one item, order of roles.

Everything here takes one row's values and raises :class:`DataError` with the reason alone; the caller knows file and row.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from finesight.data.conversation import MediaRef, Part, Role, Turn
from finesight.data.media import MediaPolicy
from finesight.errors import DataError

Kind = Literal["image", "video"]

ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool",
}  # fmt: skip
# Keys of a media part, or of a row, that set how its images and videos are resized and sampled.
SIZE_KEYS = ("resized_height", "resized_width", "min_pixels", "max_pixels")
RATE_KEYS = ("fps", "nframes", "num_frames")
_UNSUPPORTED_KEYS = ("video_start", "video_end", "total_pixels", "min_frames", "max_frames")
_TAG = re.compile(r"<(image|video|audio)>")


@dataclass(frozen=True)
class Slot:
    """A place in a turn for an image or video: a tag in the text, or a typed part, which may name the file itself."""

    type: Kind
    settings: Mapping[str, Any] = field(default_factory=dict)
    media: MediaRef | None = None  # None: the next one of the row's own images or videos


Pieces = tuple[Role, list[Part | Slot], bool]  # role, what the turn holds, whether it is trained on


@dataclass(frozen=True)
class Media:
    """Looks up what rows of one source name."""

    policy: MediaPolicy
    folder: Path  # of the data file

    def ref(self, value: Any, kind: Kind) -> MediaRef:
        """A path, address, data URL, bytes, Arrow image, PIL image, or (for a video) a list of frames.

        Raises:
            DataError: it is none of these, or cannot be found (:class:`MediaError`).
        """
        if isinstance(value, (str, Path)):
            return self.policy.resolve(str(value), beside=self.folder)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return MediaRef(data=bytes(value))
        if isinstance(value, Image.Image):
            return MediaRef(image=value)
        if isinstance(value, Mapping):
            return self._of_mapping(value, kind)
        if kind == "video" and isinstance(value, Sequence):
            if not value:
                raise DataError("a video is an empty list of frames")
            return MediaRef(frames=tuple(self.ref(frame, "image") for frame in value))
        raise DataError(f"the {kind} is of type {type(value).__name__}; give a path, a data URL, encoded bytes or a PIL image")

    def _of_mapping(self, value: Mapping[str, Any], kind: Kind) -> MediaRef:
        if value.get("bytes") is not None:
            return MediaRef(data=bytes(value["bytes"]))
        if value.get("base64") is not None:
            try:
                return MediaRef(data=base64.b64decode(value["base64"], validate=True))
            except (binascii.Error, ValueError, TypeError) as error:
                raise DataError(f"the base64 of the {kind} is not valid ({error})") from None
        for key in ("path", "url"):
            if value.get(key):
                return self.ref(value[key], kind)
        raise DataError(
            f"the {kind} is an object with the keys {', '.join(map(str, value)) or '(none)'}; one of bytes, path and url must be set"
        )


def item_settings(values: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Resizing and sampling settings of one image or video, as fields of :class:`Part`.

    Args:
        values: a media part, or a row; other keys are left alone.

    Raises:
        DataError: a value is out of range, two contradict each other, or a setting is not supported.
    """
    for key in _UNSUPPORTED_KEYS:
        if values.get(key) is not None:
            raise DataError(
                f"{key} is not supported on single items; cut or resize the {kind} beforehand, or use fps, nframes, min_pixels, max_pixels"
            )
    settings: dict[str, Any] = {}
    for key in SIZE_KEYS:
        if (value := values.get(key)) is not None:
            settings[key] = _whole_number(value, key)
    if ("resized_height" in settings) != ("resized_width" in settings):
        raise DataError("resized_height and resized_width must be given together")
    if settings.get("min_pixels", 0) > settings.get("max_pixels", math.inf):
        raise DataError(f"min_pixels ({settings['min_pixels']}) is larger than max_pixels ({settings['max_pixels']})")
    if kind == "video":
        counts = [values[key] for key in ("nframes", "num_frames") if values.get(key) is not None]
        if counts:
            settings["num_frames"] = _whole_number(counts[0], "nframes")
        if values.get("fps") is not None:
            settings["fps"] = number(values["fps"], "fps")
            if settings["fps"] <= 0:
                raise DataError(f"fps must be above 0, not {values['fps']!r}")
        if "fps" in settings and "num_frames" in settings:
            raise DataError("fps and nframes exclude each other; keep one")
    return settings


def number(value: Any, name: str) -> float:
    """A finite number, possibly written as text (as in CSV).

    Raises:
        DataError: it is none.
    """
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not math.isfinite(result):
        raise DataError(f"{name} must be a finite number, not {value!r}")
    return result


def weight(value: Any, column: str) -> float:
    """The weight of a sample: finite and not negative.

    Raises:
        DataError: it is not.
    """
    result = number(value, f"the weight (column {column!r})")
    if result < 0:
        raise DataError(f"the weight (column {column!r}) must not be negative, and is {value!r}")
    return result


def _whole_number(value: Any, name: str) -> int:
    result = number(value, name)
    if result != int(result) or result < 1:
        raise DataError(f"{name} must be a whole number of at least 1, not {value!r}")
    return int(result)


def split_tags(text: str, *, strip: bool) -> list[Part | Slot]:
    """Cuts text at `<image>` and `<video>` tags.

    Args:
        strip: take away white space next to a tag, as Qwen's own reader does: what a chat puts there is nothing.

    Raises:
        DataError: there is an `<audio>` tag.
    """
    pieces = _TAG.split(text)  # text, tag, text, tag, …, text
    if "audio" in pieces[1::2]:
        raise DataError("the text has an <audio> tag; audio is not supported by these models")
    found: list[Part | Slot] = []
    for place, piece in enumerate(pieces):
        if place % 2:
            found.append(Slot("image" if piece == "image" else "video"))
            continue
        if strip and len(pieces) > 1:
            piece = piece.strip()
        if piece:
            found.append(Part("text", text=piece))
    return found


def fill_slots(
    turns: Sequence[Pieces], row_media: Mapping[Kind, Sequence[MediaRef]], row: Mapping[str, Any], *, first_if_no_slots: bool
) -> list[Turn]:
    """Puts the images and videos of a row into their places, in order.

    Args:
        row: its resizing and sampling settings hold for all its media; a part's own go before them.
        first_if_no_slots: where the messages have no place for them, they go first in the first user turn; otherwise
            that is a mismatch.

    Raises:
        DataError: there are more or fewer places than images or videos.
    """
    lead: list[Slot] = []
    queues: dict[str, list[MediaRef]] = {}
    shared: dict[str, dict[str, Any]] = {}
    for kind, given in row_media.items():
        slots = [piece for _, pieces, _ in turns for piece in pieces if isinstance(piece, Slot) and piece.type == kind]
        open_slots = sum(slot.media is None for slot in slots)
        if given and not slots and first_if_no_slots:
            lead += [Slot(kind, media=ref) for ref in given]
        elif open_slots != len(given):
            named = len(slots) - open_slots
            raise DataError(
                f"the messages have {open_slots} place(s) for {kind}s (<{kind}> tags), the row has {len(given)} {kind}(s)"
                + (f" besides {named} that the messages name themselves" if named else "")
                + "; give one for each tag, in order"
            )
        queues[kind] = list(given)[::-1]
        shared[kind] = item_settings(row, kind) if slots or given else {}
    filled = []
    for role, pieces, train in turns:
        own_lead, lead = (lead, []) if role == "user" else ([], lead)
        parts = [
            _media_part(piece, queues[piece.type], shared[piece.type]) if isinstance(piece, Slot) else piece
            for piece in (*own_lead, *pieces)
        ]
        filled.append(Turn(role, tuple(_joined(parts)), train))
    if lead:
        raise DataError("the row has images or videos, but no user turn to put them into")
    return filled


def _media_part(slot: Slot, queue: list[MediaRef], shared: Mapping[str, Any]) -> Part:
    settings = {**shared, **slot.settings}
    if "fps" in settings and "num_frames" in settings:  # of the part, and of the row: the part's own counts
        settings.pop("num_frames" if "fps" in slot.settings else "fps")
    return Part(slot.type, media=slot.media or queue.pop(), **settings)


def _joined(parts: Iterable[Part]) -> list[Part]:
    """Neighbouring texts as one, so that the same words are the same parts."""
    joined: list[Part] = []
    for part in parts:
        if part.type == "text" and not part.text:
            continue
        if part.type == "text" and joined and joined[-1].type == "text":
            joined[-1] = replace(joined[-1], text=joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined


def check_turns(turns: Sequence[Turn], *, require_answer: bool) -> None:
    """Holds a conversation to: an optional system turn, then user and assistant in turns (tool results in between).

    Raises:
        DataError: roles are out of order, a turn is empty, or the answer is missing.
    """
    body = turns[1:] if turns and turns[0].role == "system" else turns
    if not body:
        raise DataError("there is no user turn")
    before: Role | None = None
    for place, turn in enumerate(body):
        if turn.role == "system":
            raise DataError(f"turn {place + 1} is a system turn; only the first may be")
        if before is None and turn.role != "user":
            raise DataError(
                f"the conversation begins with {_a(turn.role)} turn; it must begin with the user (after the system turn, if there is one)"
            )
        if turn.role == before and turn.role != "tool":
            raise DataError(f"two {turn.role} turns follow each other; join them, or put what lies between")
        if turn.role == "tool" and before == "user":
            raise DataError("a tool turn follows a user turn; it must follow the assistant's call")
        if turn.role == "user" and before == "tool":
            raise DataError("a user turn follows a tool turn; the assistant's answer is missing")
        if turn.role == "assistant":
            if any(part.type != "text" for part in turn.parts):
                raise DataError("an assistant turn holds an image or video; these models answer in text only")
            if not turn.text.strip():
                raise DataError("empty answer: an assistant turn has no text")
        elif not any(part.type != "text" or part.text.strip() for part in turn.parts):
            raise DataError(f"{_a(turn.role)} turn is empty")
        before = turn.role
    if require_answer and before != "assistant":
        raise DataError("there is no answer to train on: the last turn is not the assistant's (prompt-only rows are for reinforcement)")


def _a(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"
