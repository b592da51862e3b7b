"""Options that several commands share: which model answers, in what precision, and how it sees images.

A group of them is a dataclass; a command takes it as one keyword argument, and :func:`with_groups` makes options of its fields.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.NAME=VALUE]…", help="Settings that go before those of the recipe.", show_default=False),
]
RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]

ModelOption = Annotated[str | None, typer.Option(help="Checkpoint: a folder, or a name on the hub.", show_default="the adapter's base")]
AdapterOption = Annotated[Path | None, typer.Option(help="Adapter, fully tuned model or run.")]
SystemOption = Annotated[str | None, typer.Option(help="System prompt.", show_default="the adapter's")]


@dataclass(frozen=True)
class Drawing:
    """How tokens of an answer are drawn."""

    temperature: Annotated[float, typer.Option(help="0: the most likely token each time.")] = 0.0
    top_p: Annotated[float, typer.Option(help="Only the most likely tokens that together have this probability.")] = 1.0
    seed: Annotated[int, typer.Option(help="Of the draws, above temperature 0.")] = 0


@dataclass(frozen=True)
class PixelLimits:
    """Of images; what is not given is left to the adapter or the checkpoint."""

    min_pixels: Annotated[int | None, typer.Option(help="Lower pixel limit of an image.", show_default="as trained")] = None
    max_pixels: Annotated[int | None, typer.Option(help="Upper pixel limit of an image.", show_default="as trained")] = None

    def given(self) -> dict[str, int]:
        """Those that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Precision:
    """Of the weights, by the names of a recipe's `model` section; without any of the bits named those that an adapter was trained over."""

    dtype: Annotated[  # metavar: with all four in it the names of options are cut at 80 columns
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Precision of the base weights: auto, bfloat16, float16 or float32.", metavar="<dtype>"),
    ] = "auto"
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Language model in 4 bits; needs bitsandbytes.")] = False
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="Language model in 8-bit integers.")] = False
    load_in_fp8: Annotated[bool, typer.Option("--load-in-fp8", help="Language model in 8-bit float, on Hopper and newer.")] = False
    quantize_vocabulary: Annotated[
        bool, typer.Option("--quantize-vocabulary", help="With one of these: embedding and lm_head in 8 bits too.")
    ] = False
    quantize_tower: Annotated[bool, typer.Option("--quantize-tower", help="With one of these: tower and merger in the same bits.")] = False

    unquantized: Annotated[
        bool, typer.Option("--unquantized", help="Full precision, also where the adapter was trained over fewer bits.")
    ] = False

    def settings(self) -> dict[str, Any]:
        """As :func:`finesight.cli.weights.model_settings` takes them."""
        return asdict(self)


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its groups as options of their own, in the place of the group.

    Typer reads a command's signature: this one carries the fields' names, annotations and defaults.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if not is_dataclass(group) or not isinstance(group, type):
            parameters.append(parameter)
            continue
        groups[parameter.name] = group
        hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
            for field in fields(group)
        ]

    @functools.wraps(command)
    def called(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return called
