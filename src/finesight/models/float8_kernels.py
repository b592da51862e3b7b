"""GPU kernels around float8 products: quantising rows, transposing bytes, adding an adapter's delta.

Imported only where there is a GPU, since Triton is. Every kernel writes each element once and in a fixed order: no
atomics, nothing read that was not written, so a run repeats bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

MOST_JOINED = 3  # tensors that one row quantisation takes side by side


def quantize_rows(
    tensors: Sequence[torch.Tensor], multipliers: Sequence[torch.Tensor] | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of up to three tensors side by side in float8; the same numbers as :func:`float8.quantize_rows` gives.

    Args:
        tensors: (T, I) each, their last dimension contiguous.
        multipliers: float32 (I,) each, for the columns of their tensor, or none.
        dtype: of the result.

    Returns:
        (T, sum of I) in float8 and the scales (T, 1) in float32.
    """
    widths = [tensor.shape[1] for tensor in tensors]
    rows = tensors[0].shape[0]
    out = torch.empty(rows, sum(widths), dtype=dtype, device=tensors[0].device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=tensors[0].device)
    if rows == 0:
        return out, scale
    # Places that are not taken are filled with the first tensor; the kernel does not touch them.
    filled = [*tensors, *([tensors[0]] * (MOST_JOINED - len(tensors)))]
    columns = [*multipliers, *([multipliers[0]] * (MOST_JOINED - len(tensors)))] if multipliers else [scale] * MOST_JOINED
    blocks = [triton.next_power_of_2(tensor.shape[1]) for tensor in filled]
    total = sum(blocks[: len(tensors)])
    _quantize_rows_kernel[(rows,)](
        *filled, *columns, out, scale,
        *(tensor.stride(0) for tensor in filled), out.stride(0), *(tensor.shape[1] for tensor in filled),
        INVERSE_MAX=1 / torch.finfo(dtype).max, COUNT=len(tensors), MULTIPLIED=multipliers is not None,
        BLOCK_0=blocks[0], BLOCK_1=blocks[1], BLOCK_2=blocks[2],
        num_warps=4 if total <= 4096 else 8 if total <= 8192 else 16 if total <= 32768 else 32,
    )  # fmt: skip
    return out, scale


