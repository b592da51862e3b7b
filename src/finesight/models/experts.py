"""Mixture of experts: one computation for frozen, quantised, adapted and training experts.

transformers keeps the experts of a layer as two stacks, `gate_up_proj` (E, 2 I, D) and `down_proj` (E, D, I). They are
used as they are here, in the model's precision or in NF4 (`NF4Experts`), and the tokens are brought into the order of
their experts, so that each stack takes part in one grouped product (`finesight.models.grouped`). Stacks in NF4 are
dequantised for each product and let go after it: for as long as a product runs, E * 2 I * D values in the model's
precision (0.75 GiB for Qwen3-VL-30B-A3B in bfloat16), once forward and once backward.

An adapter's product lies beside the base's and the two are summed in float32: in front of the activation, and where the
experts of a token are summed. No weight is ever formed from base and adapter, which would round small updates away and
cannot be done in 4 bits.

Kept for the backward pass without checkpointing, in bytes of a layer in bfloat16: 4 S I for the product with gate_up_proj,
20 S for weights and order, and with adapters 4 S I + 2 S (D + I + 2 r) more, where S = tokens * experts per token.

Shapes: T tokens, D hidden, E experts, I inputs of the down projection, k experts for each token, S = T * k, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from finesight.errors import ModelError
from finesight.models.grouped import ALIGNMENT, has_grouped_kernel, product, route, to_experts, to_tokens, weighted_swiglu
from finesight.models.low_rank import compute_dtype
from finesight.models.nf4 import NF4Tensor, dequantize_nf4, quantize_nf4

STACKS = ("gate_up_proj", "down_proj")  # of a layer's experts, in the order in which transformers declares them
# Products come out on the bfloat16 grid, and so do sums of a few of them: often halfway between two numbers that the result
# may be rounded to. There any update, however small, decides which, and counts more than it is worth: an update of 2e-5 was
# seen 1.66 times as large. Times a number that is no short binary fraction the sums lie anywhere, and it is seen as it is.
_OFF_GRID = 0.6180339887
EXPERTS = ".mlp.experts."  # in the name of every weight of an expert


class ExpertAdapter(NamedTuple):
    """Low-rank matrices beside one stack: the product of expert e gains scaling * up[e] @ down[e]."""

    down: torch.Tensor  # (E, r, inputs)
    up: torch.Tensor  # (E, outputs, r)
    scaling: float


def run_experts(
    experts: nn.Module,
    states: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    adapters: Mapping[str, ExpertAdapter] | None = None,
) -> torch.Tensor:
    """What the chosen experts make of each token, weighed and summed: (T, D) -> (T, D).

    Args:
        experts: transformers' experts of one layer, or `NF4Experts`.
        states: (T, D).
        chosen: (T, k) int64, of the router.
        weights: (T, k), of the router.
        adapters: by the name of the stack.
    """
    adapters = adapters or {}
    gate_up, down = stack_of(experts, "gate_up_proj"), stack_of(experts, "down_proj")
    dtype = compute_dtype(states, experts.compute_dtype if isinstance(experts, NF4Experts) else cast(torch.Tensor, gate_up).dtype)
    routing = route(chosen, gate_up.shape[0])
    rows = to_experts(states.to(dtype), routing)
    base, delta = _products(rows, gate_up, adapters.get("gate_up_proj"), routing.offsets)
    row_weights = weights.to(torch.promote_types(weights.dtype, torch.float32)) / _OFF_GRID
    inner = weighted_swiglu(base, delta, row_weights.reshape(-1).index_select(0, routing.order))
    base, delta = _products(inner, down, adapters.get("down_proj"), routing.offsets)
    out = to_tokens(base, routing)
    if delta is not None:
        out = out + to_tokens(delta, routing)
    return (out * _OFF_GRID).to(states.dtype)


def stack_of(experts: nn.Module, name: str) -> torch.Tensor | NF4Tensor:
    """A stack of the experts of one layer, (E, outputs, inputs)."""
    return experts.stack(name) if isinstance(experts, NF4Experts) else cast(torch.Tensor, getattr(experts, name))


def _products(
    rows: torch.Tensor, weight: torch.Tensor | NF4Tensor, adapter: ExpertAdapter | None, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(S, inputs) -> (S, outputs) of the base, and of the adapter if there is one."""
    if not isinstance(weight, NF4Tensor):
        weight = weight.to(rows.dtype)
    base = product(rows, weight, offsets)
    if adapter is None:
        return base, None
    down, up = adapter.down.to(rows.dtype), adapter.up.to(rows.dtype)
    if rows.is_cuda and (missing := -down.shape[1] % ALIGNMENT):  # zeros, so that the grouped kernel takes any rank
        down, up = nn.functional.pad(down, (0, 0, 0, missing)), nn.functional.pad(up, (0, missing))
    inner = product(rows, down, offsets)
    return base, product(inner * adapter.scaling, up.contiguous(), offsets)


