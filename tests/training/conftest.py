"""Checkpoints and rows that many tests of training share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny import tiny_checkpoint
from tiny_runs import write_rows
from training.pair import Pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes that train together; those of one session are the same."""
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL checkpoint folder."""
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "qwen3_vl", "qwen3_vl")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine rows: two questions about each of four images, and one of text alone."""
    return write_rows(tmp_path_factory.mktemp("rows"))
