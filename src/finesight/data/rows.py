"""One row of a known format -> Conversation. Formats:

- `messages`: OpenAI-style chat, with typed parts or strings; also TRL's `images` column and LLaMA-Factory's v1 parts;
- `llamafactory`: `messages` whose strings hold `<image>` tags, filled from an `images` column;
- `prompt_completion`: TRL's `prompt` and `completion`, each a string or messages;
- `conversations`: LLaVA's and Qwen's own `from`/`value` turns with `<image>` tags;
- `qwen_inline`: the same, with `<|vision_start|>path<|vision_end|>` in the text.

Tables (`columns:`) are in `columns.py`. Functions raise :class:`DataError` with the reason alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from finesight.data.conversation import Conversation, MediaRef, Part, Role, RowSource, Turn
from finesight.data.media import VIDEO_SUFFIXES
from finesight.data.row_parts import (
    RATE_KEYS,
    ROLES,
    SIZE_KEYS,
    Kind,
    Media,
    Pieces,
    Slot,
    check_turns,
    fill_slots,
    item_settings,
    number,
    split_tags,
    weight,
)  # fmt: skip
from finesight.data.tables import Row
from finesight.errors import DataError

MEDIA_COLUMNS: dict[Kind, tuple[str, ...]] = {"image": ("images", "image"), "video": ("videos", "video")}
_AUDIO_COLUMNS = ("audios", "audio")
_TEXT_TYPES = ("text", "input_text", "output_text")
_MEDIA_TYPES: dict[str, Kind] = {
    "image": "image", "image_url": "image", "input_image": "image", "video": "video", "video_url": "video", "input_video": "video",
}  # fmt: skip
_INLINE = re.compile(r"<\|vision_start\|>(.*?)<\|vision_end\|>", re.DOTALL)
_PLACEHOLDERS: dict[str, Kind] = {"<|image_pad|>": "image", "<|video_pad|>": "video"}


@dataclass(frozen=True)
class RowReader:
    """What is the same for all rows of a source."""

    media: Media
    system: str | None = None  # for rows that have none
    weight_column: str | None = None
    require_answer: bool = True

    def finish(self, turns: Sequence[Pieces], row: Row, source: RowSource, *, used: Sequence[str], first_if_no_slots: bool) -> Conversation:
        """Fills images in, checks the order of roles, and keeps the remaining columns for graders."""
        media = {kind: media_column(row, MEDIA_COLUMNS[kind], kind, self.media) for kind in MEDIA_COLUMNS}
        filled = fill_slots(turns, media, row, first_if_no_slots=first_if_no_slots)
        taken = {*used, *MEDIA_COLUMNS["image"], *MEDIA_COLUMNS["video"], *SIZE_KEYS, *RATE_KEYS, self.weight_column}
        extra = {key: value for key, value in row.items() if key not in taken and value is not None}
        return self.conversation(filled, row, source, extra)

    def conversation(self, turns: Sequence[Turn], row: Row, source: RowSource, extra: Mapping[str, Any]) -> Conversation:
        """Adds the system prompt and the weight, and checks the whole."""
        turns = list(turns)
        if self.system and (not turns or turns[0].role != "system"):
            turns.insert(0, Turn("system", (Part("text", text=self.system),)))
        check_turns(turns, require_answer=self.require_answer)
        value = 1.0
        if self.weight_column is not None:
            if row.get(self.weight_column) is None:
                raise DataError(f"there is no weight (column {self.weight_column!r})")
            value = weight(row[self.weight_column], self.weight_column)
        return Conversation(tuple(turns), source, value, extra)


def from_messages(row: Row, source: RowSource, reader: RowReader, *, tagged: bool = False) -> Conversation:
    """OpenAI-style `messages`. `tagged`: images must have `<image>` tags (LLaMA-Factory), else they may come first (TRL)."""
    _refuse_unsupported(row)
    turns = read_messages(row.get("messages"), "messages", reader.media)
    return reader.finish(turns, row, source, used=("messages", "tools"), first_if_no_slots=not tagged)


def from_prompt_completion(row: Row, source: RowSource, reader: RowReader) -> Conversation:
    """TRL's `prompt` and `completion`; only the completion is trained on. Without a completion: a prompt alone."""
    _refuse_unsupported(row)
    turns = [(role, pieces, False) for role, pieces, _ in _prompt_or_completion(row.get("prompt"), "prompt", "user", reader.media)]
    if row.get("completion") is not None:
        turns += _prompt_or_completion(row["completion"], "completion", "assistant", reader.media)
    return reader.finish(turns, row, source, used=("prompt", "completion", "tools"), first_if_no_slots=True)


