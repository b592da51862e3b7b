"""What every test stands on: no network, no CUDA tests without CUDA, quiet libraries."""

from __future__ import annotations

import os
from pathlib import Path

# Set before any Hugging Face library is imported, in this process and in those that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
EXAMPLE_DATA = CHECKOUT / ".." / "shared" / "data"  # beside the checkout; only some machines have it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks everything under tests/gpu as `gpu`, and leaves `gpu` out where there is no CUDA device."""
    for item in items:
        if "gpu" in item.path.relative_to(CHECKOUT).parts:
            item.add_marker(pytest.mark.gpu)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # only now: most runs of a single file need no torch

    if torch.cuda.is_available():
        return
    config.hook.pytest_deselected(items=on_gpu)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(scope="session")
def example_data() -> Path:
    """The folder with the example data that users bring; the test is skipped where it is missing."""
    if not EXAMPLE_DATA.is_dir():
        pytest.skip("the example data folders (shared/data beside the checkout) are not on this machine")
    return EXAMPLE_DATA.resolve()
