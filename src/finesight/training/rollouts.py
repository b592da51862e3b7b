"""Rollouts: completions of prompts, what they earn, and what is worth knowing of both.

A rollout is a function of the seed, the position of the run and the weights alone: completions follow seeds derived from the
position, and so do the prompts that replace others under dynamic sampling.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from finesight.data.blank import blanked
from finesight.data.conversation import Conversation
from finesight.data.sample import Sample
from finesight.errors import EvaluationError
from finesight.grpo_settings import GRPOSettings, RolloutSettings
from finesight.sampling.types import Completion, RolloutSampler, SamplingSettings
from finesight.tasks.reward_types import Earned, Reward, RewardCall, RewardFailure, RewardResult, RewardTally
from finesight.tasks.rewards import RewardSet
from finesight.training.grpo_losses import overlong_penalty
from finesight.training.rollout_shares import Processes
from finesight.wording import counted


@dataclass(frozen=True, eq=False)
class Group:
    """One prompt and its completions, G of them."""

    row: int  # place of the prompt in the data
    completions: tuple[Completion, ...]
    values: dict[str, tuple[float | None, ...]]  # of each reward by its label, (G,)
    totals: tuple[float | None, ...]  # (G,) weighted sums, the penalty for length taken off; None where no reward applied
    failures: Mapping[int, str] = field(default_factory=dict)  # of completions, by their number in the group: which rewards failed, and why
    extra: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # columns that reward functions logged, (G,)

    @property
    def is_constant(self) -> bool:
        """Whether all its completions earn the same, so that it teaches nothing."""
        known = [total for total in self.totals if total is not None]
        return len(known) < 2 or min(known) == max(known)


@dataclass(frozen=True, eq=False)
class Rollout:
    """The groups of a rollout, in the order of the prompts asked for, and figures of it."""

    groups: tuple[Group, ...]
    figures: dict[str, float] = field(default_factory=dict)
    failures: tuple[RewardFailure, ...] = ()
    blind_failures: tuple[RewardFailure, ...] = ()  # of the completions with images blanked
    tallies: Mapping[str, RewardTally] = field(default_factory=dict)  # by reward, of all completions sampled with their images


@dataclass(frozen=True)
class Position:
    """Where in a run a rollout stands: everything that it depends on besides the weights."""

    epoch: int
    index: int  # of its first optimizer step in the epoch
    step: int  # optimizer steps before it, in the whole run

    def seed(self, seed: int, purpose: str) -> int:
        """A seed for one purpose at this place."""
        digest = hashlib.blake2b(f"{seed}/{self.epoch}/{self.index}/{purpose}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


class RolloutMaker:
    """Samples completions and asks for their rewards.

    Args:
        sampler: of the model in training.
        rewards: what completions earn.
        prompts: encoded; conversations: their rows.
        grpo, rollout: sections of the recipe.
        seed: of everything that is drawn.
        max_steps: of the run, told to reward functions.
        processes: each samples its share of the prompts and asks for its rewards; all know of all.
    """

    def __init__(
        self,
        sampler: RolloutSampler,
        rewards: RewardSet,
        prompts: Sequence[Sample],
        conversations: Sequence[Conversation],
        *,
        grpo: GRPOSettings,
        rollout: RolloutSettings,
        seed: int,
        max_steps: int | None = None,
        processes: Processes = Processes(),
    ) -> None:
        self.sampler, self.rewards, self.prompts, self.conversations = sampler, rewards, prompts, conversations
        self.processes = processes
        self.grpo, self.rollout, self.seed, self.max_steps = grpo, rollout, seed, max_steps
        self.labels = reward_labels(rewards.rewards)
        self._is_first = True

    def make(self, rows: Sequence[int], at: Position, *, ablate: bool = False) -> Rollout:
        """A group for each of these rows, or for one that replaces it.

        Args:
            ablate: answer the same prompts with their images blanked too, and tell what that earns.

        Raises:
            DataError: an image cannot be opened.
            ModelError: the GPU has no memory to sample.
            EngineError: another engine fails.
            EvaluationError: in the first rollout no reward gave a number, as in :func:`refuse_without_rewards`.
        """
        self.sampler.refresh(at.step)
        groups, result = self._groups(rows, [self.prompts[row] for row in rows], at, "completions")
        if self._is_first:
            refuse_without_rewards(result)
            self._is_first = False
        # Of the first round alone: groups that replaced others were chosen for what they earn.
        figures = {**completion_figures(groups, self.rollout.max_completion_length), **reward_figures(result, groups, self.labels)}
        failures, tallies = list(result.failures), result.tallies
        blind_failures: tuple[RewardFailure, ...] = ()
        if ablate:
            blind_figures, blind_failures = self._without_images(rows, groups, at)
            figures |= blind_figures
        rounds = replaced = 0
        while rounds < self.grpo.max_resampling_rounds and (constant := [i for i, group in enumerate(groups) if group.is_constant]):
            others = self._other_rows(len(constant), {group.row for group in groups}, at, rounds)
            if not others:
                break
            rounds += 1
            fresh, result = self._groups(others, [self.prompts[row] for row in others], at, f"round {rounds}")
            failures += result.failures
            tallies = {name: tally + result.tallies[name] for name, tally in tallies.items()}
            useful = [group for group in fresh if not group.is_constant]
            for place, group in zip(constant, useful, strict=False):
                groups[place] = group
            replaced += min(len(useful), len(constant))
        if self.grpo.max_resampling_rounds:
            figures |= {"resampling/rounds": float(rounds), "resampling/replaced_groups": float(replaced)}
            figures["resampling/constant_groups_left"] = sum(group.is_constant for group in groups) / len(groups)
        return Rollout(tuple(groups), figures, tuple(failures), blind_failures, tallies)

    def _groups(self, rows: Sequence[int], prompts: Sequence[Sample], at: Position, purpose: str) -> tuple[list[Group], RewardResult]:
        size = self.grpo.num_generations
        completions, result = answers_and_rewards(
            self.sampler,
            self.rewards,
            prompts,
            [self.conversations[row] for row in rows],
            self._sampling(at.seed(self.seed, purpose)),
            self.processes,
            step=at.step,
            max_steps=self.max_steps,
        )
        totals = self._penalised(result.totals, completions)
        cuts = [slice(number * size, (number + 1) * size) for number in range(len(rows))]
        groups = [
            Group(
                row,
                tuple(completions[cut]),
                {self.labels[name]: values[cut] for name, values in result.values.items()},
                totals[cut],
                _failures_of(result.failures, cut),
                {name: values[cut] for name, values in result.extra.items()},
            )
            for row, cut in zip(rows, cuts, strict=True)
        ]
        return groups, result

    def _sampling(self, seed: int) -> SamplingSettings:
        r = self.rollout
        return SamplingSettings(
            max_completion_length=r.max_completion_length,
            temperature=r.temperature,
            top_p=r.top_p,
            top_k=r.top_k,
            min_p=r.min_p,
            stop=tuple(r.stop),
            batch_size=r.batch_size,
            num_generations=self.grpo.num_generations,
            seed=seed,
        )

    def _penalised(self, totals: Sequence[float | None], completions: Sequence[Completion]) -> tuple[float | None, ...]:
        if not self.grpo.overlong_buffer:
            return tuple(totals)
        lengths = torch.tensor([len(completion.token_ids) for completion in completions])
        penalties = overlong_penalty(lengths, self.rollout.max_completion_length, self.grpo.overlong_buffer) * self.grpo.overlong_penalty
        return tuple(None if total is None else total + penalty for total, penalty in zip(totals, penalties.tolist(), strict=True))

    def _other_rows(self, count: int, taken: set[int], at: Position, number: int) -> list[int]:
        """Prompts that the rollout does not have, drawn anew for each round."""
        left = [row for row in range(len(self.prompts)) if row not in taken]
        chosen = np.random.default_rng(at.seed(self.seed, f"other prompts {number}")).permutation(len(left))[:count]
        return [left[place] for place in chosen]

    def _without_images(
        self, rows: Sequence[int], groups: Sequence[Group], at: Position
    ) -> tuple[dict[str, float], tuple[RewardFailure, ...]]:
        """What is earned by answers to the same prompts with grey pictures, judged as if the pictures had been seen."""
        places = [place for place, row in enumerate(rows) if self.prompts[row].visual_items]
        if not places:
            return {}, ()
        seen = [groups[place] for place in places]
        blind, result = self._groups([rows[p] for p in places], [blanked(self.prompts[rows[p]]) for p in places], at, "images blanked")
        found: dict[str, float] = {}
        for name, of in [("reward", lambda group: group.totals), *((f"rewards/{n}", _value_of(n)) for n in seen[0].values)]:
            with_image, without = (_mean([value for group in side for value in of(group)]) for side in (seen, blind))
            found |= {f"image_ablation/{name}/with_image": with_image, f"image_ablation/{name}/without_image": without}
        return {name: value for name, value in found.items() if math.isfinite(value)}, result.failures


def answers_and_rewards(
    sampler: RolloutSampler,
    rewards: RewardSet,
    prompts: Sequence[Sample],
    conversations: Sequence[Conversation],
    sampling: SamplingSettings,
    processes: Processes,
    *,
    step: int,
    max_steps: int | None = None,
) -> tuple[list[Completion], RewardResult]:
    """`num_generations` completions of each prompt, in the prompts' order, and what they earn.

    Each process samples the completions of its share of the prompts and asks for their rewards; all learn of all. What is
    drawn depends on the place among all prompts, and so not on the number of processes.

    Args:
        prompts: encoded; conversations: their rows.
        step: optimizer steps done; max_steps: of the run. For reward functions.
    """
    share, size = processes.share(len(prompts)), sampling.num_generations
    own = sampler.generate_samples(prompts[share], replace(sampling, first_place=share.start))
    call = RewardCall(
        conversations=tuple(conversation for conversation in conversations[share] for _ in range(size)),
        texts=tuple(completion.text for completion in own),
        completion_ids=tuple(completion.token_ids for completion in own),
        group=tuple(number for number in range(share.start, share.stop) for _ in range(size)),
        step=step,
        max_steps=max_steps,
    )
    found = processes.exchange((own, rewards.earned(call)))
    group = [number for number in range(len(prompts)) for _ in range(size)]
    return [completion for part, _ in found for completion in part], rewards.result(Earned.joined([part for _, part in found]), group)


def refuse_without_rewards(result: RewardResult) -> None:
    """Refuses to go on where no reward gave a number for any completion, because of failures: nothing can be learnt from that.

    Rewards that give None for all of them, which may apply to other rows, are let pass.

    Raises:
        EvaluationError: each reward that failed, and its first reason.
    """
    if not result.failures or any(tally.given for tally in result.tallies.values()):
        return
    first: dict[str, str] = {}
    for failure in result.failures:
        first.setdefault(failure.reward, failure.message)
    raise EvaluationError(
        f"No reward gave a number for any of the {counted(len(result.totals), 'completion')} of the first rollout, so that there is nothing to "
        f"learn from: {'; '.join(f'{name}: {message}' for name, message in first.items())}. Correct that and start again; nothing was saved."
    )


def reward_labels(rewards: Sequence[Reward]) -> dict[str, str]:
    """Names of rewards in figures: short ones, unless two are alike."""
    short = [reward.label for reward in rewards]
    return {reward.name: label if short.count(label) == 1 else reward.name for reward, label in zip(rewards, short, strict=True)}


def _failures_of(failures: Sequence[RewardFailure], cut: slice) -> dict[int, str]:
    """The failures of one group's completions, in words, by their number in the group."""
    found: dict[int, list[str]] = {}
    for failure in failures:
        if cut.start <= failure.index < cut.stop:
            found.setdefault(failure.index - cut.start, []).append(f"{failure.reward}: {failure.message}")
    return {number: "; ".join(words) for number, words in found.items()}


