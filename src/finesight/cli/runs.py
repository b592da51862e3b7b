"""`finesight runs`: what runs there are, how they differ, a report of one, going on with one, deleting one."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finesight.errors import CheckpointError, RecipeError
from finesight.wording import counted

runs = typer.Typer(name="runs", help="List, compare, report, resume and delete runs.", no_args_is_help=True)

_UNLIMITED = 10_000  # characters of a line
_RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]


@runs.command(name="list")
def list_runs(folder: Annotated[Path, typer.Argument(help="Folder that holds runs, or one run.")] = Path("runs")) -> None:
    """Show the runs in a folder, and what each lacks to be self-contained."""
    from finesight.training.run_folder import BEST_LOSS, BEST_REWARD, find_runs, read_run

    found = find_runs(folder)
    console = Console()
    if not found:
        console.print(f"There are no runs in {folder}.", markup=False, highlight=False)
        return
    read = [read_run(path) for path in found]
    columns = {"steps": "steps", "loss": "last loss", "held-out loss": BEST_LOSS}
    if any(run.is_reinforcement for run in read):
        columns |= {"reward": "last reward", "held-out reward": BEST_REWARD}
    rows = []
    for run in read:
        figures = run.figures()
        rows.append(
            {
                "run": escape(str(run.path)),
                "state": run.status,
                **{name: _number(figures.get(label)) for name, label in columns.items()},
                "checkpoints": str(len(run.checkpoints)),
                "GiB": f"{run.num_bytes / 2**30:.2f}",
                "missing": ", ".join(run.missing) or "-",
            }
        )
    _print_rows(rows, console)


def _print_rows(rows: Sequence[Mapping[str, str]], console: Console) -> None:
    """A table without the columns that hold nothing, or, where it is wider than a terminal, a block for each row; nothing is cut."""
    named = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    table = Table(*named)
    for row in rows:
        table.add_row(*(row[name] for name in named))
    needed = console.measure(table, options=console.options.update(max_width=_UNLIMITED)).maximum
    if not console.is_terminal:
        Console(width=needed).print(table)
    elif needed <= console.width:
        console.print(table)
    else:
        for row in rows:
            shown = ", ".join(f"{name} {row[name]}" for name in named if name not in ("run", "state") and row[name] != "-")
            console.print(f"{row['run']}: {row['state']}", highlight=False, soft_wrap=True)
            console.print(f"  {shown}", highlight=False, soft_wrap=True)


@runs.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN…", help="Folders of two runs or more.", show_default=False)],
) -> None:
    """Show how runs differ: settings, data, versions, and what they came to."""
    from finesight.training.run_folder import differing_settings, read_run

    if len(folders) < 2:
        raise typer.BadParameter("two runs or more are needed", param_hint="RUN")
    found = [read_run(folder) for folder in folders]
    table = Table("", *(escape(str(run.path)) for run in found))
    for label in dict.fromkeys(label for run in found for label in run.figures()):
        table.add_row(label, *(_number(run.figures().get(label)) for run in found))
    table.add_row("state", *(run.status for run in found))
    table.add_row("device", *(str(run.run.get("device", "-")) for run in found))
    fingerprints = [run.data_fingerprint for run in found]
    table.add_row("data", *("-" if mark is None else mark[:12] for mark in fingerprints))
    versions = [run.run.get("versions", {}) for run in found]
    for name in sorted({name for known in versions for name in known}):
        if len({known.get(name) for known in versions}) > 1:
            table.add_row(f"version of {name}", *(str(known.get(name, "-")) for known in versions))
    table.add_section()
    for name, values in differing_settings(found).items():
        table.add_row(name, *(escape(_value(value)) for value in values))
    console = Console()
    console.print(table)
    for run in found:
        if run.recipe_problem is not None:
            console.print(
                f"Note: the recipe of {run.path} cannot be read: {run.recipe_problem}", markup=False, highlight=False, soft_wrap=True
            )


@runs.command()
def report(folder: _RunArgument) -> None:
    """Write report.html of a run of reinforcement, also while it goes on: reward curves, and completions with their images."""
    from finesight.training.run_folder import read_run
    from finesight.training.run_report import write_run_report

    run = read_run(folder)
    path = write_run_report(run.path)
    if path is None:
        why = "it has not made a step yet" if run.is_reinforcement or run.recipe is None else "it is no run of reinforcement (grpo)"
        raise CheckpointError(f"{folder} has no rewards to report of: {why}.")
    Console().print(str(path), markup=False, highlight=False, soft_wrap=True)


@runs.command()
def resume(
    folder: _RunArgument,
    overrides: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    force: Annotated[bool, typer.Option("--force", help="Begin also where the GPU's memory is planned not to suffice.")] = False,
) -> None:
    """Go on with a run from its newest valid checkpoint, with the run's own recipe.

    Relative paths of its data start at the present folder, as when it was begun.
    """
    from finesight.recipe_files import RECIPE_FILE, load_recipe
    from finesight.training.run_folder import read_run

    if overrides:
        raise RecipeError(
            f"A resumed run keeps its settings; {' '.join(overrides)} cannot be changed here. To train on from its weights under others, start a new "
            "run with `finesight train` and model.adapter."
        )
    run = read_run(folder)
    if not run.checkpoints:
        ended = f" It has ended ({run.status})." if run.weights is not None else ""
        raise CheckpointError(f"{folder} holds no checkpoint to go on from.{ended} Start a new run with `finesight train`.")
    recipe = load_recipe(folder / RECIPE_FILE, ["training.resume=true", f"training.output_dir={json.dumps(str(folder))}"])
    from finesight.training.run import train

    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    if run.begun_in not in (None, str(Path.cwd())):
        again = shlex.join(["finesight", "runs", "resume", str(folder.absolute())])
        console.print(
            f"Note: the run was begun in {run.begun_in}, and relative paths in its recipe start at the present folder, {Path.cwd()}. "
            f"If something is not found here: cd {shlex.quote(str(run.begun_in))} && {again}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    result = train(recipe, console=console, force=force)
    if result.interrupted:
        console.print(f"Stopped. To go on: finesight runs resume {folder}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(130)


@runs.command()
def delete(
    folder: _RunArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete the folder of a run with everything in it: checkpoints, weights, reports."""
    from finesight.training.run_folder import delete_run, read_run

    run = read_run(folder)
    weights = "" if run.weights is None else f", {run.weights.name}"
    about = f"{run.path}: {run.status}, {counted(len(run.checkpoints), 'checkpoint')}{weights}, {run.num_bytes / 2**30:.2f} GiB"
    if not yes and not typer.confirm(f"{about}. Delete all of it?", default=False):
        raise typer.Exit(1)
    delete_run(run)
    Console().print(f"Deleted {about}.", markup=False, highlight=False, soft_wrap=True)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
