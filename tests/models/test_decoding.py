"""Decoding's tables: which rows read their common prompt together, and what is stored where."""

from __future__ import annotations

import torch
import transformers

from finesight.models.decoding import BUNDLE_ROWS, bundles_of, decode_attention, rotate_and_store
from tiny import tiny_config

# Rows by the first block of their prompt; 0: idle.
FIRST_BLOCKS = [7, 3, 7, 0, 9, 7, 0, 3]


def bundles_found(table: torch.Tensor, prompt_blocks: list[int]) -> list[list[int]]:
    members, count, _ = bundles_of(table, torch.tensor(prompt_blocks))
    assert (members[int(count) :] == -1).all()
    return [[row for row in bundle if row >= 0] for bundle in members[: int(count)].tolist()]


def test_rows_of_one_prompt_are_bundled():
    table = torch.tensor([[block, 100 + row] for row, block in enumerate(FIRST_BLOCKS)])
    # The row of block 9 is of a prompt that fills no block.
    assert bundles_found(table, [1, 1, 1, 0, 0, 1, 0, 1]) == [[0, 2, 5], [1, 7]]
    assert bundles_found(table, [0] * 8) == []


def test_many_rows_of_one_prompt_make_several_bundles():
    rows = 2 * BUNDLE_ROWS + 3
    found = bundles_found(torch.full((rows, 4), 5), [4] * rows)
    assert found == [list(range(BUNDLE_ROWS)), list(range(BUNDLE_ROWS, 2 * BUNDLE_ROWS)), [rows - 3, rows - 2, rows - 1]]


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
    mixed = decode_attention(found, keys, values, table, torch.tensor([1, 1]), bundles_of(table, torch.tensor([0, 0])), 0.5)
    torch.testing.assert_close(mixed, value.repeat_interleave(heads // groups, dim=1))
