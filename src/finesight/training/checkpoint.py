"""Checkpoints that survive a crash at any moment.

A checkpoint is written to a temporary folder beside its place; every file is flushed to the disk, `manifest.json` gets
the hash and size of each, and only then is the folder renamed and the parent flushed. Whatever carries the name
`checkpoint-N` was therefore once complete; whether it still is, the hashes tell. Tensors are safetensors, everything
else is JSON: reading a checkpoint runs no code of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finesight.errors import CheckpointError
from finesight.file_modes import give_usual_mode

MANIFEST = "manifest.json"
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = (".saving-", ".replaced-", ".deleting-")


@dataclass(frozen=True)
class FoundCheckpoint:
    """What a search for a checkpoint found."""

    path: Path | None
    skipped: tuple[str, ...]  # each newer folder that cannot be used, and why


def checkpoint_path(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(output_dir) / f"checkpoint-{step}"


def checkpoint_step(path: str | Path) -> int | None:
    """The step of a checkpoint folder, from its name; None for other folders."""
    match = _NAME.fullmatch(Path(path).name)
    return int(match.group(1)) if match else None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders, oldest step first, whether valid or not."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if path.is_dir() and (step := checkpoint_step(path)) is not None]
    return [path for _, path in sorted(found)]


def write_checkpoint(output_dir: str | Path, step: int, fill: Callable[[Path], None], about: dict[str, Any] | None = None) -> Path:
    """Writes `checkpoint-<step>` such that it is there whole or not at all.

    Args:
        fill: writes the content into the empty folder it is given.
        about: kept in the manifest, readable without reading the rest.

    Returns:
        The folder. One of the same step that was there before is replaced.
    """
    return write_folder(checkpoint_path(output_dir, step), fill, {"step": step, **(about or {})})


def write_folder(target: Path, fill: Callable[[Path], None], about: dict[str, Any] | None = None) -> Path:
    """A folder that is there whole or not at all, with a manifest; as :func:`write_checkpoint` for any name."""
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(parent)
    temporary = parent / f".saving-{target.name}-{os.getpid()}"
    temporary.mkdir()
    fill(temporary)
    give_usual_mode(temporary)
    files = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        _flush(path)
        files[path.relative_to(temporary).as_posix()] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
    manifest = {"format": _FORMAT, "written": time.time(), **(about or {}), "files": files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _flush(temporary / MANIFEST)
    for folder in sorted(p for p in temporary.rglob("*") if p.is_dir()):
        _flush(folder)
    _flush(temporary)
    if target.exists():
        aside = parent / f".replaced-{target.name}-{os.getpid()}"
        target.rename(aside)
        temporary.rename(target)
        _flush(parent)
        shutil.rmtree(aside)
    else:
        temporary.rename(target)
        _flush(parent)
    return target


def remove_unfinished(output_dir: str | Path) -> None:
    """Deletes what a crash left of an unfinished save or deletion."""
    folder = Path(output_dir)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and path.name.startswith(_UNFINISHED):
            shutil.rmtree(path)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
            raise ValueError("it lists no files")
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is no checkpoint, or not a whole one.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): the checkpoint is damaged.") from None
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path} has format {manifest.get('format')!r}, this version reads {_FORMAT}. Use the version that wrote it.")
    return manifest


def verify_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Reads every file of a checkpoint and compares it with the manifest, which is returned.

    Raises:
        CheckpointError: names the first file that is missing or not what was written.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, wanted in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing. Use another checkpoint.")
        if path.stat().st_size != wanted["bytes"]:
            raise CheckpointError(
                f"{folder} is damaged: {name} has {path.stat().st_size:,} bytes in place of {wanted['bytes']:,}. Use another checkpoint."
            )
        if _sha256(path) != wanted["sha256"]:
            raise CheckpointError(f"{folder} is damaged: the content of {name} is not what was written. Use another checkpoint.")
    return manifest


def written_at(folder: str | Path) -> float:
    """When a folder of :func:`write_folder` was written, in seconds since 1970: by its manifest, else by its files' times."""
    folder = Path(folder)
    try:
        return float(read_manifest(folder)["written"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return max((path.stat().st_mtime for path in folder.iterdir() if path.is_file()), default=0.0)


def newest_valid(output_dir: str | Path, *, resumable: bool = True, written_after: float | None = None) -> FoundCheckpoint:
    """The newest checkpoint whose files are all as they were written.

    Args:
        resumable: pass over checkpoints without optimizer state (`training.save_only_model`).
        written_after: look only at checkpoints written later than this (:func:`written_at`).
    """
    skipped: list[str] = []
    for path in reversed(list_checkpoints(output_dir)):
        if written_after is not None and written_at(path) <= written_after:
            continue
        try:
            if resumable and not read_manifest(path).get("resumable", False):
                skipped.append(f"{path} holds no optimizer state (training.save_only_model): it cannot be resumed")
                continue
            verify_checkpoint(path)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return FoundCheckpoint(path, tuple(skipped))
    return FoundCheckpoint(None, tuple(skipped))


def remove_old(output_dir: str | Path, limit: int | None, *, newest: Path, best_step: int | None) -> list[Path]:
    """Deletes the oldest checkpoints beyond `limit`; never the best one, nor `newest`, which was just written.

    A folder loses its name before its first file goes, so that a crash in between leaves no damaged checkpoint.
    """
    if limit is None:
        return []
    others = [p for p in list_checkpoints(output_dir) if p != newest and checkpoint_step(p) != best_step]
    # Besides `newest`, limit - 1 may stay. Folders of later steps than the newest belong to a course that was left.
    surplus = others[: max(0, len(others) - (limit - 1))]
    for path in surplus:
        doomed = path.with_name(f".deleting-{path.name}-{os.getpid()}")
        path.rename(doomed)
        shutil.rmtree(doomed)
    return surplus


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file or folder entry is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
