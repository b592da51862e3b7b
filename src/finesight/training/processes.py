"""The processes of a run, and how they hold the model that they train: whole in each, or divided over them (`training.sharding`)."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from finesight.allocator import use_expandable_segments
from finesight.errors import RecipeError
from finesight.models.load import LoadedModel, choose_dtype, load_model
from finesight.models.packed import PackedModel
from finesight.models.sharding import shard
from finesight.recipe import Recipe, TrainingSettings
from finesight.training.trackers import LOGS


def start_accelerator(recipe: Recipe, output_dir: Path, device: torch.device | None = None) -> Accelerator:
    """Device, processes and trackers of a run. Weights keep the precision they are loaded in, so no autocast is on.

    Args:
        device: of a model that is loaded already; None: the GPU of this process, or the CPU.

    Raises:
        RecipeError: several processes without the same device kind as the model, a tracker failed to start, or a setting is for a single
            process.
    """
    use_expandable_segments()
    # accelerate keeps its state for the whole process; a second run in it may want other settings.
    AcceleratorState._reset_state(reset_partial_state="RANK" not in os.environ)
    refuse_to_share_alone(recipe.training, int(os.environ.get("WORLD_SIZE", "1")))
    if recipe.training.gradient_release and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            "training.gradient_release is for a single process, since gradients are gone before they could be averaged: set it to false, or train "
            "on one GPU"
        )
    # Rows without images leave the tower's parameters without gradients.
    tower_trains = recipe.tuning.finetune_vision_layers or recipe.tuning.finetune_merger
    # Buffers (scales of quantised weights, rotary frequencies) are constants, the same in every process.
    return Accelerator(
        cpu=(device.type == "cpu") if device is not None else not torch.cuda.is_available(),
        mixed_precision="no",
        log_with=list(recipe.training.report_to) or None,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / LOGS)),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=tower_trains, broadcast_buffers=False)],
    )


def seed_everything(seed: int) -> None:
    """Seeds all generators that dropout or libraries may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def refuse_to_share_alone(settings: TrainingSettings, processes: int) -> None:
    """A single process has nobody to divide a model with.

    Raises:
        RecipeError: it is asked to.
    """
    if settings.sharding == "full" and processes < 2:
        raise RecipeError(
            "training.sharding: full divides the model over several GPUs, and this is a single process: start it with torchrun "
            "--nproc-per-node 2 -m finesight train …, or set training.sharding: none"
        )


def load_for_training(recipe: Recipe, device: torch.device) -> LoadedModel:
    """The recipe's model on its device; one that will be divided in host memory, since the whole may be larger than a GPU.

    Raises:
        ModelError: see :func:`load_model`.
        RecipeError: it is to be divided, and in float16.
    """
    settings, going_on = recipe.model, recipe.model.adapter is not None
    if recipe.training.sharding == "none":
        return load_model(settings, data=recipe.data, device=device, train_adapter=going_on)
    dtype, _ = choose_dtype(settings.dtype, device)
    _refuse_float16(dtype)
    settings = settings.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    loaded = load_model(settings, data=recipe.data, device="cpu", train_adapter=going_on)
    return replace(loaded, device=device)


def over_processes(packed: PackedModel, accelerator: Accelerator, settings: TrainingSettings) -> torch.nn.Module:
    """The model as it trains: divided over the processes, or whole in each with gradients averaged.

    FSDP2 is used directly: accelerate would wrap transformers' own layers, whose call the loops here never make.

    Raises:
        RecipeError: the model is to be divided, and is in float16 or trains in several precisions.
    """
    if settings.sharding == "none":
        wrapped: torch.nn.Module = accelerator.prepare_model(packed)
        return wrapped
    _refuse_float16(packed.compute_dtype)
    if len(kinds := {parameter.dtype for parameter in packed.parameters() if parameter.requires_grad}) > 1:
        raise RecipeError(
            f"training.sharding: full needs one precision for all that trains, and here are {' and '.join(sorted(map(str, kinds)))} (an adapter with "
            "biases, over a base in 16 bits): set model.dtype: float32, or training.sharding: none"
        )
    shard(packed, accelerator.device, accelerator.num_processes)
    return packed


def _refuse_float16(dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        raise RecipeError(
            "training.sharding: full cannot be used in float16, whose loss scale each process would set by its own part of the gradients: set "
            "model.dtype: bfloat16 or float32, or training.sharding: none"
        )
