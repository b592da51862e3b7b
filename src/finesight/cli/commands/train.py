"""Arguments of `finesight train`."""

from __future__ import annotations

import os
import shlex
from typing import Annotated

import typer
from rich.console import Console

from finesight.cli.options import OverridesArgument, RecipeArgument


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show recipe, token counts and samples; train nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest valid checkpoint of the run, if there is one.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Begin also where the GPU's memory is planned not to suffice.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Compute the largest pack first, and compare its memory with the plan.")] = False,
) -> None:
    """Train as a recipe says.

    On a GPU the run's memory is planned first: what cannot fit is not begun, and the cheapest remedies are named.

    Ctrl-C (or SIGTERM) stops after the present step and saves a checkpoint; --resume goes on from it.
    """
    from finesight.recipe_files import load_recipe

    settings = load_recipe(recipe, [*(overrides or ()), *(["training.resume=true"] if resume else [])])
    console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of several processes the first one speaks
    if dry_run:
        from finesight.cli.preview import show_dry_run

        show_dry_run(settings, console)
        return
    from finesight.training.run import train as run_training

    result = run_training(settings, console=console, force=force, probe=probe)
    again = " ".join(shlex.quote(argument) for argument in (str(recipe), *(overrides or ())))
    if result.interrupted:
        console.print(f"Stopped. To go on: finesight train {again} --resume", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(130)
    following = f"finesight eval {again}"
    if settings.grpo is not None and not settings.evaluation.tasks:
        following = (
            "name a grader in evaluation.tasks, which names none; a reward that is a grader can be named there too. Then: "
            f"{following} (without one it would measure none of the rewards, the text probe alone)"
        )
    console.print(f"Next: {following}", highlight=False, markup=False, soft_wrap=True)
