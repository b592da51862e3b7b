"""A whole run, from a recipe, over one code path; `trainers.py` puts parts of it in from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from finesight.data.formats import ReadResult
from finesight.errors import RecipeError
from finesight.models.load import LoadedModel
from finesight.recipe import Recipe
from finesight.training.memory_probe import probe_memory
from finesight.training.planning import plan_here
from finesight.training.prepare import Plan, Prepared, prepare
from finesight.training.processes import start_accelerator
from finesight.training.saving import find_resume, nothing_to_resume
from finesight.training.session import RunResult, Session
from finesight.training.state import check_same_run, data_fingerprint, read_trainer_state
from finesight.training.trackers import check_trackers

__all__ = ["Plan", "Prepared", "RunResult", "prepare", "train"]

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
    return run_recipe(recipe, console=console, base_dir=base_dir, force=force, probe=probe)


def run_recipe(
    recipe: Recipe,
    *,
    console: Console | None,
    base_dir: Path | None = None,
    loaded: LoadedModel | None = None,
    sources: list[ReadResult] | None = None,
    held_out_sources: list[ReadResult] | None = None,
    reward_functions: Mapping[str, Callable[..., Any]] | None = None,
    force: bool = False,
    probe: bool = False,
) -> RunResult:
    """As :func:`train`, with parts of the run that are in memory already.

    Args:
        loaded: the model; sources, held_out_sources: rows; reward_functions: functions that `rewards` of the recipe name.
    """
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
        reward_functions=reward_functions,
    )
    if resume_from is not None:  # known now, not after the weights are loaded
        check_same_run(read_trainer_state(resume_from), prepared.recipe, data_fingerprint(prepared.samples), resume_from)
    memory = plan_here(prepared, accelerator, config=None if loaded is None else loaded.base.config, force=force)
    session = Session(prepared, accelerator, loaded=loaded, console=own_console, memory=memory)
    if probe:
        probe_memory(session, force=force)
    return session.run(resume_from)
