"""Which files and addresses a data row may name, and where they lie.

A row is written by somebody else: it must not be able to make a training run read a file that the user never meant to
give it. A path is looked up beside the data file, then in `media_dir`, then in `allowed_dirs`; symbolic links and `..`
are followed first, and what lies outside of those folders is refused.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from finesight.data.conversation import MediaRef
from finesight.errors import MediaError

MAX_DATA_URL_BYTES = 64 * 2**20  # decoded; the largest photos are a few tens of MiB
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2"})
VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts", ".3gp", ".ogv"})

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")  # two letters at least: `C:` is a drive
_SEARCHES_PER_POLICY = 20  # in vain; each costs a few dozen look-ups on disk
_FOLDERS_PER_HINT = 200
_LONGEST_PATH = 4096  # characters; PATH_MAX on Linux


@dataclass(frozen=True, eq=False)
class MediaPolicy:
    """What rows may name. One policy serves one source of rows, and remembers what it has looked up.

    Attributes:
        roots: further folders that media may lie in (the recipe's `data.allowed_dirs`).
        allow_urls: whether http(s) addresses may be fetched (`data.allow_urls`).
        media_dir: second folder that paths are resolved against. It may also play the part of the folders that paths
            begin with: with `demo/images/1.png` in the rows and the file at `<media_dir>/images/1.png`, it stands for
            `demo`. The first path that can only be found so fixes what it stands for; other beginnings are then refused,
            so that `train/1.png` and `val/1.png` can never become the same file.
        media_dir_setting: name of that setting in the recipe, for messages.
        in_memory: the rows are no file's: `beside` is the present folder, and messages name arguments of Python.
    """

    roots: tuple[Path, ...] = ()
    allow_urls: bool = False
    media_dir: Path | None = None
    media_dir_setting: str = "media_dir"
    in_memory: bool = False
    _refs: dict[tuple[str, str], MediaRef] = field(default_factory=dict, init=False, repr=False)
    _real_folders: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    _stands_for: list[tuple[str, ...]] = field(default_factory=list, init=False, repr=False)  # none or one
    _searched: set[str] = field(default_factory=set, init=False, repr=False)  # paths that no folder nearby would make resolve
    _hints: list[Path] = field(default_factory=list, init=False, repr=False)  # folders that would for others

    @property
    def stands_for(self) -> str | None:
        """The leading folders of paths that `media_dir` was found to stand for, or None."""
        return str(Path(*self._stands_for[0])) if self._stands_for else None

    def resolve(self, text: str, *, beside: Path) -> MediaRef:
        """What a row means by a path, `file://` address, http(s) address or data URL.

        Args:
            text: as the row has it. A folder stands for the frames of a video, in the natural order of their names.
            beside: folder of the data file.

        Raises:
            MediaError: nothing is there, it lies outside of what the user allowed, or the address is of another kind.
        """
        if not isinstance(text, str) or not text.strip():
            raise MediaError("an image or video path is empty; give a path, or remove the entry")
        if text[:5].lower() == "data:":
            return MediaRef(data=_decode_data_url(text))
        known = self._refs.get((text, str(beside)))
        if known is None:
            known = self._refs[(text, str(beside))] = self._resolve_new(text.strip(), beside)
        return known

    def _resolve_new(self, text: str, beside: Path) -> MediaRef:
        scheme = match[1].lower() if (match := _SCHEME.match(text)) else ""
        if scheme in ("http", "https"):
            if not self.allow_urls:
                raise MediaError(
                    f"{shown(text)} is an address on the network; set data.allow_urls: true to fetch it, or download it and give its path"
                )
            if not urlsplit(text).hostname:
                raise MediaError(f"{shown(text)} names no host; give a whole address")
            return MediaRef(url=text)
        if scheme == "file":
            text = _path_of_file_url(text)
        elif scheme and text[len(scheme) :].startswith("://"):
            raise MediaError(
                f"{shown(text)}: {scheme}:// is not supported; download it and give its path, or use http(s) with data.allow_urls: true"
            )
        if len(text) > _LONGEST_PATH or "\0" in text:
            raise MediaError(f"{shown(text)} is no path; write base64 as a data URL (data:image/png;base64,…)")
        real = self._locate(text, beside)
        mode = real.stat().st_mode
        if stat.S_ISDIR(mode):
            return MediaRef(frames=self._frames(real, text, beside))
        if not stat.S_ISREG(mode):
            raise MediaError(f"{shown(text)} is no regular file")
        return MediaRef(path=str(real))

    def _locate(self, text: str, beside: Path) -> Path:
        """The real path of an existing file or folder within what is allowed."""
        path = Path(text)
        allowed = [Path(self._real(folder)) for folder in (beside, self.media_dir, *self.roots) if folder is not None]
        bases = [path] if path.is_absolute() else [folder / path for folder in allowed]
        outside: Path | None = None
        for candidate in bases:
            real = self._existing(candidate)
            if real is not None and _is_within(real, allowed):
                return real
            outside = outside or real
        if (real := self._in_place_of_first_folders(path, allowed)) is not None:
            return real
        if outside is not None:
            remedy = f"add {outside.parent} to data.allowed_dirs"
            remedy += " (in Python the argument allowed_dirs)" if self.in_memory else f", or set {self.media_dir_setting} to it"
            raise MediaError(f"{shown(text)} lies at {outside}, outside of the folders that media may be read from; {remedy}")
        raise MediaError(self._missing(text, path, beside, allowed))

    def _in_place_of_first_folders(self, path: Path, allowed: list[Path]) -> Path | None:
        if self.media_dir is None or ".." in path.parts:
            return None
        parts, media_dir = path.parts, Path(self._real(self.media_dir))
        if self._stands_for:
            first = self._stands_for[0]
            lengths: range | tuple[int, ...] = (len(first),) if parts[: len(first)] == first else ()
        else:
            lengths = range(1, len(parts))
        for length in lengths:
            real = self._existing(media_dir.joinpath(*parts[length:]))
            if real is not None and _is_within(real, allowed):
                if not self._stands_for:
                    self._stands_for.append(parts[:length])
                return real
        return None

    def _existing(self, candidate: Path) -> Path | None:
        """The path with symbolic links and `..` followed, or None where nothing is."""
        try:
            if candidate.name in ("", ".."):
                real = Path(os.path.realpath(candidate))
            else:
                real = Path(self._real(candidate.parent), candidate.name)
                if stat.S_ISLNK(real.lstat().st_mode):
                    real = Path(os.path.realpath(real))
            real.stat()
        except (OSError, ValueError):  # not there, name too long, not readable
            return None
        return real

    def _real(self, folder: Path) -> str:
        """`realpath`, remembered: rows name few folders and many files."""
        key = str(folder)
        real = self._real_folders.get(key)
        if real is None:
            real = self._real_folders[key] = os.path.realpath(key)
        return real

    def _frames(self, folder: Path, text: str, beside: Path) -> tuple[MediaRef, ...]:
        allowed = [Path(self._real(f)) for f in (beside, self.media_dir, *self.roots) if f is not None]
        names = sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES), key=lambda p: _natural(p.name))
        if not names:
            raise MediaError(f"{shown(text)} is a folder without images; give a file, or a folder with the frames of a video")
        frames = []
        for name in names:
            real = self._existing(name)
            if real is None or not _is_within(real, allowed):
                raise MediaError(f"{name} is a link out of the folders that media may be read from; add its folder to data.allowed_dirs")
            frames.append(MediaRef(path=str(real)))
        return tuple(frames)

    def _missing(self, text: str, path: Path, beside: Path, allowed: list[Path]) -> str:
        looked = (
            f"looked in the present folder, {beside}, since the rows are in memory" if self.in_memory else "looked beside the data file"
        )
        looked += "" if self.media_dir is None else f" and in {self.media_dir_setting} ({self.media_dir})"
        message = f"{shown(text)} does not exist ({looked})"
        if path.is_absolute() and not any(_is_within(path, [root]) for root in allowed):
            message = f"{shown(text)} does not exist, or its folder is not in data.allowed_dirs"
        if self._stands_for and path.parts[: len(self._stands_for[0])] != self._stands_for[0]:
            message += (
                f"; {self.media_dir_setting} already stands for {self.stands_for!r}, which this path does not begin with: "
                "give the rows one common first folder"
            )
        elif "\\" in text:
            message += "; it is written with backslashes, use forward slashes"
        elif (hint := self._hint(path, beside)) and self.in_memory:
            message += f"; it can be found from {hint}: give the path of the data file in place of its rows, or whole paths in the rows"
        elif hint:
            message += f"; {self.media_dir_setting}: {hint} would make it resolve"
        return message

    def _hint(self, path: Path, beside: Path) -> str | None:
        """A folder that, as `media_dir`, would make this path resolve, if a few look-ups find one."""
        if ".." in path.parts:
            return None
        near = Path(self._real(beside))
        parts = path.parts[1:] if path.is_absolute() else path.parts
        suffixes = [Path(*parts[length:]) for length in range(0 if path.is_absolute() else 1, len(parts))]

        def resolves(folder: Path) -> bool:
            within = suffixes if folder == near else (path, *suffixes)
            return any(self._existing(folder / suffix) is not None for suffix in within)

        # Rows tend to be wrong in the same way: what was found for one costs little to try for all others.
        found = next((folder for folder in self._hints if resolves(folder)), None)
        if found is None and str(path) not in self._searched and max(len(self._searched), len(self._hints)) < _SEARCHES_PER_POLICY:
            found = near if resolves(near) else next((folder for folder in _folders_in(near) if resolves(folder)), None)
            if found is None:
                self._searched.add(str(path))
            else:
                self._hints.append(found)
        return None if found is None else str(found)


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(e.path) for _, e in zip(range(_FOLDERS_PER_HINT), entries, strict=False) if e.is_dir())
    except OSError:
        return []


def shown(text: str) -> str:
    """A path or address as messages quote it: one line, not too long."""
    text = text if len(text) <= 160 else text[:120] + f"… ({len(text)} characters)"
    return repr(text)


def _is_within(path: Path, folders: list[Path]) -> bool:
    return any(path == folder or path.is_relative_to(folder) for folder in folders)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `frame10` after `frame9`."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _path_of_file_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise MediaError(f"{shown(text)} names a host ({parts.netloc}); a file on this machine is written file:///folder/name")
    # A '#' or '?' in a file name is seldom escaped; nothing else it could mean here.
    rest = parts.path + (f"?{parts.query}" if parts.query else "") + (f"#{parts.fragment}" if parts.fragment else "")
    return unquote(rest)


def _decode_data_url(text: str) -> bytes:
    header, comma, body = text[5:].partition(",")
    if not comma:
        raise MediaError("a data URL has no comma; it is written data:image/png;base64,…")
    if len(body) > MAX_DATA_URL_BYTES * 4 // 3 + 4:
        raise MediaError(f"a data URL holds more than {MAX_DATA_URL_BYTES // 2**20} MiB; write it to a file and give its path")
    if header.lower().endswith(";base64"):
        try:
            content = base64.b64decode("".join(unquote(body).split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise MediaError(f"a data URL is not valid base64 ({error})") from None
    else:
        content = unquote_to_bytes(body)
    if not content:
        raise MediaError("a data URL is empty")
    return content
