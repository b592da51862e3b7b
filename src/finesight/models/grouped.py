"""Products of rows with the matrix of the expert that each of them was sent to.

The rows of a pack are put in the order of their experts, so that the rows of one expert lie together and end at its
offset; then one grouped product serves all experts. Nothing here depends on numbers that only the device knows: there
are T * k rows whatever the router decides, and no value is fetched by the host where `torch._grouped_mm` has a kernel
(bfloat16 on Hopper and newer data-centre GPUs). On Ampere and Ada torch's own fallback, and in any other precision or on
a CPU the loop below, read the offsets on the host.

Shapes: T tokens, k experts chosen for each, S = T * k rows, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from finesight.models.nf4 import NF4Tensor, dequantize_nf4

ALIGNMENT = 8  # values of 16 bits: what a row must measure a multiple of for the grouped kernel


class Routing(NamedTuple):
    """Where the rows of each expert lie."""

    order: torch.Tensor  # (S,) int64: row i in the order of experts is choice order[i] % k of token order[i] // k
    inverse: torch.Tensor  # (S,) int64: where choice j of token t lies in the order of experts, at t * k + j
    offsets: torch.Tensor  # (E,) int32: where the rows of each expert end
    choices: int  # k


def route(chosen: torch.Tensor, experts: int) -> Routing:
    """The order of experts for the choices (T, k) of a router. Rows of one expert keep the order of their tokens."""
    sorted_ids, order = torch.sort(chosen.reshape(-1), stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    experts_ids = torch.arange(experts, device=chosen.device, dtype=sorted_ids.dtype)
    offsets = torch.searchsorted(sorted_ids, experts_ids, right=True, out_int32=True)
    return Routing(order, inverse, offsets, chosen.shape[-1])


def to_experts(x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """(T, D) -> (S, D): each token's values once for each of its experts, in the order of experts."""
    return _ToExperts.apply(x, *routing)


def to_tokens(rows: torch.Tensor, routing: Routing) -> torch.Tensor:
    """(S, D) in the order of experts -> (T, D): the sum over each token's experts, in float32 (float64 stays)."""
    return _ToTokens.apply(rows, *routing)


