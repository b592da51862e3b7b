"""What the planner says of exactly the packs and settings that a row was measured with. This is the one place that asks it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finesight.recipe_files import load_recipe

if TYPE_CHECKING:
    from finesight.data.layout import TowerShape
    from finesight.data.pack import PackPlan
    from finesight.planner.moments import MemoryPlan

Pack = dict[str, Any]
GIB = 2**30


def pack_of(plan: PackPlan, tower: TowerShape) -> Pack:
    """A pack in the numbers that its memory depends on: the fields of the planner's `PackSizes`, before any filling."""
    from bench.arithmetic import work_of  # which needs torch; judging rows does not

    work = work_of(plan, tower)
    segments = [segment for tree in plan.trees for segment in tree.segments]
    branched = any(segment.start > 0 for segment in segments)
    return {
        "tokens": plan.num_tokens,
        "targets": work.targets,
        "patches": [item.grid.patches for item in plan.visual_items],
        "segments": len(segments),
        "gathered_keys": sum(segment.stop for segment in segments) if branched else 0,
        "key_pairs": work.key_pairs,
        "samples": len(plan.samples),
    }


def plan_of_row(row: Mapping[str, Any], checkpoint: str | Path | None = None) -> MemoryPlan:
    """The plan of a step of a row's packs.

    Args:
        row: of `bench.memory`, measured or not: model, settings, packs, compiled, torch, dtype; of reinforcement also rollout.
        checkpoint: folder with the model's configuration; None: the planner knows the model by its name.
    """
    from finesight.planner.activations import Execution
    from finesight.planner.catalogue import find_shape
    from finesight.planner.plan import plan_memory
    from finesight.planner.shapes import read_shape
    from finesight.planner.sizes import PackSizes, RolloutSizes, RunSizes

    shape = find_shape(row["model"]) if checkpoint is None else read_shape(checkpoint)
    settings = [f"{name}={json.dumps(value)}" for name, value in row["settings"].items()]
    recipe = load_recipe(None, [f"model.name_or_path={row['model']}", *settings])
    packs = tuple(PackSizes(**{**pack, "patches": tuple(pack["patches"])}) for pack in row["packs"])
    # Attention repeats keys and values for each query head before torch 2.12; on a CPU it goes by groups of like lengths.
    before_2_12 = tuple(int(part) for part in row["torch"].split(".")[:2]) < (2, 12)
    on_cpu = row["dtype"] == "float32"
    execution = Execution(compiled=row["compiled"], repeats_keys=before_2_12 and not on_cpu, grouped=on_cpu)
    rollout = RolloutSizes(**row["rollout"]) if row.get("rollout") else None
    sizes = RunSizes((packs,), source="the packs measured", rollout=rollout)
    return plan_memory(shape, recipe, sizes, execution=execution, precision=row["dtype"])


def planned(row: Mapping[str, Any], checkpoint: str | Path | None = None) -> dict[str, Any]:
    """The figures of :func:`plan_of_row` in GiB; where the planner cannot say, the reason."""
    try:
        plan = plan_of_row(row, checkpoint)
    except Exception as error:  # a plan that fails is a result, and takes nothing from the measurement
        return {"reason": f"{type(error).__name__}: {error}"[:400]}
    parts = plan.peak.parts
    return {
        "peak_allocated_gib": round(plan.peak_bytes / GIB, 4),
        "weights_gib": round(sum(size for part, size in parts.items() if part.startswith("weights")) / GIB, 4),
        "moment": plan.peak.name,
        "parts_gib": {part: round(size / GIB, 4) for part, size in parts.items() if size},
        "moments_gib": {moment.name: round(moment.total / GIB, 4) for moment in plan.moments},
    }


def error_percent(row: Mapping[str, Any]) -> float | None:
    """Plan over measurement, in percent: above 0 where more is planned than was needed. None: one of them is missing.

    The plan is the present planner's, made anew from the row; what it said as the row was measured stands in the row.
    """
    measured = row.get("peak_allocated_gib")
    if not measured:
        return None
    said = planned(row).get("peak_allocated_gib")
    return None if said is None else 100 * (said / measured - 1)
