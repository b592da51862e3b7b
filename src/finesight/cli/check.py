"""What `finesight check` does: reads and encodes every row as training would, and reports instead of stopping."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

from rich.console import Console

from finesight.data.audit import DatasetAudit, audit
from finesight.data.audit_settings import AuditSettings
from finesight.data.conversation import Conversation, MediaRef
from finesight.data.encode import recipe_encoder
from finesight.data.formats import ReadResult, read_source
from finesight.data.media import open_image
from finesight.data.processor import Processor, load_processor
from finesight.data.sample import Sample
from finesight.data.split import held_out_source, hold_out, is_share
from finesight.errors import BadRow, MediaError, RecipeError
from finesight.models.adapter_metadata import restore_data_settings
from finesight.recipe import Recipe
from finesight.recipe_files import load_recipe
from finesight.tasks.frames import frames_of
from finesight.tasks.graders import check_graders
from finesight.tasks.reward_types import Reward, RewardCall
from finesight.tasks.rewards import RewardSet, check_rewards, load_rewards
from finesight.training.prepare import data_seed, encode_all
from finesight.training.telemetry import progress

_NO_MODEL = "(none)"
_TRIED_TEXT = "A short answer."  # the completion that functions are tried with


def target_recipe(target: str, model: str | None, overrides: Sequence[str]) -> tuple[Recipe, bool]:
    """The recipe to check, and whether it names a model: `target` is a recipe, or the path or hub name of data alone.

    Raises:
        RecipeError: the recipe cannot be read, or an override does not fit.
    """
    if Path(target).suffix.lower() in (".yaml", ".yml"):
        given = [] if model is None else [f"model.name_or_path={json.dumps(model)}"]
        return load_recipe(target, [*given, *overrides]), True
    settings = [f"model.name_or_path={json.dumps(model or _NO_MODEL)}", f"data.train=[{{path: {json.dumps(target, ensure_ascii=False)}}}]"]
    recipe = load_recipe(None, [*settings, *overrides])
    return recipe, recipe.model.name_or_path != _NO_MODEL


def check_recipe(recipe: Recipe, *, with_model: bool, console: Console, base_dir: Path | None = None) -> DatasetAudit:
    """Looks through the data of a recipe. Bad rows are figures here, not errors.

    Args:
        with_model: encode the rows for the recipe's model, for figures in tokens.
        console: for progress and notes.

    Raises:
        DataError: a source as a whole cannot be read, or the rows cannot be divided as `data.eval_split` says.
        ModelError: the processor cannot be read.
        EvaluationError: a grader of `evaluation.tasks` or a reward is unknown, or does not fit the rows, as in training.
    """
    base_dir = base_dir or Path.cwd()
    load_rewards(recipe.rewards, base_dir=base_dir)  # what is misnamed is told before any row is read
    check_graders(recipe.evaluation.tasks, base_dir=base_dir)
    if with_model and recipe.model.adapter is not None:  # its pixel limits are kept, as in training
        recipe = recipe.model_copy(update={"data": restore_data_settings(recipe.model.adapter, recipe.data)[0]})
    if not recipe.data.train:
        raise RecipeError("The recipe names no rows: set data.train to a file, a folder or a hub name.")
    answers = recipe.grpo is None  # prompts will do for reinforcement
    sources = [read_source(source, data=recipe.data, base_dir=base_dir, require_answer=answers) for source in recipe.data.train]
    held_out_setting = held_out_source(recipe.data)
    held_out_results = (
        [] if held_out_setting is None else [read_source(held_out_setting, data=recipe.data, base_dir=base_dir, require_answer=answers)]
    )
    for note in [note for result in (*sources, *held_out_results) for note in result.notes]:
        console.print(f"Note: {note}", markup=False, highlight=False)
    train, held_out, bad_rows = (
        _joined(sources),
        _joined(held_out_results),
        [row for r in (*sources, *held_out_results) for row in r.bad_rows],
    )
    damaged = _damaged_images([*train, *held_out], console)
    if damaged:
        bad_rows += damaged.values()
        train, held_out = ([c for c in side if id(c) not in damaged] for side in (train, held_out))
    samples: dict[int, Sample] | None = None
    processor: Processor | None = None
    if with_model and (train or held_out):
        processor = load_processor(recipe.model.name_or_path, data=recipe.data, hub=recipe.model.hub, revision=recipe.model.revision)
        samples, failed = _encode(recipe, processor, [*train, *held_out], console)
        bad_rows += failed
        train, held_out = ([c for c in side if id(c) in samples] for side in (train, held_out))
    if train or held_out:
        frames = None if processor is None else frames_of(processor)
        rewards = load_rewards(recipe.rewards, base_dir=base_dir, frames=frames)
        check_rewards(rewards, [*train, *held_out])
        _try_functions(rewards, (train or held_out)[0], console)
    eval_split = recipe.data.eval_split
    if train and eval_split is not None and is_share(eval_split):
        train, held_out = hold_out(train, eval_split, data_seed(recipe))
    return audit(
        train,
        None if samples is None else [samples[id(c)] for c in train],
        bad_rows,
        AuditSettings.of(recipe),
        held_out=held_out,
        formats={result.file: result.format for result in (*sources, *held_out_results)},
    )


def _try_functions(rewards: Sequence[Reward], row: Conversation, console: Console) -> None:
    """Calls each function of the user once, as training does, and warns of those that fail: another completion may be judged well."""
    call = RewardCall((row,), texts=(_TRIED_TEXT,), completion_ids=((0, 1, 2),), group=(0,))
    functions = [reward for reward in rewards if reward.function is not None]
    with redirect_stdout(sys.stderr):  # what a function prints is no part of the result
        failures = RewardSet(functions).earned(call).failures
    for failure in failures:
        console.print(
            f"WARNING: the reward {failure.reward} fails for the completion {_TRIED_TEXT!r} of {failure.source}: {failure.message}. "
            "If it does so in training, that completion does not get it.",
            style="bold red", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


def _joined(results: Sequence[ReadResult]) -> list[Conversation]:
    return [conversation for result in results for conversation in result.conversations]


def _damaged_images(conversations: Sequence[Conversation], console: Console) -> dict[int, BadRow]:
    """Rows with an image that cannot be decoded, by the identity of their conversation. Each image is opened once.

    Encoding reads headers alone; a file that is cut short would come to light only when training opens it.
    """
    references = list(
        dict.fromkeys(part.media for c in conversations for part in c.media if part.type == "image" and part.media is not None)
    )
    reasons: dict[MediaRef, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress(console, "Opening images", len(references)) as advance:
        for reference, reason in zip(references, pool.map(_damage, references), strict=True):
            advance(1)
            if reason is not None:
                reasons[reference] = reason
    damaged: dict[int, BadRow] = {}
    for c in conversations:
        found = next((reasons[part.media] for part in c.media if part.media in reasons), None)
        if found is not None:
            damaged[id(c)] = BadRow(c.source.file, c.source.row, found)
    return damaged


def _damage(reference: MediaRef) -> str | None:
    try:
        open_image(reference)
    except MediaError as error:
        return str(error)
    return None


def _encode(
    recipe: Recipe, processor: Processor, conversations: Sequence[Conversation], console: Console
) -> tuple[dict[int, Sample], list[BadRow]]:
    """Samples by the identity of their conversation, and the rows that cannot be encoded.

    Where too long a sample would stop the run it is encoded all the same, so that its length can be told.
    """
    refuses = recipe.data.too_long == "refuse"
    outcomes = encode_all(conversations, recipe_encoder(recipe, processor, any_length=refuses), console)
    samples = {id(c): outcome for c, outcome in zip(conversations, outcomes, strict=True) if isinstance(outcome, Sample)}
    return samples, [outcome for outcome in outcomes if isinstance(outcome, BadRow)]
