"""Base product and adapter's delta in one sum that is rounded once.

A sum of two bfloat16 numbers loses what is smaller than half a step of the larger one's grid, and a base product that
has been rounded to bfloat16 is larger than a first update by four orders of magnitude. Measured on an H200 (torch 2.11,
4,096 × 4,096, an update of 2e-5; bench/adapter_cost.py): with `addmm_` onto a bfloat16 delta 2% of the update is found
in the output, as with a separate addition: cuBLAS seems to round the product before it adds. With the product left in float32,
100%. On a CPU `addmm_` adds first and keeps 99%.

Shapes: T tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch


class Adapter(NamedTuple):
    """peft's matrices of one adapted layer."""

    down: torch.Tensor  # (r, I), peft's A
    up: torch.Tensor  # (O, r), peft's B
    scaling: float


class LowRankOperands(NamedTuple):
    """Of several layers of one input, in the precision of their products."""

    downs: list[torch.Tensor]  # (r, I) each
    ups: list[torch.Tensor]  # (O, r) each
    scalings: list[float]

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, int]], adapters: Sequence[Adapter | None], like: torch.Tensor) -> LowRankOperands:
        """What adapters give; no adapter is one of rank zero.

        Args:
            shapes: (O, I) of each layer.
            like: of the precision, and on the device, that is wanted.
        """
        downs, ups, scalings = [], [], []
        for (outputs, inputs), adapter in zip(shapes, adapters, strict=True):
            downs.append(like.new_empty(0, inputs) if adapter is None else adapter.down.to(like.dtype))
            ups.append(like.new_empty(outputs, 0) if adapter is None else adapter.up.to(like.dtype))
            scalings.append(1.0 if adapter is None else adapter.scaling)
        return cls(downs, ups, scalings)


def add_bias(out: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Rows (T, O) of a product plus a bias, with the leading dimensions of x (…, I)."""
    if bias is not None:
        # Last, never onto an adapter's delta alone: a bias is on the grid of its precision, and would round it away.
        out = out + bias.to(out.dtype)
    return out.view(*x.shape[:-1], out.shape[-1])


def compute_dtype(x: torch.Tensor, own: torch.dtype) -> torch.dtype:
    """Precision of a product: that of autocast where it is on, otherwise the layer's own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else own


def inner_gradient(grads: Sequence[torch.Tensor], ups: Sequence[torch.Tensor], scalings: Sequence[float]) -> torch.Tensor:
    """Gradient of x Aᵀ of several layers side by side, (T, sum of r): s g B of each.

    Args:
        grads: (T, O) each.
    """
    return torch.cat([(g @ up).mul_(s) for g, up, s in zip(grads, ups, scalings, strict=True)], dim=1)


def low_rank_gradients(
    grads: Sequence[torch.Tensor],
    grad_inner: torch.Tensor,
    x: torch.Tensor,
    inner: torch.Tensor,
    ranks: Sequence[int],
    scalings: Sequence[float],
) -> list[torch.Tensor]:
    """Gradients of each A, then of each B.

    Args:
        grads: (T, O) each.
        grad_inner: of :func:`inner_gradient`; inner: (T, sum of r), x Aᵀ of the layers side by side.
        x: (T, I).
    """
    downs = [part.clone() for part in (grad_inner.T @ x).split(list(ranks))]
    ups = [(g.T @ part).mul_(s) for g, part, s in zip(grads, inner.split(list(ranks), dim=1), scalings, strict=True)]
    return [*downs, *ups]


def sum_with_low_rank(
    x: torch.Tensor, weight: torch.Tensor, left: torch.Tensor, up: torch.Tensor, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x Wᵀ + left upᵀ, summed before the one rounding; (T, O). Without a graph.

    Args:
        x: (T, I); weight: (O, I); left: (T, r); up: (O, r), r may be 0; all of one precision.
        out_dtype: of the result; none: that of x.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return (left.to(out_dtype) @ up.to(out_dtype).T).addmm_(x.to(out_dtype), weight.to(out_dtype).T)
    if not left.shape[1]:
        return x @ weight.T if out_dtype == x.dtype else torch.mm(x, weight.T, out_dtype=out_dtype)
    return add_low_rank(torch.mm(x, weight.T, out_dtype=torch.float32), left, up, out_dtype)


def adapted_sums(
    x: torch.Tensor, weights: Sequence[torch.Tensor], downs: Sequence[torch.Tensor], ups: Sequence[torch.Tensor], scales: Sequence[float]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """x Wᵀ + s (x Aᵀ) Bᵀ of each layer, (T, O), each sum rounded once; and x Aᵀ of all side by side, (T, sum of r). Without a graph.

    Args:
        x: (T, I).
        weights: (O, I) each; downs: (r, I) each; ups: (O, r) each.
    """
    inner = x @ torch.cat(list(downs)).T
    parts = inner.split([down.shape[0] for down in downs], dim=1)
    # The scale goes onto the narrow factor: onto the result it would be a pass over every output.
    outs = [
        sum_with_low_rank(x, weight, part * s if s != 1 else part, up)
        for part, weight, up, s in zip(parts, weights, ups, scales, strict=True)
    ]
    return outs, inner


def add_low_rank(base: torch.Tensor, left: torch.Tensor, up: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """base + left upᵀ on a GPU, summed in float32 and rounded once; (T, O). Without a graph.

    Args:
        base: (T, O), float32 unless the GPU gives no such product.
        left: (T, r); up: (O, r), strided as it likes; both of one precision.
        dtype: of the result.
    """
    if has_triton(base.device.index):
        from finesight.models import low_rank_kernels

        with torch.cuda.device_of(base):
            return low_rank_kernels.add_low_rank(base, left, up, dtype)
    # Two more passes over the outputs.
    return torch.addmm(base.float(), left.float(), up.float().T).to(dtype)


@lru_cache
def has_triton(device_index: int) -> bool:
    """Whether Triton is installed and knows this GPU (Turing and newer)."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device_index) >= (7, 5)


# For where the adapter reads another input than the base, as under dropout. Opaque to compilers, which would take the
# product and the sum apart.
@torch.library.custom_op("finesight::low_rank_sum", mutates_args=())
def low_rank_sum(x: torch.Tensor, weight: torch.Tensor, left: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """:func:`sum_with_low_rank` with gradients of all that need one."""
    return sum_with_low_rank(x, weight, left, up)


@low_rank_sum.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, left: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, left, up = ctx.saved_tensors
    needs_x, needs_weight, needs_left, needs_up = ctx.needs_input_grad
    return (
        grad @ weight if needs_x else None,
        grad.T @ x if needs_weight else None,
        grad @ up if needs_left else None,
        grad.T @ left if needs_up else None,
    )


low_rank_sum.register_autograd(_backward, setup_context=_save_for_backward)
