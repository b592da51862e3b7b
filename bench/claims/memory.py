"""Peak memory of many configurations: what QLoRA of each model takes at least, what runs under a cap, how right the planner is."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from bench.claim import Claim, Finding, Row, Rows, Run, main
from bench.claims.settings import PROJECT_ENVIRONMENT
from bench.memory_settings import GROUPS
from bench.planned import error_percent
from bench.rows import significant

RUNS = tuple(
    Run(name, "bench.memory", (name, "--bpe={bpe}", "--folder", "{scratch}"), environment=PROJECT_ENVIRONMENT, packages=("bitsandbytes",))
    for name in GROUPS
)
CONFIGURATIONS = 24  # that the planner is to be held against, at least
PLANNER = "plan against measured peak"


def judge(rows: Rows) -> list[Finding]:
    measured = [row for name in GROUPS for row in rows.get(name, ()) if "name" in row]
    return [
        _peak("Qwen3-VL-8B QLoRA, vocabulary and tower quantised too", 5.5, measured, "8b-least"),
        _peak("Qwen3-VL-4B QLoRA, 448 px", 3.6, measured, "4b-448-least"),
        _peak("Qwen2.5-VL-7B QLoRA", 5.5, measured, "2.5-7b-least"),
        _peak("Qwen3-VL-30B-A3B QLoRA", 17, measured, "30b-a3b-least"),
        under_cap("Qwen3-VL-30B-A3B QLoRA under a cap", 20, measured, "30b-a3b"),
        _peak("Qwen2.5-VL-72B QLoRA", 40, measured, "2.5-72b-least"),
        under_cap("Qwen3-VL-8B full tuning, tower frozen, under a cap", 80, measured, "8b-tuned"),
        *_planner(measured),
    ]


def _peak(what: str, reach: float, measured: Sequence[Row], prefix: str) -> Finding:
    """The least peak among the configurations that try for it."""
    return _least(f"{what}: peak allocated", reach, measured, prefix, "peak_allocated_gib", lambda row: True)


def under_cap(what: str, cap: float, measured: Sequence[Row], prefix: str) -> Finding:
    """Whether any ran while torch could reserve no more than the cap; the value is what the smallest reserved."""
    return _least(f"{what} of {cap:g} GiB: reserved", cap, measured, prefix, "peak_reserved_gib", lambda row: row["cap_gib"] == cap)


def _least(what: str, reach: float, measured: Sequence[Row], prefix: str, figure: str, wanted: Callable[[Row], bool]) -> Finding:
    found = [row for row in measured if row["name"].startswith(prefix) and wanted(row)]
    told = [row for row in found if figure in row]
    if not told:
        return Finding(what, reach, None, " GiB", at_most=True, reason="a CPU tells no memory" if found else "no row")
    best = min(told, key=lambda row: row[figure])
    return Finding(what, reach, significant(best[figure]), " GiB", at_most=True, compared=(best["label"],))


def _planner(measured: Sequence[Row]) -> list[Finding]:
    """How far the planner's figures for exactly these packs and settings are from what was measured."""
    errors = {row["label"] + row["name"]: error for row in measured if (error := error_percent(row)) is not None}
    labels = tuple(dict.fromkeys(row["label"] for row in measured if row["label"] + row["name"] in errors))

    def finding(what: str, reach: float, value: Callable[[list[float]], float], unit: str = "%", *, at_most: bool = True) -> Finding:
        if not errors:
            return Finding(what, reach, None, unit, at_most=at_most, reason="no row with both a peak and a plan")
        return Finding(what, reach, significant(value(list(errors.values())), 3), unit, at_most=at_most, compared=labels)

    return [
        finding(f"{PLANNER}, configurations", CONFIGURATIONS, lambda found: float(len(found)), "", at_most=False),
        finding(f"{PLANNER}, median error", 3, lambda found: statistics.median(map(abs, found))),
        finding(f"{PLANNER}, most under-predicted", 3, lambda found: max(0.0, -min(found))),
        finding(f"{PLANNER}, most over-predicted", 10, lambda found: max(0.0, max(found))),
    ]


CLAIM = Claim(
    "memory",
    "Peak memory, and the planner's figures for exactly these packs and settings",
    RUNS,
    judge,
    note="`chart`, native pixels unless said otherwise, steps of two packs (one where state is paged). Weights are random: made, and quantised, one matrix after "
    "the other on the GPU. Peaks are what torch has allocated at most from the second step on; the CUDA context is not in them. A cap is "
    "set with `torch.cuda.set_per_process_memory_fraction`. GRPO: prompts of 1,024 "
    "image and 100 text tokens, completions of 256, rollouts included in the peak.",
)

if __name__ == "__main__":
    main(CLAIM)
