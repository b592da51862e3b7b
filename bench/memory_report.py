"""Writes docs/memory.md and its plot: what the planner says of every model, and how far it is off where memory was measured.

    python -m bench.memory_report            # write
    python -m bench.memory_report --check    # fail if the document is not what planner and results say
    python -m bench.memory_report --errors   # plan against measurement, row by row

Measurements are the `rows` of the claim `memory` in `bench/results`; bench/README.md says what a row holds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.claim import DEFAULT_MODEL, RESULTS, say
from bench.claims import claim_of
from bench.claims.memory import CLAIM, PLANNER
from bench.machine import CHECKOUT
from bench.planned import plan_of_row
from bench.report import Results
from finesight.planner.calibration import GIB
from finesight.planner.catalogue import CATALOGUE
from finesight.planner.moments import MemoryPlan
from finesight.planner.plan import plan_memory
from finesight.planner.shapes import ModelShape
from finesight.planner.sizes import PackSizes, filled_run
from finesight.recipe import Recipe
from finesight.recipe_files import parse_recipe

DOCUMENT, PLOT = CHECKOUT / "docs" / "memory.md", CHECKOUT / "docs" / "memory.svg"
# What is to be reached: median of the errors' sizes, most under, most over; percent.
REACH = (3.0, 3.0, 10.0)
LEAST_ROWS = 24

METHODS: dict[str, dict[str, Any]] = {
    "LoRA, bf16": {},
    "LoRA, 8-bit float base": {"model.load_in_fp8": True},
    "LoRA, 8-bit base": {"model.load_in_8bit": True},
    "QLoRA, 4-bit base": {"model.load_in_4bit": True},
    "QLoRA, vocabulary and tower too": {"model.load_in_4bit": True, "model.quantize_vocabulary": True, "model.quantize_tower": True},
    "full, stochastic rounding, 8-bit Adam": {
        "tuning.method": "full",
        "tuning.bf16_updates": "stochastic_rounding",
        "training.optim": "adamw_8bit",
    },
}
PIXELS = (448 * 448, 1024 * 1024)
# Budget of a pack and policy: the smallest that is sensible, and the usual one.
WAYS = ((2048, "offload"), (8192, "full"))
SHARDED_MODELS = ("Qwen3-VL-8B", "Qwen3-VL-32B", "Qwen3-VL-30B-A3B", "Qwen2.5-VL-72B")
SHARDED_METHODS: dict[str, dict[str, Any]] = {"LoRA, bf16": {}, "full tuning": {"tuning.method": "full"}}
SHARDING_GPUS = (2, 4, 8)


@dataclass(frozen=True)
class Measured:
    """One measured peak, and what the planner says of the same run."""

    row: dict[str, Any]
    plan: MemoryPlan

    @property
    def model(self) -> str:
        """As the planner's catalogue writes it."""
        return next(name for name in CATALOGUE if name.casefold() == self.row["model"].casefold())

    @property
    def method(self) -> str:
        return str(self.row["method"])

    @property
    def pack(self) -> PackSizes:
        """The largest of the step."""
        return max(self.plan.sizes.packs, key=lambda pack: pack.tokens)

    @property
    def peak_gib(self) -> float:
        return float(self.row["peak_allocated_gib"])

    @property
    def planned_gib(self) -> float:
        return self.plan.peak_bytes / GIB

    @property
    def error_percent(self) -> float:
        """Above zero: planned too high."""
        return 100 * (self.planned_gib / self.peak_gib - 1)

    @property
    def setting(self) -> str:
        """What else a reader must know of it."""
        parts = ["GRPO"] if self.row.get("rollout") else []
        parts += [name.partition(".")[2].replace("=", ": ") for name in self.row.get("further", ()) if not name.startswith(_IN_METHOD)]
        parts += [f"at most {self.row['max_pixels']:,} pixels"] if self.row.get("max_pixels") else []
        parts += ["compiled"] if self.row["compiled"] else []
        return ", ".join(parts)


# Settings that the method tells, or that go with every one of its configurations.
_IN_METHOD = ("tuning.", "training.optim=adamw", "training.max_grad_norm")


def recipe_for(model: str, settings: dict[str, Any]) -> Recipe:
    """A recipe from settings by dotted name; `rewards`, a list, has a name of its own."""
    content: dict[str, Any] = {"model": {"name_or_path": model}}
    for name, value in settings.items():
        section, dot, key = name.partition(".")
        if dot:
            content.setdefault(section, {})[key] = value
        else:
            content[section] = value
    return parse_recipe(content)


