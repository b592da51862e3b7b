"""The folder of a run, read without its weights: recipe, state, metrics, checkpoints, report. Needs no torch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finesight.errors import CheckpointError, RecipeError
from finesight.recipe import Recipe
from finesight.recipe_files import RECIPE_FILE, RUN_FILE, load_recipe
from finesight.training.checkpoint import checkpoint_step, list_checkpoints
from finesight.training.telemetry import METRICS, read_metrics

REPORT = Path("eval") / "report.html"  # of `finesight eval`
RUN_REPORT = "report.html"  # of reinforcement
_TRAINER = "trainer.json"  # in a checkpoint
_WEIGHTS = ("adapter", "model")
BEST_LOSS, BEST_REWARD = "lowest held-out loss", "highest held-out reward"
# Figures that runs are compared by: their label and their key in the state of run.json.
_FIGURES = (
    ("steps", "step"),
    ("samples", "num_samples"),
    ("last loss", "last_loss"),
    (BEST_LOSS, "best_metric"),
    ("seconds", "seconds"),
)
_REWARDS = (("last reward", "reward"), ("last held-out reward", "eval_reward"))  # label, and key in lines of metrics.jsonl


@dataclass(frozen=True)
class RunFolder:
    """What lies in the folder of a run."""

    path: Path
    recipe: Recipe | None
    recipe_problem: str | None  # why there is none
    run: Mapping[str, Any]  # run.json, written when a run ends; empty before
    state: Mapping[str, Any]  # of run.json, or else of the newest checkpoint
    data_fingerprint: str | None
    begun_in: str | None  # folder that relative paths of its recipe start at, as its newest checkpoint has it
    metrics: tuple[Mapping[str, Any], ...] = field(repr=False)
    checkpoints: tuple[Path, ...]
    weights: Path | None  # adapter or whole model of a run that ended
    report: Path | None
    num_bytes: int

    @property
    def status(self) -> str:
        """How it ended, or that it has not."""
        if reason := self.run.get("stop_reason"):
            return str(reason)
        return "stopped or running" if self.checkpoints or self.metrics else "not begun"

    @property
    def is_reinforcement(self) -> bool:
        """Whether it learns from rewards."""
        return self.recipe is not None and self.recipe.grpo is not None

    @property
    def missing(self) -> tuple[str, ...]:
        """What a self-contained run would hold and this one does not."""
        wanted = {
            "recipe": self.recipe is not None,
            "versions": bool(self.run.get("versions")),
            "data fingerprint": self.data_fingerprint is not None,
            "metrics": bool(self.metrics),
            "weights": self.weights is not None or bool(self.checkpoints),
            "report": self.report is not None,
        }
        return tuple(name for name, there in wanted.items() if not there)

    def figures(self) -> dict[str, float]:
        """Numbers to compare by, those that are known."""
        found = {label: self.state[key] for label, key in _FIGURES if isinstance(self.state.get(key), (int, float))}
        for label, key in (("last loss", "loss"), *(_REWARDS if self.is_reinforcement else ())):
            # Not finite: no reward was given.
            values = [line[key] for line in self.metrics if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])]
            if label not in found and values:
                found[label] = values[-1]
        if self.is_reinforcement and BEST_LOSS in found:
            found[BEST_REWARD] = found.pop(BEST_LOSS)
        return found


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run; the folder of an adapter, which keeps the recipe too, is not."""
    if not (folder / RECIPE_FILE).is_file():
        return False
    return (folder / RUN_FILE).is_file() or (folder / METRICS).is_file() or bool(list_checkpoints(folder))


def find_runs(folder: str | Path, depth: int = 2) -> list[Path]:
    """Folders of runs: the folder itself, or those in it to a depth of folders, by name.

    Raises:
        CheckpointError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist. Give the folder that holds the runs (of training.output_dir).")
    return sorted(_runs_in(folder, depth))


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
    elif depth:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield from _runs_in(path, depth - 1)


def read_run(folder: str | Path) -> RunFolder:
    """Reads the folder of a run.

    Raises:
        CheckpointError: it is no folder of a run, or its run.json is damaged.
    """
    path = Path(folder)
    if not is_run(path):
        raise CheckpointError(f"{path} is not the folder of a run: {RECIPE_FILE} beside metrics, checkpoints or {RUN_FILE} is needed.")
    run = _read_object(path / RUN_FILE)
    checkpoints = list_checkpoints(path)
    trainer = _read_object(checkpoints[-1] / _TRAINER) if checkpoints else {}
    newest = trainer.get("state", {})
    state = run.get("state", {})
    recipe, problem = _recipe(path)
    return RunFolder(
        path=path,
        recipe=recipe,
        recipe_problem=problem,
        run=run,
        # A run that was resumed and stopped again has gone on from what run.json says.
        state=newest if newest.get("step", 0) > state.get("step", 0) else state,
        begun_in=trainer.get("folder"),
        data_fingerprint=run.get("data_fingerprint") or trainer.get("data_fingerprint"),
        metrics=tuple(read_metrics(path / METRICS)),
        checkpoints=tuple(checkpoints),
        weights=next((path / name for name in _WEIGHTS if (path / name).is_dir()), None),
        report=next((path / name for name in (REPORT, RUN_REPORT) if (path / name).is_file()), None),
        num_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink()),
    )


def _recipe(folder: Path) -> tuple[Recipe | None, str | None]:
    try:
        return load_recipe(folder / RECIPE_FILE), None
    except RecipeError as error:  # written by another version
        return None, str(error)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Restore or delete it.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold an object, not a {type(content).__name__}.")
    return content


def differing_settings(runs: Sequence[RunFolder]) -> dict[str, list[Any]]:
    """Settings, by dotted name, that are not the same in all recipes, with the value in each; None where a recipe is missing."""
    flat = [{} if run.recipe is None else _flat(run.recipe.model_dump(mode="json")) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = {name: [settings.get(name) for settings in flat] for name in names if name != "training.output_dir"}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name; a section that is a list, or was left out, counts as one setting."""
    flat: dict[str, Any] = {}
    for section, values in content.items():
        flat |= {f"{section}.{name}": value for name, value in values.items()} if isinstance(values, Mapping) else {section: values}
    return flat


def delete_run(run: RunFolder) -> None:
    """Deletes the folder of a run. It loses its name first, so that a crash in between leaves nothing that looks whole.

    Raises:
        CheckpointError: it is a link, or cannot be deleted.
    """
    if run.path.is_symlink():
        raise CheckpointError(f"{run.path} is a link. Delete what it points to, by its own name.")
    place = run.path.resolve()
    doomed = place.with_name(f".deleting-{place.name}")
    try:
        place.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise CheckpointError(f"{run.path} cannot be deleted: {error.strerror or error}.") from None


def newest_step(run: RunFolder) -> int | None:
    """The step of the newest checkpoint, whether valid or not; None: there is none."""
    return checkpoint_step(run.checkpoints[-1]) if run.checkpoints else None
