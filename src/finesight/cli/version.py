"""What `finesight version` tells: versions of the libraries underneath, and the device that would be used."""

from __future__ import annotations

import platform
from importlib import metadata

from finesight import __version__

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "torchao")


def versions() -> dict[str, str]:
    """Name to version, with the device at the end. Imports torch."""
    found = {"finesight": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "device": _device()}


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        properties = torch.cuda.get_device_properties(0)
        memory_gib = properties.total_memory / 2**30
        return f"{count} x {properties.name}, {memory_gib:.0f} GiB, CUDA {torch.version.cuda}"
    return f"CPU, {torch.get_num_threads()} threads"
