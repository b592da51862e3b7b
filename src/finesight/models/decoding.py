"""Keys and values of prompts and what follows them, and one token more for many rows at once.

Keys and values lie in blocks of a pool; a row's table names its blocks in order, so that rows that go on from the same
prompt name the same blocks and the prompt's keys and values exist once. Nothing here waits for the device or depends on
values: a step can be captured in a CUDA graph.

Shapes: B rows, M blocks of a row's table, R rows of a bundle, H heads, G key-value heads, d head size, D hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from finesight.data.batch import PackedBatch
from finesight.errors import ModelError
from finesight.models.experts import wait_for_offsets
from finesight.models.packed import PackedModel, last_states, next_projections, projections, rotary, rotate

BLOCK_TOKENS = 32
# Most rows that read the blocks of their common prompt together.
BUNDLE_ROWS = 8
# Most parts that the tokens of a prompt, and those of a row alone, are divided into; and the fewest tokens worth a part.
MOST_PARTS = 8
PART_TOKENS = 256
PART_FIELDS = 5  # of a part besides its rows
# Rows that are not in use write and read here.
IDLE_BLOCK = 0


class KeyValuePool:
    """Blocks of keys and values, the same numbers for every layer.

    Args:
        text_config: of the language model.
        blocks: how many of BLOCK_TOKENS tokens each, the idle one included.
    """

    def __init__(self, text_config: Any, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (text_config.num_hidden_layers, blocks * BLOCK_TOKENS, text_config.num_key_value_heads, head_size(text_config))
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.blocks = blocks
        self._free = list(range(blocks - 1, IDLE_BLOCK, -1))
        self._users = [0] * blocks

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Blocks for one user.

        Raises:
            ModelError: fewer are free.
        """
        if count > len(self._free):
            raise ModelError(f"The key-value cache has {len(self._free)} free blocks of {BLOCK_TOKENS} tokens, and {count} are asked for.")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._users[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more user of these blocks."""
        for block in blocks:
            self._users[block] += 1

    def give_back(self, blocks: list[int]) -> None:
        """One user less; blocks without any are free again."""
        for block in blocks:
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free.append(block)

    def copy_block(self, source: int, target: int) -> None:
        """Keys and values of one block into another, in all layers."""
        here, there = (slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS) for block in (source, target))
        self.keys[:, there] = self.keys[:, here]
        self.values[:, there] = self.values[:, here]


def head_size(text_config: Any) -> int:
    """Width of one attention head."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def block_bytes(text_config: Any, dtype: torch.dtype) -> int:
    """Bytes that one block takes, keys and values of all layers together."""
    numbers = 2 * text_config.num_hidden_layers * BLOCK_TOKENS * text_config.num_key_value_heads * head_size(text_config)
    return numbers * dtype.itemsize


class Parts(NamedTuple):
    """What attention of one step is divided into: parts of rows' tokens, each with the rows whose queries meet them.

    What rows of one prompt have in common is read once for all rows of a bundle; what a row has alone is read for it.
    """

    # (L, PART_FIELDS + R) int32: the row whose table is read, the first token, the one after the last, the part's number among those of its
    # rows, whether it is of a prompt, and its rows, -1 in places that are left. Parts of prompts come first.
    lines: torch.Tensor
    number: torch.Tensor  # () int64: lines that are in use; the others come last
    of_row: torch.Tensor  # (B,) int32: how many parts a row has


def divide_attention(table: torch.Tensor, prompt_blocks: torch.Tensor, lengths: torch.Tensor, part_tokens: int = PART_TOKENS) -> Parts:
    """Parts of rows, of which those whose tables begin with the same block go on from the same prompt.

    How a row's tokens are divided depends on its own lengths alone, so that what a row gets does not change with its
    neighbours. Nothing depends on the size of what is found, so that a captured step can compute it.

    Args:
        table: (B, M) int64. A block at its front that is shared belongs to one prompt alone.
        prompt_blocks: (B,) int64: blocks at the front that hold nothing but the prompt; rows with 0 are in no bundle.
        lengths: (B,) int64: tokens that a row attends to.
        part_tokens: the fewest tokens worth a part.
    """
    rows, part = torch.arange(len(table), device=table.device), torch.arange(MOST_PARTS, device=table.device)
    members = _bundles(table, prompt_blocks)
    common = prompt_blocks * BLOCK_TOKENS
    each, own_each = (_tokens_of_a_part(tokens, part_tokens) for tokens in (common, lengths - common))
    prompt_parts, own_parts = (common + each - 1) // each, (lengths - common + own_each - 1) // own_each
    begin = part * each[:, None]  # (B, P), as the rest
    own_begin = common[:, None] + part * own_each[:, None]
    alone = F.pad(rows[:, None], (0, BUNDLE_ROWS - 1), value=-1)

    def lines(first: torch.Tensor, last: torch.Tensor, number: torch.Tensor, whose: torch.Tensor, *, of_prompt: bool) -> torch.Tensor:
        fields = [rows[:, None].expand_as(first), first, last, number.expand_as(first), torch.full_like(first, of_prompt)]
        return torch.cat([torch.stack(fields, dim=-1), whose[:, None].expand(-1, MOST_PARTS, -1)], dim=-1).flatten(0, 1)

    every = torch.cat([
        lines(begin, torch.minimum(begin + each[:, None], common[:, None]), part, members, of_prompt=True),
        lines(own_begin, torch.minimum(own_begin + own_each[:, None], lengths[:, None]), prompt_parts[:, None] + part, alone, of_prompt=False),
    ]).to(torch.int32)  # fmt: skip
    leads = members[:, 0] >= 0
    used = torch.cat([(leads[:, None] & (part < prompt_parts[:, None])).flatten(), (part < own_parts[:, None]).flatten()])
    place = torch.where(used, used.cumsum(0) - 1, len(used))  # the last line is of no part
    packed = torch.zeros(len(used) + 1, every.shape[1], dtype=torch.int32, device=table.device).index_copy(0, place, every)
    return Parts(packed[:-1], used.sum(), (prompt_parts + own_parts).to(torch.int32))


def _bundles(table: torch.Tensor, prompt_blocks: torch.Tensor) -> torch.Tensor:
    """(B, R) int64: for the first row of each bundle its rows, in their order; -1 elsewhere."""
    rows = torch.arange(len(table), device=table.device)
    alike = (table[:, None, 0] == table[None, :, 0]) & (prompt_blocks > 0)
    place = (alike & (rows[None, :] < rows[:, None])).sum(dim=1)  # among the rows of the same prompt
    first = alike & (place[None, :] == (place - place % BUNDLE_ROWS)[:, None])  # at most one of each line
    leader = torch.where(prompt_blocks > 0, first.to(torch.uint8).argmax(dim=1), len(table))  # the last line is of no bundle
    members = torch.full((len(table) + 1, BUNDLE_ROWS), -1, dtype=torch.int64, device=table.device)
    members[leader, place % BUNDLE_ROWS] = rows
    return members[:-1]


def _tokens_of_a_part(tokens: torch.Tensor, fewest: int) -> torch.Tensor:
    """Of parts about as long as each other; whole blocks, so that a part begins with one."""
    parts = (tokens // fewest).clamp(1, MOST_PARTS)
    return (-(-tokens // (parts * BLOCK_TOKENS))).clamp(min=1) * BLOCK_TOKENS


class StepInputs(NamedTuple):
    """What all layers of a step need."""

    hidden: torch.Tensor  # (B, D) of the first layer
    cos: torch.Tensor  # (B, d)
    sin: torch.Tensor
    slots: torch.Tensor  # (B,) int64: where the keys and values of the token go
    lengths: torch.Tensor  # (B,) int64: tokens attended to, itself included
    parts: Parts | None  # for the kernels of a GPU


def begin_step(
    text: Any, tokens: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor, prompt_blocks: torch.Tensor
) -> tuple[StepInputs, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What lies before the first attention of :meth:`Decoder.step`: inputs of all layers, and :func:`projections` of the first.

    Args:
        text: the language model.
    """
    hidden = text.embed_tokens(tokens)
    cos, sin = rotary(text, positions.expand(3, -1), hidden)
    slots = table.gather(1, (lengths // BLOCK_TOKENS)[:, None]).squeeze(1) * BLOCK_TOKENS + lengths % BLOCK_TOKENS
    seen = lengths + 1
    parts = divide_attention(table, prompt_blocks, seen) if tokens.is_cuda else None
    return StepInputs(hidden, cos, sin, slots, seen, parts), *projections(text.layers[0], hidden)


# What lies before, between and after the attentions of a step.
_AROUND: tuple[Callable[..., Any], ...] = (begin_step, next_projections, last_states)


def _overlapped(packed: PackedModel) -> Sequence[Callable[..., Any]]:
    """Of what lies around attention, that whose compiled kernels may overlap, since each of them reads what one ahead of it wrote.

    A step's division into parts, and the routing of tokens to experts, fill tensors with constants first.
    """
    layers = packed.base.model.language_model.layers
    return () if any(hasattr(layer.mlp, "experts") for layer in layers) else (next_projections, last_states)


class Decoder:
    """Prompts into a pool, and steps from it.

    Args:
        packed: the model; its adapters are applied as they are at each call.
        pool: where keys and values go.
        compile_layers: compile what lies before and after attention.
        say: is told if that fails.
    """

    def __init__(
        self, packed: PackedModel, pool: KeyValuePool, *, compile_layers: bool = False, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.packed, self.pool = packed, pool
        around: Sequence[Callable[..., Any]] = _AROUND
        if compile_layers:
            around = packed.compiled_for_decoding(_AROUND, _overlapped(packed), say)
        self._begin, self._between, self._end = around

    @property
    def can_be_captured(self) -> bool:
        """Whether a step can be captured in a CUDA graph."""
        packed, layers = self.packed, self.packed.base.model.language_model.layers
        experts = [layer.mlp.experts for layer in layers if hasattr(layer.mlp, "experts")]
        return packed.device.type == "cuda" and not any(wait_for_offsets(each, packed.compute_dtype, packed.device) for each in experts)

    def prefill(self, batch: PackedBatch, slots: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) after the tokens that the batch's targets are predicted from.

        Args:
            slots: (T,) int64: where each token's keys and values go.
        """

        def keep(layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
            self.pool.keys[layer].index_copy_(0, slots, key.to(self.pool.keys.dtype))
            self.pool.values[layer].index_copy_(0, slots, value.to(self.pool.values.dtype))

        return self._logits(self.packed.target_states(batch, observe=keep))

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor, prompt_blocks: torch.Tensor
    ) -> torch.Tensor:
        """Logits (B, V) after one more token of each row, whose keys and values are added to the pool.

        Args:
            tokens: (B,) int64.
            positions: (B,) int64, the same on all three axes.
            lengths: (B,) int64: tokens that a row has in the pool already.
            table: (B, M) int64: its blocks; room for one more token must be there.
            prompt_blocks: (B,) int64: those at the front of its table that rows of the same prompt have in common.
        """
        text = self.packed.base.model.language_model
        inputs, query, key, value = self._begin(text, tokens, positions, lengths, table, prompt_blocks)
        hidden = inputs.hidden
        for index, layer in enumerate(text.layers):
            attention, keys, values = layer.self_attn, self.pool.keys[index], self.pool.values[index]
            query = rotate_and_store(attention, query, key, value, inputs.cos, inputs.sin, keys, values, inputs.slots)
            mixed = decode_attention(query, keys, values, table, inputs.lengths, inputs.parts, attention.scaling).flatten(1)
            if index + 1 < len(text.layers):
                hidden, query, key, value = self._between(layer, text.layers[index + 1], hidden, mixed)
        return self._logits(self._end(text.layers[-1], text.norm, hidden, mixed))

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        head: nn.Module = self.packed.base.lm_head
        logits: torch.Tensor = head(states)
        return logits


def rotate_and_store(
    attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Rotated queries (B, H, d) of one token a row, whose rotated key and value are written into a pool.

    Args:
        attention: of a decoder layer; its norms of queries and keys are applied where it has them.
        query: (B, H, d); key, value: (B, G, d).
        cos, sin: (B, d).
        keys, values: (slots, G, d) of one layer, written to.
        slots: (B,) int64; the same one twice only where nobody reads it.
    """
    if keys.is_cuda:
        from finesight.models import decoding_kernels  # needs Triton, which only machines with a GPU have

        return decoding_kernels.rotate_and_store(attention, query, key, value, cos, sin, keys, values, slots)
    query, key = rotate(attention, query, key, cos, sin)
    keys.index_copy_(0, slots, key.to(keys.dtype))
    values.index_copy_(0, slots, value.to(values.dtype))
    return query


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    parts: Parts | None,
    scale: float,
) -> torch.Tensor:
    """Attention of one query a row to the first `lengths` tokens of its blocks.

    Args:
        query: (B, H, d).
        keys, values: (slots, G, d) of one layer; G divides H.
        table: (B, M) int64; lengths: (B,) int64, at least 1.
        parts: of these rows and lengths (:func:`divide_attention`), for the kernels of a GPU; None: without them.

    Returns:
        (B, H, d).
    """
    if parts is not None:
        from finesight.models import decoding_kernels

        return decoding_kernels.decode_attention(query, keys, values, table, parts, scale, BLOCK_TOKENS)
    slots = (table[:, :, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).flatten(1)[:, : int(lengths.max())]
    seen = torch.arange(slots.shape[1]) < lengths[:, None]
    own_keys, own_values = (rows[slots].transpose(1, 2).to(query.dtype) for rows in (keys, values))
    mixed = F.scaled_dot_product_attention(
        query.unsqueeze(2), own_keys, own_values, attn_mask=seen[:, None, None], scale=scale, enable_gqa=keys.shape[1] != query.shape[1]
    )
    return mixed.squeeze(2)
