"""GGUF for llama.cpp: its own converter run on a merged checkpoint, once for the language model and once for the vision part."""

from __future__ import annotations

import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finesight.errors import ExportError

CONVERTER = "convert_hf_to_gguf.py"
_MAGIC = b"GGUF"


@dataclass(frozen=True)
class GGUFHeader:
    """The first fields of a GGUF file (ggml's docs/gguf.md), all little-endian."""

    version: int
    num_tensors: int


def find_converter(given: str | Path | None) -> Path:
    """llama.cpp's converter.

    Args:
        given: the script, or the folder of llama.cpp; None: on the PATH, or in a folder llama.cpp here.

    Raises:
        ExportError: it is not where it was said to be, or nowhere.
    """
    if given is not None:
        path = Path(given).expanduser()
        path = path / CONVERTER if path.is_dir() else path
        if not path.is_file():
            raise ExportError(f"{path} does not exist. Give --llama-cpp the folder of llama.cpp, or its {CONVERTER}.")
        return path
    found = shutil.which(CONVERTER)
    local = Path("llama.cpp") / CONVERTER
    if found is None and not local.is_file():
        raise ExportError(
            f"llama.cpp's {CONVERTER} was not found. Get it, and give --llama-cpp llama.cpp:\n"
            f"  git clone --depth 1 https://github.com/ggml-org/llama.cpp && pip install -r llama.cpp/requirements.txt\n"
            "or export with --to merged, and convert that folder where llama.cpp is."
        )
    return Path(found) if found else local


def gguf_files(output: Path, name: str, dtype: str) -> tuple[Path, Path]:
    """(language model, vision part) in the folder of an export."""
    return output / f"{name}-{dtype}.gguf", output / f"mmproj-{name}-{dtype}.gguf"


def commands(converter: str | Path, merged: Path, output: Path, name: str, dtype: str) -> list[list[str]]:
    """The two calls of the converter."""
    kind = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[dtype]
    text, vision = gguf_files(output, name, kind)
    shared = [sys.executable, str(converter), str(merged), "--outtype", kind]
    return [[*shared, "--outfile", str(text)], [*shared, "--mmproj", "--outfile", str(vision)]]


def convert(merged: Path, output: Path, name: str, dtype: str, converter: str | Path | None, say: Callable[[str], None]) -> list[Path]:
    """Runs the converter on a merged checkpoint; returns the two files.

    Args:
        name: of the files.
        dtype: of the merged weights, which the files keep.
        converter: as :func:`find_converter`.
        say: told each command before it runs.

    Raises:
        ExportError: the converter is missing, it fails, or it leaves no GGUF file.
    """
    found = find_converter(converter)
    made = []
    for command in commands(found, merged, output, name, dtype):
        say(shlex.join(command))
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            tail = "\n".join(f"  {line}" for line in done.stdout.strip().splitlines()[-8:])
            raise ExportError(f"{CONVERTER} failed ({done.returncode}); the merged checkpoint stays at {merged}. It ended with:\n{tail}")
        path = Path(command[-1])
        prefixed = path.with_name(f"mmproj-{path.name}")  # some versions put this in front whatever the name
        if "--mmproj" in command and prefixed.is_file() and not path.exists():
            prefixed.rename(path)
        header = read_header(path)
        say(f"{path}: GGUF {header.version}, {header.num_tensors} tensors, {path.stat().st_size / 2**30:.2f} GiB")
        made.append(path)
    return made


def read_header(path: Path) -> GGUFHeader:
    """The header of a GGUF file.

    Raises:
        ExportError: there is no such file, or it is no GGUF file with tensors in it.
    """
    try:
        with path.open("rb") as file:
            content = file.read(16)
    except OSError as error:
        raise ExportError(f"{path} was not written by {CONVERTER}: {error.strerror}. Try a newer llama.cpp.") from None
    if len(content) < 16 or content[:4] != _MAGIC:
        raise ExportError(f"{path} is no GGUF file. Try a newer llama.cpp.")
    version, tensors = struct.unpack("<IQ", content[4:])
    if not tensors:
        raise ExportError(f"{path} holds no tensors. Try a newer llama.cpp.")
    return GGUFHeader(version, tensors)
