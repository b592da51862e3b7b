"""The losses against the plain definitions."""

from __future__ import annotations

import pytest
import torch

from finesight.training.losses import sft_loss


def test_equals_cross_entropy_mean():
    logits = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    token = torch.randint(0, 11, (7,))
    logprobs = torch.log_softmax(logits, -1).gather(1, token[:, None]).squeeze(1)
    loss = sft_loss(logprobs, torch.ones(7, dtype=torch.float64), 7.0)
    expected = torch.nn.functional.cross_entropy(logits, token)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected)))


def test_parts_of_a_step_add_up():
    logprobs, weight = torch.randn(10, dtype=torch.float64), torch.rand(10, dtype=torch.float64)
    whole = sft_loss(logprobs, weight, float(weight.sum()))
    parts = sum(sft_loss(logprobs[rows], weight[rows], float(weight.sum())) for rows in (slice(0, 3), slice(3, 10)))
    torch.testing.assert_close(whole, parts)


def test_zero_weight_target_counts_for_nothing():
    logprobs = torch.tensor([-1.0, -float("inf")], requires_grad=True)
    loss = sft_loss(logprobs, torch.tensor([1.0, 0.0]), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(1.0)
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-1.0, 0.0]


def test_empty_batch_gives_zero():
    assert sft_loss(torch.empty(0), torch.empty(0), 3.0).item() == 0.0