def _value_of(name: str) -> Callable[[Group], tuple[float | None, ...]]:
    return lambda group: group.values[name]


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else math.nan


def completion_figures(groups: Sequence[Group], max_completion_length: int) -> dict[str, float]:
    """Lengths in tokens, and the share of completions that the limit cut off."""
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(completion.finish_reason == "length" for completion in completions) / len(completions),
    }


def reward_figures(result: RewardResult, groups: Sequence[Group], labels: Mapping[str, str]) -> dict[str, float]:
    """Mean, spread and saturation of each reward, and how many groups have no variance in it. Figures without values are left out."""
    totals = [total for group in groups for total in group.totals if total is not None]
    found = {
        "reward": _mean(totals),
        "reward_std": float(np.std(totals, ddof=1)) if len(totals) > 1 else math.nan,
        "frac_reward_zero_std": sum(group.is_constant for group in groups) / len(groups),
    }
    for name, statistics in result.statistics.items():
        prefix = f"rewards/{labels[name]}"
        found |= {
            f"{prefix}/mean": statistics.mean,
            f"{prefix}/std": statistics.spread,
            f"{prefix}/saturation": statistics.saturation,
            f"{prefix}/constant_groups": statistics.constant_groups,
            f"{prefix}/failed": float(statistics.failed),
            f"{prefix}/seconds": statistics.seconds,
        }
    # What functions log goes by the name that they give it, unless a figure of the run has it.
    found |= {name if name not in found else f"logged/{name}": _mean(values) for name, values in result.metrics.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}
