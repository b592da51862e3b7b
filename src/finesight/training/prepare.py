"""Everything before the first weight is read: rows, their encoding, the hold-out, and what the run will look like.

None of it needs torch, except to make tensors of it: :meth:`Prepared.feed` and :meth:`Prepared.held_out_feed`.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from finesight.data.audit_settings import group_run
from finesight.data.conversation import Conversation, MediaRef
from finesight.data.encode import Encoder, recipe_encoder
from finesight.data.formats import ReadResult, accept, read_source
from finesight.data.groups import GroupSchedule
from finesight.data.processor import Processor, load_processor
from finesight.data.sample import Sample
from finesight.data.split import held_out_source, hold_out, is_share
from finesight.data.steps import Schedule
from finesight.data_settings import DataSettings, SourceSettings
from finesight.errors import BadRow, DataError, RecipeError, TemplateError
from finesight.models.adapter_metadata import adapter_shape, restore_data_settings
from finesight.recipe import Recipe
from finesight.tasks.frames import frames_of
from finesight.tasks.graders import check_graders
from finesight.tasks.reward_types import Reward
from finesight.tasks.rewards import check_rewards, load_rewards
from finesight.training.telemetry import padding_saved, progress, sharing_ratio
from finesight.wording import counted

if TYPE_CHECKING:
    from finesight.data.feed import Feed

# From this many rows on, several processes encode.
PARALLEL_ROWS = 2000
MAX_ENCODING_PROCESSES = 8


@dataclass(frozen=True)
class Plan:
    """What a run will look like. Rates and means are over the steps looked at (all, or an even choice of them)."""

    num_samples: int
    num_held_out: int
    steps_per_epoch: int
    total_steps: int
    train_batch_size: int
    packs_per_step: float
    tokens_per_step: float  # computed
    targets_per_step: float  # supervised tokens
    padding_saved: float
    sharing_ratio: float
    num_generations: int | None = (
        None  # of reinforcement: samples are prompts, train_batch_size counts completions, tokens are the most there may be
    )

    def lines(self) -> list[str]:
        """The plan for people."""
        epochs = self.total_steps / self.steps_per_epoch
        held_out = f", {self.num_held_out:,} held out" if self.num_held_out else ""
        if self.num_generations is not None:
            groups = self.train_batch_size // self.num_generations
            return [
                f"{counted(self.num_samples, 'prompt')} to train on{held_out}",
                f"{counted(self.total_steps, 'step')} of {counted(self.train_batch_size, 'completion')}: {self.num_generations} for each of "
                f"{counted(groups, 'prompt')} ({counted(epochs, 'epoch')} of {counted(self.steps_per_epoch, 'step')})",
                f"a step: on average at most {counted(round(self.tokens_per_step), 'token')} computed in {counted(float(f'{self.packs_per_step:.3g}'), 'pack')}; "
                f"sharing ratio: {self.sharing_ratio:.2f} (tokens of the completions with their prompts over tokens computed)",
            ]
        return [
            f"{counted(self.num_samples, 'sample')} to train on{held_out}",
            f"{counted(self.total_steps, 'step')} of {counted(self.train_batch_size, 'sample')} ({counted(epochs, 'epoch')} of "
            f"{counted(self.steps_per_epoch, 'step')}): what other trainers call batch size × accumulation = {self.train_batch_size}",
            f"a step: {counted(round(self.tokens_per_step), 'token')} computed in {counted(float(f'{self.packs_per_step:.3g}'), 'pack')}, "
            f"{self.targets_per_step:,.0f} supervised",
            f"padding saved: {self.padding_saved:.0%}; sharing ratio: {self.sharing_ratio:.2f} (tokens of the samples over tokens computed)",
        ]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run up to, but without, its weights."""

    recipe: Recipe  # with what an adapter to go on from restores (pixel limits, frame sampling)
    processor: Processor
    samples: list[Sample]  # to train on
    conversations: list[Conversation]  # of the samples, in the same order
    held_out: list[Sample]
    held_out_conversations: list[Conversation]
    bad_rows: tuple[BadRow, ...]  # passed over
    formats: tuple[tuple[str, str], ...]  # of each source: its name and format
    notes: tuple[str, ...]  # what a user should know
    rewards: tuple[Reward, ...] = ()  # of reinforcement, whose samples are prompts

    def feed(self, **arguments: int | bool | object) -> Feed:
        """The feed of the samples to train on; arguments beyond the recipe's go to :class:`Feed`."""
        from finesight.data.feed import Feed

        return Feed(self.samples, self.processor, num_workers=self.recipe.training.num_workers, **(self._order() | arguments))

    def schedule(self, processes: int = 1) -> Schedule:
        """The steps of the samples to train on, planned without torch and without opening an image."""
        if self.recipe.grpo is not None:
            return self.group_schedule(processes)
        return Schedule(self.samples, processes=processes, **self._order())

    def group_schedule(self, processes: int = 1) -> GroupSchedule:
        """The steps of reinforcement, whose samples are prompts.

        Raises:
            RecipeError: the recipe has no section grpo.
        """
        run = group_run(self.recipe)
        if run is None:
            raise RecipeError("Steps of groups are for reinforcement: add a section grpo to the recipe.")
        return GroupSchedule(self.samples, sizes=run.sizes, processes=processes, **self._order())

    def _order(self) -> dict[str, Any]:
        t = self.recipe.training
        return {
            "train_batch_size": t.train_batch_size,
            "token_budget": t.token_budget,
            "share": self.recipe.shares_prefixes,
            "shuffle": t.shuffle,
            "seed": data_seed(self.recipe),
        }

    def held_out_feed(self, **arguments: int | bool | object) -> Feed:
        """The feed of the held-out samples, in their order."""
        from finesight.data.feed import Feed

        t = self.recipe.training
        # Samples of one image follow one another in most files: many in a step share more, and pack better.
        batch = max(t.train_batch_size, 32)
        return Feed(
            self.held_out,
            self.processor,
            train_batch_size=batch,
            token_budget=t.token_budget,
            share=self.recipe.data.share_prefixes,
            shuffle=False,
            num_workers=t.num_workers,
            **arguments,  # type: ignore[arg-type]
        )

    def plan(self) -> Plan:
        """What the run will look like."""
        schedule, t = self.schedule(), self.recipe.training
        steps = schedule.survey()
        tokens, unshared = sum(s.num_tokens for s in steps), sum(s.unshared_tokens for s in steps)
        return Plan(
            num_samples=len(self.samples),
            num_held_out=len(self.held_out),
            steps_per_epoch=schedule.steps_per_epoch,
            total_steps=schedule.total_steps(t.num_train_epochs, t.max_steps),
            train_batch_size=t.train_batch_size,
            packs_per_step=sum(len(s.plans) for s in steps) / len(steps),
            tokens_per_step=tokens / len(steps),
            targets_per_step=sum(s.num_targets for s in steps) / len(steps),
            padding_saved=padding_saved(unshared, sum(s.padded_tokens for s in steps)),
            sharing_ratio=sharing_ratio(unshared, tokens),
            num_generations=None if self.recipe.grpo is None else self.recipe.grpo.num_generations,
        )


