"""What stands in a checkpoint beside its weights: configuration, tokenizer, processor files, and what it was trained under."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from finesight.data.processor import checkpoint_folder
from finesight.errors import ModelError
from finesight.export.stored import INDEX
from finesight.models.adapter_metadata import METADATA, METADATA_FORMAT, AdapterMetadata
from finesight.recipe import ModelSettings

# Patterns of what is copied; weights, in whatever format, and other people's notes on the base are not among them. Nor is the
# manifest of a base that Finesight wrote, whose hashes are those of the base's files.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")
_LEFT = (INDEX, METADATA, "config.json", "adapter_config.json", "manifest.json", "pytorch_model.bin.index.json")


def local_checkpoint(settings: ModelSettings) -> Path:
    """The folder of a base with its weights, fetched from its hub where it is not on the disk.

    Raises:
        ModelError: there is no such checkpoint, or it cannot be fetched.
    """
    name = checkpoint_folder(settings.name_or_path, settings.hub, settings.revision)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=settings.revision, allow_patterns=["*.safetensors", *_COPIED]))
    except (OSError, ValueError) as error:
        raise ModelError(f"{name} cannot be fetched: {str(error).splitlines()[0]} (and there is no folder {name} here)") from error


def write_companions(
    base: Path, folder: Path, dtype: torch.dtype, metadata: AdapterMetadata | None, quantization: Mapping[str, Any] | None = None
) -> None:
    """Copies them from the base, with the precision in config.json and the pixel limits of training in the processor's files.

    Args:
        quantization: `quantization_config` of the new checkpoint; None: it has none, whatever the base had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted({path for pattern in _COPIED for path in base.glob(pattern) if path.name not in _LEFT}):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    _set_dtype(config, str(dtype).removeprefix("torch."))
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    _write(folder / "config.json", config)
    if metadata is None:
        return
    images, videos = (metadata.min_pixels, metadata.max_pixels), (metadata.video_min_pixels, metadata.video_max_pixels)
    _set_limits(folder / "preprocessor_config.json", None, images)
    _set_limits(folder / "video_preprocessor_config.json", None, videos)
    _set_limits(folder / "processor_config.json", "image_processor", images)
    _set_limits(folder / "processor_config.json", "video_processor", videos)
    merged = replace(metadata, quantization="none", quantize_vocabulary=False, quantize_tower=False)
    _write(folder / METADATA, {"format": METADATA_FORMAT, **asdict(merged)})


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    config |= dict.fromkeys(names, dtype)
    for part in ("text_config", "vision_config"):
        for name in ("dtype", "torch_dtype"):
            if name in config.get(part, {}):
                config[part][name] = dtype


def _set_limits(path: Path, part: str | None, limits: tuple[int, int]) -> None:
    """Sets the pixel limits of a processor's file, or of one part of it, so that every engine sees images as training did."""
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    settings = content if part is None else content.get(part)
    if not isinstance(settings, dict):
        return
    settings["size"] = {"shortest_edge": limits[0], "longest_edge": limits[1]}
    for name, value in zip(("min_pixels", "max_pixels"), limits, strict=True):
        if name in settings:  # as older files call them; transformers lets these go first
            settings[name] = value
    _write(path, content)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
