"""Where `finesight predict` writes: beside its place until all is answered, so that a run that was stopped can go on.

`OUT.partial` holds the answers so far, `OUT.partial.json` what they depend on. The same command takes them up again if nothing of
that has changed. Another one begins anew, and keeps what the earlier one answered under another name.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console

from finesight.data.conversation import Conversation, MediaRef
from finesight.data_settings import DataSettings
from finesight.errors import BadRow, DataError
from finesight.evaluation.results import prompt_text
from finesight.recipe import ModelSettings
from finesight.sampling.types import SamplingSettings
from finesight.wording import counted

# Settings of the data section that answers depend on.
_DATA = ("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels", "fps", "max_frames", "image_first")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".json")


@dataclass(frozen=True)
class Earlier:
    """What an earlier run of the same command has answered."""

    answers: int = 0
    next_index: int = 0  # of the conversations, where to go on
    left_out: tuple[BadRow, ...] = ()  # rows before it that have no answer
    others: int = 0  # answers in the partial file that another command gave


def dependencies(
    model: ModelSettings,
    settings: SamplingSettings,
    data: DataSettings,
    schema: Mapping[str, Any] | None,
    conversations: Sequence[Conversation],
) -> dict[str, str]:
    """What answers depend on: a digest of each, by what people are told where it is no longer the same.

    Files are told apart by size and time of change, not by content.
    """
    how = {name: value for name, value in asdict(settings).items() if name != "batch_size"}
    parts: dict[str, Any] = {
        "another model": [model.model_dump(mode="json"), _stamps(model.name_or_path), _stamps(model.adapter)],
        "other sampling settings": [how, schema],
        "other pixel limits or frame sampling": [getattr(data, name) for name in _DATA],
        "other questions or images": [_content(conversation) for conversation in conversations],
    }
    return {name: hashlib.sha256(json.dumps(part, default=str).encode()).hexdigest() for name, part in parts.items()}


def _stamps(folder: str | None) -> list[tuple[str, int, int]]:
    """Of the files of a checkpoint or adapter; empty for a name on the hub."""
    if folder is None or not Path(folder).is_dir():
        return []
    return [_stamp(path) for path in sorted(Path(folder).iterdir()) if path.suffix in _WEIGHT_SUFFIXES]


def _stamp(path: Path) -> tuple[str, int, int]:
    try:
        found = path.stat()
    except OSError:
        return str(path), -1, -1
    return str(path), found.st_size, found.st_mtime_ns


def _content(conversation: Conversation) -> list[Any]:
    where = conversation.source
    asked = conversation.prompt()
    return [where.file, where.row, [[turn.role, [[*_part(part), _media(part.media)] for part in turn.parts]] for turn in asked.turns]]


def _part(part: Any) -> list[Any]:
    names = ("type", "text", "resized_height", "resized_width", "min_pixels", "max_pixels", "fps", "num_frames")
    return [getattr(part, name) for name in names]


def _media(ref: MediaRef | None) -> Any:
    if ref is None:
        return None
    if ref.path is not None:
        return _stamp(Path(ref.path))
    if ref.frames is not None:
        return [_media(frame) for frame in ref.frames]
    return ref.url or hashlib.sha256(ref.data or (ref.image.tobytes() if ref.image is not None else b"")).hexdigest()


def check_free(output: Path | None, conversations: Sequence[Conversation]) -> None:
    """Refuses to replace answers.

    Raises:
        DataError: there is such a file; the message says whether it answers these conversations.
    """
    if output is None or not output.is_file():
        return
    asked = {(where.file, where.row, prompt_text(c)) for c in conversations if (where := c.source)}
    try:
        records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        answered = {(record["file"], record["row"], record["question"]) for record in records}
    except (OSError, TypeError, KeyError, ValueError):
        answered = set()
    what = f"answers all of this already ({counted(len(asked), 'question')})" if asked == answered else "holds something else"
    raise DataError(
        f"{output} is there and {what}. Add --overwrite to replace it once all is answered, or give another file with --output."
    )


@contextmanager
def opened(
    output: Path | None, depends_on: Mapping[str, str], conversations: Sequence[Conversation], console: Console
) -> Iterator[tuple[Callable[[str], None], Earlier]]:
    """What writes a line, and what is answered already. The file takes its place at the end; what was answered before an error stays.

    Args:
        output: None: stdout. A device or pipe is written to as it is.
        depends_on: of :func:`dependencies`.

    Raises:
        DataError: it cannot be written, or another process is writing it.
    """
    if output is None or (output.exists() and not output.is_file() and not output.is_dir()):  # the latter: /dev/null, a pipe
        with nullcontext(sys.stdout) if output is None else _writable(output, "w") as stream:
            yield lambda line: _write(stream, line), Earlier()
        return
    if output.is_dir():
        raise DataError(f"{output} is a folder. Give a file with --output.")
    partial, state = _beside(output)
    written = 0
    with _writable(partial, "a+") as file:
        _lock(file, partial)
        earlier = _taken_up(file, partial, state, depends_on, conversations, console)

        def begin() -> None:
            if earlier.others:
                _say(console, f"Its answers ({earlier.others:,}) are kept in {_keep(output, partial, state)}.")
            file.truncate(0)

        def write(line: str) -> None:
            nonlocal written
            if not written and not earlier.answers:
                begin()  # what an earlier run left stays until there is something in its place
                state.write_text(json.dumps(depends_on, indent=1), encoding="utf-8")
            _write(file, line)
            written += 1

        try:
            yield write, earlier
        except BaseException:
            if written + earlier.answers:
                _say(console, f"{counted(written + earlier.answers, 'answer')} so far: {partial}; the same command goes on from there.")
            elif partial.stat().st_size == 0:
                partial.unlink()
                state.unlink(missing_ok=True)
            raise
        if not written and not earlier.answers:
            begin()
    if output.exists():
        _say(console, f"{output} was there and is replaced.")
    partial.replace(output)
    state.unlink(missing_ok=True)


def _beside(output: Path) -> tuple[Path, Path]:
    """(The answers so far, what they depend on) of an output that is not whole yet."""
    return output.with_name(output.name + ".partial"), output.with_name(output.name + ".partial.json")


def _keep(output: Path, partial: Path, state: Path) -> Path:
    """Copies what another command answered to where that command would take it up if it were given a free output's name."""
    names = (output.with_name(f"{output.stem}.earlier-{number}{output.suffix}") for number in itertools.count(1))
    kept, kept_state = next(_beside(name) for name in names if not any(path.exists() for path in (name, *_beside(name))))
    try:
        shutil.copyfile(partial, kept)
        if state.exists():
            shutil.copyfile(state, kept_state)
    except OSError as error:
        raise DataError(f"{partial} cannot be kept as {kept}: {error.strerror}. Give another place with --output.") from None
    return kept


