"""The planner's view of a run: sizes of its packs, the GPU that is here, and the decision before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator

from finesight.data.pack import PackPlan
from finesight.errors import ModelError, PlanError, RecipeError
from finesight.models.compilation import compiles_well
from finesight.planner.activations import Execution
from finesight.planner.calibration import CONTEXT_BYTES
from finesight.planner.catalogue import find_shape
from finesight.planner.fit import Situation, as_stored, choose_policy, gpus_that_fit, remedies
from finesight.planner.gpus import Gpu, find_gpu
from finesight.planner.moments import MemoryPlan
from finesight.planner.shapes import ModelShape, shape_of
from finesight.planner.speed import REFERENCE
from finesight.planner.text import gib, refusal
from finesight.planner.weights import precision_on
from finesight.recipe import Recipe
from finesight.training.prepare import Prepared
from finesight.training.run_sizes import DataSizes

# Compiling takes some tens of seconds; shorter runs are over sooner without it.
COMPILE_FROM_STEPS = 50


def will_compile(recipe: Recipe, total_steps: int, device: torch.device) -> bool:
    """Whether a run compiles its layers: as the recipe says, or where it pays."""
    asked = recipe.training.torch_compile
    if asked is False or compiles_well(device) is not None:
        return False
    return asked is True or total_steps >= COMPILE_FROM_STEPS


def gpu_here(device: torch.device) -> Gpu:
    """The GPU of a device; where its name is in no table, with the rates of a common one."""
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    try:
        known = find_gpu(name)
    except RecipeError:  # an unknown card is no reason to stop
        known = REFERENCE
    return replace(known, name=name, capability=capability)


def available_bytes(device: torch.device) -> int:
    """What this process may take of a GPU, its own context included: what is free, and no more than a cap that was set."""
    free, total = torch.cuda.mem_get_info(device)
    room = free + torch.cuda.memory_reserved(device)
    if hasattr(torch.cuda, "get_per_process_memory_fraction"):
        # Unlike the others it takes no device without a number, which is what a single process has.
        index = torch.cuda.current_device() if device.index is None else device.index
        room = min(room, int(torch.cuda.get_per_process_memory_fraction(index) * total))
    return room + CONTEXT_BYTES  # the context is there by now


def shape_here(recipe: Recipe, config: object | None) -> ModelShape:
    """The dimensions of a recipe's model: of one in memory, or as :func:`find_shape`."""
    if config is not None:
        return shape_of(config.to_dict(), name=recipe.model.name_or_path, source="the model in memory")  # type: ignore[attr-defined]
    return find_shape(recipe.model.name_or_path, recipe.model.revision)


def situation_of(prepared: Prepared, accelerator: Accelerator, *, total_steps: int, config: object | None = None) -> Situation:
    """What a run is planned for, on the GPU that it will use. All processes get the same."""
    recipe, device = prepared.recipe, accelerator.device
    room = torch.tensor([available_bytes(device)], dtype=torch.int64, device=device)
    least = int(accelerator.gather(room).min())
    gpu = gpu_here(device)
    sizes = DataSizes(prepared, accelerator.num_processes)
    pixels = [
        item.resized_height * item.resized_width for sample in prepared.samples for item in sample.visual_items if item.kind == "image"
    ]
    return Situation(
        model=shape_here(recipe, config),
        sizes_of=sizes,
        gpu=gpu,
        available_bytes=least,
        execution=Execution.here(compiled=will_compile(recipe, total_steps, device)),
        precision=precision_on(recipe, gpu.capability),
        processes=accelerator.num_processes,
        longest_sample=sizes.longest_sample,
        pixels=max(pixels, default=None),
    )


def plan_here(prepared: Prepared, accelerator: Accelerator, *, config: object | None = None, force: bool = False) -> MemoryPlan | None:
    """Plans a run on the GPU of this process, before its weights are read.

    None on a CPU, of which nothing is said, and for a model whose dimensions are not known before it is fetched.

    Args:
        config: of a model that is in memory already.
        force: go on where the plan does not fit.

    Raises:
        PlanError: the run cannot fit; says the three cheapest remedies.
    """
    if accelerator.device.type != "cuda":
        return None
    try:
        situation = situation_of(prepared, accelerator, total_steps=prepared.plan().total_steps, config=config)
    except ModelError:
        return None
    model, recipe = as_stored(situation.model, prepared.recipe)
    return decide(replace(situation, model=model), recipe, force=force)


def decide(situation: Situation, recipe: Recipe, *, force: bool = False) -> MemoryPlan:
    """The plan of a run that may begin.

    Raises:
        PlanError: it does not fit, and `force` is not set; says the three cheapest remedies.
    """
    plan = choose_policy(situation, recipe)
    if not force and not plan.fits(situation.available_bytes):
        raise PlanError(refusal(plan, situation.available_bytes, remedies(situation, recipe), gpus_that_fit(situation, recipe)))
    return plan


def plan_note(plan: MemoryPlan) -> str:
    """One line: what is planned, and what was chosen."""
    chosen = " (chosen: the fastest that fits)" if plan.recipe.training.gradient_checkpointing == "auto" else ""
    return f"GPU memory: {gib(plan.needed_bytes)} planned (peak {gib(plan.peak_bytes)}); activations: {plan.policy}{chosen}"


def largest_pack(plans: Sequence[PackPlan]) -> PackPlan:
    """The pack with most tokens, and among those with most patches."""
    return max(plans, key=lambda plan: (plan.num_tokens, sum(item.grid.patches for item in plan.visual_items)))
