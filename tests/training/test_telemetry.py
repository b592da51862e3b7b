"""Metrics on the disk, the view on a terminal and off it, trackers."""

from __future__ import annotations

import importlib.util
import io
import json

import pytest
from rich.console import Console

from finesight.errors import RecipeError
from finesight.recipe_files import parse_recipe
from finesight.training import telemetry as telemetry_module
from finesight.training.telemetry import (
    METRICS,
    MetricsFile,
    StepFigures,
    Telemetry,
    duration,
    padding_saved,
    progress,
    read_metrics,
)
from finesight.training.trackers import check_trackers, flat_settings, tracker_arguments
from finesight.wording import counted


def figures(step, loss=1.0, **values):
    content = dict(
        step=step, epoch=step / 4, loss=loss, grad_norm=0.5, learning_rates={"language_model": 1e-4}, seconds=0.5, num_samples=4,
        num_tokens=50, unshared_tokens=100, padded_tokens=125, num_targets=10, memory_bytes=2**30,
    )  # fmt: skip
    return StepFigures(**{**content, **values})


def test_one_line_each_logging_step_with_means_over_the_window(tmp_path):
    with Telemetry(tmp_path, total_steps=5, logging_steps=2) as telemetry:
        for step, loss, targets in ((1, 1.0, 10), (2, 4.0, 30), (3, 1.0, 10), (4, 1.0, 10), (5, 7.0, 10)):
            telemetry.step(figures(step, loss, num_targets=targets))
    lines = read_metrics(tmp_path / METRICS)
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert lines[0]["loss"] == pytest.approx((1.0 * 10 + 4.0 * 30) / 40)
    assert lines[0]["samples_per_s"] == 8.0 and lines[0]["supervised_tokens_per_s"] == 40.0
    assert lines[0]["padding_saved"] == pytest.approx(0.2) and lines[0]["sharing_ratio"] == 2.0
    assert telemetry.history == lines


def test_lines_are_on_disk_at_once(tmp_path):
    with Telemetry(tmp_path, total_steps=5) as telemetry:
        telemetry.step(figures(1))
        assert json.loads((tmp_path / METRICS).read_text())["step"] == 1


def test_resume_removes_later_and_torn_lines(tmp_path):
    path = tmp_path / METRICS
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "lo')
    file = MetricsFile(path, resumed_step=2)
    file.write({"step": 3, "loss": 0.5})
    file.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1}\n')
    with Telemetry(tmp_path, total_steps=1):
        pass
    assert read_metrics(tmp_path / METRICS) == []


def test_plain_lines_without_a_terminal(tmp_path):
    out = io.StringIO()
    with Telemetry(tmp_path, total_steps=3, console=Console(file=out, width=200)) as telemetry:
        for step in (1, 2, 3):
            telemetry.step(figures(step))
        telemetry.evaluation(3, {"eval_loss": 0.25, "eval_samples": 7})
        telemetry.message("saved [checkpoint-3]")
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["1/3", "3/3"]  # the one between came too soon
    assert "loss 1.0000" in lines[0] and "left" in lines[0]
    assert "eval_loss 0.25" in lines[2] and lines[3] == "saved [checkpoint-3]"
    assert "\x1b" not in out.getvalue()


def test_live_view_on_a_terminal(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, height=30)
    with Telemetry(tmp_path, total_steps=2, console=console) as telemetry:
        telemetry.step(figures(1))
        telemetry.step(figures(2, learning_rates={"tower": 1e-5, "language_model": 1e-4}))
    text = out.getvalue()
    for shown in ("supervised tokens/s", "padding saved", "sharing ratio", "memory", "1.00 GiB", "20%", "2/2"):
        assert shown in text, shown
    assert read_metrics(tmp_path / METRICS)[1]["learning_rate_tower"] == 1e-5


def test_trackers_get_numbers_with_prefixes(tmp_path):
    seen = []
    with Telemetry(tmp_path, total_steps=1, track=lambda values, step: seen.append((step, values))) as telemetry:
        telemetry.step(figures(1))
        telemetry.evaluation(1, {"eval_loss": 0.5, "note": "text"})
    assert seen[0][0] == 1 and seen[0][1]["train/loss"] == 1.0
    assert seen[1] == (1, {"eval/loss": 0.5})


