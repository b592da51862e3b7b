"""What `finesight plan` does: plans a recipe for a GPU that may not be here, and searches for settings that fit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from rich.console import Console

from finesight.errors import ModelError, RecipeError
from finesight.planner.activations import Execution
from finesight.planner.catalogue import find_shape
from finesight.planner.fit import Change, Situation, as_stored, choose_policy, fit, gpus_that_fit, levers, with_settings
from finesight.planner.gpus import Gpu, find_gpu, is_name_of, parse_memory
from finesight.planner.moments import MemoryPlan
from finesight.planner.shapes import ModelShape
from finesight.planner.sizes import ANSWER_TOKENS, PROMPT_TEXT_TOKENS, RunSizes, filled_run, sampled_with, visual_tokens_of
from finesight.planner.speed import REFERENCE
from finesight.planner.weights import precision_on
from finesight.recipe import Recipe
from finesight.recipe_files import dump_recipe

# Of an image, where a recipe names neither data nor a limit.
DEFAULT_PIXELS = 1024 * 1024
LEVERS_SHOWN = 6


@dataclass(frozen=True)
class Target:
    """The GPU that is planned for; without any the plan says only what is needed."""

    gpu: Gpu = REFERENCE
    available_bytes: int | None = None
    label: str = ""  # the card, for people; says so where another name was asked for

    @staticmethod
    def of(memory: str | None, name: str | None) -> Target:
        """From the options `--gpu` and `--gpu-name`; given both, it is a card of that name with that memory, and the label says so.

        Raises:
            RecipeError: the amount or the name cannot be read.
        """
        if name is None:
            return Target() if memory is None else Target(available_bytes=parse_memory(memory))
        gpu = find_gpu(name)
        label = gpu.name if is_name_of(gpu, name) else f"{gpu.name}, taken for {name!r}, which is not known"
        if memory is None:
            return Target(gpu, gpu.available_bytes, label)
        return Target(gpu, parse_memory(memory), f"{label} (--gpu; the card itself has {gpu.memory_gib:g} GiB)")


@dataclass(frozen=True)
class Outcome:
    """A plan, what would change it, and with `--fit` the settings found.

    Attributes:
        more_gpus: on so many of them it would fit if they shared the model; None: it fits as it is, or on none.
    """

    plan: MemoryPlan
    target: Target
    changes: list[Change]
    fitted: Change | None = None
    more_gpus: int | None = None


def plan_recipe(
    recipe: Recipe,
    target: Target,
    *,
    tokens: int | None = None,
    pixels: int | None = None,
    search: bool = False,
    gpus: int = 1,
    console: Console | None = None,
) -> Outcome:
    """Plans a recipe.

    Args:
        tokens: of the largest pack, and
        pixels: of each image, in place of what the data say; where either is given, or the recipe names no data, none are read.
        search: look for the fastest settings that fit; `tokens` is then the token budget, which the search keeps.
        gpus: that train together; the plan is that of each.

    Raises:
        RecipeError: a search is asked for without a GPU, or sharding with a single one.
        FinesightError: the model's dimensions are not known, or the data cannot be read.
    """
    if search and target.available_bytes is None:
        raise RecipeError("--fit needs a GPU to fit: give --gpu 16GiB or --gpu-name 'RTX 4090'.")
    if recipe.training.sharding == "full" and gpus == 1:
        raise RecipeError("training.sharding: full divides the model over several GPUs: give their number, as in --gpus 2.")
    model = find_shape(recipe.model.name_or_path, recipe.model.revision)
    model, recipe = as_stored(model, recipe)
    given: dict[str, int] = {}
    if search and tokens is not None and tokens != recipe.training.token_budget:
        given = {"training.token_budget": tokens}
        recipe = with_settings(recipe, given)
    if recipe.data.train and tokens is None and pixels is None:
        sizes, longest, largest_image = _from_data(recipe, console, gpus)
    else:
        sizes, longest, largest_image = _from_pixels(model, recipe, tokens, pixels, gpus)
    situation = Situation(
        model=model,
        sizes_of=sizes,
        gpu=target.gpu,
        available_bytes=target.available_bytes or 0,
        execution=Execution.here(compiled=recipe.training.torch_compile is not False and target.gpu.compiles),
        precision=precision_on(recipe, target.gpu.capability),
        processes=gpus,
        longest_sample=longest,
        pixels=largest_image,
        keeps_budget=tokens is not None,
    )
    if target.available_bytes is None and recipe.training.gradient_checkpointing == "auto":
        plan = situation.plan(recipe, "full")
    else:
        plan = choose_policy(situation, recipe)
    fitted = _fitted(situation, recipe, given) if search else None
    too_large = target.available_bytes is not None and not plan.fits(target.available_bytes)
    return Outcome(plan, target, levers(situation, plan)[:LEVERS_SHOWN], fitted, gpus_that_fit(situation, recipe) if too_large else None)


def _fitted(situation: Situation, recipe: Recipe, given: dict[str, int]) -> Change:
    """The settings found, after those that the command itself was `given`."""
    found = fit(situation, recipe)
    if found is None:
        tried = "activation policy, quantisation or pixels"
        tried = f"{tried} (--tokens keeps the token budget)" if situation.keeps_budget else f"token budget, {tried}"
        raise RecipeError(
            f"No change of {tried} makes {situation.model.name} fit {situation.available_bytes / 2**30:.1f} GiB. "
            "Take a smaller model, or a larger GPU."
        )
    return replace(found, settings=(*given.items(), *found.settings))


def _from_data(recipe: Recipe, console: Console | None, gpus: int) -> tuple[Callable[[Recipe], RunSizes], int, int | None]:
    from finesight.training.prepare import prepare
    from finesight.training.run_sizes import DataSizes

    try:
        sizes = DataSizes(prepare(recipe, console=console), gpus)
    except ModelError as error:
        raise ModelError(
            f"{str(error).rstrip('.')}. The data's sizes in tokens need the checkpoint's tokenizer; "
            "--pixels 1000000 (and --tokens) plans without data or network."
        ) from None
    images = [item for sample in sizes.prepared.samples for item in sample.visual_items if item.kind == "image"]
    return sizes, sizes.longest_sample, max((item.resized_height * item.resized_width for item in images), default=None)


def _from_pixels(
    model: ModelShape, recipe: Recipe, tokens: int | None, pixels: int | None, gpus: int
) -> tuple[Callable[[Recipe], RunSizes], int, int | None]:
    size = pixels or recipe.data.max_pixels or DEFAULT_PIXELS

    @cache
    def of(budget: int, image: int) -> RunSizes:
        if recipe.grpo is None:
            return filled_run(model, budget, image, -(-recipe.training.train_batch_size // gpus))
        from finesight.training.run_sizes import filled_groups

        return filled_groups(model, recipe, budget, image, gpus)

    def sizes(changed: Recipe) -> RunSizes:
        image = size if changed.data.max_pixels is None else min(size, changed.data.max_pixels)
        budget = changed.training.token_budget
        found = of(tokens if tokens is not None and budget == recipe.training.token_budget else budget, image)
        return replace(found, rollout=sampled_with(found.rollout, changed))

    longest = visual_tokens_of(model, size) + PROMPT_TEXT_TOKENS
    longest += ANSWER_TOKENS if recipe.rollout is None else recipe.rollout.max_completion_length
    return sizes, longest, size


def write_fitted(path: Path, change: Change, origin: str) -> None:
    """Writes the recipe that fits.

    Raises:
        RecipeError: there is such a file, or it cannot be written.
    """
    if path.exists():
        raise RecipeError(f"{path} exists and is not overwritten; name another file for --write.")
    chosen = ", as auto chooses with that memory" if change.recipe.training.gradient_checkpointing == "auto" else ""
    peak = f"{change.plan.peak_bytes / 2**30:.2f} GiB"
    header = f"# {origin}, fitted: {change}\n# Planned peak: {peak}, activations: {change.plan.policy}{chosen}.\n"
    try:
        path.write_text(header + dump_recipe(change.recipe), encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {error.strerror}. Name another file for --write.") from None
