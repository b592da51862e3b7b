"""Policy losses of reinforcement: GRPO and its relatives. Pure functions, tensors in, tensors out.

Shapes: N target records of one packed batch, B sequences (completions) of it, K completions of a whole step.

Every loss is a sum over target records, Σ share · (policy term + beta · KL), and only the share of a record depends on how
a method averages. The shares refer to the whole optimizer step, whose totals are known before its first backward: the parts
of a step add up to the same gradient however it is divided into packs and processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"]
RewardScaling = Literal["group", "batch", "none"]
STD_EPSILON = 1e-4  # added to a standard deviation before it divides, as in TRL
CISPO_EPSILON_HIGH = 5.0  # largest ratio in `cispo` where none is set: the recommendation of ScaleRL (Khatri et al. 2025)


@dataclass(frozen=True, eq=False)
class PolicyRecords:
    """What a loss must know of the target records of a batch besides their log-probabilities. No gradient flows through it."""

    sequence: torch.Tensor  # (N,) int64: index of the completion that a record belongs to
    weight: torch.Tensor  # (N,): 1 for a record that counts, 0 for filling and for completions that are masked
    advantages: torch.Tensor  # (B,)
    old_logprobs: torch.Tensor | None = None  # (N,) under the policy that the ratio refers to; None: the present one (on-policy)
    reference_logprobs: torch.Tensor | None = None  # (N,) under the reference; needed for a KL
    sampler_logprobs: torch.Tensor | None = None  # (N,) as another engine sampled them; None: the sampler is the policy


@dataclass(frozen=True)
class StepTotals:
    """What a step's loss is divided by, over all its packs and all processes."""

    sequences: int  # completions, masked ones included
    tokens: int  # records that count
    max_completion_length: int  # most tokens of a completion
    process_tokens: int | None = None  # records that count on this process; None: there is one process
    num_processes: int = 1


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """One pack's part of a step's loss, and sums to be added up over packs and divided by `tokens`. Sums carry no gradient."""

    loss: torch.Tensor  # scalar
    tokens: torch.Tensor  # records that count
    clipped_low: torch.Tensor  # of these, with a ratio below the lower bound and a negative advantage
    clipped_high: torch.Tensor  # above the upper bound and a positive advantage
    kl: torch.Tensor  # Σ of the k3 estimate; 0 without a reference
    ratio: torch.Tensor  # Σ of the ratio to the old policy
    importance: torch.Tensor  # Σ of the weights that correct another engine's log-probabilities; as `tokens` without one
    truncated: torch.Tensor  # records whose weight was cut to `importance_cap`; 0 without another engine