# The two are each other's transpose. Left to autograd, a gather's backward adds with atomics in the rows' own precision:
# imprecise, and different at every run.
class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, offsets: torch.Tensor, k: int) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.choices = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return _sum_of_choices(grads[0], inverse, ctx.choices).to(grads[0].dtype), None, None, None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, offsets: torch.Tensor, k: int) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.choices, ctx.dtype = k, rows.dtype
        return _sum_of_choices(rows, inverse, k)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return grads[0].to(ctx.dtype).index_select(0, order // ctx.choices), None, None, None, None


def _sum_of_choices(rows: torch.Tensor, inverse: torch.Tensor, k: int) -> torch.Tensor:
    return rows.index_select(0, inverse).unflatten(0, (-1, k)).sum(1, dtype=_wide(rows.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def weighted_swiglu(base: torch.Tensor, delta: torch.Tensor | None, weights: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up * weight, (S, I), where [gate, up] = base + delta; computed in float32 and rounded once.

    The router's weight counts here, before the down projection, which is linear: the projection's result is then not
    needed for the weight's gradient. Kept for the backward pass: base, delta and the weights.

    Args:
        base: (S, 2 I), product with the expert's frozen matrix.
        delta: (S, 2 I), its adapter's, or None.
        weights: (S,), of the router.
    """
    return _WeightedSwiGLU.apply(base, delta, weights)


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: torch.Tensor, delta: torch.Tensor | None, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(base, delta, weights)
        gate, up = _gate_and_up(base, delta)
        return (F.silu(gate) * up * weights.to(gate.dtype).unsqueeze(-1)).to(base.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        base, delta, weights = ctx.saved_tensors
        gate, up = _gate_and_up(base, delta)
        grad = grads[0].to(gate.dtype)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        grad_weights = (grad * silu * up).sum(-1).to(weights.dtype)
        grad = grad * weights.to(gate.dtype).unsqueeze(-1)
        # d silu / d gate = sigmoid * (1 + gate * (1 - sigmoid))
        grad_sum = torch.cat([grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu], dim=-1).to(base.dtype)
        return grad_sum, None if delta is None else grad_sum, grad_weights


def _gate_and_up(base: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    both = base.to(_wide(base.dtype))
    gate, up = (both if delta is None else both + delta).chunk(2, dim=-1)
    return gate, up


def product(x: torch.Tensor, weight: torch.Tensor | NF4Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(S, I) -> (S, O): each row times the transposed matrix of its expert.

    Args:
        x: rows in the order of experts.
        weight: (E, O, I) in the precision of x, or the same in NF4, dequantised for this product and again for its
            backward pass (E * O * I values for as long as it runs), which gives it no gradient.
        offsets: (E,) int32, see `Routing`.
    """
    if isinstance(weight, NF4Tensor):
        return grouped_product_nf4(x, [*weight.tensors], list(weight.shape), offsets, False)
    return grouped_product(x, weight, offsets, False)


# Opaque to compilers: which kernel runs depends on the device, and the loop on values of the offsets.
@torch.library.custom_op("finesight::grouped_product", mutates_args=())
def grouped_product(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, backwards: bool) -> torch.Tensor:
    """x Wᵀ for each expert, (S, I) -> (S, O); or, backwards, x W, (S, O) -> (S, I)."""
    return _multiply(x, weight if backwards else weight.transpose(1, 2), offsets)


@torch.library.custom_op("finesight::grouped_product_nf4", mutates_args=())
def grouped_product_nf4(
    x: torch.Tensor, packed: list[torch.Tensor], shape: list[int], offsets: torch.Tensor, backwards: bool
) -> torch.Tensor:
    """The same with matrices (E, O, I) in NF4, dequantised to the precision of x."""
    weight = dequantize_nf4(NF4Tensor.of(packed, shape), x.dtype)
    return _multiply(x, weight if backwards else weight.transpose(1, 2), offsets)


@torch.library.custom_op("finesight::grouped_outer", mutates_args=())
def grouped_outer(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(S, O), (S, I) -> (E, O, I): leftᵀ right over the rows of each expert; zeros for one without rows."""
    if has_grouped_kernel(left.dtype, left.device, left.shape[1], right.shape[1]):
        return _grouped_mm()(left.t(), right, offs=offsets).contiguous()
    out = right.new_zeros(offsets.shape[0], left.shape[1], right.shape[1])
    for expert, (start, end) in enumerate(_groups(offsets)):
        torch.mm(left[start:end].t(), right[start:end], out=out[expert])
    return out


def _multiply(x: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(S, K), (E, K, N) -> (S, N)."""
    x = x.contiguous()
    if has_grouped_kernel(x.dtype, x.device, matrices.shape[1], matrices.shape[2]):
        return _grouped_mm()(x, matrices, offs=offsets).contiguous()
    out = x.new_empty(x.shape[0], matrices.shape[2])
    for expert, (start, end) in enumerate(_groups(offsets)):
        torch.mm(x[start:end], matrices[expert], out=out[start:end])
    return out


def _groups(offsets: torch.Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def has_grouped_kernel(dtype: torch.dtype, device: torch.device, *widths: int) -> bool:
    """Whether products of such matrices are one kernel; otherwise they are a loop, for which the host waits for the offsets."""
    return device.type == "cuda" and dtype is torch.bfloat16 and not any(width % ALIGNMENT for width in widths) and _capable(device.index)


@lru_cache
def _capable(device_index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device_index) >= (8, 0)


def _grouped_mm() -> Callable[..., torch.Tensor]:
    return getattr(F, "grouped_mm", None) or torch._grouped_mm


@grouped_product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, backwards: bool) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[2 if backwards else 1])


@grouped_product_nf4.register_fake
def _(x: torch.Tensor, packed: list[torch.Tensor], shape: list[int], offsets: torch.Tensor, backwards: bool) -> torch.Tensor:
    return x.new_empty(x.shape[0], shape[2 if backwards else 1])


@grouped_outer.register_fake
def _(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return right.new_empty(offsets.shape[0], left.shape[1], right.shape[1])


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, offsets, ctx.backwards = inputs
    # Without a gradient of the weight the rows are not needed again.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, offsets)


def _product_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grouped_product(grad, weight, offsets, not ctx.backwards) if ctx.needs_input_grad[0] else None
    grad_weight = None
    if ctx.needs_input_grad[1]:
        grad_weight = grouped_outer(x, grad, offsets) if ctx.backwards else grouped_outer(grad, x, offsets)
    return grad_x, grad_weight, None, None


def _save_nf4(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, packed, ctx.shape, offsets, ctx.backwards = inputs
    ctx.save_for_backward(*packed, offsets)


def _nf4_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    *packed, offsets = ctx.saved_tensors
    return grouped_product_nf4(grad.contiguous(), packed, ctx.shape, offsets, not ctx.backwards), [None] * len(packed), None, None, None


grouped_product.register_autograd(_product_backward, setup_context=_save_product)
grouped_product_nf4.register_autograd(_nf4_backward, setup_context=_save_nf4)