def from_conversations(row: Row, source: RowSource, reader: RowReader) -> Conversation:
    """LLaVA's and Qwen's own `conversations` with `<image>` and `<video>` tags."""
    _refuse_unsupported(row)
    turns = read_messages(row.get("conversations"), "conversations", reader.media, strip=True)
    return reader.finish(turns, row, source, used=("conversations", "tools"), first_if_no_slots=False)


def from_qwen_inline(row: Row, source: RowSource, reader: RowReader) -> Conversation:
    """`conversations` (or `messages`) whose text holds `<|vision_start|>path<|vision_end|>`."""
    _refuse_unsupported(row)
    key = "conversations" if "conversations" in row else "messages"
    turns: list[Pieces] = []
    for role, pieces, train in read_messages(row.get(key), key, reader.media, tags=False):
        inline: list[Part | Slot] = []
        for piece in pieces:
            inline += _split_inline(piece, reader.media) if isinstance(piece, Part) and piece.type == "text" else [piece]
        turns.append((role, inline, train))
    return reader.finish(turns, row, source, used=(key, "tools"), first_if_no_slots=False)


def read_messages(messages: Any, key: str, media: Media, *, strip: bool = False, tags: bool = True) -> list[Pieces]:
    """Turns of a list of messages, `role`/`content` or `from`/`value`.

    Args:
        strip: see :func:`split_tags`.
        tags: whether `<image>` in a string is a place for an image. In messages with typed parts it never is.

    Raises:
        DataError: a message has another form, an unknown role, or an unknown type of part.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(f"`{key}` must be a list of messages, not {'missing' if messages is None else f'a {type(messages).__name__}'}")
    if not messages:
        raise DataError(f"`{key}` is empty")
    typed = any(isinstance(m, Mapping) and isinstance(_first(m, "content", "value"), list) for m in messages)
    turns = []
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(f"`{key}` entry {place} must be an object with role and content, not a {type(message).__name__}")
        name = _first(message, "role", "from")
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise DataError(f"`{key}` entry {place} has the role {name!r}; known: {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise DataError(f"`{key}` entry {place} has tool_calls, which are not read; write the call into its content")
        if message.get("reasoning_content"):
            raise DataError(f"`{key}` entry {place} has reasoning_content, which is not read; write it into content as <think>…</think>")
        content = _first(message, "content", "value")
        turns.append((role, _pieces(content, media, strip=strip, tags=tags and not typed), _is_trained(message)))
    return turns


def media_column(row: Row, columns: Sequence[str], kind: Kind, media: Media) -> list[MediaRef]:
    """The images or videos of a row: a value or a list of them, in the first of these columns that has any."""
    filled = [column for column in columns if row.get(column) is not None]
    if not filled:
        return []
    if len(filled) > 1:
        raise DataError(f"the row has both {' and '.join(filled)}; keep one")
    value = row[filled[0]]
    values = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)) else [value]
    refs = []
    for place, item in enumerate(values):
        if item is None or item == "":
            raise DataError(f"{filled[0]}[{place}] is empty")
        refs.append(media.ref(item, kind))
    return refs


def _prompt_or_completion(value: Any, key: str, role: Role, media: Media) -> list[Pieces]:
    if isinstance(value, str):
        return [(role, _pieces(value, media, strip=False, tags=True), True)]
    return read_messages(value, key, media)


def _pieces(content: Any, media: Media, *, strip: bool, tags: bool) -> list[Part | Slot]:
    if content is None:
        return []
    if isinstance(content, str):
        return split_tags(content, strip=strip) if tags else [Part("text", text=content)]
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence):
        raise DataError(f"the content of a message is a {type(content).__name__}; it must be text or a list of parts")
    return [_typed_part(entry, media) for entry in content]


def _typed_part(entry: Any, media: Media) -> Part | Slot:
    """One entry of a content list: `{"type": …}`, or Qwen's short form `{"image": …}`, or plain text."""
    if isinstance(entry, str):
        return Part("text", text=entry)
    if not isinstance(entry, Mapping):
        raise DataError(f"a part of a message is a {type(entry).__name__}; it must be an object with a type")
    # Arrow gives every part every key, the unused ones as None.
    part = {key: value for key, value in entry.items() if value is not None}
    kind = part.get("type")
    if kind is None:
        named = [key for key in ("text", *_MEDIA_TYPES) if key in part]
        if len(named) != 1:
            raise DataError(
                f"a part with the keys {', '.join(map(str, part)) or '(none)'} has no type; give text, image, image_url, video or video_url"
            )
        kind = named[0]
    if kind in _TEXT_TYPES:
        text = _first(part, "text", "value", "content")
        if not isinstance(text, str):
            raise DataError(f"a text part holds {'no text' if text is None else f'a {type(text).__name__}'}")
        return Part("text", text=text)
    if kind not in _MEDIA_TYPES:
        if isinstance(kind, str) and "audio" in kind:
            raise DataError(f"a part is of type {kind!r}; audio is not supported by these models")
        raise DataError(f"a part is of type {kind!r}; known: text, image, image_url, video, video_url")
    kind = _MEDIA_TYPES[kind]
    settings = item_settings(part, kind)
    value = _first(part, kind, f"{kind}_url", "value", "url", "path", "base64", "bytes")
    if value is None:
        return Slot(kind, settings)
    if "base64" in part and value is part["base64"]:
        value = {"base64": value}
    return Slot(kind, settings, media.ref(value, kind))


