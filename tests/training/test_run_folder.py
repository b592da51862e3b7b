"""Folders of runs: what is read of them, what they lack, how they differ, and their end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finesight.cli import main
from finesight.errors import CheckpointError
from finesight.recipe_files import dump_recipe, parse_recipe
from finesight.training.checkpoint import write_checkpoint
from finesight.training.run_folder import delete_run, differing_settings, find_runs, is_run, read_run


def written_run(folder: Path, *, ended: bool = True, learning_rate: float = 1e-4) -> Path:
    """A run's folder with the files that a run writes."""
    folder.mkdir(parents=True)
    recipe = parse_recipe({"model": {"name_or_path": "base"}, "training": {"output_dir": str(folder), "learning_rate": learning_rate}})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')

    def fill(place: Path) -> None:
        (place / "trainer.json").write_text(json.dumps({"state": {"step": 2, "last_loss": 1.5}, "data_fingerprint": "abc"}))

    write_checkpoint(folder, 2, fill, {"resumable": True})
    if ended:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "recipe.yaml").write_text(dump_recipe(recipe))
        run = {"stop_reason": "finished", "state": {"step": 4, "last_loss": 1.0}, "data_fingerprint": "abc", "versions": {"torch": "2"}}
        (folder / "run.json").write_text(json.dumps(run))
        (folder / "eval").mkdir()
        (folder / "eval" / "report.html").write_text("<html>")
    return folder


def test_a_run_that_ended(tmp_path: Path) -> None:
    run = read_run(written_run(tmp_path / "one"))
    assert run.status == "finished" and run.missing == () and run.weights == tmp_path / "one" / "adapter"
    assert run.figures() == {"steps": 4, "last loss": 1.0} and len(run.metrics) == 2 and run.num_bytes > 0
    for name, lacking in (("run.json", ("versions",)), ("metrics.jsonl", ("versions", "metrics"))):
        (tmp_path / "one" / name).unlink()
        assert read_run(tmp_path / "one").missing == lacking  # the fingerprint also stands in the checkpoint


def test_a_run_that_was_cut_off(tmp_path: Path) -> None:
    run = read_run(written_run(tmp_path / "one", ended=False))
    assert run.status == "stopped or running" and run.data_fingerprint == "abc" and run.figures() == {"steps": 2, "last loss": 1.5}
    assert run.missing == ("versions", "report")


def test_what_reinforcement_came_to(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # a row of a table stays one line
    folder, supervised = written_run(tmp_path / "learned"), written_run(tmp_path / "taught")
    recipe = {"model": {"name_or_path": "base"}, "grpo": {"num_generations": 4}, "rewards": ["math"]}
    (folder / "recipe.yaml").write_text(dump_recipe(parse_recipe(recipe)))
    lines = [
        {"step": 1, "reward": 0.25},
        {"step": 1, "eval_reward": 0.75},
        {"step": 2, "reward": 0.5},
        {"step": 2, "eval_reward": float("nan")},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for run in (folder, supervised):
        content = json.loads((run / "run.json").read_text())
        content["state"]["best_metric"] = 0.875
        (run / "run.json").write_text(json.dumps(content))
    rewards = {"last reward": 0.5, "last held-out reward": 0.75, "highest held-out reward": 0.875}
    assert read_run(folder).figures() == {"steps": 4, "last loss": 1.0, **rewards}
    assert read_run(supervised).figures() == {"steps": 4, "last loss": 1.0, "lowest held-out loss": 0.875}
    for command in (["list", str(tmp_path)], ["compare", str(folder), str(supervised)]):
        with pytest.raises(SystemExit) as ended:
            main(["runs", *command])
        shown = capsys.readouterr().out
        assert not ended.value.code and "0.5000" in shown and shown.count("0.8750") == 2


def test_runs_in_a_folder(tmp_path: Path) -> None:
    runs = [written_run(tmp_path / "a"), written_run(tmp_path / "group" / "b", ended=False)]
    (tmp_path / "other").mkdir()
    assert find_runs(tmp_path) == runs and find_runs(runs[0]) == runs[:1]
    assert not is_run(runs[0] / "adapter")  # which keeps the recipe too
    with pytest.raises(CheckpointError, match="does not exist"):
        find_runs(tmp_path / "none")


@pytest.mark.parametrize("terminal", [True, False])
def test_the_list_cuts_no_name(terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [written_run(tmp_path / f"a-run-with-a-long-name-{number}", ended=number == 1) for number in (1, 2)]
    monkeypatch.setenv("COLUMNS", "80")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(SystemExit) as ended:
        main(["runs", "list", str(tmp_path)])
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert not ended.value.code and "…" not in shown
    lines = [next(line for line in shown.splitlines() if str(run) in line) for run in runs]
    assert "finished" in lines[0] and "stopped or running" in lines[1] and "versions, report" in shown
    assert "held-out loss" not in shown  # none was measured
    assert ("┃" in shown) != terminal  # a table as wide as it must be, or a block for each run


def test_settings_that_differ(tmp_path: Path) -> None:
    runs = [read_run(written_run(tmp_path / name, learning_rate=rate)) for name, rate in (("a", 1e-4), ("b", 2e-4))]
    assert differing_settings(runs) == {"training.learning_rate": [1e-4, 2e-4]}


def test_a_recipe_of_another_version(tmp_path: Path) -> None:
    folder = written_run(tmp_path / "one")
    (folder / "recipe.yaml").write_text("model: {name_or_path: base, gone: 1}\n")
    run = read_run(folder)
    assert run.recipe is None and run.recipe_problem is not None and "gone" in run.recipe_problem and run.missing == ("recipe",)


def test_delete(tmp_path: Path) -> None:
    folder = written_run(tmp_path / "one")
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(CheckpointError, match="is a link"):
        delete_run(read_run(tmp_path / "link"))
    delete_run(read_run(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("content", ["nothing", "[]"])
def test_damage_is_named(content: str, tmp_path: Path) -> None:
    folder = written_run(tmp_path / "one")
    (folder / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run.json"):
        read_run(folder)
    with pytest.raises(CheckpointError, match="is not the folder of a run"):
        read_run(tmp_path)