@triton.jit
def _load_row(source: Any, multiplier: Any, row: Any, stride: Any, width: Any, MULTIPLIED: tl.constexpr, BLOCK: tl.constexpr) -> Any:
    column = tl.arange(0, BLOCK)
    values = tl.load(source + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
    if MULTIPLIED:
        values *= tl.load(multiplier + column, mask=column < width, other=0.0)
    return values


@triton.jit
def _store_row(out: Any, values: Any, inverse: Any, width: Any, BLOCK: tl.constexpr) -> None:
    column = tl.arange(0, BLOCK)
    tl.store(out + column, (values * inverse).to(out.dtype.element_ty), mask=column < width)


@triton.jit
def _quantize_rows_kernel(
    source_0: Any, source_1: Any, source_2: Any, multiplier_0: Any, multiplier_1: Any, multiplier_2: Any, out: Any, scale: Any,
    stride_0: Any, stride_1: Any, stride_2: Any, out_stride: Any, width_0: Any, width_1: Any, width_2: Any,
    INVERSE_MAX: tl.constexpr, COUNT: tl.constexpr, MULTIPLIED: tl.constexpr,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr,
) -> None:  # fmt: skip
    """One row a program, held in registers between finding its largest value and writing it."""
    row = tl.program_id(0).to(tl.int64)
    values_0 = _load_row(source_0, multiplier_0, row, stride_0, width_0, MULTIPLIED, BLOCK_0)
    largest = tl.max(tl.abs(values_0), axis=0)
    if COUNT > 1:
        values_1 = _load_row(source_1, multiplier_1, row, stride_1, width_1, MULTIPLIED, BLOCK_1)
        largest = tl.maximum(largest, tl.max(tl.abs(values_1), axis=0))
    if COUNT > 2:
        values_2 = _load_row(source_2, multiplier_2, row, stride_2, width_2, MULTIPLIED, BLOCK_2)
        largest = tl.maximum(largest, tl.max(tl.abs(values_2), axis=0))
    # The next power of two, as in float8.power_of_two_scale; 2^-100 is its floor.
    wanted = tl.maximum(largest, 7.888609052210118e-31) * INVERSE_MAX
    exponent = (wanted.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(scale + row, (exponent << 23).to(tl.float32, bitcast=True) + largest * 0.0)
    out += row * out_stride
    _store_row(out, values_0, inverse, width_0, BLOCK_0)
    if COUNT > 1:
        _store_row(out + width_0, values_1, inverse, width_1, BLOCK_1)
    if COUNT > 2:
        _store_row(out + width_0 + width_1, values_2, inverse, width_2, BLOCK_2)


def transpose_into(weight: torch.Tensor, out: torch.Tensor) -> None:
    """out = weightᵀ for matrices of one byte an element.

    Args:
        weight: (O, I), rows contiguous.
        out: (I, O), rows contiguous; may be a part of a wider matrix.
    """
    rows, columns = weight.shape
    grid = (triton.cdiv(rows, 128), triton.cdiv(columns, 128))
    source, target = weight.view(torch.uint8), out.view(torch.uint8)
    _transpose_kernel[grid](source, target, rows, columns, source.stride(0), target.stride(0), BLOCK=128, num_warps=8)


@triton.jit
def _transpose_kernel(source: Any, target: Any, rows: Any, columns: Any, source_stride: Any, target_stride: Any, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = row.to(tl.int64)[:, None] * source_stride + column[None, :]
    tile = tl.load(source + places, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0)
    places = column.to(tl.int64)[:, None] * target_stride + row[None, :]
    tl.store(target + places, tl.trans(tile), mask=(column < columns)[:, None] & (row < rows)[None, :])


def add_low_rank(base: torch.Tensor, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """base + left rightᵀ, summed in float32 and rounded once.

    Args:
        base: (T, O).
        left: (T, r); right: (O, r), strided as it likes; both of the same precision.
        dtype: of the result.
    """
    rows, columns, rank = *base.shape, left.shape[1]
    out = torch.empty(rows, columns, dtype=dtype, device=base.device)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(rows, 64), triton.cdiv(columns, 128))
    _add_low_rank_kernel[grid](
        base, left, right, out, rows, columns, base.stride(0), left.stride(0), left.stride(1), right.stride(0), right.stride(1), out.stride(0),
        RANK=rank, RANK_BLOCK=_rank_block(rank), ROW_BLOCK=64, COLUMN_BLOCK=128, num_warps=4,
    )  # fmt: skip
    return out


def _rank_block(rank: int) -> int:
    """Ranks taken at a time: matrix units want at least 16."""
    return min(max(triton.next_power_of_2(rank), 16), 64)


@triton.jit
def _add_products(
    total: Any, left: Any, right: Any, row: Any, column: Any, rows: Any, columns: Any,
    left_row: Any, left_rank: Any, right_column: Any, right_rank: Any, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """total + left rightᵀ on one tile."""
    for start in tl.static_range(0, RANK, RANK_BLOCK):
        rank = start + tl.arange(0, RANK_BLOCK)
        places = left + row.to(tl.int64)[:, None] * left_row + rank[None, :] * left_rank
        some_left = tl.load(places, mask=(row < rows)[:, None] & (rank < RANK)[None, :], other=0.0)
        places = right + rank.to(tl.int64)[:, None] * right_rank + column.to(tl.int64)[None, :] * right_column
        some_right = tl.load(places, mask=(rank < RANK)[:, None] & (column < columns)[None, :], other=0.0)
        total = tl.dot(some_left, some_right, total, input_precision="ieee")
    return total


@triton.jit
def _add_low_rank_kernel(
    base: Any, left: Any, right: Any, out: Any, rows: Any, columns: Any, base_stride: Any,
    left_row: Any, left_rank: Any, right_column: Any, right_rank: Any, out_stride: Any,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    column = tl.program_id(1) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    total = tl.load(base + row.to(tl.int64)[:, None] * base_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    total = _add_products(
        total, left, right, row, column, rows, columns, left_row, left_rank, right_column, right_rank, RANK, RANK_BLOCK
    )  # fmt: skip
    tl.store(out + row.to(tl.int64)[:, None] * out_stride + column[None, :], total.to(out.dtype.element_ty), mask=inside)


def product_with_low_rank(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor,
    dtype: torch.dtype, *, fast_accumulation: bool,
) -> torch.Tensor:  # fmt: skip
    """(scales of rows of a)ᵀ a bᵀ (scales of rows of b) + left rightᵀ in one kernel, rounded once.

    Args:
        a: (M, K) in float8, rows contiguous, K a multiple of 16; a_scale: (M, 1) float32.
        b: (N, K), likewise; b_scale: (N,) float32, or none for ones.
        left: (M, r); right: (N, r), strided as it likes.
        fast_accumulation: add up inside the matrix unit all along K; otherwise in float32 every 128 entries.

    Returns:
        (M, N).
    """
    (rows, depth), columns, rank = a.shape, b.shape[0], left.shape[1]
    out = torch.empty(rows, columns, dtype=dtype, device=a.device)
    if out.numel() == 0:
        return out
    row_block, column_block = 128, 256 if fast_accumulation else 128  # the second float32 sum takes its place in registers
    tiles = triton.cdiv(rows, row_block) * triton.cdiv(columns, column_block)
    processors = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 2
    _product_kernel[(min(tiles, processors),)](
        TensorDescriptor.from_tensor(a, [row_block, 128]), TensorDescriptor.from_tensor(b, [column_block, 128]),
        TensorDescriptor.from_tensor(out, [row_block, column_block // 2]),
        a_scale, a_scale if b_scale is None else b_scale, left, right, rows, columns, depth,
        left.stride(0), left.stride(1), right.stride(0), right.stride(1),
        B_SCALED=b_scale is not None, RANK=rank, RANK_BLOCK=_rank_block(rank), ROW_BLOCK=row_block, COLUMN_BLOCK=column_block,
        DEPTH_BLOCK=128, GROUP=8, PROGRAMS=min(tiles, processors), IMPRECISE=None if fast_accumulation else 128,
        num_warps=8, num_stages=3 if fast_accumulation else 4,
    )  # fmt: skip
    return out


@triton.jit
def _product_kernel(
    a: Any, b: Any, out: Any, a_scale: Any, b_scale: Any, left: Any, right: Any, rows: Any, columns: Any, depth: Any,
    left_row: Any, left_rank: Any, right_column: Any, right_rank: Any,
    B_SCALED: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr, IMPRECISE: tl.constexpr,
) -> None:  # fmt: skip
    """Each program walks over tiles of the result; tiles that share operands are near each other in time (cache)."""
    row_tiles, column_tiles = tl.cdiv(rows, ROW_BLOCK), tl.cdiv(columns, COLUMN_BLOCK)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        group = tile // (GROUP * column_tiles)
        group_rows = min(row_tiles - group * GROUP, GROUP)
        first_row = (group * GROUP + (tile % (GROUP * column_tiles)) % group_rows) * ROW_BLOCK
        first_column = ((tile % (GROUP * column_tiles)) // group_rows) * COLUMN_BLOCK
        total = tl.zeros((ROW_BLOCK, COLUMN_BLOCK), dtype=tl.float32)
        for step in range(tl.cdiv(depth, DEPTH_BLOCK)):
            some_a = a.load([first_row, step * DEPTH_BLOCK])
            some_b = b.load([first_column, step * DEPTH_BLOCK])
            total = tl.dot(some_a, some_b.T, total, max_num_imprecise_acc=IMPRECISE)
        row, column = first_row + tl.arange(0, ROW_BLOCK), first_column + tl.arange(0, COLUMN_BLOCK)
        total *= tl.load(a_scale + row, mask=row < rows, other=0.0)[:, None]
        if B_SCALED:
            total *= tl.load(b_scale + column, mask=column < columns, other=0.0)[None, :]
        total = _add_products(
            total, left, right, row, column, rows, columns, left_row, left_rank, right_column, right_rank, RANK, RANK_BLOCK
        )  # fmt: skip
        halves = tl.permute(tl.reshape(total, (ROW_BLOCK, 2, COLUMN_BLOCK // 2)), (0, 2, 1))
        first, second = tl.split(halves)
        out.store([first_row, first_column], first.to(out.dtype))
        out.store([first_row, first_column + COLUMN_BLOCK // 2], second.to(out.dtype))