def _split_inline(part: Part, media: Media) -> list[Part | Slot]:
    found: list[Part | Slot] = []
    pieces = _INLINE.split(part.text)  # text, path, text, …
    for place, piece in enumerate(pieces):
        piece = piece.strip() if len(pieces) > 1 else piece
        if place % 2 == 0:
            if piece:
                found.append(Part("text", text=piece))
        elif piece in _PLACEHOLDERS:
            found.append(Slot(_PLACEHOLDERS[piece]))
        elif not piece:
            raise DataError("there is no path between <|vision_start|> and <|vision_end|>")
        else:
            kind: Kind = "video" if PurePosixPath(urlsplit(piece).path).suffix.lower() in VIDEO_SUFFIXES else "image"
            found.append(Slot(kind, media=media.ref(piece, kind)))
    return found


def _is_trained(message: Mapping[str, Any]) -> bool:
    """`train` or, as OpenAI and LLaMA-Factory call it, `weight` or `loss_weight` of one message: all or nothing."""
    for key in ("train", "weight", "loss_weight"):
        value = message.get(key)
        if value is None:
            continue
        share = float(value) if isinstance(value, bool) else number(value, f"`{key}` of a message")
        if share not in (0.0, 1.0):
            raise DataError(
                f"`{key}` of a message is {value!r}; only 0 and 1 are supported (whole rows may have any weight, see weight_column)"
            )
        return share == 1.0
    return True


def _refuse_unsupported(row: Row) -> None:
    if row.get("tools"):
        raise DataError(
            "the row has tool definitions (`tools`), which are not read; write them into the system prompt, for example with a formatter"
        )
    for column in _AUDIO_COLUMNS:
        if row.get(column):
            raise DataError(f"the row has audio (`{column}`), which is not supported by these models")


def _first(values: Mapping[str, Any], *keys: str) -> Any:
    """The value of the first key that has one."""
    return next((values[key] for key in keys if values.get(key) is not None), None)
