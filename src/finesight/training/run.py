"""A whole run, from a recipe or from Python objects, over one code path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from finesight.data.conversation import Conversation
from finesight.data.formats import ReadResult, read_source
from finesight.data.processor import Processor
from finesight.data.tables import RowTable
from finesight.errors import DataError, RecipeError
from finesight.models.load import LoadedModel
from finesight.recipe import Recipe, SourceSettings
from finesight.recipe_files import all_setting_names, parse_recipe
from finesight.training.memory_probe import probe_memory
from finesight.training.planning import plan_here
from finesight.training.prepare import Plan, Prepared, prepare
from finesight.training.saving import find_resume, nothing_to_resume
from finesight.training.session import RunResult, Session, start_accelerator
from finesight.training.state import check_same_run, data_fingerprint, read_trainer_state
from finesight.training.trackers import check_trackers

__all__ = ["Plan", "Prepared", "RunResult", "SFTTrainer", "prepare", "train"]

BAD_ROWS = "bad_rows.jsonl"


def train(
    recipe: Recipe, *, console: Console | None = None, base_dir: Path | None = None, force: bool = False, probe: bool = False
) -> RunResult:
    """Runs a recipe: data, model, training, adapter (or model) on the disk.

    Args:
        console: for progress; None: silent.
        base_dir: folder that relative paths of data start at; None: the present one.
        force: begin also where the GPU's memory is planned not to suffice.
        probe: compute the largest pack first, and compare its memory with the plan.

    Raises:
        PlanError: the run is planned to need more memory than the GPU has, or a probe is asked for without a GPU.
        FinesightError: see :func:`prepare` and :class:`finesight.training.loop.TrainingLoop`.
    """
    return _train(recipe, console=console, base_dir=base_dir, force=force, probe=probe)


def _train(
    recipe: Recipe,
    *,
    console: Console | None,
    base_dir: Path | None = None,
    loaded: LoadedModel | None = None,
    sources: list[ReadResult] | None = None,
    held_out_sources: list[ReadResult] | None = None,
    force: bool = False,
    probe: bool = False,
) -> RunResult:
    check_trackers(recipe.training.report_to)
    output_dir = Path(recipe.training.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"training.output_dir: {output_dir} cannot be made a folder: {error.strerror}. Name another one.") from None
    resume_from, skipped = find_resume(output_dir, recipe.training.resume)
    accelerator = start_accelerator(recipe, output_dir, None if loaded is None else loaded.device)
    own_console = console if accelerator.is_main_process else None
    if own_console is not None:
        for reason in skipped:
            own_console.print(f"Passed over: {reason}", markup=False, highlight=False, soft_wrap=True)
        if recipe.training.resume and resume_from is None:
            own_console.print(f"Note: {nothing_to_resume(output_dir)}", markup=False, highlight=False, soft_wrap=True)
    prepared = prepare(
        recipe,
        console=own_console,
        base_dir=base_dir,
        bad_rows_path=output_dir / BAD_ROWS if accelerator.is_main_process else None,
        processor=None if loaded is None else loaded.processor,
        sources=sources,
        held_out_sources=held_out_sources,
    )
    if resume_from is not None:  # known now, not after the weights are loaded
        check_same_run(read_trainer_state(resume_from), prepared.recipe, data_fingerprint(prepared.samples), resume_from)
    memory = plan_here(prepared, accelerator, config=None if loaded is None else loaded.base.config, force=force)
    session = Session(prepared, accelerator, loaded=loaded, console=own_console, memory=memory)
    if probe:
        probe_memory(session, force=force)
    return session.run(resume_from)


class SFTTrainer:
    """Supervised fine-tuning from Python, with the words of a recipe.

    Example::

        trainer = SFTTrainer("Qwen/Qwen3-VL-8B-Instruct", train_dataset=rows, output_dir="runs/mine", r=16, learning_rate=1e-4)
        result = trainer.train()

    Args:
        model: a checkpoint (folder or hub name), or what :func:`finesight.load` gave. May be left out if the recipe names it.
        processor: of a model that is loaded already; goes before its own.
        train_dataset: rows: dicts in any format that files may have, conversations, a `datasets.Dataset`, or a path.
            None: what the recipe names.
        eval_dataset: held-out rows, likewise; `eval_split` divides them off the others instead.
        recipe: settings to start from.
        console: for progress; None: a new one on stdout.
        settings: any setting of the sections `training`, `tuning`, `data` and `model` by its own name (`learning_rate=…`, `r=…`,
            `max_pixels=…`); these go before those of the recipe.

    Raises:
        RecipeError: a setting is unknown or does not fit.
    """

    def __init__(
        self,
        model: str | Path | LoadedModel | None = None,
        processor: Processor | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        recipe: Recipe | None = None,
        console: Console | None = None,
        **settings: Any,
    ) -> None:
        self.loaded = model if isinstance(model, LoadedModel) else None
        if processor is not None:
            if self.loaded is None:
                raise RecipeError(
                    "SFTTrainer: a processor is for a model that is loaded already; give finesight.load(…) as model, or leave it out"
                )
            self.loaded = replace(self.loaded, processor=processor)
        if self.loaded is not None:
            settings |= self.loaded.precision(recipe, settings)
        if eval_dataset is not None and recipe is None:
            settings.setdefault("eval_split", "eval_dataset")  # whose rows are handed over, not read
        name = self.loaded.model.name_or_path if self.loaded is not None else model
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.recipe = _recipe_with(recipe, None if name is None else str(name), settings)
        self.console = console or Console()
        self.result: RunResult | None = None

    def train(self) -> RunResult:
        """Trains and returns what :func:`train` does; `model` and `processor` are then the trained ones.

        Raises:
            FinesightError: as :func:`train`.
        """
        held_out = None if self.eval_dataset is None else [self._read(self.eval_dataset, "eval_dataset")]
        sources = None if self.train_dataset is None else [self._read(self.train_dataset, "train_dataset")]
        self.result = _train(self.recipe, console=self.console, loaded=self.loaded, sources=sources, held_out_sources=held_out)
        return self.result

    @property
    def model(self) -> Any:
        """The trained model (transformers, or peft around it)."""
        return self._done().model

    @property
    def processor(self) -> Processor:
        """The processor that the model was trained with."""
        return self._done().processor

    def _done(self) -> RunResult:
        if self.result is None:
            raise RecipeError("SFTTrainer: call train() first")
        return self.result

    def _read(self, dataset: Any, name: str) -> ReadResult:
        data = self.recipe.data
        like = data.train[0] if data.train else SourceSettings(path=name)
        if isinstance(dataset, (str, Path)):
            return read_source(like.model_copy(update={"path": str(dataset)}), data=data, base_dir=Path.cwd())
        rows = list(dataset)
        if not rows:
            raise DataError(f"{name} holds no rows")
        if all(isinstance(row, Conversation) for row in rows):
            return ReadResult(rows, [], "messages", name)
        odd = next((row for row in rows if not isinstance(row, Mapping)), None)
        if odd is not None:
            raise DataError(f"{name}: rows must be dicts or conversations, not {type(odd).__name__}")
        table = RowTable(name, Path.cwd(), iter([dict(row) for row in rows]))
        return read_source(like.model_copy(update={"path": name}), data=data, base_dir=Path.cwd(), table=table)


# Sections whose settings SFTTrainer takes by their own names.
_SECTIONS = ("training", "tuning", "data", "model")


def _recipe_with(recipe: Recipe | None, name: str | None, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with flat settings put into their sections."""
    content: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True) if recipe is not None else {}
    places = {
        path.split(".")[1]: path.split(".")[0]
        for path in reversed(all_setting_names())
        if path.count(".") == 1 and path.split(".")[0] in _SECTIONS
    }
    places["train"] = "data"
    for key, value in settings.items():
        content.setdefault(places.get(key, "training"), {})[key] = str(value) if isinstance(value, Path) else value
    if name is not None:
        content.setdefault("model", {})["name_or_path"] = name
    return parse_recipe(content, origin="SFTTrainer")
