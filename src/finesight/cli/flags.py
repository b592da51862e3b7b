"""Messages of the library in the options of the command, where there is no recipe whose settings they could name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from finesight.errors import FinesightError

# Messages of the library name settings of a recipe; these are the options that stand for them here.
_FLAGS = (
    (r"add (.+) to data\.allowed_dirs, or set the source\.media_dir to it", r"give --media-dir \1"),
    (r"the source\.media_dir: (.+?) would make it resolve", r"--media-dir \1 would make it resolve"),
    (r"the source\.media_dir", "--media-dir"),
    (r"[Ss]et model\.adapter to it and model\.name_or_path to its base", "Give it with --adapter, and its base with --model"),
    (r"\bSet model\.(adapter|name_or_path) to", r"Give model.\1"),
    (r"\bset data\.on_bad_row: skip", "add --on-bad-row skip"),
    (r"\bset data\.allow_urls: true", "add --allow-urls"),
    (r"data\.allow_urls: true", "--allow-urls"),
    (r"data\.on_bad_row: skip", "--on-bad-row skip"),
    (r"\bmodel\.name_or_path", "--model"),
    (r"\bmodel\.adapter", "--adapter"),
    (r"\b[Ss]et model\.load_in_(4bit|8bit|fp8): true", r"Give --load-in-\1"),
    (r"\b([Ss]et|leave out) model\.load_in_(4bit|8bit|fp8)(: false)?", r"Leave out --load-in-\2"),
    (r"\b(model\.)?load_in_(4bit|8bit|fp8)(: true)?", r"--load-in-\2"),
    (r"\bquantize_(vocabulary|tower)", r"--quantize-\1"),
    (r"\bevaluation\.batch_size", "--batch-size"),
    (r"\bevaluation\.max_completion_length", "--max-completion-length"),
    (r"\bdata\.(min|max)_pixels", r"--\1-pixels"),
)


def in_flags(message: str) -> str:
    """A message in the options of `finesight predict` and its siblings, in place of the settings of a recipe."""
    for setting, flag in _FLAGS:
        message = re.sub(setting, flag, message)
    return message


@contextmanager
def errors_in_flags() -> Iterator[None]:
    """Messages of errors as :func:`in_flags` puts them."""
    try:
        yield
    except FinesightError as error:
        error.args = (in_flags(str(error)),)
        raise