def data_seed(recipe: Recipe) -> int:
    """The seed of the order of samples and of the hold-out."""
    return recipe.training.seed if recipe.training.data_seed is None else recipe.training.data_seed


def prepare(
    recipe: Recipe,
    *,
    console: Console | None = None,
    base_dir: Path | None = None,
    bad_rows_path: Path | None = None,
    processor: Processor | None = None,
    sources: Sequence[ReadResult] | None = None,
    held_out_sources: Sequence[ReadResult] | None = None,
    reward_functions: Mapping[str, Callable[..., Any]] | None = None,
) -> Prepared:
    """Reads, checks, divides and encodes the rows of a recipe. Reads no weights.

    Args:
        console: for progress and notes; None: silent.
        base_dir: folder that relative paths of the recipe start at; None: the present one.
        bad_rows_path: file to write all bad rows to.
        processor: of a model that is loaded already; pixel limits of the recipe go before its own.
        sources: rows already read, in place of those that `data.train` names.
        held_out_sources: held-out rows already read, in place of `data.eval_split`.
        reward_functions: functions in memory that `rewards` of the recipe name.

    Raises:
        DataError: rows cannot be used and `data.on_bad_row` is "stop"; carries all of them.
        ModelError: the checkpoint's processor cannot be read.
        RecipeError: pixel limits do not fit the model.
        EvaluationError: a grader of `evaluation.tasks` or a reward is unknown, or does not fit the rows.
    """
    if recipe.rewards:
        load_rewards(recipe.rewards, base_dir=base_dir or Path.cwd(), functions=reward_functions)
    check_graders(recipe.evaluation.tasks, base_dir=base_dir)  # what is wrong with them is found now, not after training
    recipe, notes = _effective(recipe)
    if processor is None:
        processor = load_processor(recipe.model.name_or_path, data=recipe.data, hub=recipe.model.hub, revision=recipe.model.revision)
    else:
        processor = _with_limits(processor, recipe.data)
    if sources is None:
        sources = _read(recipe.data.train, recipe, base_dir)
        if not sources:
            raise DataError("There is nothing to train on: set data.train to a file, a folder or a hub name.")
    if held_out_sources is None:
        named = held_out_source(recipe.data)
        held_out_sources = _read([] if named is None else [named], recipe, base_dir)
    results = [*sources, *held_out_sources]
    say: Callable[[str], None] | None = (
        None if console is None else lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
    )
    if recipe.data.on_bad_row == "stop":
        accept(results, "stop", report_path=bad_rows_path)
    encoded, checked = _encode_results(results, recipe_encoder(recipe, processor), console)
    accept(checked, recipe.data.on_bad_row, report_path=bad_rows_path, say=say)
    train = [c for result in checked[: len(sources)] for c in result.conversations]
    held_out = [c for result in checked[len(sources) :] for c in result.conversations]
    if recipe.data.eval_split is not None and is_share(recipe.data.eval_split) and not held_out_sources:
        train, held_out = hold_out(train, recipe.data.eval_split, data_seed(recipe))
    notes += [note for result in results for note in result.notes]
    rewards = load_rewards(recipe.rewards, base_dir=base_dir or Path.cwd(), frames=frames_of(processor), functions=reward_functions)
    check_rewards(rewards, [*train, *held_out])
    return Prepared(
        recipe=recipe,
        rewards=rewards,
        processor=processor,
        samples=[encoded[id(c)] for c in train],
        conversations=train,
        held_out=[encoded[id(c)] for c in held_out],
        held_out_conversations=held_out,
        bad_rows=tuple(row for result in checked for row in result.bad_rows),
        formats=tuple((result.file, result.format) for result in results),
        notes=tuple(notes),
    )


