"""The GPU kernels of decoding: one query a row against keys and values in blocks.

What rows of one prompt have in common is read once for all rows of a bundle, whose queries fill one tile (as in Juravsky
et al. 2024, Hydragen); what a row has alone is read for it. Both are divided into parts, which are joined by their
logsumexp (Dao et al. 2023, Flash-Decoding; blocks as in Kwon et al. 2023, PagedAttention). A launch has as many programs
as the device runs at once, which go through the list of parts in turn. What bounds it is the time between loads, so that little is
computed for each of them: a part is found in one read, a block in one look at the table, and keys, and values, are the left
operand of each product, so that queries, of which there are few, lie along the side that matrix units take in eights.

Launches overlap on Hopper and newer as those of :mod:`finesight.models.few_rows_kernels`, and for the same reasons safely: what a program
reads before it waits (the list of parts, tables) was written before the kernel ahead of its own began.

Imported only where there is a GPU, since Triton is.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Parameters of kernels have no types: Triton gives meaning to annotations and knows `tl.constexpr` alone.

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from finesight.models.decoding import PART_FIELDS, Parts
from finesight.models.few_rows_kernels import can_overlap


class AttentionTiles(NamedTuple):
    """How a launch of attention is laid out."""

    programs: int  # for each processor
    tokens: int  # of a tile
    stages: int  # tiles that are read at once
    warps: int  # of a program
    registers: int  # of a thread
    overlapped: bool = True  # each launch begins before the one ahead of it has ended, where the GPU can


# The fastest of those measured for Qwen3-VL-4B on an H200 (bench/attend.py); and what shared memory holds of float32.
_TILES = AttentionTiles(4, 32, 3, 4, 128)
_WIDE_TILES = AttentionTiles(2, 32, 2, 4, 255)


def rotate_and_store(
    attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """See :func:`finesight.models.decoding.rotate_and_store`; norms and rotation in float32, rounded once."""
    (rows, heads, size), groups = query.shape, key.shape[1]
    query, key, value = (x if x.stride()[1:] == (size, 1) else x.contiguous() for x in (query, key, value))
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(rows, heads, size, dtype=query.dtype, device=query.device)
    normalised = hasattr(attention, "q_norm")
    weights = (attention.q_norm.weight, attention.k_norm.weight) if normalised else (cos, cos)
    eps = attention.q_norm.variance_epsilon if normalised else 0.0
    _rotate_kernel[(rows, heads + groups)](
        query, key, value, *weights, cos, sin, slots, out, keys, values, eps,
        query.stride(0), key.stride(0), value.stride(0), keys.stride(0),
        HEADS=heads, SIZE=size, HALF=size // 2, HALF_BLOCK=triton.next_power_of_2(size // 2), NORMALISED=normalised, num_warps=1, **_launched(query.device, True),
    )  # fmt: skip
    return out


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    parts: Parts,
    scale: float,
    block_tokens: int,
    tiles: AttentionTiles | None = None,
) -> torch.Tensor:
    """See :func:`finesight.models.decoding.decode_attention`.

    Args:
        tiles: others than those in use, to compare.
    """
    rows, heads, size = query.shape
    groups, bundle, most = keys.shape[1], parts.lines.shape[1] - PART_FIELDS, parts.lines.shape[0] // rows
    tiles = tiles or (_TILES if query.dtype.itemsize == 2 else _WIDE_TILES)
    programs = min(len(parts.lines) * groups, tiles.programs * _processors(query.device.index))
    shared = heads // groups
    query = query.contiguous()
    part_out = torch.empty(rows, heads, most, size, dtype=torch.float32, device=query.device)
    part_logsumexp = torch.empty(rows, heads, most, dtype=torch.float32, device=query.device)  # to base 2
    out = torch.empty_like(query)
    size_block = max(16, triton.next_power_of_2(size))  # matrix units want at least 16
    launched = _launched(query.device, tiles.overlapped)
    _attend_kernel[(programs,)](
        query, keys, values, table, parts.lines, parts.number, part_out, part_logsumexp, scale * math.log2(math.e),
        keys.stride(0), keys.stride(1), table.stride(0),
        GROUPS=groups, SHARED=shared, BUNDLE=bundle, QUERIES_BLOCK=max(16, triton.next_power_of_2(shared * bundle)),
        OWN_BLOCK=max(16, triton.next_power_of_2(shared)),
        SIZE=size, SIZE_BLOCK=size_block, BLOCK=block_tokens, TOKENS=tiles.tokens, PARTS=most, FIELDS=PART_FIELDS,
        PLACE=tl.int32 if keys.numel() < 2**31 else tl.int64, num_warps=tiles.warps, num_stages=tiles.stages,
        maxnreg=tiles.registers, **launched,
    )  # fmt: skip
    _join_kernel[(rows * heads,)](
        part_out, part_logsumexp, parts.of_row, out,
        HEADS=heads, SIZE=size, SIZE_BLOCK=size_block, PARTS=most, PARTS_BLOCK=triton.next_power_of_2(most), num_warps=1, **launched,
    )  # fmt: skip
    return out


def _launched(device: torch.device, overlapped: bool) -> dict[str, bool]:
    """Options of a launch that may begin before the one ahead of it has ended."""
    return {"OVERLAPPED": True, "launch_pdl": True} if overlapped and can_overlap(device) else {"OVERLAPPED": False}


@lru_cache
def _processors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


@triton.jit
def _rotate_kernel(
    query, key, value, query_weight, key_weight, cos, sin, slots, out, keys, values, eps,
    query_stride, key_stride, value_stride, slot_stride,
    HEADS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, NORMALISED: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """One head of queries of one row, or one of keys and values."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, HALF_BLOCK)
    wanted = channel < HALF
    if head < HEADS:
        lower, upper = _rotated(query + row * query_stride + head * SIZE, query_weight, cos + row * SIZE, sin + row * SIZE, eps,
                                SIZE, HALF, HALF_BLOCK, NORMALISED)  # fmt: skip
        target = out + (row * HEADS + head) * SIZE + channel
        tl.store(target, lower.to(out.dtype.element_ty), mask=wanted)
        tl.store(target + HALF, upper.to(out.dtype.element_ty), mask=wanted)
    else:
        group = head - HEADS
        slot = tl.load(slots + row) * slot_stride + group * SIZE
        lower, upper = _rotated(key + row * key_stride + group * SIZE, key_weight, cos + row * SIZE, sin + row * SIZE, eps,
                                SIZE, HALF, HALF_BLOCK, NORMALISED)  # fmt: skip
        tl.store(keys + slot + channel, lower.to(keys.dtype.element_ty), mask=wanted)
        tl.store(keys + slot + HALF + channel, upper.to(keys.dtype.element_ty), mask=wanted)
        source = value + row * value_stride + group * SIZE + channel
        tl.store(values + slot + channel, tl.load(source, mask=wanted).to(values.dtype.element_ty), mask=wanted)
        tl.store(values + slot + HALF + channel, tl.load(source + HALF, mask=wanted).to(values.dtype.element_ty), mask=wanted)


