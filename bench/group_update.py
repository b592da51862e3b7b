"""The update of reinforcement by itself: shared prompts against prompts computed anew for each completion. Lines of JSON.

    python -m bench.group_update --model qwen3-vl-4b --bpe qwen.tiktoken --compile [--profile]

Completions are fixed random tokens, advantages and old log-probabilities are fixed too, so that both forms have the same
targets, the same loss and the same gradients; row `grpo_compared` says how near they are. A step (`grpo_update`) is one group,
with --compile several: forward and backward pass of its packs, clipping, and the optimizer's step; the tower is computed in it, once for each pack,
but for the forms of `kept_features`, which take the images' features as a rollout leaves them to the update of a run.
Each form starts from the same adapters. With --profile, row `grpo_profile` tells for each form how long the parts of a step take,
each waited for by itself, and names the kernels of one step.
Activation memory is the peak of a step over what is allocated before it. Row `grpo_memory`: the same for larger groups under the
activation policy full, in one pack and split over several.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import models
from bench.checkpoint import write_processor
from bench.group_prompts import completions, conversations, encoded
from bench.profile_step import profiled
from bench.rows import Row, emit, failed, part, significant
from bench.workload import TINY_GROUP, GroupSetting
from finesight.data.batch import PackedBatch, Scoring
from finesight.data.feed import Feed, Step
from finesight.data.kept import use_kept
from finesight.data.pack import PackPlan
from finesight.data.processor import Processor, load_processor
from finesight.data.sample import Sample
from finesight.data.steps import StepPlan, plan_packs
from finesight.models.adapters import apply_tuning
from finesight.models.compilation import STEADY_TOKENS, keep_compiled_code
from finesight.models.packed import PackedModel
from finesight.models.vision import patch_dtype
from finesight.recipe import Recipe
from finesight.recipe_files import load_recipe
from finesight.sampling.forking_sampler import answering
from finesight.training.completion_targets import CompletionTargets, by_completion, by_record
from finesight.training.grpo import GRPO
from finesight.training.optimizer import StepOptimizer

GIB = 2**30
WARM, STEPS = 2, 4
ONE_PACK = 1 << 14  # token budget that takes a group of 8 unshared, or one of 32 shared
SIZES = (4, 32)  # of groups, whose memory is compared
GROUPS = 4  # of a step whose time is taken with compiled layers
KERNELS = 30  # named in a profile
PARTS = ("tower", "forward", "scoring", "loss and its gradient", "backward", "collecting gradients", "clipping and update")


@dataclass(frozen=True)
class Form:
    """How an update is computed."""

    shared: bool
    policy: str  # of activations
    compiled: bool
    token_budget: int = ONE_PACK
    generations: int = 8
    groups: int = 1  # of a step, each about an image of its own
    kept_features: bool = False  # of the images, as a rollout leaves them to the update of a run; otherwise the tower is part of the step


@dataclass(frozen=True, eq=False)
class About:
    """What is fixed of a completion besides its tokens."""

    advantage: float
    old_logprobs: np.ndarray  # (its tokens,) float32


def own_share_bytes(text_config: Any, tokens: int, width: int) -> int:
    """What completions of so many tokens take by themselves under the policy full: the inputs of all decoder layers.

    Working memory of a layer and the vocabulary's logits are not counted: they need not grow with the group.
    """
    layers: int = text_config.num_hidden_layers
    hidden: int = text_config.hidden_size
    return tokens * layers * hidden * width


class UpdateBench:
    """One adapted model, updated in one form after another.

    Args:
        a: options of the script.
        common: of every row.
    """

    def __init__(self, a: argparse.Namespace, processor: Processor, recipe: Recipe, common: Row) -> None:
        self.a, self.processor, self.recipe, self.common = a, processor, recipe, common
        self.on_gpu = a.device == "cuda"
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        base = models.build(a.model, device=a.device, dtype=dtype).eval()
        self.model: Any = apply_tuning(base, recipe.tuning, processor.family, recipe.training.seed)
        generator = torch.Generator(a.device).manual_seed(1)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if ".lora_B." in name:  # zeros otherwise, which leave A without gradients
                    parameter.normal_(0, 0.01, generator=generator)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.at_first = [parameter.detach().clone() for parameter in self.trained]
        self.prompts = encoded(processor, conversations(processor, a.setting, GROUPS))
        self.groups: dict[tuple[int, int], tuple[list[Sample], dict[Sample, About]]] = {}  # by place and the number of completions
        self.split = replace(a.setting, generations=8).group_tokens  # token budget: a pack takes 8 completions
        self.notes: list[str] = []

    # --- what is computed ---------------------------------------------------------------------------------------

    def packed(self, form: Form) -> PackedModel:
        def say(text: str) -> None:
            self.notes.append(text)
            sys.stderr.write(text + "\n")

        self.notes.clear()
        return PackedModel(self.model, gradient_checkpointing=form.policy, compile_layers=form.compiled, say=say).train()

    def step_of(self, form: Form, packed: PackedModel) -> Step:
        """The step of one group or several, on the device."""
        samples, about = [], {}
        for place in range(form.groups):
            of_group, known = self.group(place, form.generations)
            samples += of_group
            about |= known
        plan, feed = self.plan(samples, form), self.feed(form, packed)
        step = feed.build(plan)
        packs = [self.with_targets(pack, chosen, about) for pack, chosen in zip(step.packs, plan.plans, strict=True)]
        packs = [self.with_features(pack, packed) if form.kept_features else pack.to(packed.device) for pack in packs]
        return replace(step, packs=packs, plan=plan)

    def group(self, place: int, generations: int) -> tuple[list[Sample], dict[Sample, About]]:
        """A prompt's completions and what is known of them, made once.

        Old log-probabilities are those of the model as it is at first, moved by noise, so that ratios differ from 1.
        """
        if (place, generations) not in self.groups:
            seed = generations + 100 * place
            samples = completions(replace(self.a.setting, generations=generations), self.prompts[place], seed=seed)
            random = np.random.default_rng(seed)
            advantages = random.standard_normal(generations)
            advantages = (advantages - advantages.mean()) / advantages.std()
            logprobs = self.scored(samples, Form(True, "none", False, self.split, generations))
            about = {
                sample: About(float(advantage), (own + random.normal(0, 0.1, len(own))).astype(np.float32))
                for sample, advantage, own in zip(samples, advantages, logprobs, strict=True)
            }
            self.groups[place, generations] = samples, about
        return self.groups[place, generations]

    def scored(self, samples: Sequence[Sample], form: Form) -> list[np.ndarray]:
        """Log-probabilities of each completion's tokens, without gradients."""
        packed = self.packed(form)
        feed = self.feed(form, packed)
        found: dict[Sample, np.ndarray] = {}
        with answering(packed):
            for plan in self.plan(samples, form).plans:
                pack = replace(feed.build_pack(plan), scoring=self.scoring())
                records = packed(pack.to(packed.device)).float().cpu().numpy()
                found.update(zip(plan.samples, by_completion(pack, records), strict=True))
        return [found[sample] for sample in samples]

    def plan(self, samples: Sequence[Sample], form: Form) -> StepPlan:
        plans, deal = plan_packs(samples, token_budget=form.token_budget, share=form.shared)
        return StepPlan(tuple(plans), deal, 0, 0, form.token_budget)

    def feed(self, form: Form, packed: PackedModel) -> Feed:
        return Feed(
            self.prompts,
            self.processor,
            train_batch_size=1,
            token_budget=form.token_budget,
            tower=packed.tower_shape,
            steady_tokens=STEADY_TOKENS if form.compiled else None,
            patch_dtype=patch_dtype(packed.base.model.visual),
        )

    def scoring(self, *, entropies: bool = False) -> Scoring:
        """As of a run: the sampler's temperature, tokens that are never drawn."""
        forbidden = torch.tensor(sorted((self.processor.image_token_id, self.processor.video_token_id)))
        return Scoring(1.0, forbidden, entropies)

    def with_targets(self, pack: PackedBatch, plan: PackPlan, about: dict[Sample, About]) -> PackedBatch:
        known = [about[sample] for sample in plan.samples]
        old = by_record(pack, [one.old_logprobs for one in known])
        table = CompletionTargets(
            torch.tensor([one.advantage for one in known], dtype=torch.float32), sampler_logprobs=old, old_logprobs=old
        )
        return replace(pack, scoring=self.scoring(entropies=True), about_targets=table)

    def with_features(self, pack: PackedBatch, packed: PackedModel) -> PackedBatch:
        """The pack on the device, its images' features computed beforehand."""
        with torch.no_grad():
            features = packed.visual_features(pack.to(packed.device))
        if features is None:
            raise ValueError("the pack has no images")
        kept = use_kept(pack, set(pack.item_keys), packed.tower_shape).to(packed.device)
        return replace(kept, stored=torch.stack([features.merged, *features.deepstack]))

    def gradients(self, packed: PackedModel, step: Step, optimizer: StepOptimizer | None = None) -> torch.Tensor:
        """Adds up the gradients of a step; returns its loss."""
        algorithm = self.algorithm(step)
        losses = []
        for pack in step.packs:
            loss = algorithm.loss(packed(pack), pack, step)
            loss.backward()
            losses.append(loss.detach())
            if optimizer is not None:
                optimizer.collect_gradients()
        return torch.stack(losses).sum()

    def algorithm(self, step: Step) -> GRPO:
        """Of the recipe, at the beginning of a step."""
        grpo, rollout = self.recipe.grpo, self.recipe.rollout
        if grpo is None or rollout is None:
            raise ValueError("the recipe is not of reinforcement")
        algorithm = GRPO(grpo, rollout.max_completion_length)
        algorithm.begin(step)
        return algorithm

    def optimizer(self) -> StepOptimizer:
        """A new one, and the adapters as they were at first: no form goes on from where another has trained them to."""
        with torch.no_grad():
            for parameter, value in zip(self.trained, self.at_first, strict=True):
                parameter.copy_(value)
        return StepOptimizer(self.model.named_parameters(), self.recipe.training, self.recipe.tuning.bf16_updates)

    def update(self, optimizer: StepOptimizer) -> None:
        """What follows the gradients of a step."""
        optimizer.clip_gradients(self.recipe.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    # --- what is measured ---------------------------------------------------------------------------------------

    def rows(self, *, compiled: bool, profile: bool) -> Iterator[Row]:
        """All rows, what takes least first; what fails is a row, and the others go on.

        With compiled layers the time of steps of several groups alone: one group does not keep a large GPU busy.
        """
        if compiled:
            for kept in (True, False):
                forms = [Form(shared, "selective", True, groups=GROUPS, kept_features=kept) for shared in (True, False)]
                yield from self._timed(forms, profile and kept)
            return
        yield self._part({"row": "grpo_compared"}, self.compared)
        yield from self._timed([Form(shared, "selective", False) for shared in (True, False)], profile)
        for budget in (self.split, ONE_PACK):
            for generations in SIZES:
                form = Form(True, "full", False, budget, generations)
                yield self._part({"row": "grpo_memory", **self._settings(form)}, partial(self.measured, form, warm=1, steps=1))

    def _timed(self, forms: Sequence[Form], profile: bool) -> Iterator[Row]:
        for form in forms:
            yield self._part({"row": "grpo_update", **self._settings(form)}, partial(self.measured, form, WARM, STEPS))
            if profile:
                yield self._part({"row": "grpo_profile", **self._settings(form)}, partial(self.profiled, form))

    def _settings(self, form: Form) -> Row:
        names = ("shared", "policy", "compiled", "token_budget", "generations", "groups", "kept_features")
        return {name: getattr(form, name) for name in names}

    def _part(self, row: Row, measure: Callable[[], Row]) -> Row:
        row = part({**self.common, **row}, measure, stop_at=self.a.stop_at, notes=self.notes)
        self.clear()
        return row

    def clear(self) -> None:
        """Lets go of gradients and of what nobody holds any more."""
        for parameter in self.trained:
            parameter.grad = None
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def compared(self) -> Row:
        """Loss and gradients of the shared form against the unshared one, nothing compiled."""
        losses, gradients = [], []
        for shared in (False, True):
            form = Form(shared, "selective", False)
            packed = self.packed(form)
            losses.append(float(self.gradients(packed, self.step_of(form, packed))))
            gradients.append([parameter.grad for parameter in self.trained])
            for parameter in self.trained:
                parameter.grad = None
        squares = [
            (float((a.float() - b.float()).square().sum()), float(a.float().square().sum())) for a, b in zip(*gradients, strict=True)
        ]
        apart, whole = (sum(column) for column in zip(*squares, strict=True))
        return {
            "loss_unshared": significant(losses[0], 6),
            "loss_shared": significant(losses[1], 6),
            "loss_apart": significant(abs(losses[1] - losses[0])),
            "gradient_norm": significant(whole**0.5),
            "gradients_apart": significant((apart / whole) ** 0.5, 3),
        }

    def measured(self, form: Form, warm: int, steps: int) -> Row:
        """Seconds of an update, and the memory that it takes beyond what is there."""
        packed = self.packed(form)
        step = self.step_of(form, packed)
        optimizer = self.optimizer()
        seconds, losses = [], []
        before = peak = 0
        for number in range(warm + steps):
            if number == warm and self.on_gpu:
                gc.collect()
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            loss = self.gradients(packed, step, optimizer)
            self.update(optimizer)
            losses.append(float(loss))  # waits for the device, as the loop does
            seconds.append(time.perf_counter() - begun)
        if self.on_gpu:
            peak = torch.cuda.max_memory_allocated()
        config, width = packed.base.config.text_config, packed.compute_dtype.itemsize
        return {
            "packs": len(step.packs),
            "tokens": sum(pack.num_tokens for pack in step.plan.plans),
            "largest_pack_tokens": max(pack.num_tokens for pack in step.plan.plans),
            "targets": step.num_targets,
            "steps": steps,
            "step_s": significant(statistics.median(seconds[warm:])),
            "first_step_s": significant(seconds[0]),
            "losses": [significant(value, 6) for value in losses],
            "own_share_gib": round(
                own_share_bytes(config, form.groups * form.generations * self.a.setting.completion_tokens, width) / GIB, 4
            ),
            **({"before_gib": round(before / GIB, 4), "activations_gib": round((peak - before) / GIB, 4)} if self.on_gpu else {}),
        }

    def profiled(self, form: Form) -> Row:
        """Seconds of the parts of an update, and the kernels of one."""
        packed = self.packed(form)
        step, optimizer = self.step_of(form, packed), self.optimizer()

        def whole() -> None:
            self.gradients(packed, step, optimizer)
            self.update(optimizer)

        whole()  # compiles what is not yet compiled
        parts = [self.parts(packed, step, optimizer) for _ in range(STEPS)]
        medians = {name: significant(statistics.median(part[name] for part in parts)) for name in parts[0]}
        return {"parts_s": medians, **profiled(whole, self.a.device, KERNELS)}

    def parts(self, packed: PackedModel, step: Step, optimizer: StepOptimizer) -> dict[str, float]:
        """Seconds of each part of an update, over all its packs; the device is waited for after each. The tower is part of `forward` too."""
        algorithm, seconds = self.algorithm(step), dict.fromkeys(PARTS, 0.0)
        if self.on_gpu:
            torch.cuda.synchronize()
        last = time.perf_counter()

        def note(name: str) -> None:
            nonlocal last
            if self.on_gpu:
                torch.cuda.synchronize()
            now = time.perf_counter()
            seconds[name] += now - last
            last = now

        for pack in step.packs:
            packed.visual_features(pack)
            note("tower")
            states = packed.target_states(pack)
            note("forward")
            leaf = states.detach().requires_grad_()
            scores = packed.score(leaf, pack)
            note("scoring")
            algorithm.loss(scores, pack, step).backward()
            note("loss and its gradient")
            states.backward(leaf.grad)
            note("backward")
            optimizer.collect_gradients()
            note("collecting gradients")
        self.update(optimizer)
        note("clipping and update")
        return seconds


def recipe_of(checkpoint: Path, setting: GroupSetting) -> Recipe:
    """The recipe whose updates are measured."""
    return load_recipe(
        None,
        [
            f"model.name_or_path={checkpoint}",
            f"grpo.num_generations={setting.generations}",
            f"rollout.max_completion_length={setting.completion_tokens}",
            "rewards=[bench.group_prompts:first_token_is_even]",
        ],
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-vl-4b", choices=models.NAMES)
    parser.add_argument(
        "--compile", action="store_true", help="the time of steps of several groups, with compiled layers, in place of the rest"
    )
    parser.add_argument("--profile", action="store_true", help="for each form, too, where a step spends its time")
    parser.add_argument("--bpe", type=Path, help="the file qwen.tiktoken")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--time-limit", type=float, default=100, help="seconds after which no further part begins")
    parser.add_argument("--tiny", action="store_true", help="only try it: the tiny model of the family")
    a = parser.parse_args(arguments)
    a.stop_at = time.monotonic() + a.time_limit
    a.setting = TINY_GROUP if a.tiny else GroupSetting()
    a.model = models.tiny_of(a.model) if a.tiny else a.model
    common: Row = {
        "model": a.model, "visual_tokens": a.setting.visual_tokens, "text_tokens": a.setting.text_tokens,
        "completion_tokens": a.setting.completion_tokens, "precision": "bf16" if a.device == "cuda" else "float32",
    }  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix="finesight-bench-") as folder:
            if a.device == "cuda":
                keep_compiled_code()
            recipe = recipe_of(write_processor(a.model, folder, a.bpe), a.setting)
            bench = UpdateBench(a, load_processor(folder, data=recipe.data), recipe, common)
            for row in bench.rows(compiled=a.compile, profile=a.profile):
                emit(row)
    except Exception as error:
        emit(failed({**common, "row": "grpo_compared"}, error))


if __name__ == "__main__":
    main()