def test_other_processes_write_nothing(tmp_path):
    with Telemetry(tmp_path, total_steps=1, main_process=False, console=Console(file=io.StringIO())) as telemetry:
        telemetry.step(figures(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_of_preparation(terminal, monkeypatch):
    monkeypatch.setattr(telemetry_module, "PLAIN_INTERVAL_S", 0.0)
    out = io.StringIO()
    with progress(Console(file=out, force_terminal=terminal, width=100), "Encoding", 2) as advance:
        advance(1)
        advance(1)
    assert "Encoding" in out.getvalue() and ("2/2" if terminal else "2 of 2") in out.getvalue()


def test_progress_may_be_silent():
    with progress(None, "Encoding", 2) as advance:
        advance(1)


def test_duration_and_padding_read_well():
    assert [duration(s) for s in (8.21, 185, 7800)] == ["8.2 s", "3 min 05 s", "2 h 10 min"]
    assert padding_saved(0, 0) == 0.0
    assert [counted(n, "step") for n in (0, 1, 2, 1200, 1.0, 2.5)] == ["0 steps", "1 step", "2 steps", "1,200 steps", "1 step", "2.5 steps"]


def recipe(**training):
    return parse_recipe({"model": {"name_or_path": "b"}, "data": {"train": ["a.jsonl", "b.jsonl"]}, "training": training})


def test_flat_settings_are_plain_values():
    flat = flat_settings(recipe(learning_rate=2e-5))
    assert flat["training.learning_rate"] == 2e-5 and flat["data.train.1.path"] == "b.jsonl" and flat["training.max_steps"] == "None"
    assert all(isinstance(value, (str, int, float, bool)) for value in flat.values())


def test_missing_tracker_is_named_with_its_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "swanlab" else find(name))
    with pytest.raises(RecipeError, match=r"swanlab is not installed.*finesight\[trackers\]"):
        check_trackers(["swanlab"])


def test_trackers_stay_offline_unless_the_user_says_otherwise(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "SWANLAB_MODE", "MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    arguments = tracker_arguments(["wandb", "swanlab", "mlflow"], tmp_path)
    assert arguments["wandb"]["mode"] == arguments["swanlab"]["mode"] == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("SWANLAB_MODE", "cloud")
    arguments = tracker_arguments(["wandb", "swanlab"], tmp_path)
    assert (arguments["wandb"]["mode"], arguments["swanlab"]["mode"]) == ("online", "cloud")


@pytest.mark.parametrize("name", ["tensorboard", "swanlab", "wandb", "mlflow"])
def test_tracker_writes_locally(tmp_path, name, monkeypatch):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    arguments = tracker_arguments([name], tmp_path)
    configuration = ProjectConfiguration(project_dir=str(tmp_path), logging_dir=str(tmp_path / "logs"))
    accelerator = Accelerator(cpu=True, log_with=[name], project_config=configuration)
    accelerator.init_trackers("finesight", config=flat_settings(recipe()), init_kwargs=arguments)
    accelerator.log({"train/loss": 1.0}, step=1)
    accelerator.end_training()
    assert [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_hit_rate_is_that_of_the_steps_of_a_line(tmp_path):
    items = ((0, 4), (0, 2), (3, 1), (2, 0), (0, 0), (0, 0), (5, 0))
    with Telemetry(tmp_path, total_steps=7, logging_steps=2) as telemetry:
        for step, (stored, computed) in enumerate(items, start=1):
            telemetry.step(figures(step, stored_items=stored, computed_items=computed))
    lines = read_metrics(tmp_path / METRICS)
    assert [line.get("feature_hit_rate") for line in lines] == [0.0, pytest.approx(5 / 6), None, 1.0]  # steps of text alone have none


def test_no_hit_rate_where_nothing_is_kept(tmp_path):
    with Telemetry(tmp_path, total_steps=1) as telemetry:
        telemetry.step(figures(1, computed_items=3))
    assert "feature_hit_rate" not in read_metrics(tmp_path / METRICS)[0]
