"""The GPU kernels of decoding: one query a row against keys and values in blocks.

What rows of one prompt have in common is read once for all rows of a bundle, whose queries fill one tile (as in Juravsky
et al. 2024, Hydragen); what a row has alone is read for it. Both are divided over several programs, whose parts are
joined by their logsumexp (Dao et al. 2023, Flash-Decoding; blocks as in Kwon et al. 2023, PagedAttention). How a row's
tokens are divided depends on its own lengths alone, so that what a row gets does not change with its neighbours.

Imported only where there is a GPU, since Triton is.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Parameters of kernels have no types: Triton gives meaning to annotations and knows `tl.constexpr` alone.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from finesight.models.decoding import Bundles

# Most programs over which a prompt, and what a row has alone, are divided; and the fewest tokens worth a program.
_PROMPT_PARTS = 8
_OWN_PARTS = 4
_LEAST_TOKENS = 128


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
    shared = heads // groups
    query = query.contiguous()
    parts = _PROMPT_PARTS + _OWN_PARTS
    part_out = torch.empty(rows, heads, parts, size, dtype=torch.float32, device=query.device)
    part_logsumexp = torch.empty(rows, heads, parts, dtype=torch.float32, device=query.device)
    out = torch.empty_like(query)
    size_block = max(16, triton.next_power_of_2(size))  # matrix units want at least 16
    tokens, stages = (64, 3) if query.dtype.itemsize == 2 else (32, 2)  # what shared memory holds
    _attend_kernel[(rows, groups, parts)](
        query, keys, values, table, lengths, bundles.members, bundles.prompt_blocks, part_out, part_logsumexp, scale,
        keys.stride(0), keys.stride(1), table.stride(0),
        HEADS=heads, SHARED=shared, BUNDLE=bundle, QUERIES_BLOCK=max(16, triton.next_power_of_2(shared * bundle)),
        SIZE=size, SIZE_BLOCK=size_block, BLOCK=block_tokens, TOKENS=tokens, LEAST_TOKENS=_LEAST_TOKENS,
        PROMPT_PARTS=_PROMPT_PARTS, OWN_PARTS=_OWN_PARTS, num_warps=4, num_stages=stages,
    )  # fmt: skip
    _join_kernel[(rows * heads,)](
        part_out, part_logsumexp, out, PARTS=parts, SIZE=size, SIZE_BLOCK=size_block, PARTS_BLOCK=triton.next_power_of_2(parts), num_warps=1
    )
    return out


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
    query, keys, values, table, lengths, members, prompt_blocks, part_out, part_logsumexp, scale, slot_stride, group_stride, table_stride,
    HEADS: tl.constexpr, SHARED: tl.constexpr, BUNDLE: tl.constexpr, QUERIES_BLOCK: tl.constexpr,
    SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, LEAST_TOKENS: tl.constexpr,
    PROMPT_PARTS: tl.constexpr, OWN_PARTS: tl.constexpr,
):  # fmt: skip
    row, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    common = tl.load(prompt_blocks + row) * BLOCK
    of_prompt = part < PROMPT_PARTS
    # Queries of this program: of a prompt's part those of a whole bundle, of a row's own part those of the row.
    place = tl.arange(0, QUERIES_BLOCK)
    member = tl.load(members + row * BUNDLE + place // SHARED, mask=place < SHARED * BUNDLE, other=-1)
    member = tl.where(of_prompt, member, tl.where(place < SHARED, row, -1))
    # Tokens of this program. A row that leads no bundle has nothing to do for a prompt.
    begin = tl.where(of_prompt, 0, common)
    end = tl.where(of_prompt, tl.where(tl.max(member, axis=0) >= 0, common, 0), tl.load(lengths + row))
    number = tl.where(of_prompt, part, part - PROMPT_PARTS)
    most = tl.where(of_prompt, PROMPT_PARTS, OWN_PARTS)
    each = tl.cdiv(tl.maximum(tl.cdiv(end - begin, most), LEAST_TOKENS), TOKENS) * TOKENS
    first = begin + number * each
    last = tl.minimum(first + each, end)
    owner = member * HEADS + group * SHARED + place % SHARED
    channel = tl.arange(0, SIZE_BLOCK)
    token = tl.arange(0, TOKENS)
    asking = member >= 0
    asked = tl.load(query + owner[:, None] * SIZE + channel[None, :], mask=asking[:, None] & (channel < SIZE)[None, :], other=0.0)
    largest = tl.full((QUERIES_BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES_BLOCK,), dtype=tl.float32)
    mixed = tl.zeros((QUERIES_BLOCK, SIZE_BLOCK), dtype=tl.float32)
    for start in range(first, last, TOKENS):
        inside = start + token < last
        block = tl.load(table + row * table_stride + (start + token) // BLOCK, mask=inside, other=0)
        slots = (block * BLOCK + (start + token) % BLOCK)[:, None] * slot_stride + group * group_stride + channel[None, :]
        present = inside[:, None] & (channel < SIZE)[None, :]
        some_keys = tl.load(keys + slots, mask=present, other=0.0)
        scores = tl.dot(asked, tl.trans(some_keys).to(asked.dtype), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))  # finite: the first token of a tile is inside
        weights = tl.exp(scores - larger[:, None])
        shrunk = tl.exp(largest - larger)
        total = total * shrunk + tl.sum(weights, axis=1)
        some_values = tl.load(values + slots, mask=present, other=0.0).to(asked.dtype)
        mixed = mixed * shrunk[:, None] + tl.dot(weights.to(asked.dtype), some_values, input_precision="ieee")
        largest = larger
    # A part without tokens is told by its logsumexp alone. Of a prompt the leader writes for all rows of its bundle, so
    # that what a row that leads none has to write is written for it.
    if last > first:
        mixed = mixed / total[:, None]
        tl.store(
            part_out + (owner[:, None] * (PROMPT_PARTS + OWN_PARTS) + part) * SIZE + channel[None, :],
            mixed,
            mask=asking[:, None] & (channel < SIZE)[None, :],
        )
    tl.store(part_logsumexp + owner * (PROMPT_PARTS + OWN_PARTS) + part, largest + tl.log(total), mask=asking)


@triton.jit
def _join_kernel(
    part_out, part_logsumexp, out, PARTS: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, PARTS_BLOCK: tl.constexpr
):  # fmt: skip
    owner = tl.program_id(0)
    part = tl.arange(0, PARTS_BLOCK)
    channel = tl.arange(0, SIZE_BLOCK)
    logsumexp = tl.load(part_logsumexp + owner * PARTS + part, mask=part < PARTS, other=float("-inf"))
    weights = tl.exp(logsumexp - tl.max(logsumexp, axis=0))
    weights = weights / tl.sum(weights, axis=0)
    wanted = (logsumexp > float("-inf"))[:, None] & (channel < SIZE)[None, :]
    some = tl.load(part_out + (owner * PARTS + part)[:, None] * SIZE + channel[None, :], mask=wanted, other=0.0)
    tl.store(out + owner * SIZE + channel, tl.sum(some * weights[:, None], axis=0).to(out.dtype.element_ty), mask=channel < SIZE)
