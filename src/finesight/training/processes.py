"""How several processes hold the model that they train: whole in each, or divided over them (`training.sharding`)."""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate import Accelerator

from finesight.errors import RecipeError
from finesight.models.load import LoadedModel, choose_dtype, load_model
from finesight.models.packed import PackedModel
from finesight.models.sharding import shard
from finesight.recipe import Recipe, TrainingSettings


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