def read_rows(folder: Path = RESULTS) -> list[Measured]:
    """All measured peaks."""
    rows = [row for row in Results(folder).of(DEFAULT_MODEL, CLAIM.name) if "peak_allocated_gib" in row]
    return [Measured(row, plan_of_row(row)) for row in rows]


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*rows, *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def plan_of(
    shape: ModelShape, settings: dict[str, Any], pixels: int, budget: int, policy: str, gpus: int = 1, sharding: str = "none"
) -> MemoryPlan:
    """The plan of a table's field: packs filled with images of one size, on a GPU with grouped attention."""
    chosen = {**settings, "training.token_budget": budget, "training.gradient_checkpointing": policy, "training.train_batch_size": 16}
    recipe = recipe_for(shape.name, {**chosen, "training.sharding": sharding})
    return plan_memory(shape, recipe, filled_run(shape, budget, pixels, -(-16 // gpus)), processes=gpus)


def sharding_table() -> str:
    """Peaks on each of several GPUs, with all of the model on each and divided over them."""
    ways = [(1, "none"), (2, "none"), *((gpus, "full") for gpus in SHARDING_GPUS)]
    heads = ["model", "method", *(f"{gpus} GPU{'s' if gpus > 1 else ''}, sharding {sharding}" for gpus, sharding in ways)]
    lines = []
    for name in SHARDED_MODELS:
        for method, settings in SHARDED_METHODS.items():
            plans = [plan_of(CATALOGUE[name], settings, 1024**2, 8192, "full", gpus, sharding) for gpus, sharding in ways]
            lines.append([name, method, *(f"{plan.peak_bytes / GIB:.1f}" for plan in plans)])
    return table(heads, lines)


def model_table(measured: Sequence[Measured]) -> str:
    """Every model × method × pixels × way; methods that were measured are marked."""
    marked = {(row.model, row.method) for row in measured}
    sides = [round(pixels**0.5) for pixels in PIXELS]
    heads = ["model", "method", *(f"{side}², {policy}, {budget:,}" for side in sides for budget, policy in WAYS)]
    lines = []
    for name, shape in CATALOGUE.items():
        for method, settings in METHODS.items():
            figures = [plan_of(shape, settings, pixels, budget, policy).peak_bytes / GIB for pixels in PIXELS for budget, policy in WAYS]
            mark = " †" if (name, method) in marked else ""
            lines.append([name, method + mark, *(f"{figure:.1f}" for figure in figures)])
    return table(heads, lines)


def error_table(measured: Sequence[Measured]) -> str:
    lines = [
        [
            row.model,
            row.method,
            str(row.plan.policy),
            row.setting,
            f"{row.pack.tokens:,}",
            f"{row.pack.total_patches:,}",
            f"{row.peak_gib:.2f}",
            f"{row.planned_gib:.2f}",
            f"{row.error_percent:+.1f}%",
            row.row.get("measured_at", "")[:10],
        ]
        for row in measured
    ]
    heads = ["model", "method", "activations", "setting", "tokens", "patches", "measured GiB", "planned GiB", "error", "date"]
    return table(heads, lines)


def cap_table(measured: Sequence[Measured]) -> str:
    """What ran while torch could reserve no more than on a smaller card."""
    lines = [
        [
            row.model,
            row.method,
            str(row.plan.policy),
            row.setting,
            f"{row.row['cap_gib']:g}",
            f"{row.peak_gib:.2f}",
            f"{row.row['peak_reserved_gib']:.2f}",
            str(row.row.get("out_of_memory", 0)),
        ]
        for row in measured
        if row.row.get("cap_gib")
    ]
    if not lines:
        return "None is measured yet.\n"
    return table(["model", "method", "activations", "setting", "cap GiB", "allocated GiB", "reserved GiB", "steps begun again"], lines)


def reach_table(folder: Path = RESULTS) -> str:
    """What is to be reached in memory, apart from the planner's errors."""
    results = Results(folder)
    lines = []
    for name in ("memory", "memory_peers", "grpo_cap"):
        for finding in claim_of(name).findings(results.of(DEFAULT_MODEL, name)):
            if finding.what.startswith(PLANNER):
                continue
            value = "not measured" if finding.value is None else f"{finding.value:g}{finding.unit}"
            outcome = {True: "reached", False: "missed", None: ""}[finding.reached]
            lines.append([finding.what, f"{'at most' if finding.at_most else 'at least'} {finding.reach:g}{finding.unit}", value, outcome])
    return table(["what", "reach", "measured", ""], lines)


def summary(measured: Sequence[Measured]) -> str:
    """The errors against what is to be reached."""
    if not measured:
        return "Nothing is measured yet.\n"
    errors = [row.error_percent for row in measured]
    median, under, over = statistics.median(map(abs, errors)), max(0.0, -min(errors)), max(0.0, max(errors))
    lines = [
        [what, f"at most {reach:g}%", f"{value:.1f}%", "reached" if value <= reach else "missed"]
        for what, reach, value in zip(
            ("median error", "most planned too low", "most planned too high"), REACH, (median, under, over), strict=True
        )
    ]
    count = len(measured)
    lines.append(["configurations measured", f"at least {LEAST_ROWS}", str(count), "reached" if count >= LEAST_ROWS else "missed"])
    return table(["what", "reach", "measured", ""], lines)


def document(measured: Sequence[Measured], folder: Path = RESULTS) -> str:
    """The whole of docs/memory.md."""
    return f"""\
# Memory

What a run takes of a GPU, from `finesight plan`. Written by `python -m bench.memory_report`; nothing in it is typed by hand.

## Every model

Peak allocated in GiB as planned, without the CUDA context (about 0.55 GiB) and what the allocator holds besides (a few percent).
Packs are filled with images of the size in the heading, 64 tokens of text beside each; `offload` and packs of 2,048 tokens are about
the least that is sensible, `full` and 8,192 the usual. LoRA: r=16 on all projections of the language model (of a mixture of
experts: on attention). The tower is frozen. Layers are compiled. Weights that do not fit one GPU are listed all the same.

† this method was measured on this model, with packs of other images: see below. The figures are plans.

{model_table(measured)}
## Several GPUs

Peak allocated in GiB on each GPU as planned, packs of 8,192 tokens with images of 1024² under the policy `full`. With `training.sharding: none` each
GPU has all of the model, and gradients are averaged. With `training.sharding: full` weights, gradients and optimizer state are divided
(FSDP2), each layer is gathered while it is computed, and the frozen tower stays whole. Full tuning keeps float32 masters and Adam's state in float32.
What FSDP2 holds besides was counted from its code, not measured. `finesight plan recipe.yaml --gpus 4 training.sharding=full` plans a recipe.

{sharding_table()}
## What is to be reached

Images at their native size unless said otherwise; what the rows of each claim are stands in [performance.md](performance.md).

{reach_table(folder)}
## Under a cap

A smaller card is stood for by `torch.cuda.set_per_process_memory_fraction`: torch can reserve no more than the cap. A step that runs out of
memory is begun again with a pack of it in two.

{cap_table(measured)}
## Plan against measurement

Peaks are `torch.cuda.max_memory_allocated` from the second step on{_gpus(measured)}. Plans are made anew by the present planner, from the packs
that were measured; the largest is given.

![Planned over measured peak](memory.svg)

{summary(measured)}
{error_table(measured)}
Most of the plan is derived: bytes of weights from the table of parameters, kept activations from the tables in
`src/finesight/planner/activations.py`, which tests hold to what autograd keeps of real layers. What is measured instead stands in
`src/finesight/planner/calibration.py`, each number with where it came from. The rows were used to look for what the plan had left out or
counted twice, each of which was then found in the code; no figure was fitted to them.

Values worked by hand are in `tests/planner`. That a forward and backward pass over 4-bit weights equals one over the same weights
dequantised to float32 is held by `tests/parity/test_quantized_parity.py`.
"""


def _gpus(measured: Sequence[Measured]) -> str:
    names = sorted({row.row["machine"]["gpu"] for row in measured if "machine" in row.row})
    return f" ({', '.join(names)})" if names else ""


def draw(measured: Sequence[Measured], path: Path) -> None:
    """Planned against measured peak, and the band that is to be kept."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "finesight"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 4.2))
    most = 1.1 * max([row.peak_gib for row in measured], default=1.0)
    _, under, over = REACH
    axes.fill_between([0, most], [0, most * (1 - under / 100)], [0, most * (1 + over / 100)], color="#dfe7ef", label="to be reached")
    axes.plot([0, most], [0, most], color="#9aa5b1", linewidth=1)
    for method in dict.fromkeys(row.method for row in measured):
        chosen = [row for row in measured if row.method == method]
        axes.scatter([row.peak_gib for row in chosen], [row.planned_gib for row in chosen], s=22, label=method, zorder=3)
    axes.set(xlabel="measured peak, GiB", ylabel="planned peak, GiB", xlim=(0, most), ylim=(0, most))
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the document is out of date")
    parser.add_argument("--errors", action="store_true", help="print plan against measurement with all moments")
    a = parser.parse_args(arguments)
    measured = read_rows()
    if a.errors:
        for row in measured:
            moments = ", ".join(f"{moment.name} {moment.total / GIB:.2f}" for moment in row.plan.moments)
            figures = f"{row.peak_gib:.2f} measured, {row.planned_gib:.2f} planned, {row.error_percent:+.2f}%"
            say(f"{row.model} {row.method} {row.row['settings']} {figures}\n    {moments}")
        return
    text = document(measured)
    if a.check:
        if not DOCUMENT.is_file() or DOCUMENT.read_text(encoding="utf-8") != text:
            sys.exit(f"{DOCUMENT} is out of date: python -m bench.memory_report")
        return
    DOCUMENT.write_text(text, encoding="utf-8")
    draw(measured, PLOT)


if __name__ == "__main__":
    main()