@triton.jit
def _rotated(
    source, weight, cos, sin, eps, SIZE: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, NORMALISED: tl.constexpr
):  # fmt: skip
    """The lower and the upper half of a head's channels, normalised and rotated, in float32."""
    channel = tl.arange(0, HALF_BLOCK)
    wanted = channel < HALF
    lower = tl.load(source + channel, mask=wanted, other=0.0).to(tl.float32)
    upper = tl.load(source + HALF + channel, mask=wanted, other=0.0).to(tl.float32)
    if NORMALISED:
        scale = 1.0 / tl.sqrt(tl.sum(lower * lower + upper * upper, axis=0) / SIZE + eps)
        lower = lower * scale * tl.load(weight + channel, mask=wanted, other=0.0).to(tl.float32)
        upper = upper * scale * tl.load(weight + HALF + channel, mask=wanted, other=0.0).to(tl.float32)
    lower_cos = tl.load(cos + channel, mask=wanted, other=0.0).to(tl.float32)
    upper_cos = tl.load(cos + HALF + channel, mask=wanted, other=0.0).to(tl.float32)
    lower_sin = tl.load(sin + channel, mask=wanted, other=0.0).to(tl.float32)
    upper_sin = tl.load(sin + HALF + channel, mask=wanted, other=0.0).to(tl.float32)
    return lower * lower_cos - upper * lower_sin, upper * upper_cos + lower * upper_sin