def _taken_up(
    file: TextIO, partial: Path, state: Path, depends_on: Mapping[str, str], conversations: Sequence[Conversation], console: Console
) -> Earlier:
    """What of the partial file goes for this command; a line that was cut off is removed."""
    file.seek(0)
    whole, keys = 0, []
    for line in file:
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            keys.append((record["file"], record["row"]))
        except (TypeError, KeyError, ValueError):
            break
        whole += len(line.encode())
    if not keys:
        return Earlier()
    try:
        before = json.loads(state.read_text(encoding="utf-8"))
        changed = [name for name, digest in depends_on.items() if before.get(name) != digest]
    except (OSError, ValueError, AttributeError):
        changed = ["another command"]
    earlier = None if changed else _matched(keys, conversations)
    if earlier is None:
        _say(console, f"{partial} was made with {' and '.join(changed) or 'another order'}: all is answered anew.")
        return Earlier(others=len(keys))
    file.truncate(whole)
    file.seek(0, 2)
    _say(console, f"{partial} holds {earlier.answers:,} of {len(conversations):,} answers; going on from there.")
    return earlier


def _matched(keys: Sequence[tuple[str, int]], conversations: Sequence[Conversation]) -> Earlier | None:
    """Finds the rows of earlier answers, which stand in the order of the conversations; None if they do not."""
    left_out: list[BadRow] = []
    index = 0
    for key in keys:
        while index < len(conversations) and (conversations[index].source.file, conversations[index].source.row) != key:
            where = conversations[index].source
            left_out.append(BadRow(where.file, where.row, "left out before the run was stopped"))
            index += 1
        if index == len(conversations):
            return None
        index += 1
    return Earlier(len(keys), index, tuple(left_out))


def _lock(file: TextIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise DataError(f"Another process is writing {path}. Wait for it, or give another place with --output.") from None


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _writable(path: Path, mode: str) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return cast(TextIO, path.open(mode, encoding="utf-8", newline="\n"))
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}. Give another place with --output.") from None


def _write(stream: TextIO, line: str) -> None:
    try:
        stream.write(line)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise DataError(f"Answers cannot be written: {error.strerror}. Give another place with --output.") from None
