"""The search for settings that fit: the activation policy, and with `--fit` token budget, quantisation and pixels.

A candidate costs the predicted time of the run, made longer by what it may cost besides (:data:`FURTHER_COST`): a setting
that changes no result is taken before one that does unless it is that much slower.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finesight.errors import RecipeError
from finesight.planner.activations import Execution
from finesight.planner.calibration import GIB
from finesight.planner.gpus import Gpu
from finesight.planner.moments import MemoryPlan, Policy
from finesight.planner.plan import plan_memory, policy_of
from finesight.planner.shapes import ModelShape
from finesight.planner.sizes import RolloutSizes, RunSizes
from finesight.planner.speed import run_seconds
from finesight.planner.weights import Precision
from finesight.recipe import Recipe
from finesight.recipe_files import parse_recipe

POLICIES: tuple[Policy, ...] = ("none", "selective", "full", "offload")
BUDGETS = (1024, 2048, 4096, 8192, 12288, 16384)
# What a setting may cost in quality, or in time that is not predicted, as a share of the run's time that it must save to be worth it.
# Our judgement, not a measurement.
FURTHER_COST: dict[str, float] = {
    "training.sharding": 0.1,  # weights travel between GPUs twice a pack
    "model.load_in_fp8": 0.02,
    "model.load_in_8bit": 0.02,
    "model.load_in_4bit": 0.06,
    "model.quantize_vocabulary": 0.02,
    "model.quantize_tower": 0.02,
    "training.optim": 0.01,
    "tuning.bf16_updates": 0.03,
    "data.max_pixels": 0.5,  # for each halving
    "rollout.batch_size": 0.02,  # for each halving: sampling takes longer
}
GPU_COUNTS = (2, 4, 8)  # of one machine
FEWEST_PIXELS = 128 * 28 * 28
# Of the peak, and what figures in GiB still show: a change that saves less is not worth a line.
LEAST_SAVING, LEAST_SAVING_BYTES = 0.01, 0.01 * GIB


@dataclass(frozen=True)
class Situation:
    """What a plan is made for, apart from the recipe.

    Attributes:
        sizes_of: the packs that a recipe gives; asked again where the token budget or the pixel limit changes.
        processes: GPUs that train together.
        longest_sample: tokens; no smaller budget is tried.
        pixels: of the largest image where the recipe sets no limit; None: pixels are not searched.
        keeps_budget: the search leaves the recipe's token budget as it is.
    """

    model: ModelShape
    sizes_of: Callable[[Recipe], RunSizes]
    gpu: Gpu
    available_bytes: int
    execution: Execution = field(default_factory=Execution)
    precision: Precision = "bfloat16"
    processes: int = 1
    longest_sample: int = 1
    pixels: int | None = None
    keeps_budget: bool = False
    rollout: RolloutSizes | None = None

    def plan(self, recipe: Recipe, policy: Policy | None = None) -> MemoryPlan:
        return plan_memory(
            self.model,
            recipe,
            self.sizes_of(recipe),
            policy=policy,
            execution=self.execution,
            precision=self.precision,
            processes=self.processes,
            rollout=self.rollout,
        )

    def seconds_a_sample(self, plan: MemoryPlan) -> float:
        """Predicted time of a sample: packs of different budgets hold different numbers of them."""
        samples = sum(pack.samples for pack in plan.sizes.packs) / len(plan.sizes.steps)
        return run_seconds(self.model, plan.recipe, plan.sizes, plan.policy, self.gpu, self.execution) / max(samples, 1)


@dataclass(frozen=True)
class Change:
    """A recipe that differs from the one asked about.

    Attributes:
        settings: by dotted name.
        cost: seconds a sample, with the share for what is not predicted.
    """

    settings: tuple[tuple[str, Any], ...]
    recipe: Recipe
    plan: MemoryPlan
    cost: float

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.settings)

    def __str__(self) -> str:
        return _text(self.settings) or "as it is"


def _text(settings: Iterable[tuple[str, Any]]) -> str:
    """Settings as a command is given them."""
    return " ".join(f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in settings)


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with some settings changed, checked anew.

    Raises:
        RecipeError: they contradict others.
    """
    content = recipe.model_dump(exclude_unset=True)
    for name, value in settings.items():
        section, key = name.split(".")
        content.setdefault(section, {})[key] = value
    return parse_recipe(content, origin="with " + _text(settings.items()))


def as_stored(model: ModelShape, recipe: Recipe) -> tuple[ModelShape, Recipe]:
    """The recipe with the bits that a checkpoint's weights are stored in already.

    bitsandbytes leaves fused experts as they are; only a recipe that asks for 4 bits has them quantised after loading.
    """
    if model.stored == "none" or recipe.model.quantization != "none":
        return model, recipe
    return replace(model, plain_experts=True), with_settings(recipe, {f"model.load_in_{model.stored}": True})


