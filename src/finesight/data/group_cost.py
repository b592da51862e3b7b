"""What a run of reinforcement costs, counted from its prompts before any completion is there.

Prompts, images and steps are counted. Nobody knows how long completions will be: whatever depends on that is given with
every completion at its full length, and so is an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finesight.data.audit_settings import AuditSettings, GroupRun
from finesight.data.groups import GroupSchedule
from finesight.data.sample import Sample

_STEPS_PLANNED = 100


@dataclass(frozen=True)
class GroupCostFigures:
    """Counts; those "of a step" are of a full optimizer step, those in tokens or images means over all prompts."""

    steps: int  # optimizer steps of the whole run
    steps_per_epoch: int
    rollouts: int  # of the whole run
    prompts_per_step: int
    completions_per_step: int
    images_per_step: float  # and videos, each time that one stands in a prompt
    prompt_tokens_per_step: float  # of each prompt once
    visual_tokens_per_step: float  # of those
    most_completion_tokens_per_step: int
    most_update_tokens_per_step: float  # through the model forward and backward: packed, a prompt computed once for its group
    most_unshared_tokens_per_step: float  # the same if each completion had its own copy of its prompt
    prompts: int  # answered in the whole run; one counts each time
    completions: int  # sampled in the whole run
    most_completion_tokens: int  # of those
    updated_completions: int  # trained on in the whole run; one counts in each pass over it
    most_resampled_completions: int  # sampled besides, in place of groups that all earn the same
    most_ablated_completions: int  # sampled besides, with the images of their prompts blanked


def group_cost(prompts: Sequence[Sample], settings: AuditSettings, run: GroupRun) -> GroupCostFigures:
    """Counts a run's prompts and completions.

    Args:
        prompts: encoded, at least one.
        run: that of `settings`.
    """
    sizes = run.sizes
    schedule = GroupSchedule(
        prompts,
        sizes=sizes,
        train_batch_size=settings.train_batch_size,
        token_budget=settings.token_budget,
        share=settings.share,
        shuffle=settings.shuffle,
        seed=settings.seed,
    )
    groups = min(schedule.train_batch_size, len(prompts))
    steps = schedule.total_steps(run.num_train_epochs, run.max_steps)
    rollouts = _rollouts(schedule, steps)
    answered = sum(count for _, _, count in rollouts)
    passes = _trained_prompts(schedule, steps)
    planned = schedule.survey(_STEPS_PLANNED)
    num_planned = sum(step.num_samples for step in planned)
    full_step = groups * sizes.num_generations
    ablated = sum(count for first, updates, count in rollouts if _meets(run.image_ablation_steps, first, updates))
    with_images = any(sample.visual_items for sample in prompts)
    return GroupCostFigures(
        steps=steps,
        steps_per_epoch=schedule.steps_per_epoch,
        rollouts=len(rollouts),
        prompts_per_step=groups,
        completions_per_step=full_step,
        images_per_step=groups * sum(len(sample.visual_items) for sample in prompts) / len(prompts),
        prompt_tokens_per_step=groups * sum(map(len, prompts)) / len(prompts),
        visual_tokens_per_step=groups * sum(map(_visual_tokens, prompts)) / len(prompts),
        most_completion_tokens_per_step=full_step * sizes.completion_tokens,
        most_update_tokens_per_step=full_step * sum(step.num_tokens for step in planned) / num_planned,
        most_unshared_tokens_per_step=full_step * sum(step.unshared_tokens for step in planned) / num_planned,
        prompts=answered,
        completions=answered * sizes.num_generations,
        most_completion_tokens=answered * sizes.num_generations * sizes.completion_tokens,
        updated_completions=passes * sizes.num_generations,
        most_resampled_completions=answered * sizes.num_generations * run.max_resampling_rounds,
        most_ablated_completions=ablated * sizes.num_generations if with_images else 0,
    )


def _rollouts(schedule: GroupSchedule, steps: int) -> list[tuple[int, int, int]]:
    """Of each rollout of a run: (its first optimizer step, counted from the run's begin, its updates, its prompts)."""
    found = []
    step = 0
    while step < steps:
        place = schedule.place(step % schedule.steps_per_epoch).prompt_steps
        updates = len(place) * schedule.sizes.num_iterations
        found.append((step, updates, sum(_prompts_in(schedule, prompt_step) for prompt_step in place)))
        step += updates
    return found


def _trained_prompts(schedule: GroupSchedule, steps: int) -> int:
    """Prompts of all optimizer steps of a run."""
    epochs, rest = divmod(steps, schedule.steps_per_epoch)
    whole = epochs * len(schedule.samples) * schedule.sizes.num_iterations
    return whole + sum(_prompts_in(schedule, schedule.place(index).prompt_step) for index in range(rest))


def _prompts_in(schedule: GroupSchedule, prompt_step: int) -> int:
    return min(schedule.train_batch_size, len(schedule.samples) - prompt_step * schedule.train_batch_size)


def _meets(every: int, first: int, updates: int) -> bool:
    """Whether one of these steps is a multiple of `every`; 0: none is."""
    return bool(every) and -(-first // every) * every < first + updates


def _visual_tokens(sample: Sample) -> int:
    return sum(count for item in sample.visual_items for _, count in item.runs)
