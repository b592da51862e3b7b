"""Log-probabilities of targets on a GPU: the kernels against float64, and against the operators that they stand for."""

from __future__ import annotations

import pytest
import torch

from finesight.models import logprobs
from finesight.models.logprobs import logits_gradient, read_rows, target_logprobs, target_logprobs_and_entropies

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORBIDDEN = [4, 9]


def drawn(rows: int, vocabulary: int, dtype: torch.dtype, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with two forbidden tokens, and other tokens."""
    torch.manual_seed(0)
    logits = (torch.randn(rows, vocabulary, device="cuda") * 4 + offset).to(dtype)
    logits[:, FORBIDDEN] = -torch.inf
    return logits, torch.randint(10, vocabulary, (rows,), device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 11), (3, 4097), (1025, 15193), (64, 151936)])
def test_kernels_near_float64(rows: int, vocabulary: int, temperature: float, dtype: torch.dtype) -> None:
    logits, token = drawn(rows, vocabulary, dtype)
    table = torch.log_softmax(logits.double() / temperature, dim=-1)
    found, logsumexp, entropies = read_rows(logits, token, temperature, True)
    assert entropies is not None
    assert torch.allclose(found.double(), table.gather(1, token[:, None]).squeeze(1), atol=1e-5, rtol=1e-6)
    assert torch.allclose(logsumexp.double(), torch.logsumexp(logits.double() / temperature, dim=-1), atol=1e-5, rtol=1e-6)
    assert torch.allclose(entropies.double(), torch.special.entr(table.exp()).sum(-1), atol=1e-5, rtol=1e-6)
    assert torch.equal(found, read_rows(logits, token, temperature, False)[0])
    grad = torch.randn(rows, device="cuda")
    exact = -table.exp()
    exact.scatter_add_(1, token[:, None], torch.ones_like(exact[:, :1])).mul_(grad[:, None])
    by_logits = logits_gradient(logits.clone(), token, logsumexp, grad, temperature)
    assert by_logits.dtype == dtype
    step, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # below it, float16 has no numbers
    assert ((by_logits.double() - exact).abs() <= exact.abs() * step + 2e-5 * grad[:, None].abs() + least).all()


def test_what_all_logits_have_in_common_costs_no_digits() -> None:
    logits, token = drawn(8, 9001, torch.float32, offset=500.0)
    table = torch.log_softmax(logits.double(), dim=-1)
    found, _, entropies = read_rows(logits, token, 1.0, True)
    assert entropies is not None
    assert torch.allclose(found.double(), table.gather(1, token[:, None]).squeeze(1), atol=5e-6)
    assert torch.allclose(entropies.double(), torch.special.entr(table.exp()).sum(-1), atol=5e-6)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen matrix", "matrix trains"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_and_gradients_as_without_kernels(dtype: torch.dtype, trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden = (torch.randn(1025, 128, device="cuda") * 0.3).to(dtype).requires_grad_()
    weight = torch.randn(15193, 128, device="cuda").to(dtype).requires_grad_(trains)
    token, probe = torch.randint(10, 15193, (1025,), device="cuda"), torch.randn(1025, device="cuda")
    forbidden = torch.tensor(FORBIDDEN, device="cuda")
    results = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(logprobs, "has_triton", lambda index: False)
        found, entropies = target_logprobs_and_entropies(hidden, weight, token, 512, temperature=0.8, forbidden=forbidden)
        wanted = [hidden, weight] if trains else [hidden]
        results.append([found, entropies, *torch.autograd.grad((probe * found).sum(), wanted)])
    for place, (a, b) in enumerate(zip(*results, strict=True)):
        error = (a.double() - b.double()).norm() / b.double().norm()
        # Gradients pass through products of this precision, whose operands may be off by a step of it.
        assert error < (2e-6 if place < 2 or dtype == torch.float32 else torch.finfo(dtype).eps), place


def test_memory_is_that_of_one_chunk_of_logits() -> None:
    hidden = torch.randn(4096, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(151936, 128, device="cuda", dtype=torch.bfloat16)
    token = torch.randint(0, 151936, (4096,), device="cuda")
    target_logprobs(hidden, weight, token).sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    target_logprobs(hidden, weight, token).sum().backward()
    one = 1024 * 151936 * 2
    assert torch.cuda.max_memory_allocated() - before < 1.2 * one


def test_nothing_waits_for_the_device() -> None:
    hidden = torch.randn(2000, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(15193, 128, device="cuda", dtype=torch.bfloat16)
    token, forbidden = torch.randint(10, 15193, (2000,), device="cuda"), torch.tensor(FORBIDDEN, device="cuda")
    target_logprobs(hidden, weight, token, forbidden=forbidden).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        target_logprobs(hidden, weight, token, forbidden=forbidden).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
