"""Losses: pure functions, tensors in, a scalar out.

Shapes: N target records of one packed batch.
"""

from __future__ import annotations

import torch


def sft_loss(logprobs: torch.Tensor, weight: torch.Tensor, denominator: float) -> torch.Tensor:
    """Weighted negative log-likelihood of supervised tokens: -Σ weight · logprob / denominator.

    The denominator is the target weight of the whole optimizer step, not of this batch: summed over all batches of a
    step the result is the mean over its supervised tokens, however the step was divided.

    Args:
        logprobs: (N,) log-probabilities of the targets.
        weight: (N,) weight of each target; a target in a shared prefix weighs as often as it is shared.
        denominator: greater than 0.

    Returns:
        A scalar, 0 for an empty batch.
    """
    # A target without weight must not matter even where its log-probability is not finite (0 · -inf is nan).
    kept = torch.where(weight != 0, logprobs, torch.zeros_like(logprobs))
    return -(weight * kept).sum() / denominator