def group_advantages(
    rewards: torch.Tensor, group: torch.Tensor, num_groups: int, scale: RewardScaling = "group"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages of a step's completions: their rewards less the mean of their group, scaled.

    Shao et al. 2024 (DeepSeekMath), section 4.1.1, for `group`: over the standard deviation of the group. `batch`: over
    that of all completions (Liu et al. 2025, "Tricks or Traps?"). `none`: as it is (Liu et al. 2025, Dr. GRPO). The
    deviations are those of a sample (n - 1), and 1e-4 is added to them, as in TRL. A completion without a reward (NaN)
    counts in no mean or deviation and has the advantage 0.

    Args:
        rewards: (K,), NaN where no reward applied.
        group: (K,) int64, the group of each.

    Returns:
        (K,) advantages and (num_groups,) the standard deviation of each group, 0 for one of fewer than two rewards.
    """
    known = ~rewards.isnan()
    values = torch.where(known, rewards, torch.zeros_like(rewards))
    counts = _sums(known.to(rewards.dtype), group, num_groups)
    means = _sums(values, group, num_groups) / counts.clamp(min=1)
    centred = torch.where(known, values - means[group], torch.zeros_like(values))
    deviations = (_sums(centred.square(), group, num_groups) / (counts - 1).clamp(min=1)).sqrt()
    if scale == "none":
        return centred, deviations
    if scale == "group":
        return centred / (deviations[group] + STD_EPSILON), deviations
    count = known.sum()
    mean = values.sum() / count.clamp(min=1)
    variance = torch.where(known, values - mean, torch.zeros_like(values)).square().sum() / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + STD_EPSILON), deviations


def overlong_penalty(lengths: torch.Tensor, max_completion_length: int, overlong_buffer: int) -> torch.Tensor:
    """The soft punishment of long completions, from 0 to -1, to be added to their rewards.

    Yu et al. 2025 (DAPO), equation 13: 0 up to `max_completion_length - overlong_buffer` tokens, from there linearly down to
    -1 at `max_completion_length`, -1 beyond.

    Args:
        lengths: (K,) tokens of each completion.
        overlong_buffer: tokens, at least 1.
    """
    over = lengths - (max_completion_length - overlong_buffer)
    return -(over / overlong_buffer).clamp(min=0.0, max=1.0)


def truncated_importance_weights(old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """min(π_old / π_sampler, cap) of each record: what corrects samples of an engine whose probabilities are slightly others.

    Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (truncated importance sampling).
    """
    return torch.exp(old_logprobs - sampler_logprobs).clamp(max=cap)


def k3_divergence(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """An estimate of KL(policy ‖ reference) at each record, never negative: exp(r) - r - 1 with r = log π_ref - log π.

    Schulman 2020, "Approximating KL divergence", k3; Shao et al. 2024, equation 4.
    """
    difference = reference_logprobs - logprobs
    return torch.expm1(difference) - difference


def policy_loss(
    logprobs: torch.Tensor,
    records: PolicyRecords,
    totals: StepTotals,
    *,
    loss_type: LossType = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    importance_cap: float = 2.0,
) -> PolicyLoss:
    """One pack's part of a step's policy loss.

    With r the ratio π / π_old of a record, A the advantage of its completion and |o| the completion's length, the policy
    term is -min(r · A, clip(r, 1 - epsilon, 1 + epsilon_high) · A), and summed over records it is divided by

    - `grpo`: completions of the step × |o| (Shao et al. 2024, equation 3);
    - `bnpo`: records of the step on this process, averaged over processes (TRL's name; with one process as `dapo`. TRL
      divides by those of a micro-batch, so that the result hangs on how a step was divided);
    - `dr_grpo`: completions of the step × max_completion_length (Liu et al. 2025, "Understanding R1-Zero-like training");
    - `dapo`: records of the step (Yu et al. 2025, equation 8, over a whole step as in TRL).

    Two differ in the term as well:

    - `gspo`: one ratio for a completion, exp(mean of log r), clipped and averaged as a whole (Zheng et al. 2025, equations 5
      to 7): divided by completions × |o|. Its epsilons are of another size, 3e-4 and 4e-4 in the paper.
    - `cispo`: -sg(min(r, epsilon_high)) · A · log π, divided as in `dapo` (MiniMax 2025, equations 4 and 5, without a lower
      bound as there). `epsilon_high` is the bound itself, not its distance from 1, as in TRL and ScaleRL.

    KL terms are averaged as the policy terms. With another engine's log-probabilities every policy term has its truncated
    importance weight before it.

    Args:
        logprobs: (N,) with gradient.
        epsilon_high: None: as `epsilon`; in `cispo` 5.
        beta: weight of the KL; the reference is needed where it is not 0.
        importance_cap: largest importance weight.

    Returns:
        The loss, 0 for a batch without records that count, and its figures.
    """
    counts = records.weight != 0
    # What does not count must not matter even where it is not finite (0 · inf is nan, in the gradient too).
    logprobs = torch.where(counts, logprobs, torch.zeros_like(logprobs))
    old = logprobs.detach() if records.old_logprobs is None else _where_counted(records.old_logprobs, counts)
    lengths = _sums(records.weight.to(logprobs.dtype), records.sequence, len(records.advantages))
    advantages = records.advantages.to(logprobs.dtype)[records.sequence]
    log_ratio = logprobs - old
    if loss_type == "gspo":
        means = _sums(log_ratio, records.sequence, len(lengths)) / lengths.clamp(min=1)
        log_ratio = means[records.sequence]
    ratio = log_ratio.exp()
    if loss_type == "cispo":
        low, high = 0.0, CISPO_EPSILON_HIGH if epsilon_high is None else epsilon_high
        terms = -ratio.detach().clamp(max=high) * advantages * logprobs
    else:
        low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
        terms = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    importance, truncated = torch.ones_like(old), torch.zeros_like(old)
    if records.sampler_logprobs is not None:
        sampler = _where_counted(records.sampler_logprobs, counts)
        importance = truncated_importance_weights(old, sampler, importance_cap)
        truncated = (old - sampler > math.log(importance_cap)).to(old.dtype)
        terms = terms * importance
    divergence = torch.zeros_like(logprobs)
    if records.reference_logprobs is not None:
        divergence = k3_divergence(logprobs, _where_counted(records.reference_logprobs, counts))
        if beta:
            terms = terms + beta * divergence
    weight = records.weight.to(logprobs.dtype)
    loss = (weight * _share(loss_type, totals, lengths[records.sequence]) * terms).sum()

    def total(values: torch.Tensor) -> torch.Tensor:
        return (weight * values).sum().detach()

    return PolicyLoss(
        loss=loss,
        tokens=weight.sum(),
        clipped_low=total(((ratio < low) & (advantages < 0)).to(weight.dtype)),
        clipped_high=total(((ratio > high) & (advantages > 0)).to(weight.dtype)),
        kl=total(divergence),
        ratio=total(ratio),
        importance=total(importance),
        truncated=total(truncated),
    )


def _share(loss_type: LossType, totals: StepTotals, lengths: torch.Tensor) -> torch.Tensor | float:
    """What one record's term counts in the step's loss. `lengths`: (N,) of the completion of each record."""
    if loss_type in ("grpo", "gspo"):
        return 1 / (max(totals.sequences, 1) * lengths.clamp(min=1))
    if loss_type == "dr_grpo":
        return 1 / (max(totals.sequences, 1) * totals.max_completion_length)
    if loss_type == "bnpo" and totals.process_tokens is not None:
        return 1 / (totals.num_processes * max(totals.process_tokens, 1))
    return 1 / max(totals.tokens, 1)


def _where_counted(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return torch.where(counts, values.detach(), torch.zeros_like(values))


def _sums(values: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """(size,) sum of the values of each index."""
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, index, values)