@triton.jit
def _attend_kernel(
    query, keys, values, table, lines, number, part_out, part_logsumexp, scale,
    slot_stride, group_stride, table_stride,
    GROUPS: tl.constexpr, SHARED: tl.constexpr, BUNDLE: tl.constexpr, QUERIES_BLOCK: tl.constexpr, OWN_BLOCK: tl.constexpr,
    SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, FIELDS: tl.constexpr, PLACE: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    program, programs, items = tl.program_id(0), tl.num_programs(0), tl.load(number).to(tl.int32) * GROUPS
    # Neighbouring programs read neighbouring groups of the same tokens. The longest parts come first, and every second round goes
    # through the programs backwards: who had a long one gets a short one.
    for begin in range(0, items, programs):
        item = begin + tl.where(begin // programs % 2 == 0, program, programs - 1 - program)
        line, group = lines + (item // GROUPS) * (FIELDS + BUNDLE), item % GROUPS
        of_prompt = tl.load(line + 4, mask=item < items, other=0)
        if of_prompt:
            _attend_part(query, keys, values, table, line, group, part_out, part_logsumexp, scale, slot_stride, group_stride, table_stride,
                         GROUPS, SHARED, BUNDLE, QUERIES_BLOCK, SIZE, SIZE_BLOCK, BLOCK, TOKENS, PARTS, FIELDS, PLACE, OVERLAPPED)  # fmt: skip
        elif item < items:
            _attend_part(query, keys, values, table, line, group, part_out, part_logsumexp, scale, slot_stride, group_stride, table_stride,
                         GROUPS, SHARED, 1, OWN_BLOCK, SIZE, SIZE_BLOCK, BLOCK, TOKENS, PARTS, FIELDS, PLACE, OVERLAPPED)  # fmt: skip


@triton.jit
def _attend_part(
    query, keys, values, table, line, group, part_out, part_logsumexp, scale, slot_stride, group_stride, table_stride,
    GROUPS: tl.constexpr, SHARED: tl.constexpr, BUNDLE: tl.constexpr, QUERIES_BLOCK: tl.constexpr,
    SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, FIELDS: tl.constexpr, PLACE: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """One group of heads of one part, for the queries of a bundle or of a single row."""
    place = tl.arange(0, QUERIES_BLOCK)
    channel = tl.arange(0, SIZE_BLOCK)
    token = tl.arange(0, TOKENS)
    row, first, last, part = tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    member = tl.load(line + FIELDS + place // SHARED, mask=place < SHARED * BUNDLE, other=-1)
    # Blocks are looked up one tile ahead: as part of the same tile, they would keep its keys and values from being read ahead.
    blocks = table + row * table_stride
    slots = _slots(blocks, first, last, slot_stride, BLOCK, TOKENS, PLACE)
    owner = member * (GROUPS * SHARED) + group * SHARED + place % SHARED
    asking = member >= 0
    wanted = (channel < SIZE)[:, None] & asking[None, :]
    own_keys, own_values = keys + group * group_stride, values + group * group_stride
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    asked = tl.load(query + owner[None, :] * SIZE + channel[:, None], mask=wanted, other=0.0)
    largest = tl.full((QUERIES_BLOCK,), float("-inf"), dtype=tl.float32)
    totals = tl.zeros((TOKENS, QUERIES_BLOCK), dtype=tl.float32)  # by place in a tile: added up once, at the end
    mixed = tl.zeros((SIZE_BLOCK, QUERIES_BLOCK), dtype=tl.float32)
    for start in range(first, last, TOKENS):
        inside = start + token < last
        places = slots[:, None] + channel[None, :]
        present = inside[:, None] & (channel < SIZE)[None, :]
        some_keys = tl.load(own_keys + places, mask=present, other=0.0)
        some_values = tl.load(own_values + places, mask=present, other=0.0)
        slots = _slots(blocks, start + TOKENS, last, slot_stride, BLOCK, TOKENS, PLACE)
        scores = tl.dot(some_keys.to(asked.dtype), asked, input_precision="ieee")
        scores = tl.where(inside[:, None], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=0))  # finite: the first token of a tile is inside
        weights = tl.exp2(scores * scale - (larger * scale)[None, :])
        shrunk = tl.exp2((largest - larger) * scale)
        totals = totals * shrunk[None, :] + weights
        mixed = tl.dot(tl.trans(some_values).to(asked.dtype), weights.to(asked.dtype), mixed * shrunk[None, :], input_precision="ieee")
        largest = larger
    total = tl.sum(totals, axis=0)
    place_out = owner * PARTS + part
    tl.store(part_out + place_out[None, :].to(tl.int64) * SIZE + channel[:, None], mixed * (1.0 / total)[None, :], mask=wanted)
    tl.store(part_logsumexp + place_out, largest * scale + tl.log2(total), mask=asking)


@triton.jit
def _slots(blocks, start, last, slot_stride, BLOCK: tl.constexpr, TOKENS: tl.constexpr, PLACE: tl.constexpr):
    """(TOKENS,): where keys and values of tokens from `start` on, the first of a block, begin."""
    token = tl.arange(0, TOKENS)
    block = tl.load(blocks + start // BLOCK, mask=start < last, other=0).to(PLACE)
    begin = tl.zeros((TOKENS,), dtype=PLACE) + block * (BLOCK * slot_stride)
    for further in tl.static_range(1, TOKENS // BLOCK):
        block = tl.load(blocks + start // BLOCK + further, mask=start + further * BLOCK < last, other=0).to(PLACE)
        begin = tl.where(token < further * BLOCK, begin, block * (BLOCK * slot_stride))
    return begin + token % BLOCK * slot_stride


@triton.jit
def _join_kernel(
    part_out, part_logsumexp, of_row, out,
    HEADS: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    owner = tl.program_id(0)
    part = tl.arange(0, PARTS_BLOCK)
    channel = tl.arange(0, SIZE_BLOCK)
    there = part < tl.load(of_row + owner // HEADS)
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    logsumexp = tl.load(part_logsumexp + owner * PARTS + part, mask=there, other=float("-inf"))
    weights = tl.exp2(logsumexp - tl.max(logsumexp, axis=0))
    weights = weights / tl.sum(weights, axis=0)
    wanted = there[:, None] & (channel < SIZE)[None, :]
    some = tl.load(part_out + (owner * PARTS + part)[:, None] * SIZE + channel[None, :], mask=wanted, other=0.0)
    tl.store(out + owner * SIZE + channel, tl.sum(some * weights[:, None], axis=0).to(out.dtype.element_ty), mask=channel < SIZE)