def wait_for_offsets(experts: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the host waits for the device when these experts are computed, which nothing captured in a CUDA graph can."""
    base = experts.get_base_layer() if isinstance(experts, BaseTunerLayer) else experts
    return not has_grouped_kernel(dtype, device, *(width for name in STACKS for width in stack_of(base, name).shape[1:]))


class NF4Experts(nn.Module):
    """The frozen experts of one layer in NF4, in place of transformers' module.

    Attributes:
        gate_up_proj, down_proj: (E, outputs, inputs / 2) uint8, as bitsandbytes packs the whole stack.
        compute_dtype: precision of inputs, outputs and products. `.to(dtype)` changes this, never what is stored.
    """

    is_transposed = False  # stacks are (E, outputs, inputs); peft asks for this

    def __init__(self, experts: nn.Module, compute_dtype: torch.dtype) -> None:
        """In place of a transformers module (which may be on the meta device), its stacks to be handed to :meth:`hold`."""
        super().__init__()
        self.config, self.original_class = experts.config, type(experts)
        self.compute_dtype = compute_dtype
        self.shapes: dict[str, torch.Size] = {}
        for name in STACKS:
            shape = cast(torch.Tensor, getattr(experts, name)).shape
            if shape[-1] % 2:
                raise ModelError(f"Experts with matrices of {shape[-1]} columns cannot be kept in 4 bits: two values share a byte.")
            self.shapes[name] = shape
            # As it was until the packed values come: while loading, transformers compares shapes with it.
            before = cast(torch.Tensor, getattr(experts, name)).detach()
            self.register_parameter(name, nn.Parameter(before, requires_grad=False))
            self.add_module(f"{name}_scales", NF4Scales())

    @classmethod
    def of(cls, experts: nn.Module) -> NF4Experts:
        """The experts quantised, where they lie."""
        quantized = cls(experts, cast(torch.Tensor, experts.gate_up_proj).dtype)
        for name in STACKS:
            quantized.hold(name, quantize_expert_tensor(name, cast(torch.Tensor, getattr(experts, name))))
        return quantized

    def hold(self, name: str, tensor: NF4Tensor) -> None:
        """Take over a stack, `gate_up_proj` or `down_proj`.

        Raises:
            ModelError: it is of another shape.
        """
        if tensor.shape != self.shapes[name]:
            raise ModelError(
                f"{name} of the experts has shape {tuple(tensor.shape)}, the model needs {tuple(self.shapes[name])} (experts, outputs, inputs)."
            )
        packed = tensor.packed.view(*tensor.shape[:-1], tensor.shape[-1] // 2)
        self.register_parameter(name, nn.Parameter(packed, requires_grad=False))
        cast(NF4Scales, getattr(self, f"{name}_scales")).hold(tensor)

    def stack(self, name: str) -> NF4Tensor:
        """A stack as it is kept."""
        scales = cast(NF4Scales, getattr(self, f"{name}_scales"))
        packed = cast(torch.Tensor, getattr(self, name))
        return NF4Tensor(packed, scales.absmax, scales.nested_absmax, scales.nested_code, scales.offset, self.shapes[name])

    def dequantized(self) -> nn.Module:
        """The transformers module again, frozen, with the values that the quantised stacks stand for."""
        with torch.device("meta"):
            experts = self.original_class(self.config)
        for name in STACKS:
            setattr(experts, name, nn.Parameter(dequantize_nf4(self.stack(name), self.compute_dtype), requires_grad=False))
        return experts.train(self.training)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """(T, D), (T, k), (T, k) -> (T, D), as transformers' experts are called."""
        return run_experts(self, hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(shape)}" for name, shape in self.shapes.items()) + ", nf4"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NF4Experts:
        """Moves follow; a change of precision is for what comes in and out: the scales keep theirs."""

        device = cast(torch.Tensor, self.gate_up_proj).device
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)


