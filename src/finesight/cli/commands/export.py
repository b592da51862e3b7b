"""Arguments of `finesight export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console


def export(
    trained: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a run, an adapter or a fully tuned model.")],
    to: Annotated[
        Literal["adapter", "merged", "merged-4bit", "gguf", "hub"],
        typer.Option(help="A peft folder; a whole checkpoint; the same in 4 bits; files for llama.cpp; an upload to the Hugging Face hub."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder to write to.")],
    model: Annotated[str | None, typer.Option(help="Base: a folder, or a name on the hub.", show_default="the adapter's base")] = None,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="Precision of merged weights.")] = "bfloat16",
    rounding: Annotated[
        Literal["nearest", "stochastic"], typer.Option(help="How sums become bfloat16; stochastic keeps small updates on average.")
    ] = "nearest",
    base: Annotated[
        Literal["trained", "stored"],
        typer.Option(help="Of an adapter trained over fewer bits: merge into the values it knew, or into the checkpoint's."),
    ] = "trained",
    bound: Annotated[
        float | None, typer.Option(help="Largest difference of a log-probability that is let pass, in nats.", show_default="by precision")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Rows, or drawn images, that the verification asks about.")] = 3,
    drawn: Annotated[bool, typer.Option("--drawn", help="Ask about drawn images also where the run's data is there.")] = False,
    device: Annotated[str | None, typer.Option(help="Of the verification.", show_default="the GPU, or else the CPU")] = None,
    llama_cpp: Annotated[Path | None, typer.Option(help="gguf: folder of llama.cpp, or its convert_hf_to_gguf.py.")] = None,
    repo: Annotated[str | None, typer.Option(help="hub: USER/NAME of the repository.")] = None,
    content: Annotated[Literal["adapter", "merged", "merged-4bit"], typer.Option(help="hub: what is uploaded.")] = "adapter",
    public: Annotated[bool, typer.Option("--public", help="hub: make a new repository public.")] = False,
    licence: Annotated[str | None, typer.Option("--license", help="hub: licence for the model card.", show_default="the base's")] = None,
) -> None:
    """Hand a trained model over, verified: greedy answers and log-probabilities must agree with what was trained.

    Merging reads and writes one shard at a time. An export that does not agree is not left behind; it is said where they part.
    """
    from finesight.cli.export import Handover, export_to
    from finesight.export.export import ExportSettings

    folder = export_to(
        trained,
        to,
        output,
        ExportSettings("merged", dtype, rounding, base, bound=bound),
        Handover(llama_cpp, repo, content, public, licence),
        model=model,
        prompts=prompts,
        drawn=drawn,
        device=device,
        console=Console(stderr=True),
    )
    Console().print(f"{folder}", highlight=False, markup=False, soft_wrap=True)
