"""GPU kernels for linear layers of few rows, as in decoding, whose time is that of reading the weights.

One launch streams the weights of all layers of one input, and with adapters their A matrices too, as so many further
outputs. Its programs stand for a tile of outputs and a part of the inputs; where there are several parts, or adapters, a
second launch joins the partial sums and adds B's share and the bias before the one rounding. The weights are the left
operand of each product, so that rows lie along the side that matrix units take in eights: what kind of unit is used, and
in which order a sum is formed, depends on the weights' shapes alone and not on the rows, nor on how many there are.

Launches overlap on Hopper and newer (programmatic dependent launch): a program may start while the kernel ahead of its own still runs,
and waits. That is safe because every program waits (`gdc_wait`) before it reads what an earlier kernel may have written, and before it
writes anything: all that came before has then ended, since no kernel ends without having waited itself, whether it is one of these or an
ordinary one. Each lets the next one start only after its own wait, so that `_join_kernel` runs beside its `_stream_kernel` alone, and may
read B, which that does not write, before it waits for the sums. Weights brought into the cache ahead of the wait, of the same product or
of the next, made a step no shorter on an H200.

Imported only where there is a GPU, since Triton is. No atomics: a run repeats bit by bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Parameters of kernels have no types: Triton gives meaning to annotations and knows `tl.constexpr` alone.

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from finesight.models.few_rows import MOST_LAYERS, Tiles, stages_that_fit

_JOINED_OUTPUTS = 16  # of a program of the second launch: many small ones, since each of them waits for memory


def few_rows_products(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    downs: Sequence[torch.Tensor],
    ups: Sequence[torch.Tensor],
    scales: Sequence[float],
    tiles: Tiles,
) -> list[torch.Tensor]:
    """x Wᵀ + s (x Aᵀ) Bᵀ + bias of each layer, summed in float32 and rounded once; (T, O) each.

    Args:
        x: (T, I), at least one row.
        weights: (O, I) each, of x's precision, 1 to MOST_LAYERS of them.
        biases: (O,) each, or None.
        downs: (r, I) each; ups: (O, r) each; r may be 0. In any one precision: they are rounded to that of x as they are read.
            All three of downs, ups and scales may be empty. Every matrix is contiguous.
        tiles: for these shapes, whatever the number of rows.
    """
    (rows, inputs), layers = x.shape, len(weights)
    row_block, rank = max(16, triton.next_power_of_2(rows)), max((down.shape[0] for down in downs), default=0)  # matrix units want 16
    adapters, rank_block = (layers, max(16, triton.next_power_of_2(rank))) if rank else (0, 16)
    sizes = [weight.shape[0] for weight in weights]
    ends = [sum(triton.cdiv(size, tiles.outputs) for size in sizes[: place + 1]) for place in range(layers)]
    part_inputs = tiles.inputs * triton.cdiv(triton.cdiv(inputs, tiles.parts), tiles.inputs)
    parts = triton.cdiv(inputs, part_inputs)
    joined = parts > 1 or rank > 0
    outs = [torch.empty(rows, size, dtype=x.dtype, device=x.device) for size in sizes]
    partial = x.new_empty((parts, ends[-1], tiles.outputs, row_block) if joined else 0, dtype=torch.float32)
    left = x.new_empty((parts, adapters, rank_block, row_block), dtype=torch.float32)
    shapes = (rows, *_padded(sizes), *_padded([down.shape[0] for down in downs] if rank else [0]), adapters)
    results = (*_padded(biases), *_padded(outs))
    down_block = rank_block if rank else 0
    stages = stages_that_fit(tiles, row_block, down_block, downs[0].element_size() if rank else 0, shared_bytes(x.device))
    overlapped = tiles.overlapped and can_overlap(x.device)
    launched = {"OVERLAPPED": True, "launch_pdl": True} if overlapped else {"OVERLAPPED": False}
    _stream_kernel[adapters + ends[-1], parts](
        x, *_padded(weights), *_padded(downs if rank else weights), *results, partial, left, *shapes, *_padded(ends), inputs, part_inputs,
        ROWS=row_block, OUTPUTS=tiles.outputs, INPUTS=tiles.inputs, RANKS=rank_block, ADAPTED=rank > 0, JOINED=joined,
        EVEN=inputs % tiles.inputs == 0, num_warps=tiles.warps, num_stages=stages, **launched,
    )  # fmt: skip
    if joined:
        _join_kernel[(triton.cdiv(ends[-1] * tiles.outputs, _JOINED_OUTPUTS),)](
            partial, left, *_padded(ups if rank else weights), *results, *_padded([float(s) for s in scales] if rank else [1.0]), *shapes,
            *_padded([end * tiles.outputs // _JOINED_OUTPUTS for end in ends]),
            ROWS=row_block, JOINED_OUTPUTS=_JOINED_OUTPUTS, RANKS=rank_block, ADAPTED=rank > 0, PARTS=parts, num_warps=4, **launched,
        )  # fmt: skip
    return outs


@lru_cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may use."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@lru_cache
def can_overlap(device: torch.device) -> bool:
    """Whether launches can be made dependent on one another, and their programs wait: Hopper and newer."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _padded(items: Sequence[Any]) -> list[Any]:
    """As many as kernels take; no program comes to those that are repeated."""
    return [*items, *[items[-1]] * (MOST_LAYERS - len(items))]


