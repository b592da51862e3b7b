"""Reads a source of rows into conversations, whatever format it is written in.

The format is told by looking at the first rows, unless the recipe names it. Every row becomes either a
:class:`Conversation` or a :class:`BadRow` with the reason; nothing is dropped. Whether bad rows stop the run is decided
by :func:`accept`. Pixels are not decoded here, but every image and video is looked at as far as its header.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from finesight.data import columns as tables_of_columns
from finesight.data import rows
from finesight.data.conversation import Conversation, MediaRef, RowSource
from finesight.data.dataset_info import find_entry
from finesight.data.media import MediaPolicy, image_size, video_info
from finesight.data.row_parts import Media
from finesight.data.rows import RowReader
from finesight.data.tables import Damaged, Row, RowTable, open_table
from finesight.data_settings import ColumnSettings, DataSettings, SourceSettings
from finesight.errors import BadRow, DataError

logger = logging.getLogger(__name__)

_ROWS_TO_TELL = 50  # rows that are looked at to tell the format
_HEADER_THREADS = 8

Converter = Callable[[Row, RowSource], Conversation]

_CONVERTERS: dict[str, Callable[[Row, RowSource, RowReader], Conversation]] = {
    "messages": rows.from_messages,
    "llamafactory": functools.partial(rows.from_messages, tagged=True),
    "prompt_completion": rows.from_prompt_completion,
    "conversations": rows.from_conversations,
    "qwen_inline": rows.from_qwen_inline,
}


@dataclass(frozen=True)
class ReadResult:
    """What became of the rows of one source: `len(conversations) + len(bad_rows)` is their number."""

    conversations: list[Conversation]
    bad_rows: list[BadRow]
    format: str  # one of SourceSettings.format, never "auto"
    file: str = ""
    notes: tuple[str, ...] = ()  # what a user should know of how the rows were read

    @property
    def num_rows(self) -> int:
        return len(self.conversations) + len(self.bad_rows)


def read_source(
    source: SourceSettings, *, data: DataSettings, base_dir: Path, require_answer: bool = True, table: RowTable | None = None
) -> ReadResult:
    """Reads all rows of a source.

    Args:
        data: what else the recipe says: allowed folders, addresses.
        base_dir: folder that relative paths of the recipe start at.
        require_answer: rows without an answer are bad (supervised training); otherwise they are prompts (reinforcement).
        table: rows that are open already (held in memory, say); `source.path` is then not opened.

    Raises:
        DataError: the source itself cannot be read: missing, of an unknown kind or format, settings that do not fit.
    """
    setting = _setting_name(source, data)
    entry = None if table is not None else find_entry(source.path, base_dir=base_dir, name=source.name, hub=source.hub)
    if entry is not None:
        if source.format not in ("auto", "llamafactory"):
            raise DataError(
                f"{setting}.format: entries of a dataset_info.json are read as llamafactory, not as {source.format}; remove the setting"
            )
        table = entry.table(source.hub, base_dir)
    elif table is None:
        table = open_table(source.path, base_dir=base_dir, hub=source.hub, split=source.split, name=source.name)
    transform: Callable[[Row], Row] | None = entry.messages_row if entry is not None else None
    if source.formatter is not None:
        function = tables_of_columns.load_formatter(source.formatter, setting)
        transform = functools.partial(tables_of_columns.apply_formatter, function, name=source.formatter)
    media_dir = None if source.media_dir is None else base_dir / Path(source.media_dir).expanduser()
    if media_dir is not None and not media_dir.is_dir():
        raise DataError(f"{setting}.media_dir: {source.media_dir} is not a folder (looked in {base_dir.absolute()})")
    policy = MediaPolicy(
        roots=(*(base_dir / Path(folder).expanduser() for folder in data.allowed_dirs), *table.roots),
        allow_urls=data.allow_urls,
        media_dir=media_dir,
        media_dir_setting=f"{setting}.media_dir",
        in_memory=table.in_memory,
    )
    reader = RowReader(Media(policy, table.folder), source.system, _weight_column(source), require_answer)
    prepared = _transformed(table, transform)
    first = list(islice(prepared, _ROWS_TO_TELL))
    if not first:
        raise DataError(f"{table.file} holds no rows")
    format_ = "llamafactory" if entry is not None and source.formatter is None else _format(first, source, table.file, setting)
    convert = _converter(format_, first, source, reader, setting)
    conversations, bad_rows = _convert_all(chain(first, prepared), convert, table.file)
    conversations, unreadable = _look_at_media(conversations)
    bad_rows = sorted(bad_rows + unreadable, key=lambda bad: bad.row)
    notes = table.notes
    if policy.stands_for is not None:
        notes = (
            *notes,
            f"{setting}.media_dir ({source.media_dir}) stands for the folder {policy.stands_for!r} that paths of {table.file} begin with",
        )
    return ReadResult(conversations, bad_rows, format_, table.file, notes)


def accept(
    results: ReadResult | Sequence[ReadResult], on_bad_row: str, *, shown: int = 20, report_path: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Conversation]:  # fmt: skip
    """Decides what to do about bad rows, and joins the conversations of all sources in order.

    Args:
        on_bad_row: "stop" or "skip" (the recipe's `data.on_bad_row`).
        shown: bad rows listed in the message; the others are counted.
        report_path: file to write every bad row to, one JSON object a line.
        say: told the list when rows are skipped; by default it is logged as a warning.

    Raises:
        DataError: there are bad rows and `on_bad_row` is "stop", or no good row is left. It carries all bad rows.
    """
    results = [results] if isinstance(results, ReadResult) else list(results)
    bad = [row for result in results for row in result.bad_rows]
    conversations = [conversation for result in results for conversation in result.conversations]
    if not bad:
        return conversations
    total = len(bad) + len(conversations)
    if report_path is not None:
        report_path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"file": row.file, "row": row.row, "reason": row.reason}, ensure_ascii=False) + "\n" for row in bad)
        report_path.write_text("".join(lines), encoding="utf-8")
    listing = list_bad_rows(bad, shown=shown, report_path=report_path)
    if on_bad_row == "stop":
        raise DataError(
            f"{len(bad)} of {total} rows cannot be used:\n{listing}\nCorrect them, or set data.on_bad_row: skip to go on without them.", bad
        )
    if not conversations:
        raise DataError(f"None of the {total} rows can be used:\n{listing}", bad)
    (say or logger.warning)(f"Skipping {len(bad)} of {total} rows:\n{listing}")
    return conversations


def list_bad_rows(bad_rows: Sequence[BadRow], *, shown: int = 20, report_path: Path | None = None) -> str:
    """Bad rows one a line (counted from 0), those past `shown` as a number."""
    lines = [f"  {row}" for row in bad_rows[:shown]]
    if len(bad_rows) > shown:
        where = f"; all of them are in {report_path}" if report_path is not None else ""
        lines.append(f"  … and {len(bad_rows) - shown} more{where}")
    return "\n".join(lines)


def tell_format(sample: Sequence[Row]) -> str | None:
    """The format that most of these rows are written in, or None."""
    votes = Counter(filter(None, map(_format_of_row, sample)))
    if not votes:
        return None
    # Tags show in some rows only (others have no image); one row with them tells for all.
    for marked, plain in (("llamafactory", "messages"), ("qwen_inline", "conversations")):
        if votes[marked] and votes[marked] + votes[plain] >= max(votes.values()):
            return marked
    return votes.most_common(1)[0][0]


def _format_of_row(row: Row) -> str | None:
    if isinstance(row.get("messages"), list):
        texts = list(_texts(row["messages"]))
        if any("<|vision_start|>" in text for text in texts):
            return "qwen_inline"
        has_media = any(row.get(column) is not None for names in rows.MEDIA_COLUMNS.values() for column in names)
        return "llamafactory" if has_media and any("<image>" in text or "<video>" in text for text in texts) else "messages"
    if isinstance(row.get("conversations"), list):
        return "qwen_inline" if any("<|vision_start|>" in text for text in _texts(row["conversations"])) else "conversations"
    prompt = row.get("prompt")
    if isinstance(prompt, list) or (isinstance(prompt, str) and isinstance(row.get("completion"), (str, list))):
        return "prompt_completion"
    return None


def _texts(messages: list[Any]) -> Iterator[str]:
    """The contents that are plain strings."""
    for message in messages:
        if isinstance(message, dict):
            yield from (value for key in ("content", "value") if isinstance(value := message.get(key), str))


def _format(first: Sequence[Row | Damaged], source: SourceSettings, file: str, setting: str) -> str:
    sample = [row for row in first if not isinstance(row, Damaged)]
    if source.format != "auto":
        return source.format
    if source.columns is not None or source.prompt is not None:
        return "table"
    if not sample:
        raise DataError(f"{file}: none of the first {len(first)} rows can be read; the first: {_reason_of(first[0])}")
    if (found := tell_format(sample)) is not None:
        return found
    keys = sample[0].keys()
    if "rejected" in keys:
        raise DataError(f"{file} holds preference pairs (chosen, rejected); supervised training needs one answer a row")
    raise DataError(f"{file} is in no format that is known by itself; {tables_of_columns.example_block(sample[0], setting)}")


def _reason_of(row: Row | Damaged) -> str:
    return row.reason if isinstance(row, Damaged) else "it can be read"


def _converter(format_: str, first: Sequence[Row | Damaged], source: SourceSettings, reader: RowReader, setting: str) -> Converter:
    if format_ == "table":
        # Rows of JSON may leave out what they do not have.
        present = dict.fromkeys(key for row in first if not isinstance(row, Damaged) for key in row)
        return tables_of_columns.table_reader(source.columns or ColumnSettings(), source.prompt, present, reader, setting)
    for name, given in (("columns", source.columns), ("prompt", source.prompt)):
        if given is not None:
            raise DataError(f"{setting}.{name} is for format table, but the format is {format_}; remove one of them")
    convert = _CONVERTERS[format_]
    return lambda row, where: convert(row, where, reader)


def _transformed(table: RowTable, transform: Callable[[Row], Row] | None) -> Iterator[Row | Damaged]:
    for row in table.rows:
        if transform is None or isinstance(row, Damaged):
            yield row
            continue
        try:
            yield transform(row)
        except DataError as error:
            yield Damaged(str(error))


def _convert_all(table_rows: Iterable[Row | Damaged], convert: Converter, file: str) -> tuple[list[Conversation], list[BadRow]]:
    conversations: list[Conversation] = []
    bad_rows: list[BadRow] = []
    for number, row in enumerate(table_rows):
        if isinstance(row, Damaged):
            bad_rows.append(BadRow(file, number, row.reason))
            continue
        try:
            conversations.append(convert(row, RowSource(file, number)))
        except DataError as error:
            bad_rows.append(BadRow(file, number, str(error)))
    return conversations, bad_rows


def _look_at_media(conversations: list[Conversation]) -> tuple[list[Conversation], list[BadRow]]:
    """Reads the header of every image and video once, several at a time."""
    kinds: dict[MediaRef, str] = {part.media: part.type for c in conversations for part in c.media if part.media is not None}
    if not kinds:
        return conversations, []

    def problem(item: tuple[MediaRef, str]) -> str | None:
        try:
            (video_info if item[1] == "video" else image_size)(item[0])
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(min(_HEADER_THREADS, (os.cpu_count() or 1) + 2)) as pool:
        problems = {ref: text for ref, text in zip(kinds, pool.map(problem, kinds.items(), chunksize=64), strict=True) if text is not None}
    if not problems:
        return conversations, []
    good, bad = [], []
    for conversation in conversations:
        found = [problems[part.media] for part in conversation.media if part.media in problems]
        if found:
            bad.append(BadRow(conversation.source.file, conversation.source.row, "; ".join(dict.fromkeys(found))))
        else:
            good.append(conversation)
    return good, bad


def _weight_column(source: SourceSettings) -> str | None:
    of_table = source.columns.weight if source.columns is not None else None
    return of_table or source.weight_column


def _setting_name(source: SourceSettings, data: DataSettings) -> str:
    """`data.train.0`, so that messages can name the setting to change."""
    return f"data.train.{data.train.index(source)}" if source in data.train else "the source"
