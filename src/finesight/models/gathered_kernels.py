"""The GPU kernel that sums the gradients of gathered rows.

Imported only where there is a GPU, since Triton is. It writes each element once and sums in a fixed order: no atomics, so a run
repeats bit by bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Parameters of kernels have no types: Triton gives meaning to annotations and knows `tl.constexpr` alone.

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl


def sums_over_uses(grad: torch.Tensor, uses: torch.Tensor, cu_uses: torch.Tensor, rows: int) -> torch.Tensor:
    """For each of T rows the sum, in float32 and rounded once, of the rows of grad that `uses` names for it.

    Args:
        grad: (K, …), contiguous.
        uses: (K,) int32; cu_uses: (T + 1,) int32.

    Returns:
        (T, …).
    """
    out = torch.empty(rows, *grad.shape[1:], dtype=grad.dtype, device=grad.device)
    width = math.prod(grad.shape[1:])
    if out.numel():
        block = min(triton.next_power_of_2(width), 1024)
        _sum_kernel[rows, triton.cdiv(width, block)](grad, uses, cu_uses, out, width, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _sum_kernel(grad, uses, cu_uses, out, width, BLOCK: tl.constexpr):
    """A block of one row a program."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for place in range(tl.load(cu_uses + row), tl.load(cu_uses + row + 1)):
        source = tl.load(uses + place).to(tl.int64)
        total += tl.load(grad + source * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * width + column, total.to(out.dtype.element_ty), mask=inside)
