"""Decoding's tables: which rows read their common prompt together, and what is stored where."""

from __future__ import annotations

import torch

from finesight.models.decoding import BUNDLE_ROWS, Bundles, bundles_of, decode_attention, store_tokens

# Rows by the first block of their prompt; 0: idle.
FIRST_BLOCKS = [7, 3, 7, 0, 9, 7, 0, 3]


def test_rows_of_one_prompt_are_bundled():
    table = torch.tensor([[block, 100 + row] for row, block in enumerate(FIRST_BLOCKS)])
    members, prompt_blocks = bundles_of(table, torch.tensor([1, 1, 1, 0, 0, 1, 0, 1]))
    assert [[row for row in bundle if row >= 0] for bundle in members.tolist()] == [[0, 2, 5], [1, 7], [], [3, 6], [4], [], [], []]
    assert prompt_blocks.tolist() == [1, 1, 1, 0, 0, 1, 0, 1]


def test_many_rows_of_one_prompt_make_several_bundles():
    rows = 2 * BUNDLE_ROWS + 3
    members, _ = bundles_of(torch.full((rows, 4), 5), torch.full((rows,), 4))
    bundles = [[row for row in bundle if row >= 0] for bundle in members.tolist()]
    assert bundles[0] == list(range(BUNDLE_ROWS)) and bundles[BUNDLE_ROWS] == list(range(BUNDLE_ROWS, 2 * BUNDLE_ROWS))
    assert bundles[2 * BUNDLE_ROWS] == [rows - 3, rows - 2, rows - 1]
    assert sum(map(len, bundles)) == rows  # each row in one bundle


def test_stored_tokens_are_attended_to():
    torch.manual_seed(0)
    keys, values = torch.zeros(96, 1, 4), torch.zeros(96, 1, 4)
    key, value = torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    store_tokens(keys, values, torch.tensor([32, 64]), key, value)
    table = torch.tensor([[1], [2]])
    # A row with a single token gives its value, whatever it asks.
    mixed = decode_attention(
        torch.randn(2, 2, 4), keys, values, table, torch.tensor([1, 1]), Bundles(table.new_full((2, BUNDLE_ROWS), -1), table[:, 0] * 0), 0.5
    )
    torch.testing.assert_close(mixed, value.expand(2, 2, 4))
