"""Experiment trackers through accelerate: each optional, imported only when asked for, local by default.

Nothing leaves the machine unless the user says so by the tracker's own environment variable (`WANDB_MODE`,
`SWANLAB_MODE`, `MLFLOW_TRACKING_URI`, `TRACKIO_SPACE_ID`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finesight.errors import RecipeError
from finesight.recipe import Recipe

LOGS = "logs"


def check_trackers(report_to: Sequence[str]) -> None:
    """Refuses trackers that are not installed, before anything long has begun.

    Raises:
        RecipeError: names the tracker and the extra that brings it.
    """
    for name in report_to:
        modules = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if not any(importlib.util.find_spec(module) for module in modules):
            raise RecipeError(
                f"training.report_to: {name} is not installed; pip install {name} (or 'finesight[trackers]' for all of them), "
                "or take it out of training.report_to"
            )


def tracker_arguments(report_to: Sequence[str], output_dir: Path) -> dict[str, dict[str, Any]]:
    """Arguments for each tracker's own start, as `Accelerator.init_trackers(init_kwargs=…)` takes them.

    Environment variables that a tracker reads when it is imported are set here where the user has not set them.
    """
    logs = output_dir.resolve() / LOGS
    arguments: dict[str, dict[str, Any]] = {}
    if report_to:
        logs.mkdir(parents=True, exist_ok=True)
    if "wandb" in report_to:
        arguments["wandb"] = {"name": output_dir.name, "dir": str(logs), "mode": os.environ.get("WANDB_MODE", "offline")}
    if "swanlab" in report_to:
        mode = os.environ.get("SWANLAB_MODE", "offline")
        arguments["swanlab"] = {"experiment_name": output_dir.name, "logdir": str(logs / "swanlab"), "mode": mode}
    if "trackio" in report_to:
        arguments["trackio"] = {"name": output_dir.name}
    if "mlflow" in report_to:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{logs / 'mlflow.db'}")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        arguments["mlflow"] = {"run_name": output_dir.name, "logging_dir": str(logs / "mlflow")}
    return arguments


def flat_settings(recipe: Recipe) -> dict[str, str | int | float | bool]:
    """The recipe as the flat dict of plain values that all trackers accept; lists and None as text."""
    flat: dict[str, str | int | float | bool] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else str(name), inner)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for index, inner in enumerate(value):
                walk(f"{prefix}.{index}", inner)
        else:
            flat[prefix] = value if isinstance(value, (bool, int, float, str)) else str(value)

    walk("", recipe.model_dump(mode="json"))
    return flat
