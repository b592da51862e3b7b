"""Rows gathered by an index, whose gradient is summed in float32 and always in the same order.

A prompt's keys are gathered for itself and for each of its completions. The gradient of a plain gather adds these up with atomics,
in the precision of the keys and in whatever order they come.

Shapes: T tokens, K gathered rows.
"""

from __future__ import annotations

from typing import Any

import torch

from finesight.models.low_rank import has_triton


def gather_rows(x: torch.Tensor, index: torch.Tensor, uses: torch.Tensor, cu_uses: torch.Tensor) -> torch.Tensor:
    """x[index] of x (T, …) and an index (K,).

    Args:
        uses: (K,) int32, the places of the index in the order of what they name; cu_uses: (T + 1,) int32, where those of each row
            of x begin.
    """
    gathered: torch.Tensor = _Gathered.apply(x, index, uses, cu_uses)
    return gathered


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, uses: torch.Tensor, cu_uses: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index, uses, cu_uses)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return sums_over_uses(grads[0], *ctx.saved_tensors, ctx.rows), None, None, None


# Opaque to compilers, which would make atomics of it; the gather itself they may fuse, and compute again.
@torch.library.custom_op("finesight::sums_over_uses", mutates_args=())
def sums_over_uses(grad: torch.Tensor, index: torch.Tensor, uses: torch.Tensor, cu_uses: torch.Tensor, rows: int) -> torch.Tensor:
    """(T, …): for each of T rows the sum of those rows of grad (K, …) that were gathered from it; other arguments as in :func:`gather_rows`."""
    if grad.is_cuda and grad.dtype != torch.float64 and has_triton(grad.device.index):
        from finesight.models import gathered_kernels

        with torch.cuda.device_of(grad):
            return gathered_kernels.sums_over_uses(grad.contiguous(), uses, cu_uses, rows)
    exact = torch.promote_types(grad.dtype, torch.float32)
    return grad.new_zeros(rows, *grad.shape[1:], dtype=exact).index_add_(0, index, grad.to(exact)).to(grad.dtype)


@sums_over_uses.register_fake
def _(grad: torch.Tensor, index: torch.Tensor, uses: torch.Tensor, cu_uses: torch.Tensor, rows: int) -> torch.Tensor:
    return grad.new_empty(rows, *grad.shape[1:])
