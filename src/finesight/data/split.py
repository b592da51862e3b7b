"""Holds rows out for evaluation so that no image stands on both sides.

Rows that share an image (the same content, whatever its name) belong together: a model that has trained on a chart has
seen the answers to other questions about it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from finesight.data.conversation import Conversation
from finesight.data.media import media_key
from finesight.data.tables import FILE_SUFFIXES
from finesight.data_settings import DataSettings, SourceSettings
from finesight.errors import DataError


def is_share(eval_split: str) -> bool:
    """Whether a hold-out is a share or number of the training rows ('5%', 'last 4') rather than a path."""
    return eval_split.endswith("%") or eval_split.startswith("last ")


def held_out_source(data: DataSettings) -> SourceSettings | None:
    """Where held-out rows are read from, if `data.eval_split` is a path: read as the first training source is.

    Its columns, template, formatter and media folder are taken over; split and name only where they can mean something.

    Raises:
        DataError: `data.eval_split` is a bare number, which could be a share as well as a number of rows.
    """
    if data.eval_split is None or is_share(data.eval_split) or _is_none(data.eval_split):
        return None
    _refuse_number(data.eval_split)
    if not data.train:
        return SourceSettings(path=data.eval_split)
    changed: dict[str, object] = {"path": data.eval_split}
    if Path(data.eval_split).suffix.lower() in FILE_SUFFIXES:
        changed |= {"split": "train", "name": None}
    return data.train[0].model_copy(update=changed)


def hold_out(conversations: Sequence[Conversation], eval_split: str, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Divides rows into (train, held out), each in the order of `conversations`.

    A share is one of rows, met as nearly as whole groups allow; which groups is drawn from `seed`. 'last 4' holds out
    the last four rows and whatever shares an image with them. A row without images or videos is a group by itself.

    Args:
        eval_split: '5%' or 'last 4'. The path of a file is not for this function: read it (:func:`held_out_source`).

    Raises:
        DataError: one side would be empty, or `eval_split` is a path, a bare number or 'none'.
    """
    _refuse_number(eval_split)
    if _is_none(eval_split):
        raise DataError(f"data.eval_split: {eval_split!r} holds no rows out; leave the setting away, or write '5%' or 'last 5'")
    groups = image_groups(conversations)
    if eval_split.startswith("last "):
        chosen = _last_groups(groups, len(conversations), int(eval_split[5:]))
    elif eval_split.endswith("%"):
        chosen = _drawn_groups(groups, len(conversations) * float(eval_split[:-1]) / 100, seed)
    else:
        raise DataError(f"data.eval_split: {eval_split!r} is a path, whose rows are read and not divided off")
    out = {row for group in chosen for row in groups[group]}
    if not out or len(out) == len(conversations):
        empty = "held out" if not out else "left to train on"
        raise DataError(
            f"data.eval_split: {eval_split} of {len(conversations)} rows, which fall into {len(groups)} groups that share no image, leaves no row {empty}; "
            "give another share, more rows, or the path of a file to evaluate on"
        )
    train = [conversation for row, conversation in enumerate(conversations) if row not in out]
    held_out = [conversation for row, conversation in enumerate(conversations) if row in out]
    return train, held_out


def image_groups(conversations: Sequence[Conversation]) -> list[list[int]]:
    """Rows (by place) that share an image or video, directly or through others; in the order of their first rows.

    Raises:
        MediaError: an image or video cannot be read.
    """
    parent = list(range(len(conversations)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first_with: dict[str, int] = {}
    for row, conversation in enumerate(conversations):
        for part in conversation.media:
            if part.media is None:
                continue
            a, b = root(first_with.setdefault(media_key(part.media), row)), root(row)
            parent[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for row in range(len(conversations)):
        groups.setdefault(root(row), []).append(row)
    return list(groups.values())


def _is_none(eval_split: str) -> bool:
    return eval_split.strip().lower() in ("", "none", "null")


def _refuse_number(eval_split: str) -> None:
    if re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*", eval_split, re.IGNORECASE):
        raise DataError(
            f"data.eval_split: {eval_split} may be a share or a number of rows; write '5%' or 'last 5', or the path of a file as ./{eval_split.strip()}"
        )


def _last_groups(groups: Sequence[Sequence[int]], num_rows: int, count: int) -> list[int]:
    return [index for index, group in enumerate(groups) if group[-1] >= num_rows - count]


def _drawn_groups(groups: Sequence[Sequence[int]], wanted: float, seed: int) -> list[int]:
    """Groups in a drawn order, each taken if it brings the number of rows nearer to what is wanted."""
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    chosen, rows = [], 0
    passed = None  # the smallest of those that were too large
    for index in order:
        size = len(groups[index])
        if rows + size <= wanted:
            chosen.append(index)
            rows += size
        elif passed is None or size < len(groups[passed]):
            passed = index
    if passed is not None:
        over = rows + len(groups[passed]) - wanted
        # A held-out side that is a little too large is better than none.
        if not chosen or over < wanted - rows:
            chosen.append(passed)
    return chosen