# Not specialised: kernels would be compiled anew for a single row, or for numbers that 16 happens to divide.
_COUNTS = ["rows", "adapters", "end_0", "end_1", "end_2"]


@triton.jit(do_not_specialize=_COUNTS)
def _stream_kernel(
    x, weight_0, weight_1, weight_2, down_0, down_1, down_2, bias_0, bias_1, bias_2, out_0, out_1, out_2, partial, left,
    rows, size_0, size_1, size_2, rank_0, rank_1, rank_2, adapters, end_0, end_1, end_2, inputs, part_inputs,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, RANKS: tl.constexpr, ADAPTED: tl.constexpr, JOINED: tl.constexpr,
    EVEN: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """One tile of outputs, or all of an A matrix, over one part of the inputs."""
    part = tl.program_id(1)
    begin = part * part_inputs
    end = tl.minimum(begin + part_inputs, inputs)
    tile = tl.program_id(0) - adapters
    if ADAPTED and tile < 0:
        layer = tile + adapters
        down, rank = down_0, rank_0
        if layer == 1:
            down, rank = down_1, rank_1
        if layer == 2:
            down, rank = down_2, rank_2
        if rank > 0:
            if OVERLAPPED:
                tl.extra.cuda.gdc_wait()
                tl.extra.cuda.gdc_launch_dependents()
            inner = _product(x, down, 0, rank, rows, inputs, begin, end, ROWS, RANKS, INPUTS, EVEN)
            _store_whole(left, (part * adapters + layer).to(tl.int64), inner, ROWS, RANKS)
    else:
        weight, size, first = weight_0, size_0, tile * OUTPUTS
        if tile >= end_0:
            weight, size, first = weight_1, size_1, (tile - end_0) * OUTPUTS
        if tile >= end_1:
            weight, size, first = weight_2, size_2, (tile - end_1) * OUTPUTS
        if OVERLAPPED:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        total = _product(x, weight, first, size, rows, inputs, begin, end, ROWS, OUTPUTS, INPUTS, EVEN)
        if JOINED:
            _store_whole(partial, (part * end_2 + tile).to(tl.int64), total, ROWS, OUTPUTS)
        elif tile < end_0:
            _finish(total, bias_0, out_0, first, size, rows, ROWS, OUTPUTS)
        elif tile < end_1:
            _finish(total, bias_1, out_1, first, size, rows, ROWS, OUTPUTS)
        else:
            _finish(total, bias_2, out_2, first, size, rows, ROWS, OUTPUTS)


@triton.jit(do_not_specialize=_COUNTS)
def _join_kernel(
    partial, left, up_0, up_1, up_2, bias_0, bias_1, bias_2, out_0, out_1, out_2, scale_0, scale_1, scale_2,
    rows, size_0, size_1, size_2, rank_0, rank_1, rank_2, adapters, end_0, end_1, end_2,
    ROWS: tl.constexpr, JOINED_OUTPUTS: tl.constexpr, RANKS: tl.constexpr, ADAPTED: tl.constexpr, PARTS: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Some outputs of one layer: the sum over all parts, B's share, the bias. Ends are of programs here, not of tiles."""
    tile = tl.program_id(0)
    if tile < end_0:
        _join(partial, left, up_0, bias_0, out_0, scale_0, tile, tile * JOINED_OUTPUTS, rows, size_0, rank_0, 0, adapters, end_2,
              ROWS, JOINED_OUTPUTS, RANKS, ADAPTED, PARTS, OVERLAPPED)  # fmt: skip
    elif tile < end_1:
        _join(partial, left, up_1, bias_1, out_1, scale_1, tile, (tile - end_0) * JOINED_OUTPUTS, rows, size_1, rank_1, 1, adapters, end_2,
              ROWS, JOINED_OUTPUTS, RANKS, ADAPTED, PARTS, OVERLAPPED)  # fmt: skip
    else:
        _join(partial, left, up_2, bias_2, out_2, scale_2, tile, (tile - end_1) * JOINED_OUTPUTS, rows, size_2, rank_2, 2, adapters, end_2,
              ROWS, JOINED_OUTPUTS, RANKS, ADAPTED, PARTS, OVERLAPPED)  # fmt: skip


@triton.jit
def _join(
    partial, left, up, bias, out, scale, tile, first, rows, size, rank, layer: tl.constexpr, adapters, tiles,
    ROWS: tl.constexpr, LINES: tl.constexpr, RANKS: tl.constexpr, ADAPTED: tl.constexpr, PARTS: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Outputs of one layer from the first on: one of so many tiles (LINES, ROWS) of all layers."""
    if ADAPTED:
        line, number = first + tl.arange(0, LINES), tl.arange(0, RANKS)
        mask = (line < size)[:, None] & (number < rank)[None, :]
        some_up = tl.load(up + line[:, None] * rank + number[None, :], mask=mask, other=0.0).to(out.dtype.element_ty)
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    inside = tl.arange(0, LINES)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    total = tl.load(partial + tl.cast(tile, tl.int64) * (LINES * ROWS) + inside)
    for part in tl.static_range(1, PARTS):
        total += tl.load(partial + tl.cast(part * tiles + tile, tl.int64) * (LINES * ROWS) + inside)
    if ADAPTED:
        total = _add_delta(total, left, some_up, scale, rank, layer, adapters, ROWS, RANKS, PARTS)
    _finish(total, bias, out, first, size, rows, ROWS, LINES)


@triton.jit
def _product(
    x, matrix, first, lines, rows, inputs, begin, end,
    ROWS: tl.constexpr, LINES: tl.constexpr, INPUTS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(LINES, ROWS): lines of a row-major matrix (lines, inputs) from the first on, times rows of x, over inputs from begin to end."""
    # What lies outside is read as the last line, or row, again: without masks loads are asynchronous copies of full width.
    line = tl.minimum(tl.arange(0, LINES), lines - 1 - first)
    row = tl.minimum(tl.arange(0, ROWS), rows - 1)
    number = tl.arange(0, INPUTS)
    matrix_places = matrix + tl.cast(first, tl.int64) * inputs + line[:, None] * inputs + number[None, :]
    x_places = x + row[None, :] * inputs + number[:, None]
    total = tl.zeros((LINES, ROWS), dtype=tl.float32)
    for start in range(begin, end, INPUTS):
        if EVEN:
            some_lines = tl.load(matrix_places + start)
            some_x = tl.load(x_places + start)
        else:
            some_lines = tl.load(matrix_places + start, mask=(start + number < inputs)[None, :], other=0.0)
            some_x = tl.load(x_places + start, mask=(start + number < inputs)[:, None], other=0.0)
        total = tl.dot(some_lines.to(x.dtype.element_ty), some_x, total, input_precision="ieee")
    return total


@triton.jit
def _store_whole(target, place, total, ROWS: tl.constexpr, LINES: tl.constexpr):
    """One of many tiles (LINES, ROWS) that lie one after another."""
    inside = tl.arange(0, LINES)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(target + place * (LINES * ROWS) + inside, total)


@triton.jit
def _add_delta(
    total, left, some_up, scale, rank, layer: tl.constexpr, adapters, ROWS: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr
):
    """total + s B (x Aᵀ)ᵀ: (LINES, ROWS), with those lines of B: (LINES, RANKS)."""
    number = tl.arange(0, RANKS)
    places = (layer * RANKS + number)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    inner = tl.zeros((RANKS, ROWS), dtype=tl.float32)
    for part in tl.static_range(0, PARTS):
        inner += tl.load(left + part * adapters * RANKS * ROWS + places, mask=(number < rank)[:, None], other=0.0)
    inner = inner * scale
    # As two numbers of the product's precision, so that nothing is lost of what was summed in float32.
    high = inner.to(some_up.dtype)
    low = (inner - high.to(tl.float32)).to(some_up.dtype)
    total = tl.dot(some_up, low, total, input_precision="ieee")
    return tl.dot(some_up, high, total, input_precision="ieee")


@triton.jit
def _finish(total, bias, out, first, size, rows, ROWS: tl.constexpr, LINES: tl.constexpr):
    """Adds the bias of outputs from the first on, rounds, and writes them as columns of out (rows, size)."""
    line = first + tl.arange(0, LINES)
    row = tl.arange(0, ROWS)
    if bias is not None:
        total += tl.load(bias + line, mask=line < size, other=0.0).to(tl.float32)[:, None]
    turned = tl.trans(total).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * size + line[None, :], turned, mask=(row < rows)[:, None] & (line < size)[None, :])
