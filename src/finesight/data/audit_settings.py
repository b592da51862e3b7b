"""What of a recipe the figures of `finesight check` depend on."""

from __future__ import annotations

from dataclasses import dataclass

from finesight.data.groups import GroupSizes
from finesight.recipe import Recipe


@dataclass(frozen=True)
class GroupRun:
    """What the cost of a run of reinforcement depends on besides the settings of every run."""

    sizes: GroupSizes
    num_train_epochs: float = 1.0
    max_steps: int | None = None
    max_resampling_rounds: int = 0
    image_ablation_steps: int = 0


def group_run(recipe: Recipe) -> GroupRun | None:
    """What a recipe says of it; None: its training is supervised."""
    grpo, rollout, training = recipe.grpo, recipe.rollout, recipe.training
    if grpo is None or rollout is None:
        return None
    sizes = GroupSizes(grpo.num_generations, rollout.max_completion_length, grpo.steps_per_generation, grpo.num_iterations)
    return GroupRun(sizes, training.num_train_epochs, training.max_steps, grpo.max_resampling_rounds, grpo.image_ablation_steps)


@dataclass(frozen=True)
class AuditSettings:
    """What of a recipe the figures depend on."""

    train_batch_size: int = 8
    token_budget: int = 8192
    max_length_tokens: int | None = None  # none: token_budget
    share: bool = True
    shuffle: bool = True
    seed: int = 0
    on_bad_row: str = "stop"
    groups: GroupRun | None = None  # reinforcement, which trains on completions that are not there yet

    @classmethod
    def of(cls, recipe: Recipe) -> AuditSettings:
        data, training = recipe.data, recipe.training
        seed = training.seed if training.data_seed is None else training.data_seed
        return cls(
            training.train_batch_size,
            training.token_budget,
            data.max_length_tokens,
            recipe.shares_prefixes,
            training.shuffle,
            seed,
            data.on_bad_row,
            group_run(recipe),
        )

    @property
    def supervised(self) -> bool:
        return self.groups is None

    @property
    def longest(self) -> int:
        """Most tokens of a sample; a prompt leaves room for a completion."""
        room = self.token_budget - (0 if self.groups is None else self.groups.sizes.completion_tokens)
        return room if self.max_length_tokens is None else min(self.max_length_tokens, room)
