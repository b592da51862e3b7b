"""Weights, gradients and optimizer state divided over the processes of a run (FSDP2, `torch.distributed.fsdp.fully_shard`).

FSDP2 gathers the weights of a module in hooks around its call. The loops here compute a layer from its parts, several
projections at once, and never call the layer; so what is computed of it runs inside the call of a :class:`ShardedUnit`
around it. Units are the decoder layers, the tower's blocks, the embedding and `lm_head`, where these do not share their
matrix; what remains (norms, mergers, a shared matrix) is gathered for the whole of a forward and backward pass of
:class:`finesight.models.packed.PackedModel`, the root.

All processes must gather the same units in the same order. A tower that does not train, and that packs of text or of kept
features pass by, therefore stays whole on every device; one that trains computes a blank image for packs that have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from finesight.models.packed import PackedModel


class ShardedUnit(nn.Module):
    """A module whose weights are gathered together, for as long as a call of the unit takes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        """function(module, *arguments), with the module's weights at hand; gradients flow to tensors among the arguments."""
        return function(self.module, *arguments)


def shard(packed: PackedModel, device: torch.device, processes: int) -> None:
    """Divides a model over the processes that train it, in place; collective.

    The model may still be in host memory: it moves to the device unit by unit, of which only this process's part stays.
    Afterwards parameters are DTensors outside of forward and backward passes.

    Args:
        device: of this process.
    """
    mesh = init_device_mesh(device.type, (processes,))
    # Gradients of bfloat16 weights are summed over processes in float32.
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    visual, text, head = packed.base.model.visual, packed.base.model.language_model, packed.base.lm_head
    shares_matrix = head.weight is text.embed_tokens.weight
    tower_trains = any(parameter.requires_grad for parameter in visual.parameters())
    whole: set[nn.Parameter] = set()
    if not tower_trains:
        visual.to(device)
        whole.update(visual.parameters())
    for module in [*(visual.blocks if tower_trains else ()), *text.layers, *(() if shares_matrix else (text.embed_tokens, head))]:
        unit = ShardedUnit(module)
        fully_shard(unit, **settings)
        whole.update(module.parameters())  # the root would find them again under the model's own names
        packed.add_unit(unit)
    packed.blank_images = tower_trains
    fully_shard(packed, ignored_params=whole, **settings)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of a model are divided."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def release_gathered(model: nn.Module) -> None:
    """Lets gathered weights go that a forward pass without a backward pass left, so that parameters are divided again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds, in the same memory; all of it where it is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def norm_over_processes(norm: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The 2-norm of everything, from that of this process's part; collective where `like` is divided."""
    if not isinstance(like, DTensor):
        return norm
    squares = norm.square()
    torch.distributed.all_reduce(squares, group=like.device_mesh.get_group())
    return squares.sqrt()


def gathered(tree: Any, *, keep: bool) -> Any:
    """Nested dicts, lists and tuples with every divided tensor in one piece in host memory; collective.

    Args:
        keep: false: take part, but hand back nothing in their place, where another process does the writing.
    """
    if isinstance(tree, DTensor):
        with torch.no_grad():
            whole = tree.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {key: gathered(value, keep=keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gathered(value, keep=keep) for value in tree)
    return tree


def divided_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor that every process has, divided as `like` is; itself where that is not."""
    if not isinstance(like, DTensor):
        return whole
    # src_data_rank: nothing is sent, each process takes its own part.
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