def choose_policy(situation: Situation, recipe: Recipe) -> MemoryPlan:
    """The plan under the policy that the recipe names, or under the fastest one that fits.

    Where none fits, under the one that needs least. The choice depends on its arguments alone: processes that are given
    the same choose the same.
    """
    named = policy_of(recipe)
    if named is not None:
        return situation.plan(recipe, named)
    plans = [situation.plan(recipe, policy) for policy in POLICIES]
    fitting = [plan for plan in plans if plan.fits(situation.available_bytes)]
    if fitting:
        return min(fitting, key=lambda plan: (situation.seconds_a_sample(plan), POLICIES.index(plan.policy)))
    return min(plans, key=lambda plan: (plan.peak_bytes, POLICIES.index(plan.policy)))


def fit(situation: Situation, recipe: Recipe) -> Change | None:
    """The cheapest change under which the recipe fits; pixels are lowered only where nothing else helps. None: nothing does."""
    for pixels in _pixel_steps(situation, recipe):
        fitting = [change for change in _changes(situation, recipe, pixels) if change.plan.fits(situation.available_bytes)]
        if fitting:
            # Fewer bits change what is trained over: they are proposed where nothing else fits.
            same = [change for change in fitting if not any(name.startswith("model.") for name in change.names)]
            return min(same or fitting, key=lambda change: (change.cost, len(change.settings), str(change)))
    return None


def remedies(situation: Situation, recipe: Recipe, count: int = 3) -> list[Change]:
    """The cheapest ways to make a recipe fit, no two of them of the same settings.

    Those from which no setting could be left out go first.
    """
    best: dict[frozenset[str], Change] = {}
    for pixels in _pixel_steps(situation, recipe):
        for change in _changes(situation, recipe, pixels):
            if not change.plan.fits(situation.available_bytes) or not change.settings:
                continue
            known = best.get(change.names)
            if known is None or (change.cost, str(change)) < (known.cost, str(known)):
                best[change.names] = change
        if len(best) >= count:
            break

    def order(change: Change) -> tuple[bool, float, str]:
        return any(other < change.names for other in best), change.cost, str(change)

    return sorted(best.values(), key=order)[:count]


