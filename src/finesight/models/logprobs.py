"""Log-probabilities of target tokens, without ever holding all logits.

Shapes: N targets, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from finesight.models.low_rank import has_triton
from finesight.models.quantized_vocabulary import vocabulary_blocks

# Rows of logits held at once: 1,024 rows of a vocabulary of 151,936 in float32 take 0.6 GiB.
CHUNK_TARGETS = 1024
# By how much gradients are larger than they are while they lie in float16, which has no numbers below 6e-8: probabilities go below that.
_FLOAT16_SCALE = 1024.0


def target_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token: torch.Tensor,
    chunk: int = CHUNK_TARGETS,
    scale: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    forbidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """log softmax(hidden @ weightᵀ / temperature)[token] of each target.

    Only `chunk` rows of logits exist at a time, so that memory does not grow with N × V, and any loss may be put on the result.
    A frozen matrix is multiplied with twice; for the gradient of one that trains, logits are computed again in the backward pass.

    Args:
        hidden: (N, D) final hidden states.
        weight: (V, D) vocabulary matrix; of int8 with a scale for each row, it is dequantised in blocks.
        token: (N,) int64.
        scale: (V,) of a weight in 8 bits; such a weight cannot train.
        temperature: above 0.
        forbidden: (F,) int64 ids of tokens that have no probability.

    Returns:
        (N,) in float32 (float64 for float64 inputs).
    """
    logprobs: torch.Tensor = _TargetLogProbs.apply(hidden, weight, token, _Head(chunk, scale, temperature, forbidden))[0]
    return logprobs


def target_logprobs_and_entropies(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token: torch.Tensor,
    chunk: int = CHUNK_TARGETS,
    scale: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    forbidden: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`target_logprobs`, and the entropy -Σ p log p (nats) of each of the distributions, without a gradient; (N,) both."""
    logprobs, entropies = _TargetLogProbs.apply(hidden, weight, token, _Head(chunk, scale, temperature, forbidden, entropies=True))
    return logprobs, entropies


@dataclass(frozen=True, eq=False)
class _Head:
    """How logits are computed and read."""

    chunk: int  # rows at a time
    scale: torch.Tensor | None
    temperature: float
    forbidden: torch.Tensor | None
    entropies: bool = False

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """hidden @ weightᵀ before the temperature, (N, V); -inf for forbidden tokens."""
        logits = _logits(hidden, weight, self.scale)
        return logits if self.forbidden is None else logits.index_fill_(1, self.forbidden, -torch.inf)


