"""Rows as dicts, from whatever holds them: JSON, JSONL, CSV, Parquet, Arrow, a saved `datasets` folder, or a hub.

Nothing is interpreted here and no image is decoded: an Arrow `Image` column comes out as ``{"bytes": …, "path": …}``.
No code that comes with a dataset is ever run.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from finesight.data.media_policy import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from finesight.errors import DataError
from finesight.hub import why_unreachable

Row = dict[str, Any]

FILE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
_PACKED_SUFFIXES = (".gz", ".zip", ".zst", ".xz", ".bz2", ".tar")
_BATCH_ROWS = 256  # Arrow rows that become Python objects at a time
# What a folder must hold for `datasets` to find rows in it: images and videos may lie in folders named after classes.
_LOADABLE = frozenset((*FILE_SUFFIXES, *_PACKED_SUFFIXES)) | IMAGE_SUFFIXES | VIDEO_SUFFIXES
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


@dataclass(frozen=True)
class Damaged:
    """Stands where a row could not be read at all."""

    reason: str


@dataclass(frozen=True)
class RowTable:
    """Rows in the order of their file, each read once."""

    file: str  # as messages name it
    folder: Path  # that relative media paths are resolved against first
    rows: Iterator[Row | Damaged]
    roots: tuple[Path, ...] = ()  # further folders in which media of these rows may lie: the library's download cache
    notes: tuple[str, ...] = ()  # what a user should know of how they were read
    in_memory: bool = False  # no file's: `folder` is then the present one


def open_table(
    path: str, *, base_dir: Path, hub: Literal["huggingface", "modelscope"] = "huggingface", split: str = "train", name: str | None = None
) -> RowTable:
    """Finds and opens rows by the path of a file or folder, or by the name of a hub dataset.

    Args:
        path: as the recipe has it; relative paths start at `base_dir`.
        split: of a saved folder or hub dataset.
        name: configuration of a hub dataset.

    Raises:
        DataError: nothing is there, its kind is unknown, or it cannot be read.
    """
    local = base_dir / Path(path).expanduser()
    if local.is_file():
        return open_file(local, label=path, split=split, name=name)
    if local.is_dir():
        return _open_folder(local, path, split, name)
    if Path(path).suffix.lower() in (*FILE_SUFFIXES, *_PACKED_SUFFIXES, ".txt", ".xlsx"):
        raise DataError(
            f"{path} does not exist (looked in {base_dir.absolute()}); correct the path of the file (data.train.0.path, or data.eval_split)"
        )
    if not _HUB_NAME.match(path):
        raise DataError(
            f"{path} does not exist (looked in {base_dir.absolute()}); give the path of a file or folder, or the name of a hub dataset"
        )
    return _open_hub(path, hub, split, name)


def open_file(path: Path, *, label: str, split: str = "train", name: str | None = None) -> RowTable:
    """Opens one file by its suffix.

    Raises:
        DataError: the suffix is unknown, or the file cannot be read.
    """
    for setting, given in (("split", split != "train"), ("name", name is not None)):
        if given:
            raise DataError(f"{label} is a single file, to which `{setting}` means nothing; remove the setting")
    suffix = path.suffix.lower()
    readers = {
        ".json": _json_rows, ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".csv": _csv_rows, ".tsv": _csv_rows,
        ".parquet": _parquet_rows, ".arrow": _arrow_rows,
    }  # fmt: skip
    if suffix not in readers:
        raise DataError(f"{label}: files of kind {suffix or 'without a suffix'!r} are not read; known: {', '.join(FILE_SUFFIXES)}")
    try:
        rows = readers[suffix](path, label)
        first = next(rows, None)  # so that a file that is damaged from the start is refused here
    except OSError as error:
        raise DataError(f"{label} cannot be read: {error.strerror or error}") from None
    return RowTable(label, path.parent, iter(()) if first is None else chain([first], rows))


def read_json(path: Path, label: str) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it is no JSON, or not in UTF-8; the message has line and column.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{label} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{label} is nested too deeply to be read") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{label} is not written in UTF-8 (byte {error.start}); save it in UTF-8") from None
    except OSError as error:
        raise DataError(f"{label} cannot be read: {error.strerror}") from None


def _as_row(value: Any, place: str = "") -> Row | Damaged:
    if isinstance(value, dict):
        return value
    return Damaged(f"{place}a row must be an object with named fields, not a {type(value).__name__}")


def _json_rows(path: Path, label: str) -> Iterator[Row | Damaged]:
    try:
        content = read_json(path, label)
    except DataError as error:
        if "Extra data" not in str(error):
            raise
        yield from _jsonl_rows(path, label)  # one object a line, whatever the suffix says
        return
    if isinstance(content, dict):
        lists = [key for key, value in content.items() if isinstance(value, list)]
        if {"messages", "conversations", "prompt"} & content.keys():
            content = [content]  # a single row
        elif len(lists) == 1:
            content = content[lists[0]]
        else:
            raise DataError(
                f"{label} must hold a list of rows, or an object with one list; found an object with the keys {_names(content)}"
            )
    if not isinstance(content, list):
        raise DataError(f"{label} must hold a list of rows, not a {type(content).__name__}")
    yield from (_as_row(value) for value in content)


def _jsonl_rows(path: Path, label: str) -> Iterator[Row | Damaged]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                # Without the line's end: past it the decoder would count columns from 1 again.
                yield _as_row(json.loads(line.rstrip(b"\r\n")), f"line {number}: ")
            except json.JSONDecodeError as error:
                yield Damaged(f"line {number} is not valid JSON: {error.msg} at column {error.colno}")
            except RecursionError:
                yield Damaged(f"line {number} is nested too deeply")
            except UnicodeDecodeError as error:
                yield Damaged(f"line {number} is not written in UTF-8 (byte {error.start})")


def _csv_rows(path: Path, label: str) -> Iterator[Row | Damaged]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{label} is not written in UTF-8 (byte {error.start}); save it as CSV UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) < len(header) or "" in header:
            raise DataError(f"{label}: the first line must name each column once; it has {_names(header)}")
        for values in reader:
            if not values:
                continue  # an empty line
            if len(values) != len(header):
                yield Damaged(f"line {reader.line_num} has {len(values)} fields, the first line names {len(header)} columns")
            else:
                yield dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataError(f"{label}, line {reader.line_num}: {error}; long fields (embedded images) belong in Parquet") from None


def _parquet_rows(path: Path, label: str) -> Iterator[Row | Damaged]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            labels = _class_labels(file.schema_arrow)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                yield from _named(batch.to_pylist(), labels)
    except pa.ArrowException as error:
        raise DataError(f"{label} is not a valid Parquet file: {error}") from None


def _arrow_rows(path: Path, label: str) -> Iterator[Row | Damaged]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            try:
                batches: Any = pa.ipc.open_stream(source)
            except pa.ArrowInvalid:  # the other of Arrow's two layouts
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
                labels = _class_labels(file.schema)
            else:
                labels = _class_labels(batches.schema)
            for batch in batches:
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield from _named(batch.slice(start, _BATCH_ROWS).to_pylist(), labels)
    except pa.ArrowException as error:
        raise DataError(f"{label} is not a valid Arrow file: {error}") from None


def _class_labels(schema: Any) -> dict[str, list[str]]:
    """Names of the classes of `datasets` ClassLabel columns, which Arrow holds as integers."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    if not metadata:
        return {}
    features = json.loads(metadata).get("info", {}).get("features", {})
    return {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _named(rows: list[Row], labels: dict[str, list[str]]) -> list[Row]:
    """Class numbers as class names: a model is to say 'cat', not 3. `datasets` writes -1 where the class is unknown."""
    for row in rows if labels else ():
        for column, names in labels.items():
            if isinstance(number := row.get(column), int):
                row[column] = names[number] if 0 <= number < len(names) else None
    return rows


def _open_folder(path: Path, label: str, split: str, name: str | None) -> RowTable:
    import datasets

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        if name is not None:
            raise DataError(f"{label} was saved with save_to_disk, to which `name` means nothing; remove the setting")
        try:
            content = datasets.load_from_disk(str(path))
        except Exception as error:  # whatever a damaged folder provokes in the library
            raise DataError(f"{label} was saved with save_to_disk, but cannot be loaded: {error}") from None
        if isinstance(content, datasets.DatasetDict):
            if split not in content:
                raise DataError(f"{label} has no split {split!r}; it has {_names(content)}. Set `split` to one of these")
            content = content[split]
        elif split != "train":
            raise DataError(f"{label} holds a single data set, to which `split` means nothing; remove the setting")
        return RowTable(label, path, _dataset_rows(content))
    if not any(file.suffix.lower() in _LOADABLE for file in path.rglob("*")):
        raise DataError(
            f"{label} is a folder that holds no data file ({', '.join(FILE_SUFFIXES)}); give the path of a file, or of a folder with such files"
        )
    return _load(label, path, path=str(path), name=name, split=split)


def _open_hub(path: str, hub: str, split: str, name: str | None) -> RowTable:
    if hub == "modelscope":
        return _open_modelscope(path, split, name)
    unreachable = None if _prepared(path) else why_unreachable()
    if unreachable is not None:  # the library would try again for half a minute
        raise _not_loaded(path, True, split, name, unreachable)
    return _load(path, None, path=path, name=name, split=split)


def _prepared(path: str) -> bool:
    """Whether the library's cache holds rows of a hub dataset, which it then reads without a network."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    namespace, _, own = path.rpartition("/")
    own = camelcase_to_snakecase(own)
    return (Path(config.HF_DATASETS_CACHE) / (f"{namespace}___{own}" if namespace else own)).is_dir()


def _not_loaded(label: str, on_hub: bool, split: Any, name: Any, reason: str) -> DataError:
    of_part = f"(split {split!r}, name {name!r})"
    what = (
        f"There is no file or folder {label} here, and as a data set of the hub {of_part} it"
        if on_hub
        else f"{label}, a data set {of_part},"
    )
    return DataError(
        f"{what} cannot be loaded: {reason}. Check path or name, split and configuration; for a mirror of the hub set HF_ENDPOINT"
    )


def _load(label: str, folder: Path | None, **arguments: Any) -> RowTable:
    """`datasets.load_dataset`, whose mirrors and tokens come from its usual environment variables.

    What it downloads or unpacks lies in its caches, so that media may lie there too.
    """
    import datasets
    from huggingface_hub import constants

    cache = (Path(datasets.config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE))
    try:
        content = datasets.load_dataset(**arguments)
    except Exception as error:  # the library raises many kinds, those of the network among them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _not_loaded(label, folder is None, arguments["split"], arguments["name"], reason.rstrip(".")) from None
    return RowTable(label, folder or cache[0], _dataset_rows(content), roots=cache)


def _open_modelscope(path: str, split: str, name: str | None) -> RowTable:
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError:
        raise DataError(f"{path}: `hub: modelscope` needs the modelscope package: pip install modelscope") from None
    try:
        content = MsDataset.load(path, subset_name=name, split=split, trust_remote_code=False)
    except Exception as error:  # as above
        raise DataError(f"{path} cannot be loaded from ModelScope (split {split!r}, name {name!r}): {error}") from None
    if hasattr(content, "to_hf_dataset"):
        content = content.to_hf_dataset()
    cache = Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope")
    return RowTable(path, cache, _dataset_rows(content), roots=(cache,))


def _dataset_rows(dataset: Any) -> Iterator[Row | Damaged]:
    """Rows of a `datasets.Dataset` as Arrow holds them, so that nothing is decoded."""
    features = dataset.features or {}
    labels = {column: feature.names for column, feature in features.items() if type(feature).__name__ == "ClassLabel" and feature.names}
    for batch in dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS):
        yield from _named(batch.to_pylist(), labels)


def _names(keys: Any) -> str:
    return ", ".join(map(str, keys)) or "none"
