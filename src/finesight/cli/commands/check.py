"""Arguments of `finesight check`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from finesight.cli.options import OverridesArgument


def check(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE_OR_DATA", help="A recipe, or a data file, folder or hub name.", show_default=False)
    ],
    overrides: OverridesArgument = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint whose tokens are counted; goes before the recipe's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead.")] = False,
) -> None:
    """Look through the data: what it holds, what is wrong with it, what training on it costs.

    Every row is read and encoded as training would. Exits with 1 when rows cannot be used.

    Reward functions that the recipe names are run once, on the first row and a made-up completion, as training would run them; one that
    fails is warned of.
    """
    from finesight.cli.check import check_recipe, target_recipe

    recipe, with_model = target_recipe(target, model, overrides or ())
    result = check_recipe(recipe, with_model=with_model, console=Console(stderr=True))
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2, ensure_ascii=False, default=str))
    else:
        result.render(Console())
    if result.rows.bad or not result.can_train:
        raise typer.Exit(1)
