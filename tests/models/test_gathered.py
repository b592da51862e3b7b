"""Gathered rows: gradients summed in float32, in one graph whatever the sizes."""

from __future__ import annotations

import pytest
import torch

from finesight.data.layout import AttentionLayout
from finesight.models.gathered import gather_rows, sums_over_uses
from models.test_attention import forest


def inverse(layout: AttentionLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert layout.key_index is not None and layout.key_uses is not None and layout.cu_key_uses is not None
    return layout.key_index, layout.key_uses, layout.cu_key_uses


def test_a_layout_knows_where_each_token_was_gathered() -> None:
    index, uses, cu_uses = inverse(forest())
    for token in range(17):
        assert uses[cu_uses[token] : cu_uses[token + 1]].tolist() == (index == token).nonzero().flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_as_of_a_plain_gather(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    operands = inverse(forest())
    x, probe = torch.randn(17, 2, 4, dtype=dtype, requires_grad=True), torch.randn(len(operands[0]), 2, 4, dtype=dtype)
    found, expected = gather_rows(x, *operands), x.index_select(0, operands[0])
    assert torch.equal(found, expected)
    grads = [torch.autograd.grad((out * probe).sum(), x)[0] for out in (found, expected)]
    assert torch.allclose(*grads)
    torch.library.opcheck(sums_over_uses, (probe, *operands, 17))


def test_many_small_gradients_are_not_lost() -> None:
    """In bfloat16 a sum of ones ends at 256."""
    operands = inverse(AttentionLayout.of_lengths([1] * 1000, [1] * 1000, torch.zeros(1000, dtype=torch.int64)))
    assert operands[2].tolist() == [0, *[1000] * 1000]  # tokens that nobody gathers have their place too
    x = torch.randn(1000, dtype=torch.bfloat16, requires_grad=True)  # of more dimensions the CPU sums in float32 anyway
    gather_rows(x, *operands).sum().backward()
    assert x.grad is not None and x.grad[0] == 1000 and not x.grad[1:].any()
