"""Chunked log-probabilities of targets against a full log softmax."""

from __future__ import annotations

import pytest
import torch

from finesight.models.logprobs import target_logprobs, target_logprobs_and_entropies


def full(hidden: torch.Tensor, weight: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax((hidden @ weight.T).double(), -1).gather(1, token[:, None]).squeeze(1)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_values_and_gradients_do_not_depend_on_chunks(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    token = torch.tensor([0, 10, 3, 3, 7, 1, 0])
    found, expected = target_logprobs(hidden, weight, token, chunk), full(hidden, weight, token)
    assert torch.allclose(found, expected, atol=1e-12)
    # a loss that is not linear in the log-probabilities, as clipped ratios are not
    probe = torch.randn(7, dtype=torch.float64)
    grads = [torch.autograd.grad((probe * x.exp()).sum(), (hidden, weight)) for x in (found, expected)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    token = torch.tensor([5, 0, 2, 2])
    assert torch.autograd.gradcheck(lambda h, w: target_logprobs(h, w, token, 2), (hidden, weight))


def test_large_logits_stay_finite_and_no_target_is_fine() -> None:
    hidden = torch.full((2, 4), 500.0, requires_grad=True)
    weight = torch.randn(9, 4)
    logprobs = target_logprobs(hidden, weight, torch.tensor([1, 2]))
    logprobs.sum().backward()
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(hidden.grad).all()
    assert target_logprobs(hidden[:0], weight, torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_bfloat16_is_summed_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).bfloat16(), torch.randn(500, 32).bfloat16()
    token = torch.randint(0, 500, (64,))
    found = target_logprobs(hidden, weight, token)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), full(hidden.float(), weight.float(), token), atol=0.1)


@pytest.mark.parametrize("chunk", [2, 100])
def test_under_temperature_and_forbidden_tokens(chunk: int) -> None:
    """As a sampler draws: values, entropies and gradients against a full softmax over what is left."""
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    token, forbidden = torch.tensor([0, 10, 3, 3, 7, 1, 0]), torch.tensor([4, 9])
    left = [column for column in range(11) if column not in forbidden]
    table = torch.log_softmax((hidden @ weight.T)[:, left] / 0.6, -1)
    expected = table.gather(1, torch.tensor([left.index(t) for t in token.tolist()])[:, None]).squeeze(1)
    found, entropies = target_logprobs_and_entropies(hidden, weight, token, chunk, temperature=0.6, forbidden=forbidden)
    assert torch.allclose(found, expected, atol=1e-12) and not entropies.requires_grad
    assert torch.allclose(entropies, -(table.exp() * table).sum(-1), atol=1e-12)
    assert torch.equal(found, target_logprobs(hidden, weight, token, chunk, temperature=0.6, forbidden=forbidden))
    probe = torch.randn(7, dtype=torch.float64)
    grads = [torch.autograd.grad((probe * x.exp()).sum(), (hidden, weight)) for x in (found, expected)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradient_of_a_frozen_matrix_is_that_of_one_that_trains(temperature: float) -> None:
    """Computed with the values for the one, in the backward pass for the other."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 5, dtype=torch.float64, requires_grad=True), torch.randn(11, 5, dtype=torch.float64)
    token, probe = torch.randint(0, 11, (9,)), torch.randn(9, dtype=torch.float64)
    grads = []
    for trains in (False, True):
        found = target_logprobs(hidden, weight.clone().requires_grad_(trains), token, 4, temperature=temperature)
        grads.append(torch.autograd.grad((probe * found.exp()).sum(), hidden)[0])
    assert torch.allclose(*grads, atol=1e-14)


def test_several_backward_passes_under_a_frozen_matrix() -> None:
    """What is kept for them is left as it is."""
    hidden, weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randn(11, 5, dtype=torch.float64)
    found = target_logprobs(hidden, weight, torch.randint(0, 11, (6,)), 4)
    once, twice = (torch.autograd.grad((factor * found).sum(), hidden, retain_graph=True)[0] for factor in (1, 2))
    assert torch.equal(2 * once, twice)


def test_unlikely_tokens_count_in_float16() -> None:
    """Fifty thousand tokens, each below the smallest number of float16 likely, matter together."""
    weight = torch.zeros(50_000, 2, dtype=torch.float16)
    weight[0, 0], weight[:, 1] = 14.5, 1.0
    weight[0, 1] = -1.0
    hidden = torch.tensor([[1.2, 0.0]], dtype=torch.float16, requires_grad=True)
    scores = hidden.detach().double() @ weight.double().T
    chances = torch.softmax(scores, -1)
    assert 0 < chances[0, 1:].max() < 2**-25 and chances[0, 1:].sum() > 1e-3
    exact = weight[0].double() - chances @ weight.double()
    scaled = 2.0**16 * target_logprobs(hidden, weight, torch.tensor([0])).sum()  # a loss scale, as in training in float16
    (found,) = torch.autograd.grad(scaled, hidden)
    assert (found.double() / 2**16 - exact).norm() < 2e-2 * exact.norm()


def test_a_frozen_matrix_is_not_kept_for_the_backward_pass() -> None:
    hidden, weight = torch.randn(6, 5, requires_grad=True), torch.randn(11, 5)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        target_logprobs(hidden, weight, torch.randint(0, 11, (6,)))
    assert [tensor.shape for tensor in kept] == [hidden.shape]
