"""Group relative policy optimisation: what to do with one step of completions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from finesight.data.batch import PackedBatch
from finesight.data.feed import Step
from finesight.errors import TrainingError
from finesight.grpo_settings import GRPOSettings
from finesight.training.completion_targets import CompletionTargets
from finesight.training.grpo_losses import PolicyRecords, StepTotals, policy_loss

# Sums over records that are divided by their number, in the order in which they are kept.
_MEANS = (
    "entropy",
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "ratio_mean",
    "sampling/sampling_logp_difference/mean",
    "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/truncated",
)


def _alone(own: torch.Tensor) -> torch.Tensor:
    return own[None]


class GRPO:
    """The policy loss of a step's completions.

    Args:
        settings: the grpo section of the recipe.
        max_completion_length: most tokens of a completion.
        corrects_sampler: another engine sampled: truncated importance weights correct its log-probabilities.
        gather: (K,) of each process -> (processes, K).
    """

    def __init__(
        self,
        settings: GRPOSettings,
        max_completion_length: int,
        *,
        corrects_sampler: bool = False,
        gather: Callable[[torch.Tensor], torch.Tensor] = _alone,
    ) -> None:
        self.settings, self.max_completion_length = settings, max_completion_length
        self.corrects_sampler, self.gather = corrects_sampler, gather
        self._sums: list[torch.Tensor] = []
        self._largest: list[torch.Tensor] = []

    def begin(self, step: Step) -> None:
        """Forgets what was counted; a step may be begun more than once."""
        self._sums, self._largest = [], []

    def loss(self, scores: torch.Tensor, batch: PackedBatch, step: Step) -> torch.Tensor:
        """One pack's part of the step's loss: the parts of all packs add up to it.

        Args:
            scores: (2, N) log-probabilities of the pack's targets and entropies of the distributions they were drawn from.

        Raises:
            TrainingError: the pack does not come from a rollout.
        """
        about, settings = batch.about_targets, self.settings
        if not isinstance(about, CompletionTargets):
            raise TrainingError("GRPO trains on packs of completions, which a RolloutSource makes; this pack has no advantages.")
        logprobs, entropies = scores.unbind(0)
        result = policy_loss(
            logprobs,
            PolicyRecords(
                batch.sequence,
                batch.weight,
                about.advantages,
                about.old_logprobs,
                about.reference_logprobs,
                about.sampler_logprobs if self.corrects_sampler else None,
            ),
            StepTotals(step.num_samples, round(step.target_weight), self.max_completion_length),
            loss_type=settings.loss_type,
            epsilon=settings.epsilon,
            epsilon_high=settings.epsilon_high,
            beta=settings.beta,
            importance_cap=settings.importance_cap,
        )
        with torch.no_grad():
            # Of the policy that sampled: later updates have moved on from it, which is no fault of the sampler.
            on_policy = logprobs if about.old_logprobs is None else about.old_logprobs
            counts = batch.weight != 0
            apart = torch.where(counts, (on_policy - about.sampler_logprobs).abs(), 0.0)
            entropy = torch.where(counts, entropies, 0.0).sum()
            policy = (result.tokens, entropy, result.kl, result.clipped_low, result.clipped_high, result.ratio)
            sums = (*policy, apart.sum(), result.importance, result.truncated)
            self._sums.append(torch.stack([value.float() for value in sums]))
            self._largest.append(apart.max() if len(apart) else apart.sum())
        return result.loss

    def figures(self) -> dict[str, float]:
        """Means over the records of the step that count, of all processes; waits for the device."""
        if not self._sums:
            return {}
        own = torch.cat([torch.stack(self._sums).sum(0), torch.stack(self._largest).max().float()[None]])
        everywhere = self.gather(own)
        tokens, *sums, largest = torch.cat([everywhere[:, :-1].sum(0), everywhere[:, -1:].max(0).values]).tolist()
        found = {name: value / max(tokens, 1.0) for name, value in zip(_MEANS, sums, strict=True)}
        found["clip_ratio/region_mean"] = found["clip_ratio/low_mean"] + found["clip_ratio/high_mean"]
        found["sampling/sampling_logp_difference/max"] = largest
        if not self.settings.beta:
            del found["kl"]
        if not self.corrects_sampler:
            found = {name: value for name, value in found.items() if not name.startswith("sampling/importance_sampling_ratio/")}
        return {name: value for name, value in found.items() if math.isfinite(value)}