def _exact_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logits(hidden: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """hidden @ weightᵀ, (N, V)."""
    if scale is None:
        return hidden @ weight.T
    out = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    for places, block in vocabulary_blocks(weight, scale, hidden.dtype):
        out[:, places] = hidden @ block.T
    return out


def _times_weight(grad_logits: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """grad_logits @ weight, (N, D)."""
    if scale is None:
        return grad_logits @ weight
    total = torch.zeros(grad_logits.shape[0], weight.shape[1], dtype=_exact_dtype(grad_logits.dtype), device=weight.device)
    for places, block in vocabulary_blocks(weight, scale, grad_logits.dtype):
        total += grad_logits[:, places] @ block
    return total


def _scale(dtype: torch.dtype) -> float:
    return _FLOAT16_SCALE if dtype == torch.float16 else 1.0


def _has_kernels(logits: torch.Tensor) -> bool:
    return logits.is_cuda and logits.dtype != torch.float64 and has_triton(logits.device.index)


def read_rows(
    logits: torch.Tensor, token: torch.Tensor, temperature: float, entropies: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of each row's softmax(logits / temperature): the token's log-probability, the logsumexp, and the entropy if asked for.

    Args:
        logits: (N, V), -inf for what has no probability.
        token: (N,) int64.

    Returns:
        (N,) each, in float32 (float64 for float64 logits).
    """
    if _has_kernels(logits):
        from finesight.models import logprobs_kernels

        with torch.cuda.device_of(logits):
            return logprobs_kernels.read_rows(logits, token, temperature, entropies)
    logits = logits.to(_exact_dtype(logits.dtype)) / temperature
    logsumexp = torch.logsumexp(logits, dim=-1)
    logprobs = logits.gather(1, token[:, None]).squeeze(1) - logsumexp
    if not entropies:
        return logprobs, logsumexp, None
    return logprobs, logsumexp, torch.special.entr(logits.sub_(logsumexp[:, None]).exp_()).sum(dim=-1)


def logits_gradient(
    logits: torch.Tensor, token: torch.Tensor, logsumexp: torch.Tensor, grad: torch.Tensor, temperature: float
) -> torch.Tensor:
    """grad (onehot(token) - softmax(logits / temperature)) of each row, (N, V) in the precision of the logits, which may be overwritten.

    Args:
        logits: (N, V); token: (N,) int64.
        logsumexp: (N,) of logits / temperature, and grad: (N,); both as :func:`read_rows` gives them.
    """
    if _has_kernels(logits):
        from finesight.models import logprobs_kernels

        with torch.cuda.device_of(logits):
            return logprobs_kernels.logits_gradient(logits, token, logsumexp, grad, temperature)
    exact = logits.to(logsumexp.dtype) / temperature
    exact.sub_(logsumexp[:, None]).exp_().mul_(-grad[:, None]).scatter_add_(1, token[:, None], grad[:, None])
    return exact.to(logits.dtype)


class _TargetLogProbs(torch.autograd.Function):
    """d logp / d logits = (onehot(token) - softmax(logits / T)) / T, with softmax = exp(logits / T - logsumexp).

    A hidden state moves the log-probability of its own target alone. So d logp / d hidden is one vector for each target,
    whatever the loss: under a frozen weight it is computed while the logits are there, and the backward pass only scales it.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, token: torch.Tensor, head: _Head
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight = weight.to(hidden.dtype) if head.scale is None else weight
        logprobs = torch.empty(hidden.shape[0], dtype=_exact_dtype(hidden.dtype), device=hidden.device)
        logsumexp = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs if head.entropies else logprobs[:0])
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        directions = torch.empty_like(hidden) if needs_hidden and not needs_weight else None
        inverse = torch.full_like(logprobs, _scale(hidden.dtype) / head.temperature)
        for start in range(0, hidden.shape[0], head.chunk):
            rows = slice(start, start + head.chunk)
            logits = head.logits(hidden[rows], weight)
            logprobs[rows], logsumexp[rows], found = read_rows(logits, token[rows], head.temperature, head.entropies)
            if found is not None:
                entropies[rows] = found
            if directions is not None:
                logits = logits_gradient(logits, token[rows], logsumexp[rows], inverse[rows], head.temperature)
                directions[rows] = _times_weight(logits, weight, head.scale)
            del logits  # before those of the next chunk are there
        # Of a weight that trains, the gradient needs the logits once more; of a frozen one, neither is needed.
        ctx.save_for_backward(directions, *((hidden, weight, token, logsumexp) if needs_weight else ()))
        ctx.head = head
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        head: _Head = ctx.head
        directions, *others = ctx.saved_tensors
        if directions is not None:
            factors = grads[0] / _scale(directions.dtype)
            return (directions * factors[:, None]).to(directions.dtype), None, None, None
        hidden, weight, token, logsumexp = others
        grad = grads[0] / head.temperature
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Chunks are added up in full precision: bfloat16 would lose most of the later ones.
        grad_weight = torch.zeros_like(weight, dtype=logsumexp.dtype)
        for start in range(0, hidden.shape[0], head.chunk):
            rows = slice(start, start + head.chunk)
            logits = head.logits(hidden[rows], weight)
            logits = logits_gradient(logits, token[rows], logsumexp[rows], grad[rows], head.temperature)
            if grad_hidden is not None:
                grad_hidden[rows] = _times_weight(logits, weight, head.scale)
            grad_weight += logits.T @ hidden[rows]
            del logits
        return grad_hidden, grad_weight.to(weight.dtype), None, None
