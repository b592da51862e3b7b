"""Arguments of `finesight chat`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from finesight.cli.flags import errors_in_flags
from finesight.cli.options import AdapterOption, Drawing, ModelOption, PixelLimits, Precision, SystemOption


def chat(
    *,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    system: SystemOption = None,
    max_completion_length: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 1024,
    max_length_tokens: Annotated[int, typer.Option(help="Most tokens of a conversation, images and the next answer included.")] = 16384,
    drawing: Drawing,
    pixels: PixelLimits,
    precision: Precision,
) -> None:
    """Talk to a model in the terminal; images and videos are named, dropped or pasted by path.

    With an adapter, pixel limits, frame rate, system prompt and the bits of the base are those that it was trained with.
    """
    from finesight.cli.chat import chat_with
    from finesight.cli.weights import model_settings
    from finesight.data_settings import DataSettings
    from finesight.sampling.types import SamplingSettings

    with errors_in_flags():
        chat_with(
            model_settings(model, adapter, **precision.settings()),
            SamplingSettings(max_completion_length, drawing.temperature, drawing.top_p, seed=drawing.seed),
            data=DataSettings(**pixels.given()),
            system=system,
            max_length_tokens=max_length_tokens,
            console=Console(),
        )
