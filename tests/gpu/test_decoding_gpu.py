"""Decoding on a GPU: the kernel, the captured step, and no waiting inside a step."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from finesight.models.decoding import BLOCK_TOKENS, Decoder, KeyValuePool, decode_attention, divide_attention, rotate_and_store
from finesight.models.packed import PackedModel, projections, rotary, rotate
from gpu.test_forest_gpu import middle_model
from tiny import FAMILIES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def expected_attention(query, keys, values, table, lengths):
    """Of each row by itself, in float64."""
    rows = []
    for row, length in enumerate(lengths.tolist()):
        slots = (table[row][:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device="cuda")).flatten()[:length]
        own = [x[slots].transpose(0, 1).double() for x in (keys, values)]
        grouped = query.shape[1] != keys.shape[1]
        one = query[row][:, None].double()
        rows.append(F.scaled_dot_product_attention(one, *own, scale=query.shape[2] ** -0.5, enable_gqa=grouped)[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "groups", "size"), [(32, 8, 128), (28, 4, 128), (64, 8, 128), (16, 2, 64), (4, 4, 8)])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_attention_of_one_query_a_row(rows: int, heads: int, groups: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    blocks = 40
    lengths = torch.randint(1, blocks * BLOCK_TOKENS, (rows,), device="cuda")
    lengths[0] = 1
    table = torch.randperm(3000, device="cuda")[: rows * blocks].view(rows, blocks) + 1
    prompts = torch.zeros(rows, dtype=torch.int64, device="cuda")
    # Some rows go on from one prompt, whose blocks they share, more of them than make one bundle; others have one alone.
    alike = torch.arange(rows, device="cuda")[2::3]
    table[alike, :7], prompts[alike] = table[0, :7] + 3000, 7
    lengths[alike] = lengths[alike].clamp(min=7 * BLOCK_TOKENS + 1)
    prompts[1:2], lengths[1:2] = 30, 30 * BLOCK_TOKENS + 5
    keys, values = (torch.randn(6100 * BLOCK_TOKENS, groups, size, device="cuda", dtype=dtype) for _ in range(2))
    query = torch.randn(rows, heads, size, device="cuda", dtype=dtype)
    found = decode_attention(query, keys, values, table, lengths, divide_attention(table, prompts, lengths), size**-0.5)
    expected = expected_attention(query, keys, values, table, lengths)
    errors = (found.double() - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    assert errors.max() < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    table = torch.arange(1, 641, device="cuda").view(16, 40)
    table[:, :20] = table[0, :20]
    lengths = torch.arange(16, device="cuda") * 30 + 20 * BLOCK_TOKENS + 1
    prompts = torch.full((16,), 20, device="cuda")
    keys, values = (torch.randn(700 * BLOCK_TOKENS, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(16, 32, 128, device="cuda", dtype=torch.bfloat16)
    together = decode_attention(query, keys, values, table, lengths, divide_attention(table, prompts, lengths), 128**-0.5)
    for row in range(16):
        one = [x[row : row + 1] for x in (query, table, lengths, prompts)]
        alone = decode_attention(one[0], keys, values, one[1], one[2], divide_attention(one[1], one[3], one[2]), 128**-0.5)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_queries_are_rotated_and_keys_stored(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed = PackedModel(middle_model(family).to("cuda", dtype))
    text = packed.base.model.language_model
    attention = text.layers[0].self_attn
    if hasattr(attention, "q_norm"):
        attention.q_norm.weight.data.uniform_(0.5, 1.5)
        attention.k_norm.weight.data.uniform_(0.5, 1.5)
    hidden = torch.randn(5, 256, device="cuda", dtype=dtype)
    cos, sin = rotary(text, torch.tensor([3, 70, 5, 1000, 0], device="cuda").expand(3, -1), hidden)
    slots = torch.tensor([5, 63, 0, 33, 34], device="cuda")
    with torch.no_grad():
        query, key, value = projections(text.layers[0], hidden)
        keys, values = (torch.zeros(64, *key.shape[1:], device="cuda", dtype=dtype) for _ in range(2))
        found = rotate_and_store(attention, query, key, value, cos, sin, keys, values, slots)
        expected = rotate(attention, query, key, cos, sin)
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected[0], atol=bound, rtol=bound)
    torch.testing.assert_close(keys[slots], expected[1], atol=bound, rtol=bound)
    assert torch.equal(values[slots], value)
    others = torch.ones(64, dtype=torch.bool, device="cuda").index_fill(0, slots, False)
    assert not keys[others].any() and not values[others].any()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_step_gives_what_a_step_gives(compiled: bool) -> None:
    model = middle_model("qwen3_vl").to("cuda", torch.bfloat16)
    packed = PackedModel(model)
    pool = KeyValuePool(model.config.text_config, 64, torch.bfloat16, torch.device("cuda"))
    decoder = Decoder(packed.eval(), pool, compile_layers=compiled)
    tokens = torch.arange(100, 108, device="cuda")
    lengths = torch.arange(8, device="cuda") * 9
    table = (1 + torch.arange(32, device="cuda")).view(8, 4)
    prompts = torch.zeros(8, dtype=torch.int64, device="cuda")
    pool.keys.normal_()
    pool.values.normal_()
    with torch.no_grad():
        expected = decoder.step(tokens, lengths, lengths, table, prompts)
        torch.cuda.set_sync_debug_mode("error")
        try:
            decoder.step(tokens, lengths, lengths, table, prompts)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = decoder.step(tokens, lengths, lengths, table, prompts)
        graph.replay()
    torch.testing.assert_close(captured, expected, atol=2e-2, rtol=2e-2)
