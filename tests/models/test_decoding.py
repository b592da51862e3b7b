"""Decoding's tables: which rows read their common prompt together, and what is stored where."""

from __future__ import annotations

import pytest
import torch
import transformers

from finesight.models.decoding import (
    BLOCK_TOKENS,
    BUNDLE_ROWS,
    MOST_PARTS,
    PART_TOKENS,
    Decoder,
    KeyValuePool,
    begin_step,
    decode_attention,
    divide_attention,
    rotate_and_store,
)
from finesight.models.packed import PackedModel, last_states, next_projections
from tiny import tiny_config, tiny_model

# Rows by the first block of their prompt; 0: idle.
FIRST_BLOCKS = [7, 3, 7, 0, 9, 7, 0, 3]


def parts_found(table: torch.Tensor, prompt_blocks: list[int], lengths: list[int]) -> list[tuple[list[int], int, int, int]]:
    """Rows, first token, the one after the last, and number of each part."""
    parts = divide_attention(table, torch.tensor(prompt_blocks), torch.tensor(lengths))
    lines = parts.lines[: int(parts.number)].tolist()
    found = [([row for row in rows if row >= 0], first, last, number) for _, first, last, number, _, *rows in lines]
    for row in range(len(table)):
        mine = sorted((first, last, number) for rows, first, last, number in found if row in rows)
        # Each of a row's tokens is in one part, and the parts are numbered in order.
        assert [first for first, *_ in mine] + [lengths[row]] == [0, *(last for _, last, _ in mine)]
        assert [number for *_, number in mine] == list(range(int(parts.of_row[row])))
    for line in lines:  # every row of a part reads the same blocks
        mine = [table[row, line[1] // BLOCK_TOKENS : -(-line[2] // BLOCK_TOKENS)].tolist() for row in (line[0], *line[5:]) if row >= 0]
        assert all(blocks == mine[0] for blocks in mine)
    return found


def bundles_found(table: torch.Tensor, prompt_blocks: list[int]) -> list[list[int]]:
    lengths = [blocks * BLOCK_TOKENS + 1 for blocks in prompt_blocks]
    return [rows for rows, _, last, _ in parts_found(table, prompt_blocks, lengths) if last % BLOCK_TOKENS == 0]


def test_rows_of_one_prompt_are_bundled():
    table = torch.tensor([[block, 100 + row] for row, block in enumerate(FIRST_BLOCKS)])
    # The row of block 9 is of a prompt that fills no block.
    assert bundles_found(table, [1, 1, 1, 0, 0, 1, 0, 1]) == [[0, 2, 5], [1, 7]]
    assert bundles_found(table, [0] * 8) == []


def test_many_rows_of_one_prompt_make_several_bundles():
    rows = 2 * BUNDLE_ROWS + 3
    found = bundles_found(torch.full((rows, 4), 5), [4] * rows)
    assert found == [list(range(BUNDLE_ROWS)), list(range(BUNDLE_ROWS, 2 * BUNDLE_ROWS)), [rows - 3, rows - 2, rows - 1]]


def test_tokens_are_divided_into_parts_of_whole_blocks():
    blocks = 3 * PART_TOKENS // BLOCK_TOKENS + 1
    table = torch.arange(blocks + 4)[None].repeat(2, 1)
    table[1, blocks:] += 100
    common = blocks * BLOCK_TOKENS
    found = parts_found(table, [blocks, blocks], [common + 5, common + 3 * BLOCK_TOKENS])
    assert [(rows, last) for rows, _, last, _ in found if last <= common] == [([0, 1], last) for last in (288, 576, 800)]
    assert [(rows, last - first) for rows, first, last, _ in found if last > common] == [([0], 5), ([1], 3 * BLOCK_TOKENS)]


def test_the_longest_answer_has_no_more_parts_than_there_is_room_for():
    tokens = (MOST_PARTS + 3) * PART_TOKENS + 1
    found = parts_found(torch.arange(-(-tokens // BLOCK_TOKENS))[None], [0], [tokens])
    assert len(found) == MOST_PARTS and {first % BLOCK_TOKENS for _, first, *_ in found} == {0}


def test_what_is_stored_is_attended_to():
    torch.manual_seed(0)
    layer = transformers.Qwen3VLForConditionalGeneration(tiny_config("qwen3_vl")).model.language_model.layers[0]
    attention = layer.self_attn
    heads, groups, size = 4, attention.k_proj.out_features // attention.head_dim, attention.head_dim
    keys, values = torch.zeros(96, groups, size), torch.zeros(96, groups, size)
    query, key, value = torch.randn(2, heads, size), torch.randn(2, groups, size), torch.randn(2, groups, size)
    cos, sin = torch.ones(2, size), torch.zeros(2, size)  # no rotation
    with torch.no_grad():
        found = rotate_and_store(attention, query, key, value, cos, sin, keys, values, torch.tensor([32, 64]))
    torch.testing.assert_close(found, attention.q_norm(query))
    torch.testing.assert_close(keys[[32, 64]], attention.k_norm(key))
    table = torch.tensor([[1], [2]])
    # A row with a single token gives its value, whatever it asks.
    mixed = decode_attention(found, keys, values, table, torch.tensor([1, 1]), None, 0.5)
    torch.testing.assert_close(mixed, value.repeat_interleave(heads // groups, dim=1))


@pytest.mark.parametrize(("family", "overlapped"), [("qwen3_vl", [next_projections, last_states]), ("qwen3_vl_moe", [])])
def test_kernels_overlap_only_where_each_of_them_reads_something(family: str, overlapped: list[object]):
    """A step's beginning, and experts, fill tensors with constants: such a kernel waits for none ahead of it."""
    packed = PackedModel(tiny_model(family))
    pool = KeyValuePool(packed.base.config.text_config, 2, torch.float32, torch.device("cpu"))
    Decoder(packed, pool, compile_layers=True)
    functions = packed.compiled_for_decoding([], [], print)  # those that the decoder named
    assert [each.function for each in functions if each.overlapped] == overlapped
    assert begin_step in [each.function for each in functions]
