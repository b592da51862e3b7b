"""What an adapter (or a whole model) was trained under: `finesight.json` and peft's `adapter_config.json`, read without weights.

`finesight.json` keeps what peft does not: the pixel limits, frame sampling and system prompt that the adapter was
trained with, so that inference sees images as training did. Needs no torch.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import metadata as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finesight import __version__
from finesight.data_settings import DataSettings
from finesight.errors import ModelError
from finesight.recipe import Recipe

if TYPE_CHECKING:
    from finesight.data.processor import Processor

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
METADATA = "finesight.json"
METADATA_FORMAT = 1
# Stacks of experts, as peft's `target_parameters` names them: it compares the ends of names.
EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

# Settings of the data section that inference takes over from the adapter unless they are given anew.
_RESTORED = ("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels", "fps", "max_frames", "image_first")


@dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter (or a whole model) was trained under. Pixel limits are the resolved ones, in pixels, never None."""

    base: str  # model.name_or_path of the recipe; a folder as an absolute path
    family: str  # model_type of the base
    min_pixels: int
    max_pixels: int
    video_min_pixels: int  # of one frame for Qwen2.5-VL, of the whole video for Qwen3-VL
    video_max_pixels: int
    fps: float  # frames sampled a second
    max_frames: int
    image_first: bool = False
    system: str | None = None  # the one system prompt of all training sources, if they have one
    hub: str = "huggingface"
    revision: str | None = None
    quantization: str = "none"  # of the base that it was trained over: none, 4bit, 8bit or fp8
    quantize_vocabulary: bool = False
    quantize_tower: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)  # of Finesight, Python and the libraries underneath


def library_versions() -> dict[str, str]:
    """Versions of Finesight, Python and the libraries that a result depends on."""
    versions = {"finesight": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes"):
        try:
            versions[name] = installed.version(name)
        except installed.PackageNotFoundError:
            continue
    return versions


def adapter_metadata(recipe: Recipe, processor: Processor) -> AdapterMetadata:
    """What is to be kept beside an adapter trained with this recipe and processor."""
    base = recipe.model.name_or_path
    systems = {source.system for source in recipe.data.train}
    return AdapterMetadata(
        base=str(Path(base).resolve()) if Path(base).is_dir() else base,
        family=processor.family.model_type,
        min_pixels=processor.image_limits.min_pixels,
        max_pixels=processor.image_limits.max_pixels,
        video_min_pixels=processor.video_limits.min_pixels,
        video_max_pixels=processor.video_limits.max_pixels,
        fps=processor.fps,
        max_frames=processor.max_frames,
        image_first=recipe.data.image_first,
        system=systems.pop() if len(systems) == 1 else None,
        hub=recipe.model.hub,
        revision=recipe.model.revision,
        quantization=recipe.model.quantization,
        quantize_vocabulary=recipe.model.quantize_vocabulary,
        quantize_tower=recipe.model.quantize_tower,
        versions=library_versions(),
    )


def adapter_base(folder: str | Path) -> str | None:
    """The base that an adapter folder names, or None if it names none.

    Raises:
        ModelError: the folder is no adapter folder.
    """
    return cast("str | None", _read_json(checked_folder(folder) / ADAPTER_CONFIG).get("base_model_name_or_path"))


def adapter_shape(folder: str | Path) -> dict[str, Any]:
    """The settings of `tuning` that an adapter folder has fixed.

    Raises:
        ModelError: the folder holds no adapter.
    """
    path = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read: {error}. Set model.adapter to a folder that holds an adapter (of a run: its adapter/)."
        ) from None
    shape = {name: config[name] for name in ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora") if config.get(name) is not None}
    return shape | {"finetune_experts": any(name in EXPERT_PARAMETERS for name in config.get("target_parameters") or ())}


def read_metadata(folder: str | Path) -> AdapterMetadata | None:
    """What an adapter was trained under; None for an adapter that other software wrote (no `finesight.json`).

    Raises:
        ModelError: `finesight.json` is damaged or of a newer format.
    """
    path = Path(folder).expanduser() / METADATA
    if not path.is_file():
        return None
    content = _read_json(path)
    if content.get("format") != METADATA_FORMAT:
        raise ModelError(
            f"{path} has format {content.get('format')!r}, this version reads {METADATA_FORMAT}. Use the version of Finesight that wrote it."
        )
    known = {f.name for f in fields(AdapterMetadata)}
    try:
        return AdapterMetadata(**{key: value for key, value in content.items() if key in known})
    except TypeError as error:
        raise ModelError(f"{path} is incomplete ({error}). Restore it from the run that wrote the adapter, or delete it.") from None


def restore_data_settings(folder: str | Path, given: DataSettings | None = None) -> tuple[DataSettings, list[str]]:
    """Data settings for inference with a trained adapter or model: as it was trained, except where `given` says otherwise.

    Returns the settings, and a warning for each one that overrides what was trained with. An adapter without
    `finesight.json` changes nothing and is warned about.

    Raises:
        ModelError: the folder has neither an adapter nor `finesight.json`, or as in :func:`read_metadata`.
    """
    given = given or DataSettings()
    metadata = read_metadata(folder)
    if metadata is None:
        checked_folder(folder)
        return given, [
            f"{folder} has no {METADATA}: the pixel limits that it was trained with are not known, those of the checkpoint are used. "
            "Set data.min_pixels and data.max_pixels as in training."
        ]
    restored: dict[str, Any] = {}
    notes: list[str] = []
    for name in _RESTORED:
        trained = getattr(metadata, name)
        asked = getattr(given, name)
        if name in given.model_fields_set and asked is not None:
            if asked != trained:
                notes.append(
                    f"data.{name} is {asked}, but {folder} was trained with {trained}: answers may be worse. Leave it out to use {trained}."
                )
        else:
            restored[name] = trained
    return given.model_copy(update=restored), notes


def checked_folder(folder: str | Path) -> Path:
    """The folder, expanded, if it holds an adapter.

    Raises:
        ModelError: it does not exist, or a file of an adapter is missing.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ModelError(f"Adapter folder {folder} does not exist. Give the folder that holds {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}.")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is no adapter folder: {name} is missing (only safetensors are read).")
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold an object, not a {type(content).__name__}.")
    return content
