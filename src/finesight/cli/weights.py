"""Finds what training left behind: users name the folder of an adapter, of a model, or of the whole run."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finesight.errors import ModelError, RecipeError
from finesight.models.adapter_metadata import ADAPTER_CONFIG, AdapterMetadata, adapter_base, read_metadata
from finesight.recipe import ModelSettings
from finesight.training.checkpoint import newest_valid, written_at
from finesight.training.weights import ADAPTER, MODEL

logger = logging.getLogger(__name__)

QUANTIZED = ("4bit", "8bit", "fp8")


def is_adapter_folder(folder: Path) -> bool:
    """Whether this is a folder with an adapter and no model of its own."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def find_weights(folder: Path) -> Path | None:
    """The folder itself if it holds an adapter or a model, else the one within a run's folder, else None.

    Of a run that was stopped, also one that was stopped after an earlier one had finished there, it is the one of the
    newest valid checkpoint; a warning says which.
    """
    if _holds_weights(folder):
        return folder
    finished = next((path for path in (folder / ADAPTER, folder / MODEL) if _holds_weights(path)), None)
    newer = newest_valid(folder, resumable=False, written_after=None if finished is None else written_at(finished)).path
    for candidate in () if newer is None else (newer / ADAPTER, newer / MODEL):
        if _holds_weights(candidate):
            earlier = "" if finished is None else f" It is newer than {finished}, of an earlier run; name that folder to use it."
            logger.warning("%s has not finished: %s of its newest checkpoint is used.%s", folder, candidate, earlier)
            return candidate
    return finished


def _holds_weights(folder: Path) -> bool:
    return is_adapter_folder(folder) or (folder / "config.json").is_file()


def run_folder(given: Path) -> Path:
    """The run that a folder belongs to: its parent if it is the `adapter` or `model` of one, else the folder itself."""
    return given.absolute().parent if given.name in (ADAPTER, MODEL) else given


def require_weights(folder: Path) -> Path:
    """As :func:`find_weights`.

    Raises:
        ModelError: there is neither an adapter nor a model.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} does not exist. Give the folder of an adapter, of a model, or of a run.")
    found = find_weights(folder)
    if found is None:
        raise ModelError(f"{folder} holds neither an adapter nor a model. Give the folder of one, or of a run that has saved one.")
    return found


def require_trained(run: Path) -> Path:
    """What a recipe's run has trained, as :func:`find_weights`.

    Raises:
        ModelError: there is no such folder, or it holds no trained weights.
    """
    found = find_weights(run) if run.is_dir() else None
    if found is None:
        state = "holds no trained weights yet" if run.is_dir() else "does not exist"
        raise ModelError(
            f"The run folder {run} (training.output_dir) {state}. Train first, name what to judge with --adapter, or judge the base alone "
            "with --base-only."
        )
    return found


def model_settings(
    model: str | None, trained: Path | None, dtype: str = "auto", *, unquantized: bool = False, **precision: bool
) -> ModelSettings:
    """The model to answer with, from a checkpoint, from what training left behind, or both; an adapter knows its base.

    The base of an adapter is loaded in the bits that the adapter was trained over, unless others are asked for.

    Args:
        unquantized: load it in full precision there too.
        precision: load_in_4bit and its siblings of a recipe's `model` section.

    Raises:
        ModelError: neither is given, the folder holds no weights, or an adapter names no base.
        RecipeError: the precisions do not go together.
    """
    if unquantized and (given := [f"--{name.replace('_', '-')}" for name, asked in precision.items() if asked]):
        raise RecipeError(f"--unquantized and {', '.join(given)} cannot be given together: choose one.")
    known: dict[str, Any] = {"dtype": dtype, **precision}
    if trained is None:
        if model is None:
            raise ModelError("No model is named. Give --model (a checkpoint), --adapter (what training wrote), or both.")
        return _settings(name_or_path=model, **known)
    folder = require_weights(trained)
    if not is_adapter_folder(folder):
        return _settings(name_or_path=str(folder), **known)
    metadata = read_metadata(folder)
    if not unquantized and not any(precision.get(f"load_in_{bits}") for bits in QUANTIZED):
        known |= dict.fromkeys(_trained_over(folder, metadata), True)
    if model is None and metadata is not None:
        return _settings(name_or_path=metadata.base, adapter=str(folder), hub=metadata.hub, revision=metadata.revision, **known)
    base = model or adapter_base(folder)
    if not base:
        raise ModelError(f"The adapter in {folder} names no base. Give it with --model.")
    return _settings(name_or_path=base, adapter=str(folder), **known)


def _trained_over(adapter: Path, metadata: AdapterMetadata | None) -> list[str]:
    """The settings of `model` that an adapter's base was quantised by; none where it was not, or cannot be here."""
    if metadata is None or metadata.quantization == "none":
        return []
    if (reason := _unusable(metadata.quantization)) is not None:
        logger.warning("%s was trained over a base in %s, which cannot be used here: %s.", adapter, metadata.quantization, reason)
        return []
    further = [name for name in ("quantize_vocabulary", "quantize_tower") if getattr(metadata, name)]
    parts = ", ".join(name.removeprefix("quantize_") for name in further)
    logger.info(
        "The base is loaded in %s%s, as %s was trained over; --unquantized loads it in full precision.",
        metadata.quantization,
        f" ({parts} quantised too)" if parts else "",
        adapter,
    )
    return [f"load_in_{metadata.quantization}", *further]


def _unusable(quantization: str) -> str | None:
    """Why a base cannot be quantised so on this machine, or None."""
    if quantization == "4bit" and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed (pip install 'finesight[gpu]')"
    if quantization == "fp8":
        from finesight.models.float8 import float8_refusal
        from finesight.models.load import choose_device

        return float8_refusal(choose_device())
    return None


def differing_precision(settings: ModelSettings, adapters: Iterable[Path]) -> list[str]:
    """A warning for each adapter that was trained over a base in other bits than this one is loaded in."""
    found = []
    for folder in adapters:
        metadata = read_metadata(folder)
        if metadata is not None and metadata.quantization != settings.quantization:
            words = ["full precision" if bits == "none" else bits for bits in (metadata.quantization, settings.quantization)]
            found.append(
                f"{folder} was trained over a base in {words[0]}, and the base is loaded in {words[1]}: answers may differ a little."
            )
    return found


def _settings(**given: Any) -> ModelSettings:
    try:
        return ModelSettings(**given)
    except ValidationError as error:
        raise RecipeError("; ".join(str(problem["msg"]).removeprefix("Value error, ") for problem in error.errors()) + ".") from None
