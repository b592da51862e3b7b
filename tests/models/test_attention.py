"""The one attention function against scores written out in full."""

from __future__ import annotations

import pytest
import torch

from finesight.data.layout import AttentionLayout
from finesight.models.attention import forest_attention


def written_out(query, key, value, layout: AttentionLayout, causal: bool) -> torch.Tensor:
    """Softmax of masked scores, segment by segment, in the dtype given."""
    repeats = query.shape[1] // key.shape[1]
    if layout.key_index is not None:
        key, value = key[layout.key_index], value[layout.key_index]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    out = torch.zeros_like(query)
    q0 = k0 = 0
    for nq, nk in zip(layout.query_lengths, layout.key_lengths, strict=True):
        q, k, v = query[q0 : q0 + nq], key[k0 : k0 + nk], value[k0 : k0 + nk]
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        if causal:
            seen = torch.ones(nq, nk, dtype=torch.bool, device=q.device).tril(nk - nq)
            scores = scores.masked_fill(~seen, float("-inf"))
        out[q0 : q0 + nq] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        q0, k0 = q0 + nq, k0 + nk
    return out


def forest() -> AttentionLayout:
    """A root of 5 with branches of 3 and 3, a branch of 2 below the second, and a lone segment of 4."""
    paths = [range(5), [*range(5), 5, 6, 7], [*range(5), 8, 9, 10], [*range(5), 8, 9, 10, 11, 12], range(13, 17)]
    index = torch.tensor([i for path in paths for i in path])
    return AttentionLayout.of_lengths([5, 3, 3, 2, 4], [len(p) for p in paths], index)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("branched", [True, False])
def test_forward_and_gradients(causal: bool, kv_heads: int, branched: bool) -> None:
    torch.manual_seed(0)
    layout = forest() if branched else AttentionLayout.of_lengths([5, 1, 5, 6])
    q, k, v = (torch.randn(17, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, kv_heads, kv_heads))
    out, expected = forest_attention(q, k, v, layout, causal=causal), written_out(q, k, v, layout, causal)
    assert torch.allclose(out, expected, atol=1e-12)
    probe = torch.randn_like(out)
    for found, wanted in zip(torch.autograd.grad(out, (q, k, v), probe), torch.autograd.grad(expected, (q, k, v), probe), strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)


def test_nothing_leaks_between_trees() -> None:
    torch.manual_seed(0)
    layout = forest()
    q, k, v = (torch.randn(17, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = forest_attention(q, k, v, layout, causal=True)
    reached = torch.autograd.grad(out[13:].sum(), k)[0].abs().sum((1, 2))
    assert (reached[:13] == 0).all()
    siblings = torch.autograd.grad(forest_attention(q, k, v, layout, causal=True)[5:8].sum(), k)[0].abs().sum((1, 2))
    assert (siblings[8:] == 0).all()
    assert (siblings[:8] > 0).any()
