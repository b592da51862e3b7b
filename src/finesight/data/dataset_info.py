"""LLaMA-Factory's `dataset_info.json`: which file or hub name an entry stands for, and how its rows are written.

Rows are brought into one form, ``{"messages": [{"role", "content"}], "images": […], "videos": […]}``, with `<image>`
tags left in the text; `rows.py` does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from finesight.data.tables import Row, RowTable, open_file, open_table, read_json
from finesight.errors import DataError

FILE_NAME = "dataset_info.json"
_SOURCES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "observation_tag": "observation",
    "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_OPENAI_TAGS = _TAGS | {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
}
_ROLES = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "assistant", "system_tag": "system"}


@dataclass(frozen=True)
class Entry:
    """One entry of a `dataset_info.json`."""

    name: str
    folder: Path  # of the dataset_info.json: images lie relative to it
    label: str  # of the dataset_info.json, for messages
    formatting: Literal["alpaca", "sharegpt", "openai"]
    file_name: str | None
    hubs: Mapping[str, str]  # hub -> name there
    subset: str | None = None
    split: str = "train"
    num_samples: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def table(self, hub: Literal["huggingface", "modelscope"], base_dir: Path) -> RowTable:
        """Opens the rows of the entry; a hub name goes before a file, as in LLaMA-Factory.

        Raises:
            DataError: as in :func:`finesight.data.tables.open_table`.
        """
        if hub in self.hubs:
            table = open_table(self.hubs[hub], base_dir=base_dir, hub=hub, split=self.split, name=self.subset)
        elif self.file_name is not None:
            path = self.folder / self.file_name
            if not path.exists():
                raise DataError(f"{self.label}: entry {self.name!r} names {self.file_name}, which is not in {self.folder}")
            label = str(Path(self.label).parent / self.file_name)
            table = (
                open_file(path, label=label)
                if path.is_file()
                else open_table(str(path), base_dir=base_dir, split=self.split, name=self.subset)
            )
            table = replace(table, folder=self.folder)
        else:
            raise DataError(f"{self.label}: entry {self.name!r} is not on {hub}, only on {', '.join(self.hubs)}; set `hub` to that")
        if self.num_samples is not None:
            note = f"{self.label} limits {self.name!r} to {self.num_samples} rows; the first ones are taken"
            table = replace(table, rows=islice(table.rows, self.num_samples), notes=(*table.notes, note))
        return table

    def messages_row(self, row: Row) -> Row:
        """A row in the common form.

        Raises:
            DataError: a column of the entry is not in the row, or a message has no known role.
        """
        names = self.columns
        messages = self._alpaca(row) if self.formatting == "alpaca" else self._sharegpt(row)
        if (system := names.get("system")) and row.get(system):
            if messages and messages[0]["role"] == "system":
                messages = messages[1:]
            messages.insert(0, {"role": "system", "content": row[system]})
        used = {
            names.get(key)
            for key in ("prompt", "query", "response", "history", "messages", "system", "tools", "images", "videos", "audios")
        }
        result = {key: value for key, value in row.items() if key not in used}
        for key in ("images", "videos", "audios", "tools"):
            if key in names and row.get(names[key]) not in (None, ""):
                result[key] = row[names[key]]
        return {**result, "messages": messages}

    def _alpaca(self, row: Row) -> list[Row]:
        prompt, query, response = (row.get(self.columns[key]) if key in self.columns else None for key in ("prompt", "query", "response"))
        if not isinstance(prompt, str):
            raise DataError(f"column {self.columns.get('prompt')!r} (the instruction) is missing or no text")
        messages = []
        for pair in (row.get(self.columns["history"]) if "history" in self.columns else None) or []:
            if not isinstance(pair, list) or len(pair) != 2:
                raise DataError(f"column {self.columns['history']!r} must hold pairs of instruction and response")
            messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        messages.append({"role": "user", "content": f"{prompt}\n{query}" if query else prompt})
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        return messages

    def _sharegpt(self, row: Row) -> list[Row]:
        column, tags = self.columns["messages"], self.tags
        given = row.get(column)
        if not isinstance(given, list):
            raise DataError(f"column {column!r} must hold a list of messages")
        roles = {tags[tag]: role for tag, role in _ROLES.items()}
        messages = []
        for place, message in enumerate(given):
            name = message.get(tags["role_tag"]) if isinstance(message, Mapping) else None
            if name not in roles:
                raise DataError(f"`{column}` entry {place} has the role {name!r}; known: {', '.join(roles)}")
            rest = {key: value for key, value in message.items() if key not in (tags["role_tag"], tags["content_tag"])}
            messages.append({**rest, "role": roles[name], "content": message.get(tags["content_tag"])})
        return messages


def find_entry(path: str, *, base_dir: Path, name: str | None, hub: str) -> Entry | None:
    """The entry that a source means, or None where `path` is no dataset_info.json and no folder with one.

    Raises:
        DataError: the file is damaged, `name` is missing or unknown, or the entry cannot be used for training.
    """
    local = base_dir / Path(path).expanduser()
    if local.is_dir():
        # `save_to_disk` writes a file of the same name, with other content, beside its state.json.
        if (local / "state.json").exists() or (local / "dataset_dict.json").exists() or not (local / FILE_NAME).is_file():
            return None
        local, label = local / FILE_NAME, str(Path(path) / FILE_NAME)
    elif local.name == FILE_NAME and local.is_file():
        label = path
    else:
        return None
    content = read_json(local, label)
    if not isinstance(content, dict) or not any(isinstance(entry, dict) and set(_SOURCES) & entry.keys() for entry in content.values()):
        return None
    if name is None or name not in content:
        here = [key for key, entry in content.items() if isinstance(entry, dict) and (local.parent / str(entry.get("file_name"))).exists()]
        problem = f"has no entry {name!r}" if name is not None else f"has {len(content)} entries; set `name` to one of them"
        raise DataError(f"{label} {problem}. With their files here: {', '.join(here) or 'none'}")
    return _parse(name, content[name], local.parent, label, hub)


def _parse(name: str, entry: Any, folder: Path, label: str, hub: str) -> Entry:
    if not isinstance(entry, dict):
        raise DataError(f"{label}: entry {name!r} must be an object")
    where = f"{label}: entry {name!r}"
    if entry.get("ranking"):
        raise DataError(f"{where} holds preference pairs (ranking: true); supervised training needs one answer a row")
    if "kto_tag" in entry.get("columns", {}):
        raise DataError(f"{where} holds answers marked good and bad (kto_tag); supervised training needs good ones only")
    for key in ("folder", "revision"):
        if entry.get(key):
            raise DataError(f"{where} names a {key} of a hub data set, which is not supported; download it and name its files")
    hubs = {hub: entry[key] for hub, key in (("huggingface", "hf_hub_url"), ("modelscope", "ms_hub_url")) if entry.get(key)}
    if not hubs and not entry.get("file_name"):
        raise DataError(f"{where} has neither file_name nor hf_hub_url nor ms_hub_url; loading scripts and cloud files are not supported")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise DataError(f"{where} has formatting {formatting!r}; known: alpaca, sharegpt, openai")
    columns = dict(entry.get("columns") or {})
    if formatting == "alpaca":
        defaults = {"prompt": "instruction", "query": "input", "response": "output"}
        columns = columns or defaults
    else:
        columns.setdefault("messages", "conversations")
    tags = (_OPENAI_TAGS if formatting == "openai" else _TAGS) | (entry.get("tags") or {})
    return Entry(
        name, folder, label, formatting, entry.get("file_name"), hubs, entry.get("subset"), entry.get("split", "train"), entry.get("num_samples"),
        columns, tags,
    )  # fmt: skip
