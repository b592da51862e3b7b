"""Puts results of calls that were kept in folders of their own (`--results`) beside those of bench/results.

    python -m bench.merge FOLDER [FOLDER …]

Of each setting of a claim, by its label, the rows that were measured last stay. A setting that failed takes the place of nothing that was
measured; of a group of configurations, of which some failed, those that were measured before stay too. What the rows say is judged anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bench.claim import RESULTS, results_path, say, verdict, write_results
from bench.claims import claim_of
from bench.rows import Row


def merged(before: Sequence[Row], further: Sequence[Row]) -> list[Row]:
    """Rows of one claim and model with further ones.

    Rows of one label belong together, and within it those of one name (`name`, a configuration; without one the whole label).
    """
    kept = _grouped(before)
    for label, fresh in _grouped(further).items():
        if label not in kept:
            kept[label] = fresh
            continue
        old, measured = kept[label], [row for row in fresh if not row.get("failed")]
        if not measured:
            if all(row.get("failed") for row in old) and _last(fresh) > _last(old):
                kept[label] = fresh
        elif _last(measured) > _last([row for row in old if not row.get("failed")]):
            # Of a script that measures several, what failed this time or was not asked for stays as it was measured.
            names = {row.get("name") for row in measured}
            stays = [row for row in old if not row.get("failed") and row.get("name") not in names] if None not in names else []
            known = names | {row["name"] for row in stays}
            failed = [row for row in fresh if row.get("failed") and row.get("name") not in known]
            kept[label] = [*measured, *stays, *failed]
    return [row for rows in kept.values() for row in rows]


def _grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["label"], []).append(row)
    return found


def _last(rows: Sequence[Row]) -> str:
    """When the last of them was measured; before all others where there is none."""
    return max((row["measured_at"] for row in rows), default="")


def merge_folder(folder: Path, into: Path) -> list[Path]:
    """Merges all results of a folder; returns the files that were written.

    Raises:
        ValueError: the folder has no results.
    """
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    contents = [content for content in contents if "claim" in content]
    if not contents:
        raise ValueError(f"{folder} has no results of a claim")
    written = []
    for content in contents:
        claim, model = claim_of(content["claim"]), content["model"]
        path = results_path(into, claim, model)
        before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        for finding in write_results(path, claim, model, merged(before, content["rows"])):
            say(verdict(finding))
        written.append(path)
    return written


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="what --results named")
    parser.add_argument("--into", type=Path, default=RESULTS)
    a = parser.parse_args(arguments)
    for folder in a.folders:
        for path in merge_folder(folder, a.into):
            say(f"wrote {path}")


if __name__ == "__main__":
    main()
