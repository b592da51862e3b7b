"""Where the steps of reinforcement come from: rollouts, made with the weights of the moment and packed for their updates.

The first update of a rollout is on-policy: its old log-probabilities are its own, detached. Where a rollout serves more than
one update, the old log-probabilities of the later ones come from a packed pass without gradients before the first one, and
not from the sampler: that computes attention in another order and so rounds otherwise, which would move ratios away from 1
before any weight has changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from finesight.data.batch import PackedBatch, Scoring
from finesight.data.feed import Feed, Step
from finesight.data.groups import GroupSchedule, continued
from finesight.data.halves import halve
from finesight.data.pack import PackPlan, pack_step
from finesight.data.sample import Sample
from finesight.data.steps import StepPlan
from finesight.errors import ModelError, TrainingError
from finesight.models.memory import first_sentence, is_out_of_memory, release_memory
from finesight.models.packed import PackedModel
from finesight.sampling.forking_sampler import answering
from finesight.training.completion_targets import CompletionTargets, by_completion, by_record
from finesight.training.grpo_losses import group_advantages
from finesight.training.rollouts import Group, Position, Rollout, RolloutMaker

# Is handed each rollout and its groups' advantages, (groups, G).
Watcher = Callable[[Position, Rollout, Sequence[Sequence[float]]], None]


@dataclass(eq=False)
class _Completed:
    """What is known of one completion besides its tokens; (its tokens,) arrays."""

    advantage: float
    sampler_logprobs: np.ndarray
    old_logprobs: np.ndarray | None = None
    reference_logprobs: np.ndarray | None = None


@dataclass(eq=False)
class _Current:
    """The rollout that steps are taken from."""

    at: Position
    made_at: int  # index in the epoch of the first update with its completions: this one is on-policy
    samples: dict[int, list[Sample]]  # by prompt step
    completed: dict[Sample, _Completed]
    figures: dict[str, float]
    seconds: float


class RolloutSource:
    """Optimizer steps from rollouts; a :class:`finesight.training.loop.StepSource`.

    Going on in the middle of a rollout that serves several updates, its completions are sampled anew, with the weights as they
    are by then.

    Args:
        feed: of the prompts; opens images and lays out packs.
        schedule: which prompts make which step.
        maker: samples completions and asks for their rewards.
        packed: the model in training.
        watcher: is told of each rollout.
    """

    def __init__(
        self, feed: Feed, schedule: GroupSchedule, maker: RolloutMaker, packed: PackedModel, watcher: Watcher = lambda *about: None
    ) -> None:
        self.feed, self.schedule, self.maker, self.packed, self.watcher = feed, schedule, maker, packed, watcher
        self.grpo, self.rollout = maker.grpo, maker.rollout
        self._forbidden = torch.tensor(sorted(maker.sampler.forbidden))
        self._current: _Current | None = None
        self._given: int | None = None  # index in its epoch of the step last given out

    @property
    def steps_per_epoch(self) -> int:
        return self.schedule.steps_per_epoch

    @property
    def can_go_ahead(self) -> bool:
        """Whether the step after the one last given out is made of the same rollout, and so waits for no update."""
        if self._given is None:
            return False
        this, following = self._given, self._given + 1
        return following < self.steps_per_epoch and self.schedule.place(this).first == self.schedule.place(following).first

    def limit_tokens(self, token_budget: int) -> None:
        """Lowers the most tokens of a pack, for all steps from now on; a larger number changes nothing."""
        self.feed.limit_tokens(token_budget)

    def stream(self, epoch: int, index: int, count: int) -> Iterator[Step]:
        """`count` steps from a position on, each rollout made when its first step is asked for.

        Raises:
            DataError: an image or video cannot be loaded.
            ModelError: the GPU has no memory to sample.
            TrainingError: a single completion does not fit in memory.
        """
        first = epoch * self.steps_per_epoch + index
        for position in range(first, first + count):
            at = divmod(position, self.steps_per_epoch)
            begun = self.schedule.place(at[1]).first
            if self._current is None or (self._current.at.epoch, self._current.at.index) != (at[0], begun) or position == first:
                self._current = self._roll_out(*at)
            self._given = at[1]
            yield self._step(self._current, *at)

    def divide(self, step: Step, number: int) -> Step | None:
        """A step with one pack laid out anew as two; None where the pack is a single completion. Completions stay whole."""
        divided = self.feed.divide(step, number)
        if divided is None:
            return None
        return self._with_targets(divided)

    def _roll_out(self, epoch: int, index: int) -> _Current:
        begun = time.perf_counter()
        place = self.schedule.place(index)
        at = Position(epoch, place.first, epoch * self.steps_per_epoch + place.first)
        rows = {prompt_step: self.schedule.prompts_of(epoch, prompt_step) for prompt_step in place.prompt_steps}
        updates = len(place.prompt_steps) * self.grpo.num_iterations
        every = self.grpo.image_ablation_steps
        ablate = bool(every) and any((at.step + update) % every == 0 for update in range(updates))
        rollout = self.maker.make([row for own in rows.values() for row in own], at, ablate=ablate)
        sampled = time.perf_counter()
        groups = iter(rollout.groups)
        samples: dict[int, list[Sample]] = {}
        completed: dict[Sample, _Completed] = {}
        advantages: list[list[float]] = []
        for prompt_step, own in rows.items():
            members = [next(groups) for _ in own]
            own_advantages = self._advantages(members)
            advantages += own_advantages
            samples[prompt_step] = []
            for group, values in zip(members, own_advantages, strict=True):
                for sample, about in self._completed(group, values):
                    samples[prompt_step].append(sample)
                    completed[sample] = about
        if place.update + 1 < updates:
            for sample, logprobs in self._scored(list(completed)).items():
                completed[sample].old_logprobs = logprobs
        if self.grpo.beta:
            for sample, logprobs in self._scored(list(completed), reference=True).items():
                completed[sample].reference_logprobs = logprobs
        figures = {"rollout_s": sampled - begun, "scoring_s": time.perf_counter() - sampled, **rollout.figures}
        self.watcher(at, rollout, advantages)
        return _Current(at, index, samples, completed, figures, time.perf_counter() - begun)

    def _advantages(self, groups: Sequence[Group]) -> list[list[float]]:
        size = self.grpo.num_generations
        totals = [np.nan if total is None else total for group in groups for total in group.totals]
        number = torch.arange(len(groups)).repeat_interleave(size)
        advantages, _ = group_advantages(torch.tensor(totals, dtype=torch.float64), number, len(groups), self.grpo.scale_rewards)
        values: list[list[float]] = advantages.view(-1, size).tolist()
        return values

    def _completed(self, group: Group, advantages: Sequence[float]) -> Iterator[tuple[Sample, _Completed]]:
        prompt = self.schedule.samples[group.row]
        for completion, advantage in zip(group.completions, advantages, strict=True):
            masked = self.grpo.mask_truncated_completions and completion.finish_reason == "length"
            sample = continued(prompt, completion.token_ids, weight=0.0 if masked else 1.0)
            yield sample, _Completed(advantage, np.asarray(completion.logprobs, dtype=np.float32))

    def _step(self, current: _Current, epoch: int, index: int) -> Step:
        samples = current.samples[self.schedule.place(index).prompt_step]
        plan = self.schedule.plan_of(samples, epoch, index, self.feed.token_budget)
        step = replace(self.feed.build(plan), plan=plan)
        if index == current.made_at:
            step = replace(step, figures=current.figures, device_s=current.seconds)
        return self._with_targets(step)

    def _with_targets(self, step: Step) -> Step:
        plan, current = step.plan, self._current
        if plan is None or current is None:
            raise TrainingError("Steps of reinforcement are made and divided by the RolloutSource that streams them.")
        on_policy = step.index == current.made_at
        packs = [
            self._with_table(pack, chosen, current, on_policy)
            for pack, chosen in zip(step.packs, _plans_of(plan, self.feed.process), strict=True)
        ]
        return replace(step, packs=packs)

    def _with_table(self, pack: PackedBatch, plan: PackPlan, current: _Current, on_policy: bool) -> PackedBatch:
        """The pack with what its loss must know."""
        if pack.about_targets is not None:
            return pack
        known = [current.completed[sample] for sample in plan.samples]
        old = [one.old_logprobs for one in known if one.old_logprobs is not None]
        reference = [one.reference_logprobs for one in known if one.reference_logprobs is not None]
        table = CompletionTargets(
            advantages=torch.tensor([one.advantage for one in known], dtype=torch.float32),
            sampler_logprobs=by_record(pack, [one.sampler_logprobs for one in known]),
            old_logprobs=by_record(pack, old) if old and not on_policy else None,
            reference_logprobs=by_record(pack, reference) if reference else None,
        )
        return replace(pack, scoring=self._scoring(entropies=True), about_targets=table)

    def _scoring(self, *, entropies: bool = False) -> Scoring:
        """As the sampler draws: its temperature, and the tokens that it never draws."""
        return Scoring(self.rollout.temperature, self._forbidden, entropies)

    def _scored(self, samples: Sequence[Sample], *, reference: bool = False) -> dict[Sample, np.ndarray]:
        """Log-probabilities of each completion's tokens without gradients, in the same packed and shared form as an update.

        Each process computes those of its share of the groups.

        Args:
            samples: of whole groups, one after the other.
            reference: under the base, adapters switched off.
        """
        size = self.grpo.num_generations
        groups = self.maker.processes.share(len(samples) // size)
        own = samples[groups.start * size : groups.stop * size]
        found: dict[Sample, np.ndarray] = {}
        with answering(self.packed), _without_adapters(self.packed.model) if reference else _as_it_is():
            for plan in pack_step(own, token_budget=self.feed.token_budget, share=self.schedule.share):
                self._score(plan, found)
        return dict(zip(samples, self.maker.processes.joined([found[sample] for sample in own]), strict=True))

    def _score(self, plan: PackPlan, found: dict[Sample, np.ndarray]) -> None:
        pack = replace(self.feed.build_pack(plan), scoring=self._scoring())
        try:
            records = self._logprobs(pack)
        except RuntimeError as error:
            halves = halve(plan) if is_out_of_memory(error) else None
            if halves is None:
                if not is_out_of_memory(error):
                    raise
                raise TrainingError(
                    f"{plan.samples[0].source}: one completion of {len(plan.samples[0]):,} tokens, prompt included, does not fit: "
                    f"{first_sentence(error)}. Lower data.max_pixels or rollout.max_completion_length."
                ) from error
        else:
            found.update(zip(plan.samples, by_completion(pack, records), strict=True))
            return
        release_memory(self.packed.device)
        for half in halves:
            self._score(half, found)

    def _logprobs(self, pack: PackedBatch) -> np.ndarray:
        cache = self.packed.feature_cache
        if cache is not None:
            pack = cache.prefetch(pack, self.packed.device).result()
        logprobs: np.ndarray = self.packed(pack.to(self.packed.device)).float().cpu().numpy()
        return logprobs


def _plans_of(plan: StepPlan, process: int) -> list[PackPlan]:
    return [plan.plans[plan.cheapest if number is None else number] for number in plan.deal[process]]


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """The base alone. Which parameters train is put back: peft's own switch makes all of an active adapter's train.

    Raises:
        ModelError: there are no adapters to switch off.
    """
    if not isinstance(model, PeftModel):
        raise ModelError("There is no adapter to switch off: the reference of grpo.beta is the base of an adapter.")
    training = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, trains in training:
            parameter.requires_grad_(trains)
