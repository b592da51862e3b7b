"""Arguments of `finesight demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder that everything is written to.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of scenes, weights and the order of rows.")] = 0,
) -> None:
    """See the whole path in minutes, on a CPU, without a network.

    A tiny Qwen3-VL learns to read real scans of digits; an adapter then teaches it new questions. Measured before and after.
    The extra `demo` (scikit-learn, which carries the scans) must be installed.
    """
    from finesight.demo import run_demo

    run_demo(output, seed=seed, console=Console())
