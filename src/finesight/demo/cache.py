"""When a model trained by an earlier demo may be used again: only if all that determines it is the same."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

import finesight
from finesight.demo.settings import DemoSettings
from finesight.errors import CheckpointError
from finesight.training.checkpoint import verify_checkpoint

_LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "numpy", "pillow", "scikit-learn")


def cache_key(settings: DemoSettings, seed: int, device: torch.device, dtype: str) -> str:
    """A digest of what determines the model of stage 1: code, libraries, settings, seed and kind of machine."""
    package = Path(finesight.__file__).parent
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    content = {
        "code": code.hexdigest(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "settings": [asdict(part) for part in (settings.scene, settings.model, settings.reading)],
        "seed": seed,
        "machine": [device.type, platform.machine(), dtype],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def is_whole(model: Path) -> bool:
    """Whether a trained model lies there, every file as it was written."""
    try:
        verify_checkpoint(model)
    except CheckpointError:
        return False
    return True
