"""The GPU kernels of decoding: one query a row against keys and values in blocks.

What rows of one prompt have in common is read once for all rows of a bundle, whose queries fill one tile (as in Juravsky
et al. 2024, Hydragen); what a row has alone is read for it. Both are divided into parts, which are joined by their
logsumexp (Dao et al. 2023, Flash-Decoding; blocks as in Kwon et al. 2023, PagedAttention). A launch has as many programs
as the device runs at once, which go through the parts in turn: most lines of a table of bundles are empty, and a program
for each would take longer to begin and end than the work itself.

How a row's tokens are divided depends on its own lengths alone, so that what a row gets does not change with its neighbours.

Imported only where there is a GPU, since Triton is.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Parameters of kernels have no types: Triton gives meaning to annotations and knows `tl.constexpr` alone.

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from finesight.models.decoding import Bundles

# Most parts that a prompt, and what a row has alone, are divided into; and the fewest tokens worth a part.
_PROMPT_PARTS = 8
_OWN_PARTS = 2
_LEAST_TOKENS = 256
_PROGRAMS_PER_PROCESSOR = 2


def store_tokens(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """See :func:`finesight.models.decoding.store_tokens`."""
    rows, width = key.shape[0], key.shape[1] * key.shape[2]
    key, value = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (key, value))
    _store_kernel[(rows,)](
        key, value, keys, values, slots, key.stride(0), value.stride(0), keys.stride(0),
        WIDTH=width, WIDTH_BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    bundles: Bundles,
    scale: float,
    block_tokens: int,
) -> torch.Tensor:
    """See :func:`finesight.models.decoding.decode_attention`."""
    rows, heads, size = query.shape
    groups, bundle = keys.shape[1], bundles.members.shape[1]
    programs = min(rows * groups * (_PROMPT_PARTS + _OWN_PARTS), _PROGRAMS_PER_PROCESSOR * _processors(query.device.index))
    shared = heads // groups
    query = query.contiguous()
    parts = _PROMPT_PARTS + _OWN_PARTS
    part_out = torch.empty(rows, heads, parts, size, dtype=torch.float32, device=query.device)
    part_logsumexp = torch.empty(rows, heads, parts, dtype=torch.float32, device=query.device)
    out = torch.empty_like(query)
    size_block = max(16, triton.next_power_of_2(size))  # matrix units want at least 16
    tokens, stages = (64, 3) if query.dtype.itemsize == 2 else (32, 2)  # what shared memory holds
    _attend_kernel[(programs,)](
        query, keys, values, table, lengths, bundles.members, bundles.count, bundles.prompt_blocks, part_out, part_logsumexp, scale, rows,
        keys.stride(0), keys.stride(1), table.stride(0),
        GROUPS=groups, SHARED=shared, BUNDLE=bundle, QUERIES_BLOCK=max(16, triton.next_power_of_2(shared * bundle)),
        SIZE=size, SIZE_BLOCK=size_block, BLOCK=block_tokens, TOKENS=tokens, LEAST_TOKENS=_LEAST_TOKENS,
        PROMPT_PARTS=_PROMPT_PARTS, OWN_PARTS=_OWN_PARTS, num_warps=4, num_stages=stages,
    )  # fmt: skip
    _join_kernel[(rows * heads,)](
        part_out, part_logsumexp, lengths, bundles.prompt_blocks, out,
        HEADS=heads, SIZE=size, SIZE_BLOCK=size_block, BLOCK=block_tokens, TOKENS=tokens, LEAST_TOKENS=_LEAST_TOKENS,
        PROMPT_PARTS=_PROMPT_PARTS, OWN_PARTS=_OWN_PARTS, PARTS_BLOCK=triton.next_power_of_2(parts), num_warps=1,
    )  # fmt: skip
    return out


@lru_cache
def _processors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


@triton.jit
def _store_kernel(
    key, value, keys, values, slots, key_stride, value_stride, slot_stride, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    channel = tl.arange(0, WIDTH_BLOCK)
    wanted = channel < WIDTH
    some_key = tl.load(key + row * key_stride + channel, mask=wanted)
    some_value = tl.load(value + row * value_stride + channel, mask=wanted)
    tl.store(keys + slot * slot_stride + channel, some_key.to(keys.dtype.element_ty), mask=wanted)
    tl.store(values + slot * slot_stride + channel, some_value.to(values.dtype.element_ty), mask=wanted)


@triton.jit
def _attend_kernel(
    query, keys, values, table, lengths, members, count, prompt_blocks, part_out, part_logsumexp, scale, rows,
    slot_stride, group_stride, table_stride,
    GROUPS: tl.constexpr, SHARED: tl.constexpr, BUNDLE: tl.constexpr, QUERIES_BLOCK: tl.constexpr,
    SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, LEAST_TOKENS: tl.constexpr,
    PROMPT_PARTS: tl.constexpr, OWN_PARTS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = PROMPT_PARTS + OWN_PARTS
    place = tl.arange(0, QUERIES_BLOCK)
    channel = tl.arange(0, SIZE_BLOCK)
    token = tl.arange(0, TOKENS)
    of_prompts = tl.load(count) * (GROUPS * PROMPT_PARTS)
    # Parts of prompts, which are the longest, come first. Neighbouring programs read neighbouring groups of the same tokens.
    for item in range(tl.program_id(0), of_prompts + rows * (GROUPS * OWN_PARTS), tl.num_programs(0)):
        of_prompt = item < of_prompts
        within = tl.where(of_prompt, item, item - of_prompts)
        group = within % GROUPS
        part = (within // GROUPS) % tl.where(of_prompt, PROMPT_PARTS, OWN_PARTS)
        line = within // (GROUPS * tl.where(of_prompt, PROMPT_PARTS, OWN_PARTS))  # a bundle, or a row
        # Queries: those of a whole bundle, or of the row.
        together = tl.load(members + line * BUNDLE + place // SHARED, mask=of_prompt & (place < SHARED * BUNDLE), other=-1)
        member = tl.where(of_prompt, together, tl.where(place < SHARED, line, -1))
        row = tl.where(of_prompt, tl.max(member, axis=0), line)  # whose table is read: the members of a bundle agree on their prompt
        common = tl.load(prompt_blocks + row) * BLOCK
        begin = tl.where(of_prompt, 0, common)
        end = tl.where(of_prompt, common, tl.load(lengths + row))
        each = _tokens_of_a_part(end - begin, tl.where(of_prompt, PROMPT_PARTS, OWN_PARTS), LEAST_TOKENS, TOKENS)
        first = begin + part * each
        last = tl.minimum(first + each, end)
        owner = member * (GROUPS * SHARED) + group * SHARED + place % SHARED
        number = tl.where(of_prompt, part, PROMPT_PARTS + part)
        asking = member >= 0
        wanted = (asking & (last > first))[:, None] & (channel < SIZE)[None, :]
        asked = tl.load(query + owner[:, None] * SIZE + channel[None, :], mask=wanted, other=0.0)
        largest = tl.full((QUERIES_BLOCK,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((QUERIES_BLOCK,), dtype=tl.float32)
        mixed = tl.zeros((QUERIES_BLOCK, SIZE_BLOCK), dtype=tl.float32)
        # Blocks are looked up one tile ahead: as part of the same tile, they would keep its keys and values from being read ahead.
        block = tl.load(table + row * table_stride + (first + token) // BLOCK, mask=first + token < last, other=0)
        for start in range(first, last, TOKENS):
            inside = start + token < last
            slots = (block * BLOCK + (start + token) % BLOCK)[:, None] * slot_stride + group * group_stride + channel[None, :]
            present = inside[:, None] & (channel < SIZE)[None, :]
            some_keys = tl.load(keys + slots, mask=present, other=0.0)
            some_values = tl.load(values + slots, mask=present, other=0.0)
            ahead = start + TOKENS + token
            block = tl.load(table + row * table_stride + ahead // BLOCK, mask=ahead < last, other=0)
            scores = tl.dot(asked, tl.trans(some_keys).to(asked.dtype), input_precision="ieee") * scale
            scores = tl.where(inside[None, :], scores, float("-inf"))
            larger = tl.maximum(largest, tl.max(scores, axis=1))  # finite: the first token of a tile is inside
            weights = tl.exp(scores - larger[:, None])
            shrunk = tl.exp(largest - larger)
            total = total * shrunk + tl.sum(weights, axis=1)
            mixed = mixed * shrunk[:, None] + tl.dot(weights.to(asked.dtype), some_values.to(asked.dtype), input_precision="ieee")
            largest = larger
        tl.store(part_out + (owner[:, None] * PARTS + number) * SIZE + channel[None, :], mixed / total[:, None], mask=wanted)
        tl.store(part_logsumexp + owner * PARTS + number, largest + tl.log(total), mask=asking & (last > first))


@triton.jit
def _tokens_of_a_part(tokens, most_parts, LEAST_TOKENS: tl.constexpr, TOKENS: tl.constexpr):
    return tl.cdiv(tl.maximum(tl.cdiv(tokens, most_parts), LEAST_TOKENS), TOKENS) * TOKENS


@triton.jit
def _join_kernel(
    part_out, part_logsumexp, lengths, prompt_blocks, out,
    HEADS: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, LEAST_TOKENS: tl.constexpr,
    PROMPT_PARTS: tl.constexpr, OWN_PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = PROMPT_PARTS + OWN_PARTS
    owner = tl.program_id(0)
    row = owner // HEADS
    part = tl.arange(0, PARTS_BLOCK)
    channel = tl.arange(0, SIZE_BLOCK)
    common = tl.load(prompt_blocks + row) * BLOCK
    own = tl.load(lengths + row) - common
    # Nothing was written of parts without tokens.
    of_prompt = part * _tokens_of_a_part(common, PROMPT_PARTS, LEAST_TOKENS, TOKENS) < common
    of_row = (part - PROMPT_PARTS) * _tokens_of_a_part(own, OWN_PARTS, LEAST_TOKENS, TOKENS) < own
    there = tl.where(part < PROMPT_PARTS, of_prompt, of_row) & (part < PARTS)
    logsumexp = tl.load(part_logsumexp + owner * PARTS + part, mask=there, other=float("-inf"))
    weights = tl.exp(logsumexp - tl.max(logsumexp, axis=0))
    weights = weights / tl.sum(weights, axis=0)
    wanted = there[:, None] & (channel < SIZE)[None, :]
    some = tl.load(part_out + (owner * PARTS + part)[:, None] * SIZE + channel[None, :], mask=wanted, other=0.0)
    tl.store(out + owner * SIZE + channel, tl.sum(some * weights[:, None], axis=0).to(out.dtype.element_ty), mask=channel < SIZE)
