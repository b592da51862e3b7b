"""In which bits the base of an adapter is loaded."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest

from finesight.cli.weights import differing_precision, model_settings
from finesight.errors import RecipeError
from tiny import tiny_checkpoint
from tiny_adapters import make_adapter

BITS = ("load_in_4bit", "load_in_8bit", "load_in_fp8", "quantize_vocabulary", "quantize_tower")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), "qwen3_vl")


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By the bits that they were trained over."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("adapters")
    over = {"none": {}, "8bit": {"load_in_8bit": True}, "4bit": {"load_in_4bit": True, "quantize_vocabulary": True}}
    return {name: make_adapter(checkpoint, folder / name, "qwen3_vl", model=model, tower=False) for name, model in over.items()}


def asked(adapter: Path, **precision: bool) -> set[str]:
    settings = model_settings(None, adapter, **precision)
    return {name for name in BITS if getattr(settings, name)}


def test_those_of_training_unless_others_are_asked_for(adapters: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="finesight"):
        assert asked(adapters["4bit"]) == {"load_in_4bit", "quantize_vocabulary"}
        assert "loaded in 4bit (vocabulary quantised too), as" in caplog.text and "--unquantized" in caplog.text
        caplog.clear()
        assert asked(adapters["8bit"], quantize_tower=True) == {"load_in_8bit", "quantize_tower"}
        caplog.clear()
        assert asked(adapters["none"]) == asked(adapters["4bit"], unquantized=True) == set()
        assert asked(adapters["4bit"], load_in_8bit=True) == {"load_in_8bit"}
        assert not caplog.records
    with pytest.raises(RecipeError, match="--unquantized and --load-in-8bit cannot be given together"):
        asked(adapters["4bit"], load_in_8bit=True, unquantized=True)


def test_of_a_base_that_is_named(adapters: dict[str, Path], checkpoint: Path) -> None:
    settings = model_settings(str(checkpoint), adapters["8bit"])
    assert (settings.name_or_path, settings.quantization) == (str(checkpoint), "8bit")
    assert model_settings(str(checkpoint), None).quantization == "none"


def test_what_cannot_be_done_here_is_said_and_left_out(
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    assert asked(adapters["4bit"]) == set()
    assert "cannot be used here: bitsandbytes is not installed" in caplog.text


def test_adapters_served_together_need_not_agree(adapters: dict[str, Path]) -> None:
    settings = model_settings(None, adapters["8bit"])
    first, second = differing_precision(settings, adapters.values())
    assert "none was trained over a base in full precision, and the base is loaded in 8bit" in first
    assert "4bit was trained over a base in 4bit" in second
