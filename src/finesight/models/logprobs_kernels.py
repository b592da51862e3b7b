"""GPU kernels over rows of logits: everything that is read of them in one pass, and their gradient in another.

In separate operators each number of a row would travel to memory and back about ten times, in float32. Both kernels read logits
in the precision of the product and compute in float32.

Imported only where there is a GPU, since Triton is. No atomics: a run repeats bit by bit.

Shapes: N rows, V vocabulary.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Parameters of kernels have no types: Triton gives meaning to annotations and knows `tl.constexpr` alone.

from __future__ import annotations

import torch
import triton
import triton.language as tl

_READ_BLOCK, _WRITE_BLOCK = 4096, 2048  # columns at a time


def read_rows(
    logits: torch.Tensor, token: torch.Tensor, temperature: float, entropies: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of each row's softmax(logits / temperature): the token's log-probability, the logsumexp, and the entropy if asked for.

    Args:
        logits: (N, V), contiguous, of float32 or half that; -inf for what has no probability.
        token: (N,) int64.

    Returns:
        (N,) in float32 each.
    """
    rows, vocabulary = logits.shape
    logprobs, logsumexp = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    found = torch.empty_like(logprobs) if entropies else None
    if rows:
        _read_kernel[(rows,)](
            logits, token, logprobs, logsumexp, found, vocabulary, float(temperature), ENTROPIES=entropies, BLOCK=_READ_BLOCK, num_warps=8
        )
    return logprobs, logsumexp, found


def logits_gradient(
    logits: torch.Tensor, token: torch.Tensor, logsumexp: torch.Tensor, grad: torch.Tensor, temperature: float
) -> torch.Tensor:
    """grad (onehot(token) - softmax(logits / temperature)) of each row, written over the logits, (N, V).

    Args:
        logits: (N, V), contiguous.
        token: (N,) int64.
        logsumexp: (N,) float32, of logits / temperature.
        grad: (N,) float32.
    """
    rows, vocabulary = logits.shape
    if rows:
        grid = (rows, triton.cdiv(vocabulary, _WRITE_BLOCK))
        _gradient_kernel[grid](logits, token, logsumexp, grad, vocabulary, float(temperature), BLOCK=_WRITE_BLOCK, num_warps=4)
    return logits


@triton.jit
def _read_kernel(logits, token, logprobs, logsumexp, entropies, vocabulary, temperature, ENTROPIES: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program. Each place of a block keeps its own running sums, relative to the largest that it has met.

    With m that largest: total is Σ exp(x - m), moment Σ exp(x - m) (x - m); the entropy is log total - moment / total.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    column = tl.arange(0, BLOCK)
    # Finite, so that differences are: -inf less -inf is no number.
    largest = tl.full((BLOCK,), -3.0e38, dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    moment = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, vocabulary, BLOCK):
        x = tl.load(logits + start + column, mask=start + column < vocabulary, other=float("-inf")).to(tl.float32) / temperature
        higher = tl.maximum(largest, x)
        down = largest - higher
        kept = tl.exp(down)
        share = tl.exp(x - higher)
        if ENTROPIES:
            moment = (moment + total * down) * kept + share * tl.where(x > float("-inf"), x - higher, 0.0)
        total = total * kept + share
        largest = higher
    most = tl.max(largest, axis=0)
    down = largest - most
    kept = tl.exp(down)
    whole = tl.sum(total * kept, axis=0)
    log_whole = tl.log(whole)
    wanted = tl.load(logits + tl.load(token + row)).to(tl.float32) / temperature
    # In this order, so that a large common part of all logits costs no digits.
    tl.store(logprobs + row, (wanted - most) - log_whole)
    tl.store(logsumexp + row, most + log_whole)
    if ENTROPIES:
        tl.store(entropies + row, log_whole - tl.sum((moment + total * down) * kept, axis=0) / whole)


@triton.jit
def _gradient_kernel(logits, token, logsumexp, grad, vocabulary, temperature, BLOCK: tl.constexpr):
    """One block of a row a program, each number read and written by itself."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    places = logits + row * vocabulary + column
    x = tl.load(places, mask=inside, other=float("-inf")).to(tl.float32) / temperature
    probability = tl.exp(x - tl.load(logsumexp + row))
    value = tl.load(grad + row) * (tl.where(column == tl.load(token + row), 1.0, 0.0) - probability)
    tl.store(places, value.to(logits.dtype.element_ty), mask=inside)
