"""What a measurement was made on: GPU, driver, versions, and which code. Imports no torch, starts nothing on the GPU."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "torch", "triton", "transformers", "peft", "accelerate", "torchao", "bitsandbytes", "numpy", "pillow", "unsloth", "unsloth_zoo", "trl",
    "datasets", "liger-kernel",
)  # fmt: skip


@cache
def machine() -> dict[str, Any]:
    """GPU, its driver, processor and operating system. `boot` tells one machine held from another of the same kind."""
    gpus = _gpus()
    return {
        "gpu": gpus[0][0] if gpus else None,
        "gpus": len(gpus),
        "gpu_memory_gib": round(float(gpus[0][1]) / 1024, 1) if gpus else None,
        "driver": gpus[0][2] if gpus else None,
        "processors": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "boot": _boot(gpus),
    }


def _gpus() -> list[list[str]]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,uuid", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[field.strip() for field in line.split(",")] for line in listed.splitlines() if line.strip()]


def _boot(gpus: list[list[str]]) -> str:
    """A short hash of what changes with the machine or its start: rows with the same one were measured side by side."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    start = boot_id.read_text(encoding="ascii").strip() if boot_id.exists() else platform.node()
    return hashlib.sha256(f"{start} {[gpu[-1] for gpu in gpus]}".encode()).hexdigest()[:12]


@cache
def versions() -> dict[str, str]:
    """Versions of the libraries that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def code() -> dict[str, str | None]:
    """The commit (also from BENCH_COMMIT, for copies without their history) and a hash of all sources that are measured."""
    commit = os.environ.get("BENCH_COMMIT") or None
    if commit is None:
        try:
            git = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
            commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            commit = None
    digest = hashlib.sha256()
    for path in sorted((CHECKOUT / "src").rglob("*.py")):
        digest.update(path.relative_to(CHECKOUT).as_posix().encode() + path.read_bytes())
    return {"commit": commit, "sources": digest.hexdigest()[:12]}


def provenance() -> dict[str, Any]:
    """All of it, with the time."""
    return {
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "versions": versions(),
        "code": code(),
    }
