"""What a run of reinforcement costs, held against a walk through all of its steps."""

from __future__ import annotations

import numpy as np
import pytest

from finesight.data.audit_settings import AuditSettings, GroupRun
from finesight.data.conversation import MediaRef, Part, RowSource
from finesight.data.group_cost import group_cost
from finesight.data.groups import GroupSchedule, GroupSizes
from finesight.data.sample import Sample, VisualItem
from finesight.geometry import Grid

BUDGET = 400


def prompt(number: int, visual: int, text: int) -> Sample:
    """An image of `visual` tokens of its own, unless that is 0, before a text."""
    items = (VisualItem("image", Part("image", media=MediaRef(path="x")), Grid(1, 2 * visual, 2), 32, 32, ((0, visual),), str(number)),)
    count = visual + text
    ids = np.full(count, number)
    return Sample(
        ids, np.tile(np.arange(count), (3, 1)), np.zeros(count, bool), items if visual else (), count, RowSource("rows.json", number)
    )


@pytest.mark.parametrize("image_ablation_steps", [0, 1, 4])
@pytest.mark.parametrize(("epochs", "max_steps"), [(1.0, None), (2.5, None), (0.1, None), (1.0, 13)])
@pytest.mark.parametrize("sizes", [GroupSizes(4, 30), GroupSizes(2, 50, num_iterations=3), GroupSizes(3, 30, 2, 2)])
def test_counts_are_those_of_the_steps(sizes: GroupSizes, epochs: float, max_steps: int | None, image_ablation_steps: int) -> None:
    prompts = [prompt(number, 10 * (number % 3), 20 + number) for number in range(11)]
    run = GroupRun(sizes, epochs, max_steps, max_resampling_rounds=2, image_ablation_steps=image_ablation_steps)
    settings = AuditSettings(train_batch_size=2 * sizes.num_generations, token_budget=BUDGET, seed=3, groups=run)
    found = group_cost(prompts, settings, run)

    schedule = GroupSchedule(prompts, sizes=sizes, train_batch_size=2 * sizes.num_generations, token_budget=BUDGET, seed=3)
    assert (found.steps, found.steps_per_epoch) == (schedule.total_steps(epochs, max_steps), schedule.steps_per_epoch)
    rollouts = answered = trained = ablated = 0
    for step in range(found.steps):
        epoch, index = divmod(step, schedule.steps_per_epoch)
        place = schedule.place(index)
        trained += len(schedule.rows_of(epoch, index))
        if place.first == index:
            own = sum(len(schedule.prompts_of(epoch, prompt_step)) for prompt_step in place.prompt_steps)
            rollouts, answered = rollouts + 1, answered + own
            updates = len(place.prompt_steps) * sizes.num_iterations
            if image_ablation_steps and any((step + update) % image_ablation_steps == 0 for update in range(updates)):
                ablated += own
    g = sizes.num_generations
    assert (found.rollouts, found.prompts, found.completions, found.updated_completions) == (rollouts, answered, g * answered, g * trained)
    assert found.most_completion_tokens == g * answered * sizes.completion_tokens
    assert (found.most_resampled_completions, found.most_ablated_completions) == (2 * g * answered, g * ablated)


def test_means_and_bounds_of_a_step() -> None:
    prompts = [prompt(0, 30, 10), prompt(1, 0, 20), prompt(2, 10, 20), prompt(3, 0, 30)]
    run = GroupRun(GroupSizes(4, completion_tokens=25))
    found = group_cost(prompts, AuditSettings(train_batch_size=8, token_budget=BUDGET, groups=run), run)
    assert (found.prompts_per_step, found.completions_per_step, found.most_completion_tokens_per_step) == (2, 8, 200)
    assert (found.images_per_step, found.prompt_tokens_per_step, found.visual_tokens_per_step) == (1, 60, 20)
    # Prompts once for their four completions, and four times.
    assert (found.most_update_tokens_per_step, found.most_unshared_tokens_per_step) == (260, 440)
    alone = group_cost(prompts, AuditSettings(train_batch_size=8, token_budget=BUDGET, share=False, groups=run), run)
    assert alone.most_update_tokens_per_step == alone.most_unshared_tokens_per_step == 440


def test_fewer_prompts_than_a_step_has_room_for() -> None:
    run = GroupRun(GroupSizes(4, completion_tokens=25), max_steps=5)
    found = group_cost([prompt(0, 0, 10)], AuditSettings(train_batch_size=64, token_budget=BUDGET, groups=run), run)
    assert (found.prompts_per_step, found.completions_per_step, found.completions, found.most_ablated_completions) == (1, 4, 20, 0)
