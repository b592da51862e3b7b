"""Decoding on a GPU: the kernel, the captured step, and no waiting inside a step."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from finesight.models.decoding import BLOCK_TOKENS, Decoder, KeyValuePool, decode_attention
from finesight.models.packed import PackedModel
from gpu.test_forest_gpu import middle_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "groups", "size"), [(32, 8, 128), (28, 4, 128), (16, 2, 64), (4, 4, 8)])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_attention_of_one_query_a_row(rows: int, heads: int, groups: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    blocks = 40
    lengths = torch.randint(1, blocks * BLOCK_TOKENS, (rows,), device="cuda")
    lengths[0] = 1
    table = torch.randint(1, 500, (rows, blocks), device="cuda")
    keys, values = (torch.randn(500 * BLOCK_TOKENS, groups, size, device="cuda", dtype=dtype) for _ in range(2))
    query = torch.randn(rows, heads, size, device="cuda", dtype=dtype)
    found = decode_attention(query, keys, values, table, lengths, size**-0.5)
    for row in range(rows):
        slots = (table[row][:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device="cuda")).flatten()[: lengths[row]]
        own = [x[slots].transpose(0, 1).double() for x in (keys, values)]
        expected = F.scaled_dot_product_attention(query[row][:, None].double(), *own, scale=size**-0.5, enable_gqa=heads != groups)
        error = (found[row].double() - expected[:, 0]).norm() / expected.norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_step_gives_what_a_step_gives(compiled: bool) -> None:
    model = middle_model("qwen3_vl")
    packed = PackedModel(model)
    pool = KeyValuePool(model.config.text_config, 64, torch.bfloat16, torch.device("cuda"))
    decoder = Decoder(packed.eval(), pool, compile_layers=compiled)
    tokens = torch.arange(100, 108, device="cuda")
    lengths = torch.arange(8, device="cuda") * 9
    table = (1 + torch.arange(32, device="cuda")).view(8, 4)
    pool.keys.normal_()
    pool.values.normal_()
    with torch.no_grad():
        expected = decoder.step(tokens, lengths, lengths, table)
        torch.cuda.set_sync_debug_mode("error")
        try:
            decoder.step(tokens, lengths, lengths, table)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = decoder.step(tokens, lengths, lengths, table)
        graph.replay()
    torch.testing.assert_close(captured, expected, atol=2e-2, rtol=2e-2)
