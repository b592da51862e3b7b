"""Arguments of `finesight eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from finesight.cli.options import OverridesArgument


def evaluate(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)] = None,
    overrides: OverridesArgument = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter, fully tuned model or run to judge.", show_default="those of the recipe's output_dir")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the results.", show_default="eval in the run's folder")
    ] = None,
    before: Annotated[Path | None, typer.Option(help="Results of the base from an earlier evaluation, not to judge it again.")] = None,
    skip_before: Annotated[bool, typer.Option("--skip-before", help="Do not judge the base.")] = False,
    base_only: Annotated[bool, typer.Option("--base-only", help="Judge the base alone; nothing need be trained.")] = False,
    graders: Annotated[bool, typer.Option("--graders", help="List the graders.")] = False,
) -> None:
    """Judge before and after: the tasks of a recipe, and a text-only probe.

    Writes every answer, summaries and report.html, which opens without a network.
    """
    from finesight.cli.evaluate import evaluate_recipe, graders_table, outcome_table
    from finesight.cli.weights import require_trained, require_weights, run_folder
    from finesight.recipe_files import load_recipe

    console = Console()
    if graders:
        console.print(graders_table())
        return
    if recipe is None:
        raise typer.BadParameter("a recipe is needed", param_hint="RECIPE")
    settings = load_recipe(recipe, overrides or ())
    if base_only and (adapter is not None or before is not None or skip_before):
        raise typer.BadParameter("goes with none of --adapter, --before and --skip-before", param_hint="--base-only")
    run = Path(settings.training.output_dir) if adapter is None else run_folder(adapter)
    trained = None if base_only else require_trained(run) if adapter is None else require_weights(adapter)
    folder = output or run / "eval"
    outcome = evaluate_recipe(
        settings, trained, folder, run=run, before=before, skip_before=skip_before, console=Console(stderr=True)
    )  # fmt: skip
    console.print(outcome_table(outcome))
    console.print(f"Answers: {outcome.folder}\nReport: {outcome.report}", highlight=False, markup=False, soft_wrap=True)
