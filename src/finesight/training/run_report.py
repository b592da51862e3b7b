"""The report of a run of reinforcement, from its folder alone: one offline page. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from finesight.evaluation import report
from finesight.evaluation.reinforcement import Reinforcement, read_reinforcement
from finesight.recipe_files import RECIPE_FILE
from finesight.training.run_folder import RUN_REPORT
from finesight.training.telemetry import METRICS

COMPLETIONS = "completions"


def reinforcement_of(run: Path) -> Reinforcement | None:
    """What the folder of a run tells of its reinforcement; None if it was none, or has not begun.

    Raises:
        EvaluationError: metrics or completions are damaged.
    """
    return read_reinforcement(run / METRICS, run / COMPLETIONS)


def write_run_report(run: Path) -> Path | None:
    """Writes `report.html` into the folder of a run of reinforcement, ended or not, and returns it; None as :func:`reinforcement_of`.

    Raises:
        EvaluationError: metrics or completions are damaged.
    """
    found = reinforcement_of(run)
    if found is None:
        return None
    recipe = run / RECIPE_FILE
    shown = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    return report.write_run_report(run / RUN_REPORT, found, title=f"{run.name}: reinforcement", recipe=shown)
