"""Arguments of `finesight plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from finesight.cli.options import OverridesArgument, RecipeArgument


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Memory to fit, such as 16GiB (16GB is 7% less); with --gpu-name in place of the card's own.", show_default=False
        ),
    ] = None,
    gpu_name: Annotated[str | None, typer.Option(help="Card to fit, such as 'RTX 4090'.", show_default=False)] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that train together; the plan is that of each.")] = 1,
    search: Annotated[bool, typer.Option("--fit", help="Search for the fastest settings that fit.")] = False,
    write: Annotated[Path | None, typer.Option(help="With --fit: recipe to write; never overwritten.", show_default=False)] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a whole pack (in place of training.token_budget), not of a sample, without reading data; kept by --fit.",
            show_default=False,
        ),
    ] = None,
    pixels: Annotated[int | None, typer.Option(min=1024, help="Pixels of each image, without reading data.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead.")] = False,
) -> None:
    """Plan the GPU memory of a run before anything is loaded; no GPU is needed.

    Exits with 1 when the run does not fit the GPU that is named.
    """
    from finesight.cli.plan import Target, plan_recipe, write_fitted
    from finesight.planner.text import heading, show, to_dict, verdict
    from finesight.recipe_files import load_recipe

    if write is not None and not search:
        raise typer.BadParameter("goes with --fit", param_hint="--write")
    console = Console()
    outcome = plan_recipe(
        load_recipe(recipe, overrides or ()),
        Target.of(gpu, gpu_name),
        tokens=tokens,
        pixels=pixels,
        search=search,
        gpus=gpus,
        console=Console(stderr=True),
    )
    available, fitted = outcome.target.available_bytes, outcome.fitted
    if write is not None and fitted is not None:
        write_fitted(write, fitted, recipe.name)
    if as_json:
        content = {"gpu": outcome.target.label or None, **to_dict(outcome.plan, available, outcome.changes)}
        if fitted is not None:
            content["fitted"] = {"settings": dict(fitted.settings), **to_dict(fitted.plan, available)}
        typer.echo(json.dumps(content, indent=2))
    else:
        show(console, outcome.plan, available, outcome.changes, outcome.target.label, outcome.more_gpus)
        if fitted is not None:
            console.print(f"\nFastest that fits: {fitted}", highlight=False, markup=False, soft_wrap=True)
            for line in (*heading(fitted.plan)[1:], str(verdict(fitted.plan, available, outcome.target.label))):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
        if write is not None:
            console.print(f"Wrote {write}. Next: finesight train {write}", highlight=False, markup=False, soft_wrap=True)
    if fitted is None and available is not None and not outcome.plan.fits(available):
        raise typer.Exit(1)
