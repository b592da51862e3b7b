"""Rows of any other table -> Conversation: `columns:` says which column is what, `prompt:` how the question is put.

Also the way out for everything else, `formatter: module:function`, and the example `columns:` block that is shown
when a table is not recognised.
"""

from __future__ import annotations

import datetime
import decimal
import difflib
import importlib
import string
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finesight.data.conversation import Conversation, MediaRef, Part, RowSource
from finesight.data.row_parts import Kind, Pieces, fill_slots, split_tags
from finesight.data.rows import RowReader, media_column
from finesight.data.tables import Row
from finesight.data_settings import ColumnSettings
from finesight.errors import DataError

# What columns are usually called, for the example block of an unrecognised table; best guess first.
_USUAL_NAMES = {
    "image": ("image", "images", "img", "picture", "photo", "image_path", "file_name", "filename"),
    "video": ("video", "videos", "video_path"),
    "question": ("question", "query", "instruction", "prompt", "input", "problem", "text_in", "caption_prompt"),
    "answer": ("answer", "answers", "label", "labels", "output", "response", "solution", "caption", "text", "target"),
}


@dataclass(frozen=True)
class TableReader:
    """Reads the rows of one table; made by :func:`table_reader`, which has checked all names."""

    columns: ColumnSettings
    template: tuple[tuple[str, str | None], ...]  # (text, column) pairs; a column of None ends it
    reader: RowReader

    def __call__(self, row: Row, source: RowSource) -> Conversation:
        columns = self.columns
        turns: list[Pieces] = []
        if columns.system is not None and row.get(columns.system):
            turns.append(("system", [Part("text", text=_text(row, columns.system))], True))
        question = "".join(text + (_text(row, column) if column is not None else "") for text, column in self.template)
        turns.append(("user", split_tags(question, strip=False), True))
        extra: dict[str, Any] = {}
        answers = self._answers(row)
        if isinstance(answers, list):
            extra["answers"] = answers
            answers = answers[0] if answers else ""
        if answers is not None:
            turns.append(("assistant", [Part("text", text=answers)], True))
        if columns.answers is not None:
            accepted = row.get(columns.answers)
            extra["answers"] = [_plain_text(item, columns.answers) for item in (accepted if isinstance(accepted, list) else [accepted])]
        if columns.ground_truth is not None:
            extra["ground_truth"] = row.get(columns.ground_truth)
        extra |= {column: row.get(column) for column in columns.extra}
        filled = fill_slots(turns, self._media(row), row, first_if_no_slots=True)
        return self.reader.conversation(filled, row, source, extra)

    def _answers(self, row: Row) -> str | list[str] | None:
        column = self.columns.answer
        if column is None:
            return None
        value = row.get(column)
        if isinstance(value, list):
            return [_plain_text(item, column) for item in value]
        if value is None and not self.reader.require_answer:
            return None
        if value is None:
            raise DataError(f"empty answer: column {column!r} is empty")
        return _plain_text(value, column)

    def _media(self, row: Row) -> dict[Kind, list[MediaRef]]:
        found: dict[Kind, list[MediaRef]] = {"image": [], "video": []}
        wanted: list[tuple[Kind, Sequence[str]]] = [("image", image_columns(self.columns)), ("video", [self.columns.video or ""])]
        for kind, names in wanted:
            for column in filter(None, names):
                if row.get(column) is None or row[column] == "":
                    raise DataError(f"missing {kind}: column {column!r} is empty")
                found[kind] += media_column(row, (column,), kind, self.reader.media)
        return found


