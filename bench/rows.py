"""Results as they come: one JSON object a line on stdout, told from whatever libraries print by its key "row".

Speed is told in two ways, which agree where steps are alike: by the median step, and by all steady steps together
(`_wall`), which also counts what only happens in some of them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.machine import provenance

Row = dict[str, Any]


def emit(row: Mapping[str, Any]) -> None:
    """Prints a result with the machine it was measured on, at once."""
    sys.stdout.write(json.dumps({**row, **provenance()}) + "\n")
    sys.stdout.flush()


def failed(row: Mapping[str, Any], error: BaseException | str) -> Row:
    """The row of a setting that gave no result, with the reason; the traceback goes to stderr."""
    if isinstance(error, BaseException):
        traceback.print_exception(error)
        lines = str(error).strip().splitlines()
        error = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return {**row, "failed": True, "reason": error[:400]}


def part(row: Row, measure: Callable[[], Row], *, stop_at: float, notes: Sequence[str]) -> Row:
    """The row of one part of a script; what fails is a row too, and the others go on.

    Args:
        stop_at: of `time.monotonic`; nothing begins after it.
        notes: of the program, as they are when the part is over.
    """
    if time.monotonic() > stop_at:
        return failed(row, "not measured: the time of this script was used up")
    begun = time.monotonic()
    try:
        row = {**row, **measure(), "notes": list(notes)}
    except Exception as error:
        row = failed(row, error)
    return {**row, "part_s": round(time.monotonic() - begun, 1)}


def parse(line: str) -> Row | None:
    """The result in a line of output, if it is one."""
    if not line.startswith("{"):
        return None
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and "row" in content else None


def speeds(step_s: Sequence[float], samples: int, **counts: float) -> dict[str, float]:
    """Rates over steady steps of `samples` samples each.

    Args:
        step_s: seconds of each, data waiting included.
        counts: further things counted over all of them together, for example tokens=…; each becomes `…_s`, a second.
    """
    total = sum(step_s)
    rates = {
        "samples_s": samples / statistics.median(step_s),
        "samples_s_wall": samples * len(step_s) / total,
        **{f"{name}_s": count / total for name, count in counts.items()},
    }
    return {name: significant(rate) for name, rate in rates.items()}


def significant(value: float, digits: int = 4) -> float:
    """Rounded to so many significant digits: what timing can bear, and no more."""
    return float(f"{value:.{digits}g}")
