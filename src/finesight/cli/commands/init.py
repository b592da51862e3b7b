"""Arguments of `finesight init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console


def init(
    model: Annotated[str, typer.Option(help="Checkpoint: a folder, or a name on the hub.")] = "Qwen/Qwen3-VL-8B-Instruct",
    data: Annotated[str, typer.Option(help="File, folder or hub name with the rows to train on.")] = "data/train.jsonl",
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe to write; never overwritten.")] = Path("recipe.yaml"),
    output_dir: Annotated[str, typer.Option(help="Folder of the run.")] = "runs/first",
    method: Annotated[Literal["lora", "full"], typer.Option(help="An adapter, or the weights themselves.")] = "lora",
    eval_split: Annotated[str, typer.Option(help="Hold-out: '5%', 'last 4', a file, or 'none'.")] = "5%",
    grader: Annotated[str, typer.Option(help="How held-out answers are graded (`finesight eval --graders`).")] = "exact_match",
    column: Annotated[
        list[str] | None, typer.Option(help="For a table: role=name, e.g. --column image=image --column answer=label.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="For a table: template of the question, {column} is replaced.")] = None,
    media_dir: Annotated[str | None, typer.Option(help="Second folder that image paths are resolved against.")] = None,
) -> None:
    """Write a commented recipe with every setting in it."""
    from finesight.cli.init import chosen_settings, commented_recipe, write_new

    source = {"path": data, "columns": column, "prompt": prompt, "media_dir": media_dir}
    chosen = chosen_settings(model=model, source=source, output_dir=output_dir, method=method, eval_split=eval_split, grader=grader)
    write_new(output, commented_recipe(chosen, name=str(output)))
    Console().print(f"Wrote {output}. Next: finesight check {output}", highlight=False, soft_wrap=True)
