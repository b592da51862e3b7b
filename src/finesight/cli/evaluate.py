"""What `finesight eval` does: the tasks of a recipe and the text-only probe, with the base and with what was trained."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from finesight.cli.progress import task_progress
from finesight.cli.weights import is_adapter_folder
from finesight.data.conversation import Conversation
from finesight.data_settings import DataSettings
from finesight.errors import EvaluationError
from finesight.evaluation.compare import Comparison, compare
from finesight.evaluation.evaluate import evaluate_model
from finesight.evaluation.probe import TextProbe, load_text_probe
from finesight.evaluation.report import write_report
from finesight.evaluation.results import EvaluationResult, read_result
from finesight.models.adapter_metadata import read_metadata, restore_data_settings
from finesight.models.load import load_model
from finesight.recipe import ModelSettings, Recipe
from finesight.recipe_files import dump_recipe
from finesight.tasks.graders import GRADERS, check_graders
from finesight.tasks.task import Task, load_task
from finesight.training.prepare import prepare
from finesight.training.run_report import reinforcement_of
from finesight.training.telemetry import METRICS

REPORT = "report.html"


@dataclass(frozen=True)
class Outcome:
    """What an evaluation left behind."""

    folder: Path  # with before/, after/ and the report
    report: Path
    before: EvaluationResult | None
    after: EvaluationResult
    comparison: Comparison | None


def evaluate_recipe(
    recipe: Recipe,
    trained: Path | None,
    output: Path,
    *,
    run: Path,
    before: Path | None = None,
    skip_before: bool = False,
    console: Console,
) -> Outcome:
    """Judges the base and what was trained on it, and writes records, summaries and the report.

    Args:
        trained: folder of an adapter or of a fully tuned model; None: only the base is judged.
        output: folder to write to.
        run: folder of the run that was trained, whose metrics the report shows.
        before: result of an earlier evaluation of the base, in place of judging it again.
        skip_before: do not judge the base.

    Raises:
        EvaluationError: there is nothing to judge, or the results cannot be compared.
        DataError, ModelError: from reading rows and loading models.
    """
    adapter = trained if trained is not None and is_adapter_folder(trained) else None
    # Before and after must see the same pixels: those that were trained with, where the recipe leaves it open.
    knows = trained is not None and read_metadata(trained) is not None
    data = restore_data_settings(trained, recipe.data)[0] if trained is not None and knows else recipe.data
    recipe = recipe.model_copy(update={"data": data})
    tasks = load_tasks(recipe, console)
    probe = load_text_probe(recipe.evaluation.text_probe, Path.cwd())
    if not tasks and probe is None:
        raise EvaluationError("There is nothing to judge: add evaluation.tasks to the recipe, or set evaluation.text_probe.")
    earlier = None if before is None else read_result(before)
    if earlier is None and trained is not None and not skip_before:
        earlier = _judge(recipe.model, data, recipe, tasks, probe, "before", console)
        earlier.write(output / "before")
    after = _judge(_trained_model(recipe, trained, adapter), data, recipe, tasks, probe, "after" if trained else "base", console)
    after.write(output / "after")
    metrics = run / METRICS
    report = write_report(
        output / REPORT,
        after,
        before=earlier,
        tasks=tasks,
        title=f"{recipe.model.name_or_path}: {'before and after' if earlier else 'evaluation'}",
        recipe=dump_recipe(recipe),
        reinforcement=reinforcement_of(run) if trained is not None else None,
        metrics=metrics if trained is not None and metrics.is_file() else None,
        notes=[f"Judged: {trained}" if trained is not None else "Judged: the base alone"],
    )
    return Outcome(output, report, earlier, after, None if earlier is None else compare(earlier, after))


def load_tasks(recipe: Recipe, console: Console) -> list[Task]:
    """The tasks of a recipe; held-out rows are divided off exactly as for training.

    Raises:
        DataError, EvaluationError: rows cannot be read, or a grader is unknown or lacks its library.
    """
    check_graders(recipe.evaluation.tasks, base_dir=Path.cwd())
    held_out: Sequence[Conversation] = ()
    if any(task.data == "eval_split" for task in recipe.evaluation.tasks) and recipe.data.eval_split is not None:
        held_out = prepare(recipe, console=console).held_out_conversations
    return [load_task(task, data=recipe.data, base_dir=Path.cwd(), held_out=held_out) for task in recipe.evaluation.tasks]


def _trained_model(recipe: Recipe, trained: Path | None, adapter: Path | None) -> ModelSettings:
    if trained is None:
        return recipe.model
    if adapter is not None:
        return recipe.model.model_copy(update={"adapter": str(adapter)})
    return recipe.model.model_copy(update={"name_or_path": str(trained), "hub": "huggingface", "revision": None, "adapter": None})


def _judge(
    model: ModelSettings, data: DataSettings, recipe: Recipe, tasks: Sequence[Task], probe: TextProbe | None, label: str, console: Console
) -> EvaluationResult:
    """Loads a model, judges it and lets it go."""
    console.print(
        f"{label}: loading {model.name_or_path}{f' with {model.adapter}' if model.adapter else ''}", markup=False, highlight=False
    )
    loaded = load_model(model, data=data)
    with task_progress(console) as report:
        result = evaluate_model(
            loaded,
            tasks,
            recipe.evaluation,
            probe=probe,
            image_first=data.image_first,
            seed=recipe.training.seed,
            on_progress=lambda task, done, total: report(f"{label}: {task}", done, total),
        )
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def outcome_table(outcome: Outcome) -> Table:
    """Before, after and what the difference is worth, one task a row, the probe last."""
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for name in ("task", "rows", "before", "after", "change", ""):
        table.add_column(name, justify="left" if name in ("task", "") else "right")
    changes = {} if outcome.comparison is None else {change.task: change for change in outcome.comparison.tasks}
    for task in outcome.after.tasks:
        change = changes.get(task.task)
        if change is None:
            table.add_row(task.task, f"{task.num_samples:,}", "", f"{task.accuracy:.1%}", "", f"95%: {task.low:.1%} to {task.high:.1%}")
        else:
            table.add_row(
                task.task, f"{change.num_pairs:,}", f"{change.before:.1%}", f"{change.after:.1%}", f"{100 * change.change:+.1f}", change.verdict
            )  # fmt: skip
    _add_probe(table, outcome)
    return table


def _add_probe(table: Table, outcome: Outcome) -> None:
    probe, change = outcome.after.probe, None if outcome.comparison is None else outcome.comparison.probe
    if probe is None:
        return
    if change is None:
        table.add_row("text probe, exact", f"{probe.num_questions:,}", "", f"{probe.accuracy:.1%}", "", "text only, nothing seen")
        table.add_row("text probe, loss", f"{probe.num_questions:,}", "", f"{probe.loss:.3f}", "", "")
        return
    exact = change.exact
    table.add_row(
        "text probe, exact", f"{exact.num_pairs:,}", f"{exact.before:.1%}", f"{exact.after:.1%}", f"{100 * exact.change:+.1f}", exact.verdict
    )  # fmt: skip
    rise = change.loss_after - change.loss_before
    table.add_row(
        "text probe, loss", "", f"{change.loss_before:.3f}", f"{change.loss_after:.3f}", f"{rise:+.3f}", "text only; a rise is forgetting"
    )


def graders_table() -> Table:
    """Every grader by name, with what counts as right."""
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("grader")
    table.add_column("an answer is right if")
    for name, grader in GRADERS.items():
        table.add_row(name, grader.description)
    table.add_row("module:function", "your function (answer, conversation) says so, from 0 to 1; file.py:function too")
    return table