class NF4Scales(nn.Module):
    """What NF4 keeps beside the packed values."""

    absmax: torch.Tensor
    nested_absmax: torch.Tensor
    nested_code: torch.Tensor
    offset: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("absmax", "nested_absmax", "nested_code", "offset"):
            self.register_buffer(name, None)

    def hold(self, tensor: NF4Tensor) -> None:
        # The code is one table that bitsandbytes shares between tensors; a state dict must not find it shared.
        self.absmax, self.nested_absmax = tensor.absmax, tensor.nested_absmax
        self.nested_code, self.offset = tensor.nested_code.clone(), tensor.offset


def is_expert_weight(name: str) -> bool:
    """Whether a parameter of this name is a stack of experts."""
    return EXPERTS in f".{name}" and name.rsplit(".", 1)[-1] in STACKS


def quantize_expert_tensor(name: str, tensor: torch.Tensor) -> NF4Tensor:
    """One stack of experts (E, outputs, inputs) in NF4, on the tensor's device; it fits `NF4Experts.hold`.

    Args:
        name: of the parameter, for messages.

    Raises:
        ModelError: it is no stack, or bitsandbytes is not installed.
    """
    if tensor.ndim != 3:
        raise ModelError(f"{name} has shape {tuple(tensor.shape)}; a stack of experts has three dimensions.")
    return quantize_nf4(tensor)


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the experts of each layer, whether quantised or not; without an adapter's wrapping."""
    for name, module in model.named_modules():
        if isinstance(module, NF4Experts) or all(isinstance(module._parameters.get(stack), nn.Parameter) for stack in STACKS):
            yield name, module


def hold_in_4bit(model: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """Takes one stack over in NF4, in a model whose other weights may not be there yet.

    Args:
        name: full name of the parameter; with the first stack of a layer `NF4Experts` comes in place of its experts.
        value: (E, outputs, inputs), on the device where the result is to stay.

    Returns:
        The parameter of packed values that has this name now.

    Raises:
        ModelError: the values are of another shape than the parameter, or bitsandbytes is not installed.
    """
    path, _, stack = name.rpartition(".")
    experts = model.get_submodule(path)
    if not isinstance(experts, NF4Experts):
        experts = NF4Experts(experts, value.dtype).train(experts.training)
        _replace(model, path, experts)
    experts.hold(stack, quantize_expert_tensor(name, value))
    return cast(torch.Tensor, getattr(experts, stack))


def quantize_experts(model: nn.Module) -> int:
    """Keep the experts of a loaded model in NF4; returns the number of layers. To be called before adapters are added.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    names = [name for name, module in experts_of(model) if not isinstance(module, NF4Experts)]
    for name in names:
        experts = model.get_submodule(name)
        _replace(model, name, NF4Experts.of(experts).train(experts.training))
    return len(names)


def dequantize_experts(model: nn.Module) -> int:
    """Give a model transformers' experts again, with the values that the quantised ones stand for; returns the layers."""
    names = [name for name, module in experts_of(model) if isinstance(module, NF4Experts)]
    for name in names:
        _replace(model, name, cast(NF4Experts, model.get_submodule(name)).dequantized())
    return len(names)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
