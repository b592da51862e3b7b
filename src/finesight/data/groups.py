"""Groups: prompts and their completions as samples, and the steps that a run of reinforcement takes over its prompts.

A completion becomes a sample of its prompt's tokens and its own. The prompt, with its images, is computed once for all
completions of a group; completions share nothing, even where they are alike, since each has an advantage of its own.

Everything here is planned from integers and needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from finesight.data.sample import Sample
from finesight.data.steps import Schedule, StepPlan, plan_packs


def continued(prompt: Sample, token_ids: Sequence[int], *, weight: float = 1.0) -> Sample:
    """A prompt with what was drawn after it, every token of that a target.

    Args:
        token_ids: of the completion, at least one.
        weight: of its targets; 0 keeps them out of the loss.
    """
    own = np.asarray(token_ids, dtype=np.int64)
    positions = np.broadcast_to(prompt.next_position + np.arange(len(own)), (3, len(own)))
    return replace(
        prompt,
        token_ids=np.concatenate([prompt.token_ids, own]),
        position_ids=np.concatenate([prompt.position_ids, positions], axis=1),
        trained=np.concatenate([np.zeros(len(prompt), dtype=bool), np.ones(len(own), dtype=bool)]),
        next_position=prompt.next_position + len(own),
        weight=weight,
        private_from=len(prompt),
    )


@dataclass(frozen=True)
class GroupSizes:
    """How completions make up steps."""

    num_generations: int  # completions of a prompt
    completion_tokens: int  # most tokens of one
    steps_per_generation: int = 1  # optimizer steps that the completions of one rollout are divided over
    num_iterations: int = 1  # passes over them


@dataclass(frozen=True)
class RolloutPlace:
    """Where an optimizer step stands in its rollout."""

    first: int  # index in the epoch of the rollout's first optimizer step
    prompt_steps: range  # the steps over prompts (of :meth:`GroupSchedule.prompts_of`) that it samples completions for
    update: int  # of its optimizer steps, counted from 0

    @property
    def prompt_step(self) -> int:
        """The prompts that this optimizer step trains on."""
        return self.prompt_steps[self.update % len(self.prompt_steps)]


class GroupSchedule(Schedule):
    """The steps of a run of reinforcement, over its prompts.

    An epoch passes over all prompts. Each rollout samples completions for the prompts of `steps_per_generation` optimizer
    steps, which are then taken `num_iterations` times. What completions there will be nobody knows: planned steps have them
    at their full length, so that no pack will be larger.

    Args:
        prompts: encoded, without pixels.
        sizes: how completions make up steps.
        train_batch_size: completions of an optimizer step, a multiple of `sizes.num_generations`.
        token_budget, share, shuffle, seed, processes: as for :class:`Schedule`.

    Raises:
        DataError: there are no prompts.
    """

    def __init__(
        self,
        prompts: Sequence[Sample],
        *,
        sizes: GroupSizes,
        train_batch_size: int,
        token_budget: int,
        share: bool = True,
        shuffle: bool = True,
        seed: int = 0,
        processes: int = 1,
    ) -> None:
        groups = max(1, train_batch_size // sizes.num_generations)
        super().__init__(
            prompts, train_batch_size=groups, token_budget=token_budget, share=share, shuffle=shuffle, seed=seed, processes=processes
        )
        self.sizes = sizes

    @property
    def prompt_steps(self) -> int:
        """Steps over prompts in an epoch."""
        return math.ceil(len(self.samples) / self.train_batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return self.prompt_steps * self.sizes.num_iterations

    def place(self, index: int) -> RolloutPlace:
        """Where the optimizer step with this index of an epoch stands."""
        each = self.sizes.steps_per_generation * self.sizes.num_iterations
        number, update = divmod(index, each)
        first = number * self.sizes.steps_per_generation
        last = min(first + self.sizes.steps_per_generation, self.prompt_steps)
        return RolloutPlace(number * each, range(first, last), update)

    def prompts_of(self, epoch: int, prompt_step: int) -> list[int]:
        """The prompts of one step over them, as places in `samples`."""
        return super().rows_of(epoch, prompt_step)

    def rows_of(self, epoch: int, index: int) -> list[int]:
        """The prompts of one optimizer step, as places in `samples`."""
        return self.prompts_of(epoch, self.place(index).prompt_step)

    def plan(self, epoch: int, index: int, token_budget: int | None = None) -> StepPlan:
        """One step with every completion as long as it may be."""
        longest = [0] * self.sizes.completion_tokens
        prompts = [self.samples[row] for row in self.rows_of(epoch, index)]
        samples = [continued(prompt, longest) for prompt in prompts for _ in range(self.sizes.num_generations)]
        return self.plan_of(samples, epoch, index, token_budget)

    def plan_of(self, samples: Sequence[Sample], epoch: int, index: int, token_budget: int | None = None) -> StepPlan:
        """The packs of one step's completions."""
        budget = self.token_budget if token_budget is None else token_budget
        plans, deal = plan_packs(samples, token_budget=budget, share=self.share, processes=self.processes)
        return StepPlan(tuple(plans), deal, epoch, index, budget)
