"""Sizes of a run's packs for the planner, from the rows themselves or, of reinforcement, from prompts made up. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from finesight.data.audit_settings import group_run
from finesight.data.conversation import Part, RowSource
from finesight.data.formats import ReadResult
from finesight.data.groups import GroupSchedule
from finesight.data.pack import PackPlan
from finesight.data.sample import Sample, VisualItem
from finesight.data.steps import StepPlan
from finesight.errors import RecipeError
from finesight.geometry import Grid
from finesight.planner.shapes import ModelShape
from finesight.planner.sizes import (
    PROMPT_TEXT_TOKENS,
    PackSizes,
    RolloutSizes,
    RunSizes,
    note_of_larger_packs,
    sampled_with,
    visual_tokens_of,
)
from finesight.recipe import Recipe
from finesight.training.prepare import Prepared, prepare
from finesight.wording import counted

# Steps of the first epoch that are looked at.
SURVEYED_STEPS = 200


def pack_sizes(plan: PackPlan) -> PackSizes:
    """What the planner needs to know of a pack."""
    segments = gathered = pairs = targets = 0
    branched = False
    for tree in plan.trees:
        for segment in tree.segments:
            segments += 1
            # A segment reads the keys of everything before it in its samples, wherever that was computed.
            gathered += segment.stop
            branched |= segment.parent is not None
            pairs += (segment.stop * (segment.stop + 1) - segment.start * (segment.start + 1)) // 2
            trained = {
                place
                for index in segment.samples
                for place in plan.samples[index].trained[segment.start : segment.stop].nonzero()[0].tolist()
            }
            targets += len(trained)
    return PackSizes(
        tokens=plan.num_tokens,
        targets=targets,
        patches=tuple(item.grid.patches for item in plan.visual_items),
        segments=segments,
        gathered_keys=gathered if branched else 0,
        key_pairs=pairs,
        samples=len(plan.samples),
    )


def rollout_sizes(prepared: Prepared) -> RolloutSizes | None:
    """What is sampled at once in a run of reinforcement: `rollout.batch_size` completions, all as long as they may be.

    Another engine samples in memory of its own; held-out prompts are answered by the model in training all the same.
    """
    return _rollout_sizes(prepared.recipe, prepared.samples)


def _rollout_sizes(recipe: Recipe, prompts: Sequence[Sample]) -> RolloutSizes | None:
    grpo, rollout = recipe.grpo, recipe.rollout
    if grpo is None or rollout is None:
        return None
    if rollout.engine != "builtin" and recipe.training.eval_strategy == "no":
        return None
    groups = recipe.training.train_batch_size // grpo.num_generations * grpo.steps_per_generation
    return RolloutSizes(
        groups=min(groups, -(-rollout.batch_size // grpo.num_generations)),
        completions=grpo.num_generations,
        prompt_tokens=max(len(prompt) for prompt in prompts),
        completion_tokens=rollout.max_completion_length,
        prompt_patches=max(sum(item.grid.patches for item in prompt.visual_items) for prompt in prompts),
    )


def _heaviest_hands(steps: Sequence[StepPlan]) -> tuple[tuple[PackSizes, ...], ...]:
    """Of each step the packs of the process with most tokens."""
    packs = []
    for step in steps:
        hands = [[step.plans[number] for number in hand if number is not None] for hand in step.deal]
        packs.append(tuple(pack_sizes(plan) for plan in max(hands, key=lambda hand: sum(plan.num_tokens for plan in hand))))
    return tuple(packs)


def filled_groups(model: ModelShape, recipe: Recipe, token_budget: int, pixels: int, processes: int = 1) -> RunSizes:
    """A step of reinforcement whose prompts are all alike: where there is no data to look at.

    It is planned as one of data is: groups are packed by :class:`GroupSchedule`, every completion at its full length.

    Args:
        recipe: of reinforcement.
        token_budget: most tokens of a pack; one completion with its prompt is planned even where it is longer.
        pixels: of each prompt's image, as for :func:`finesight.planner.sizes.filled_pack`.
        processes: that share each step.

    Raises:
        RecipeError: the recipe has no section grpo.
    """
    run = group_run(recipe)
    if run is None:
        raise RecipeError("Steps of groups are for reinforcement: add a section grpo to the recipe.")
    sizes, batch = run.sizes, recipe.training.train_batch_size
    visual = visual_tokens_of(model, pixels)
    prompts = [_made_up_prompt(model, number, visual) for number in range(batch // sizes.num_generations)]
    schedule = GroupSchedule(
        prompts, sizes=sizes, train_batch_size=batch, token_budget=token_budget, share=recipe.shares_prefixes, processes=processes
    )
    side = round(pixels**0.5)
    source = (
        f"no data: groups of {sizes.num_generations} completions of {sizes.completion_tokens:,} tokens, each group's prompt of an image of "
        f"about {side} × {side} pixels and {PROMPT_TEXT_TOKENS} tokens of text"
    )
    steps = _heaviest_hands(schedule.survey(1))
    note = note_of_larger_packs(token_budget, max(pack.tokens for step in steps for pack in step), "one prompt with a completion")
    return RunSizes(steps, source=source, rollout=_rollout_sizes(recipe, prompts), note=note)


def _made_up_prompt(model: ModelShape, number: int, visual: int) -> Sample:
    """An image of so many visual tokens, another for each number, and a short text."""
    merge, length = model.vision.merge_size, visual + PROMPT_TEXT_TOKENS
    image = VisualItem(
        "image",
        Part("image"),
        Grid(1, visual * merge, merge),
        resized_height=visual * merge * model.vision.patch_size,
        resized_width=merge * model.vision.patch_size,
        runs=((0, visual),),
        key=str(number),
    )
    positions = np.broadcast_to(np.arange(length), (3, length))
    ids, none = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=bool)
    return Sample(ids, positions, none, (image,), next_position=length, source=RowSource("no data", number))


@dataclass
class DataSizes:
    """Sizes of a recipe's packs from its rows. Rows are encoded anew only where the pixel limit changes.

    Args:
        prepared: the rows as the recipe has them.
        processes: that share each step.
    """

    prepared: Prepared
    processes: int = 1
    _by_pixels: dict[int | None, Prepared] = field(default_factory=dict)
    _found: dict[tuple[int, int | None], RunSizes] = field(default_factory=dict)

    @property
    def longest_sample(self) -> int:
        rollout = self.prepared.recipe.rollout
        return max(len(sample) for sample in self.prepared.samples) + (0 if rollout is None else rollout.max_completion_length)

    def __call__(self, recipe: Recipe) -> RunSizes:
        key = (recipe.training.token_budget, recipe.data.max_pixels)
        if key not in self._found:
            self._found[key] = self._survey(recipe)
        found = self._found[key]
        sampled = sampled_with(found.rollout, recipe)
        return found if sampled == found.rollout else replace(found, rollout=sampled)

    def _survey(self, recipe: Recipe) -> RunSizes:
        prepared = self._rows(recipe)
        training = prepared.recipe.training.model_copy(update={"token_budget": recipe.training.token_budget})
        planned = replace(prepared, recipe=prepared.recipe.model_copy(update={"training": training}))
        schedule = planned.schedule(processes=self.processes)
        steps = schedule.survey(SURVEYED_STEPS)
        source = f"{len(steps):,} of {counted(schedule.steps_per_epoch, 'step')} of the data"
        return RunSizes(_heaviest_hands(steps), source=source, rollout=rollout_sizes(planned))

    def _rows(self, recipe: Recipe) -> Prepared:
        pixels = recipe.data.max_pixels
        if pixels == self.prepared.recipe.data.max_pixels:
            return self.prepared
        if pixels not in self._by_pixels:
            own = self.prepared
            data = own.recipe.data.model_copy(update={"max_pixels": pixels})
            # Rows and rewards may have come from memory: what was read is encoded anew, nothing is read again.
            self._by_pixels[pixels] = prepare(
                own.recipe.model_copy(update={"data": data}),
                processor=own.processor,
                sources=[ReadResult(own.conversations, [], "messages", "rows")],
                held_out_sources=[ReadResult(own.held_out_conversations, [], "messages", "held-out rows")],
                reward_functions={reward.name: reward.function for reward in own.rewards if reward.function is not None},
            )
        return self._by_pixels[pixels]
