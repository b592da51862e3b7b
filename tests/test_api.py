"""The Python API: names are found lazily, the words are those of the command, and the example runs as it stands."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import finesight
from tiny import tiny_checkpoint

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
EXAMPLE = EXAMPLES / "finetune_charts.py"


@pytest.mark.parametrize("name", finesight.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(finesight, name) is not None
    assert name in dir(finesight)


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match="SFTTrainer"):
        _ = finesight.Trainer


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As a reader would call it, with a tiny model and few charts."""
    model = tiny_checkpoint(tmp_path / "model", "qwen3_vl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--model", str(model), "--charts", "4", "--max-steps", "2", "--output", "runs/charts"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "charts: 0.0% ->" in printed
    assert Path("runs/charts/run/adapter/adapter_model.safetensors").is_file()
    assert len(Path("runs/charts/data/train.jsonl").read_text(encoding="utf-8").splitlines()) == 8
    loaded = finesight.load(str(model), adapter="runs/charts/run/adapter")
    assert loaded.metadata is not None and loaded.metadata.family == "qwen3_vl"


def test_the_example_of_reinforcement_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = EXAMPLES / "reinforce_counting.py"
    model = tiny_checkpoint(tmp_path / "model", "qwen3_vl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", [str(example), "--model", str(model), "--pictures", "4", "--max-steps", "2", "--output", "runs/counting"]
    )
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert "held-out reward:" in printed and "report: runs/counting/report.html" in printed
    assert Path("runs/counting/adapter/adapter_model.safetensors").is_file() and Path("runs/counting/report.html").is_file()
