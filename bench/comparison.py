"""How rows are compared: only what did the same work, and never by the kinder of two figures."""

from __future__ import annotations

from collections.abc import Iterable

from bench.claim import Finding, Rows, labelled
from bench.rows import Row, significant

# Means over different numbers of samples of one workload may differ so much.
MEAN_TOLERANCE = 0.03


def fastest(rows: Iterable[Row]) -> Row | None:
    """The row with the most samples a second, over all steady steps."""
    return max(rows, key=lambda row: row["samples_s_wall"], default=None)


def ratio(row: Row, other: Row) -> float:
    """How many times as fast: by median steps or by all steady steps, whichever is less."""
    return significant(min(row[name] / other[name] for name in ("samples_s", "samples_s_wall")), 3)


def difference(row: Row, other: Row) -> str | None:
    """Why two rows cannot be compared, or None."""
    for name in ("kind", "per_image", "model"):
        if row[name] != other[name]:
            return f"{name} is {row[name]} and {other[name]}"
    if row["machine"]["boot"] != other["machine"]["boot"]:
        return "measured on different machines, or with a restart in between"
    for name in ("supervised_tokens_per_sample", "patches_per_sample"):
        if abs(row[name] / other[name] - 1) > MEAN_TOLERANCE:
            return f"{name} is {row[name]} and {other[name]}"
    if other.get("comparable") is False:
        return "the peer did other work than the samples ask for"
    return None


def faster(what: str, reach: float, rows: Rows, ours: Iterable[str], theirs: Iterable[str]) -> Finding:
    """Our fastest row of some labels over the fastest of others."""
    row, other = fastest(labelled(rows, *ours)), fastest(labelled(rows, *theirs))
    return compared(what, reach, row, other)


def compared(what: str, reach: float, row: Row | None, other: Row | None) -> Finding:
    """One row's speed over another's."""
    if row is None or other is None:
        return Finding(what, reach, None, reason="no row of ours" if row is None else "no row to compare with")
    if (reason := difference(row, other)) is not None:
        return Finding(what, reach, None, reason=reason)
    return Finding(what, reach, ratio(row, other), compared=(row["label"], other["label"]))


def single(rows: Rows, label: str, **wanted: object) -> Row | None:
    """The row of a label (with these values), if it was measured."""
    return next((row for row in rows.get(label, ()) if all(row.get(name) == value for name, value in wanted.items())), None)