def _read(sources: Sequence[SourceSettings], recipe: Recipe, base_dir: Path | None) -> list[ReadResult]:
    # For reinforcement prompts will do.
    answers = recipe.grpo is None
    return [read_source(source, data=recipe.data, base_dir=base_dir or Path.cwd(), require_answer=answers) for source in sources]


def _effective(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with what the adapter to go on from was trained with; its shape cannot change any more."""
    if recipe.model.adapter is None:
        return recipe, []
    data, notes = restore_data_settings(recipe.model.adapter, recipe.data)
    own = adapter_shape(recipe.model.adapter)
    for name, value in own.items():
        if name in recipe.tuning.model_fields_set and getattr(recipe.tuning, name) != value:
            notes.append(
                f"tuning.{name}: {getattr(recipe.tuning, name)} is not used: the adapter {recipe.model.adapter} has {name} {value}, and keeps it."
            )
    return recipe.model_copy(update={"data": data, "tuning": recipe.tuning.model_copy(update=own)}), notes


def _with_limits(processor: Processor, data: DataSettings) -> Processor:
    """A processor with the limits that these settings name."""
    given: dict[str, Any] = {name: getattr(data, name) for name in ("fps", "max_frames") if name in data.model_fields_set}
    image = processor.image_limits.override(data.min_pixels, data.max_pixels)
    video = processor.video_limits.override(data.video_min_pixels, data.video_max_pixels)
    try:
        image.check(processor.layout)
        video.check(processor.layout)
    except DataError as error:
        raise RecipeError(f"data.min_pixels, data.max_pixels, data.video_min_pixels, data.video_max_pixels: {error}") from None
    return replace(processor, image_limits=image, video_limits=video, **given)


def _encode_results(results: Sequence[ReadResult], encoder: Encoder, console: Console | None) -> tuple[dict[int, Sample], list[ReadResult]]:
    """Samples by the identity of their conversation, and the results with rows that cannot be encoded among the bad ones."""
    conversations = [c for result in results for c in result.conversations]
    outcomes = encode_all(conversations, encoder, console)
    samples: dict[int, Sample] = {}
    failed: dict[int, BadRow] = {}
    for conversation, outcome in zip(conversations, outcomes, strict=True):
        if isinstance(outcome, Sample):
            samples[id(conversation)] = outcome
        else:
            failed[id(conversation)] = outcome
    checked = [
        replace(
            result,
            conversations=[c for c in result.conversations if id(c) in samples],
            bad_rows=result.bad_rows + [failed[id(c)] for c in result.conversations if id(c) in failed],
        )
        for result in results
    ]
    return samples, checked


def encode_all(conversations: Sequence[Conversation], encoder: Encoder, console: Console | None = None) -> list[Sample | BadRow]:
    """Encodes rows in their order, on several processor cores where there are many rows; a bad row becomes its reason."""
    processes = min(os.cpu_count() or 1, MAX_ENCODING_PROCESSES)
    outcomes: list[Sample | BadRow] = []
    with progress(console, "Encoding", len(conversations)) as advance:
        if len(conversations) < PARALLEL_ROWS or processes == 1 or "fork" not in multiprocessing.get_all_start_methods():
            for conversation in conversations:
                outcomes.append(_encode(encoder, conversation))
                advance(1)
            return outcomes
        for part in _encode_in_parallel(conversations, encoder, processes):
            outcomes += part
            advance(len(part))
    return outcomes


def _encode(encoder: Encoder, conversation: Conversation) -> Sample | BadRow:
    try:
        return encoder.encode(conversation)
    except (DataError, TemplateError) as error:
        if isinstance(error, DataError) and error.bad_rows:
            return error.bad_rows[0]
        source = conversation.source
        return BadRow(source.file, source.row, str(error).removeprefix(f"{source}: "))


# What forked processes find in memory: rows and encoder travel to them without being copied.
_inherited: tuple[Sequence[Conversation], Encoder] | None = None


def _encode_range(bounds: tuple[int, int]) -> list[Sample | BadRow]:
    if _inherited is None:
        raise RuntimeError("rows are encoded in processes forked by _encode_in_parallel only")
    conversations, encoder = _inherited
    return [_without_media(_encode(encoder, conversation), conversation) for conversation in conversations[bounds[0] : bounds[1]]]


def _encode_in_parallel(conversations: Sequence[Conversation], encoder: Encoder, processes: int) -> Iterator[list[Sample | BadRow]]:
    global _inherited
    size = max(1, min(256, math.ceil(len(conversations) / (4 * processes))))
    ranges = [(start, min(start + size, len(conversations))) for start in range(0, len(conversations), size)]
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    _inherited = (conversations, encoder)
    try:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            for (start, _), part in zip(ranges, pool.imap(_encode_range, ranges), strict=True):
                yield [_with_media(outcome, conversations[start + place]) for place, outcome in enumerate(part)]
    finally:
        _inherited = None
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _without_media(outcome: Sample | BadRow, conversation: Conversation) -> Sample | BadRow:
    """Images stay where they are: in what travels between processes each is only a number of its conversation."""
    if isinstance(outcome, BadRow) or not outcome.visual_items:
        return outcome
    places = {id(part.media): place for place, part in enumerate(conversation.media)}
    items = [replace(item, part=replace(item.part, media=MediaRef(path=str(places[id(item.part.media)])))) for item in outcome.visual_items]
    return replace(outcome, visual_items=tuple(items))


def _with_media(outcome: Sample | BadRow, conversation: Conversation) -> Sample | BadRow:
    """Undoes :func:`_without_media` in the process that has the images."""
    if isinstance(outcome, BadRow) or not outcome.visual_items:
        return outcome
    media = [part.media for part in conversation.media]
    items = [
        replace(item, part=replace(item.part, media=media[int(cast(MediaRef, item.part.media).path or "")]))
        for item in outcome.visual_items
    ]
    return replace(outcome, visual_items=tuple(items))
