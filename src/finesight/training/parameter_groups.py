"""Which parameter is stepped by which optimizer, with which learning rate and decay."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from finesight.errors import RecipeError
from finesight.models.parameters import part_of
from finesight.models.sharding import divided_like
from finesight.recipe import TrainingSettings

GroupPart = Literal["tower", "merger", "language_model"]


def group_part(name: str) -> GroupPart:
    """The part whose learning rate a parameter takes."""
    part = part_of(name)
    return part if part in ("tower", "merger") else "language_model"


def takes_muon(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon steps a parameter: matrices of hidden layers, no embeddings, vocabulary matrices or convolutions."""
    steps = name.split(".")
    outside = {"embed_tokens", "lm_head", "pos_embed", "patch_embed"}
    return parameter.ndim == 2 and not outside.intersection(steps)


def parameter_groups(named: Sequence[tuple[str, nn.Parameter]], settings: TrainingSettings) -> list[dict[str, Any]]:
    """Groups for AdamW: one for each part and, within it, for matrices (with decay) and vectors (without)."""
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in named:
        part, decays = group_part(name), parameter.ndim >= 2
        fresh: dict[str, Any] = {
            "params": [],
            "part": part,
            "lr": part_learning_rate(part, settings),
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        groups.setdefault((part, decays), fresh)["params"].append(parameter)
    return list(groups.values())


def part_learning_rate(part: GroupPart, settings: TrainingSettings) -> float:
    """Peak learning rate of a part."""
    own = {"tower": settings.vision_learning_rate, "merger": settings.merger_learning_rate}.get(part)
    return settings.learning_rate if own is None else own


def build_optimizers(named: Sequence[tuple[str, nn.Parameter]], settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """The optimizers of a recipe for these parameters: one, or Muon and AdamW beside each other.

    Raises:
        RecipeError: a library is missing.
    """
    if settings.optim in ("adamw_8bit", "paged_adamw_8bit"):
        return [_adamw_8bit(parameter_groups(named, settings), settings)]
    if settings.optim == "muon":
        matrices = [(name, parameter) for name, parameter in named if takes_muon(name, parameter)]
        rest = [(name, parameter) for name, parameter in named if not takes_muon(name, parameter)]
        optimizers = [_muon(matrices, settings)] if matrices else []
        return optimizers + ([_adamw(parameter_groups(rest, settings), settings)] if rest else [])
    return [_adamw(parameter_groups(named, settings), settings)]


def _adam_arguments(settings: TrainingSettings) -> dict[str, Any]:
    return {"lr": settings.learning_rate, "betas": (settings.adam_beta1, settings.adam_beta2), "eps": settings.adam_epsilon}


def _adamw(groups: list[dict[str, Any]], settings: TrainingSettings) -> torch.optim.Optimizer:
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, fused=True if on_gpu else None, **_adam_arguments(settings))


def _adamw_8bit(groups: list[dict[str, Any]], settings: TrainingSettings) -> torch.optim.Optimizer:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"training.optim: {settings.optim} needs bitsandbytes, which is not installed: pip install 'finesight[gpu]', or set training.optim: adamw"
        )
    import bitsandbytes

    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    # Of weights in main memory the state is there already.
    paged = settings.optim == "paged_adamw_8bit" and on_gpu
    kind = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    return kind(groups, **_adam_arguments(settings))


def _muon(named: Sequence[tuple[str, nn.Parameter]], settings: TrainingSettings) -> torch.optim.Optimizer:
    """Muon with updates as large as AdamW's (`match_rms_adamw`), so that learning rates of AdamW carry over.

    A part with a learning rate of its own keeps its ratio to `training.learning_rate`.
    """
    base = settings.muon_learning_rate or settings.learning_rate
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named:
        part = group_part(name)
        ratio = part_learning_rate(part, settings) / settings.learning_rate
        groups.setdefault(part, {"params": [], "part": part, "lr": base * ratio})["params"].append(parameter)
    return torch.optim.Muon(list(groups.values()), lr=base, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores the state of an optimizer of :func:`build_optimizers`, divided as its parameters are; that of a paged one is paged again.

    bitsandbytes would move all of it to the GPU at once, and leave it there as ordinary tensors.
    """
    if not getattr(optimizer, "is_paged", False):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        kept = {number: _divided(values, parameters[number]) for number, values in state["state"].items()}
        optimizer.load_state_dict({**state, "state": kept})
        return
    paged: Any = optimizer
    paged.load_state_dict(state, move_to_device=False)
    for parameter, values in paged.state.items():
        for name, value in values.items():
            if not isinstance(value, torch.Tensor):
                continue
            moved = value.to(parameter.device)
            if name in ("state1", "state2"):
                # The parameter itself may be empty between steps: a tensor of the state has the right shape.
                buffer = paged.get_state_buffer(moved, dtype=value.dtype)
                moved = buffer.copy_(value)
            values[name] = moved


def _divided(values: dict[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
    """The state of one parameter: what has its shape is divided as it is; counters are not."""
    return {
        name: divided_like(value, parameter) if isinstance(value, torch.Tensor) and value.shape == parameter.shape else value
        for name, value in values.items()
    }
