"""Groups of options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from finesight.cli.commands import chat, predict, serve
from finesight.cli.options import Drawing, PixelLimits, Precision, with_groups
from finesight.recipe import ModelSettings


def test_fields_of_groups_become_options_and_come_back_as_the_group() -> None:
    got: list[object] = []

    def command(
        name: str, *, drawing: Drawing, count: Annotated[int, typer.Option(help="How many.")] = 1, pixels: PixelLimits, precision: Precision
    ) -> None:
        got.extend((name, drawing, count, pixels.given(), precision))

    app = typer.Typer()
    app.command()(with_groups(command))
    runner = CliRunner()
    result = runner.invoke(app, ["x", "--temperature", "0.5", "--max-pixels", "4096", "--load-in-4bit", "--count", "3"])
    assert result.exit_code == 0, result.output
    assert got == ["x", Drawing(temperature=0.5), 3, {"max_pixels": 4096}, Precision(load_in_4bit=True)]
    assert runner.invoke(app, ["x", "--dtype", "int3"]).exit_code == 2


def test_precision_names_settings_of_a_recipe() -> None:
    assert {field.name for field in fields(Precision)} - {"unquantized"} <= set(ModelSettings.model_fields)


@pytest.mark.parametrize("command", [predict.predict, chat.chat, serve.serve])
def test_commands_that_answer_share_them(command: Callable[..., None]) -> None:
    options = inspect.signature(with_groups(command)).parameters
    for group in (PixelLimits, Precision):
        assert [options[field.name].default for field in fields(group)] == [field.default for field in fields(group)]