def table_reader(columns: ColumnSettings, prompt: str | None, present: Collection[str], reader: RowReader, setting: str) -> TableReader:
    """Checks that every column named is there and that the table says what is asked and answered.

    Args:
        present: the table's columns.
        setting: name of the source in the recipe, for messages.

    Raises:
        DataError: a column is not there, or the template cannot be used.
    """
    named = {"video": columns.video, "question": columns.question, "answer": columns.answer, "answers": columns.answers}
    named |= {"ground_truth": columns.ground_truth, "weight": columns.weight, "system": columns.system}
    pairs = [(f"columns.{key}", column) for key, column in named.items() if column is not None]
    pairs += [("columns.image", column) for column in image_columns(columns)] + [("columns.extra", column) for column in columns.extra]
    if prompt is None and columns.question is None:
        raise DataError(f"{setting}: a table needs columns.question, or a prompt that names columns, for example prompt: '{{question}}'")
    template = _parse_template("{" + columns.question + "}" if prompt is None and columns.question else prompt or "", setting)
    pairs += [("prompt", column) for _, column in template if column is not None]
    for key, column in pairs:
        if column not in present:
            near = difflib.get_close_matches(column, list(present), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{setting}.{key}: there is no column {column!r}{hint} The table has: {', '.join(present)}")
    if prompt is not None and columns.question is not None and columns.question not in {column for _, column in template}:
        raise DataError(
            f"{setting}: columns.question is {columns.question!r}, but prompt does not contain {{{columns.question}}}; add it there, or remove one of the two"
        )
    if columns.answer is None and reader.require_answer:
        raise DataError(f"{setting}: columns.answer is not set; training needs answers (prompt-only rows are for reinforcement)")
    return TableReader(columns, template, reader)


def image_columns(columns: ColumnSettings) -> list[str]:
    """The image column or columns as a list."""
    if columns.image is None:
        return []
    return [columns.image] if isinstance(columns.image, str) else list(columns.image)


def _parse_template(prompt: str, setting: str) -> tuple[tuple[str, str | None], ...]:
    """'{query}\\nBriefly.' -> (('', 'query'), ('\\nBriefly.', None)). Only plain names: no attributes, no formats."""
    found = []
    try:
        for text, name, spec, conversion in string.Formatter().parse(prompt):
            if name is not None and (not name or spec or conversion):
                raise ValueError("give column names alone inside braces")
            found.append((text, name))
    except ValueError as error:
        raise DataError(f"{setting}.prompt: {error}; write {{{{ and }}}} for braces that are meant as such") from None
    return tuple(found)


def _text(row: Row, column: str) -> str:
    if row.get(column) is None:
        raise DataError(f"column {column!r} is empty")
    return _plain_text(row[column], column)


def _plain_text(value: Any, column: str) -> str:
    """Text, or a number as people write it."""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float, decimal.Decimal, datetime.date, datetime.time)):
        return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else str(value)
    raise DataError(f"column {column!r} holds {'nothing' if value is None else f'a {type(value).__name__}'} where text is needed")


def load_formatter(name: str, setting: str) -> Callable[[Row], Any]:
    """`module:function`, imported from the current directory or the installed packages. Only the recipe names it.

    Raises:
        DataError: it cannot be imported, or is no function.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise DataError(f"{setting}.formatter: {name!r} is not of the form module:function")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's; it may fail in any way
        raise DataError(f"{setting}.formatter: {module_name} cannot be imported from {here}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise DataError(f"{setting}.formatter: {module_name} has no function {function_name!r}; it has {', '.join(known) or 'none'}")
    return function


def apply_formatter(function: Callable[[Row], Any], row: Row, name: str) -> Row:
    """One row through the user's function.

    Raises:
        DataError: it raised, or returned something other than a dict.
    """
    try:
        result = function(row)
    except Exception as error:  # as above
        raise DataError(f"formatter {name} raised {type(error).__name__}: {error}") from None
    if not isinstance(result, Mapping):
        raise DataError(f"formatter {name} returned {'None' if result is None else f'a {type(result).__name__}'}; it must return a dict")
    return dict(result)


def example_block(row: Row, setting: str) -> str:
    """Columns of a table with what they hold, and a `columns:` block to start from."""
    listed = "\n".join(f"  {name}: {_glimpse(value)}" for name, value in row.items())
    chosen: dict[str, str] = {}
    for role, names in _USUAL_NAMES.items():
        free = [key for key in row if key not in chosen.values()]
        exact = [key for name in names for key in free if key.lower() == name]
        if role in ("image", "video"):
            exact = exact or [key for key in free if role == "image" and _holds_image(row[key])]
        if exact:
            chosen[role] = exact[0]
    chosen.setdefault("question", "<column with the question>")
    chosen.setdefault("answer", "<column with the answer>")
    block = "\n".join(f"      {role}: {chosen[role]}" for role in ("image", "video", "question", "answer") if role in chosen)
    return f"its columns are\n{listed}\nSay which is what, for example ({setting}):\n    columns:\n{block}\nor name a formatter (module:function)."


def _holds_image(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, Mapping) and "bytes" in value)


def _glimpse(value: Any) -> str:
    if _holds_image(value):
        return "an embedded image"
    if isinstance(value, list):
        return f"a list of {len(value)}" + (f", the first {_glimpse(value[0])}" if value else "")
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "…"
