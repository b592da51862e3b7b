"""Arguments of `finesight predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from finesight.cli.flags import errors_in_flags
from finesight.cli.options import AdapterOption, Drawing, ModelOption, PixelLimits, Precision, SystemOption
from finesight.wording import counted


def predict(
    inputs: Annotated[list[str], typer.Argument(help="Images, videos, folders of them, or data files with questions.", show_default=False)],
    *,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    question: Annotated[str | None, typer.Option("--question", "-q", help="What to ask about each image or video.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL file to write; it appears once all is answered.", show_default="stdout")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there, once all is answered.")] = False,
    system: SystemOption = None,
    max_completion_length: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    drawing: Drawing,
    batch_size: Annotated[int, typer.Option(help="Prompts answered side by side.")] = 8,
    pixels: PixelLimits,
    media_dir: Annotated[str | None, typer.Option(help="For data files: second folder that image paths are resolved against.")] = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch http(s) images that rows name.")] = False,
    on_bad_row: Annotated[Literal["stop", "skip"], typer.Option(help="What to do about rows that cannot be used.")] = "stop",
    schema: Annotated[
        Path | None, typer.Option(help="File with a JSON schema that answers follow; needs the extra `schema`.", show_default="none")
    ] = None,
    precision: Precision,
) -> None:
    """Answer questions about images: one JSON object a line. A run that was stopped goes on when it is started again.

    With an adapter, pixel limits, frame rate, system prompt and the bits of the base are those that it was trained with.
    """
    from finesight.cli.predict import predict_to
    from finesight.cli.weights import model_settings
    from finesight.data_settings import DataSettings, SourceSettings
    from finesight.sampling.types import SamplingSettings

    with errors_in_flags():
        count = predict_to(
            output,
            model_settings(model, adapter, **precision.settings()),
            inputs,
            question,
            SamplingSettings(max_completion_length, drawing.temperature, drawing.top_p, seed=drawing.seed, batch_size=batch_size),
            data=DataSettings(**pixels.given(), allow_urls=allow_urls, on_bad_row=on_bad_row),
            source=SourceSettings(path=inputs[0], media_dir=media_dir, system=system),
            schema=schema,
            overwrite=overwrite,
            console=Console(stderr=True),
        )
    if output is not None:
        Console().print(f"{counted(count, 'answer')}: {output}", highlight=False, markup=False, soft_wrap=True)
