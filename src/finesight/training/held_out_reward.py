"""What answers to held-out prompts earn while a run of reinforcement goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Literal

from finesight.data.conversation import Conversation
from finesight.data.sample import Sample
from finesight.sampling.forking_sampler import ForkingSampler
from finesight.sampling.types import SamplingSettings
from finesight.tasks.rewards import RewardSet
from finesight.training.completion_files import tell_failures
from finesight.training.rollout_shares import Processes
from finesight.training.rollouts import answers_and_rewards, reward_labels
from finesight.training.telemetry import Telemetry


class HeldOutReward:
    """The mean reward of one answer to each held-out prompt; a :class:`finesight.training.loop.Validation`.

    Args:
        sampler: of the model in training.
        rewards: what answers earn.
        prompts: encoded; conversations: their rows.
        sampling: how they are answered.
        processes: each answers its share of the prompts.
        telemetry: is told of rewards that failed.
    """

    criterion: Literal["eval_loss", "eval_reward"] = "eval_reward"

    def __init__(
        self,
        sampler: ForkingSampler,
        rewards: RewardSet,
        prompts: Sequence[Sample],
        conversations: Sequence[Conversation],
        sampling: SamplingSettings,
        processes: Processes = Processes(),
        telemetry: Telemetry | None = None,
    ) -> None:
        self.sampler, self.rewards, self.prompts, self.conversations = sampler, rewards, prompts, conversations
        self.sampling, self.processes, self.telemetry = sampling, processes, telemetry

    def measure(self, step: int) -> dict[str, float]:
        """`eval_reward`, the mean of each reward, and the mean length in tokens. An answer that no reward applies to is left out.

        Raises:
            DataError: an image cannot be loaded.
            ModelError: the GPU has no memory to sample.
        """
        begun = time.perf_counter()
        completions, result = answers_and_rewards(
            self.sampler, self.rewards, self.prompts, self.conversations, self.sampling, self.processes, step=step
        )
        if self.telemetry is not None:
            tell_failures(self.telemetry, step, result.failures, where="of held-out prompts")
        labels = reward_labels(self.rewards.rewards)
        known = [total for total in result.totals if total is not None]
        means = {f"eval_rewards/{labels[name]}/mean": found.mean for name, found in result.statistics.items() if math.isfinite(found.mean)}
        return {
            "eval_reward": math.fsum(known) / len(known) if known else math.nan,
            **means,
            "eval_completion_length": sum(len(completion.token_ids) for completion in completions) / len(completions),
            "eval_samples": len(completions),
            "eval_seconds": time.perf_counter() - begun,
        }