def levers(situation: Situation, plan: MemoryPlan) -> list[Change]:
    """What each setting alone would change, the largest saving first; without those that save next to nothing.

    A change of several settings of which some already save as much is left out too.
    """
    recipe = plan.recipe
    options = _options(situation, recipe)
    singles: list[dict[str, Any]] = [{"training.gradient_checkpointing": policy} for policy in POLICIES if policy != plan.policy]
    smaller = [budget for budget in BUDGETS if situation.longest_sample <= budget < recipe.training.token_budget]
    singles += [{"training.token_budget": smaller[-1]}] if smaller else []
    singles += [settings for settings in options if settings]
    singles += [{"rollout.batch_size": batch} for batch in _smaller_rollouts(situation, recipe)[:1]]
    if situation.pixels:
        singles.append({"data.max_pixels": (recipe.data.max_pixels or situation.pixels) // 2})
    changes = [change for settings in singles if (change := _change(situation, recipe, settings, plan.policy))]
    least = max(LEAST_SAVING * plan.peak_bytes, LEAST_SAVING_BYTES)
    worth: list[Change] = []
    for change in sorted(changes, key=lambda change: len(change.settings)):
        parts = [known.plan.peak_bytes for known in worth if set(known.settings) < set(change.settings)]
        if change.plan.peak_bytes + least <= min(parts, default=plan.peak_bytes):
            worth.append(change)
    return sorted(worth, key=lambda change: change.plan.peak_bytes)


def _change(situation: Situation, recipe: Recipe, settings: Mapping[str, Any], policy: Policy | None = None) -> Change | None:
    """A change with its plan, under `policy` where the recipe leaves it open; None: its settings contradict the recipe's others."""
    changed = _allowed(recipe, settings)
    if changed is None:
        return None
    plan = choose_policy(situation, changed) if policy is None or policy_of(changed) is not None else situation.plan(changed, policy)
    further = sum(FURTHER_COST.get(name, 0) for name, value in settings.items() if value and name != "rollout.batch_size")
    if recipe.rollout is not None and changed.rollout is not None:
        further += FURTHER_COST["rollout.batch_size"] * math.log2(recipe.rollout.batch_size / changed.rollout.batch_size)
    return Change(tuple(settings.items()), changed, plan, situation.seconds_a_sample(plan) * (1 + further))


def _changes(situation: Situation, recipe: Recipe, pixels: int | None) -> Iterator[Change]:
    """All candidates at one pixel limit."""
    tried = () if situation.keeps_budget else BUDGETS
    budgets = sorted({b for b in tried if b >= situation.longest_sample} | {recipe.training.token_budget})
    named = policy_of(recipe)
    limit = {} if pixels is None else {"data.max_pixels": pixels}
    rollouts: list[dict[str, Any]] = [{}, *({"rollout.batch_size": batch} for batch in _smaller_rollouts(situation, recipe))]
    for options, budget, rollout in itertools.product(_options(situation, recipe), budgets, rollouts):
        settings = {**options, **({} if budget == recipe.training.token_budget else {"training.token_budget": budget}), **rollout, **limit}
        policies: list[dict[str, Any]] = [{}]  # auto chooses anew
        if named is not None:
            policies += [{"training.gradient_checkpointing": policy} for policy in POLICIES if policy != named]
        for chosen in policies:
            change = _change(situation, recipe, {**settings, **chosen})
            if change is not None:
                yield change


def _options(situation: Situation, recipe: Recipe) -> list[dict[str, Any]]:
    """Changes of precision and optimizer that suit the recipe and the card; the first is none at all."""
    options: list[dict[str, Any]] = [{}]
    if recipe.training.sharding == "full":  # which goes with none of the others
        return options
    if situation.processes > 1 and (change := _sharded(recipe)) is not None:
        options.append(change)
    if recipe.tuning.method == "lora":
        options += _quantisations(situation, recipe)
        return options
    if recipe.training.optim == "adamw":
        options.append({"training.optim": "adamw_8bit"})
        options.append({"training.optim": "paged_adamw_8bit"})
    if recipe.tuning.bf16_updates == "float32_masters" and situation.precision == "bfloat16":
        rounding = {"tuning.bf16_updates": "stochastic_rounding"}
        options += [{**option, **rounding} for option in list(options) if "training.sharding" not in option]
    return options


def _sharded(recipe: Recipe) -> dict[str, Any] | None:
    """The setting under which GPUs share the model; None where something in the recipe forbids it."""
    change = {"training.sharding": "full"}
    return None if _allowed(recipe, change) is None else change


def _allowed(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe | None:
    """The recipe with some settings changed; None: they contradict others."""
    try:
        return with_settings(recipe, settings)
    except RecipeError:
        return None


def gpus_that_fit(situation: Situation, recipe: Recipe) -> int | None:
    """On how many such GPUs a recipe would fit if they shared the model; None: on none of :data:`GPU_COUNTS`.

    Packs are taken to stay as large as they are.
    """
    change = _sharded(recipe)
    if change is None:
        return None
    sharded = with_settings(recipe, change)
    for count in GPU_COUNTS:
        there = replace(situation, processes=count)
        if count >= situation.processes and choose_policy(there, sharded).fits(situation.available_bytes):
            return count
    return None


def _quantisations(situation: Situation, recipe: Recipe) -> list[dict[str, Any]]:
    """Smaller forms of the base than the recipe's, each alone and with vocabulary and tower."""
    sizes: Sequence[str] = ("none", "fp8", "8bit", "4bit")
    present = recipe.model.quantization
    further = [name for name in ("quantize_vocabulary", "quantize_tower") if not getattr(recipe.model, name)]
    tower_trains = recipe.tuning.finetune_vision_layers or recipe.tuning.finetune_merger
    found: list[dict[str, Any]] = []
    for form in sizes[sizes.index(present) :]:
        if form == "none" or (form == "fp8" and not situation.gpu.has_float8):
            continue
        base: dict[str, Any] = {} if form == present else {f"model.load_in_{form}": True}
        if base and present != "none":
            base = {f"model.load_in_{present}": False, **base}
        if base:
            found.append(base)
        extra = [name for name in further if not (name == "quantize_tower" and (tower_trains or form == "fp8"))]
        if extra:
            found.append({**base, **{f"model.{name}": True for name in extra}})
    return found


def _smaller_rollouts(situation: Situation, recipe: Recipe) -> list[int]:
    """Completions of half the prompts that are sampled at once, and so on down to one; none where the model in training samples none."""
    sampled = situation.sizes_of(recipe).rollout
    found: list[int] = []
    groups = 1 if sampled is None else sampled.groups
    while sampled is not None and groups > 1:
        groups //= 2
        found.append(groups * sampled.completions)
    return found


def _pixel_steps(situation: Situation, recipe: Recipe) -> Iterator[int | None]:
    """None for the recipe's own limit, then halves of it."""
    yield None
    pixels = recipe.data.max_pixels or situation.pixels
    while pixels is not None and situation.pixels is not None and pixels // 2 >= FEWEST_PIXELS:
        pixels //= 2
        yield pixels


def corrected(plan: MemoryPlan, measured_peak_bytes: int) -> MemoryPlan:
    """The plan with the difference that a probe measured."""
    return replace(plan, correction_bytes=measured_peak_bytes - plan.peak.total)
