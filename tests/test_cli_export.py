"""`finesight export` and `finesight runs` on the run of a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from rich.console import Console
from safetensors.torch import load_file

from finesight.cli import main
from finesight.cli.export import rows_of_run
from finesight.models.load import load_model
from finesight.recipe import ModelSettings
from finesight.recipe_files import dump_recipe
from finesight.training.run import train
from tiny import tiny_checkpoint
from tiny_adapters import make_adapter
from tiny_runs import tiny_recipe, write_rows

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls the command in this process: exit status, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as done:
            status = int(done.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps with a checkpoint after each; never changed by a test."""
    folder = tmp_path_factory.mktemp("trained")
    checkpoint = tiny_checkpoint(folder / "base", "qwen3_vl")
    (checkpoint / "manifest.json").write_text('{"format": 1, "files": {}}')  # as a fully tuned base of ours has one
    rows = write_rows(folder / "data")
    train(
        tiny_recipe(
            checkpoint, rows, folder / "runs" / "first", training={"save_strategy": "steps", "save_steps": 1, "train_batch_size": 5}
        )
    )
    return folder


def test_merged_from_a_run(trained: Path, call: Call, tmp_path: Path) -> None:
    status, out, err = call("export", trained / "runs" / "first", "--to", "merged", "-o", tmp_path / "out", "--dtype", "float32")
    assert status == 0, err
    assert (
        out.strip() == str(tmp_path / "out")
        and "Verified on 3 rows of the run's data: log-probabilities" in err
        and "3 of 3 greedy answers are the same" in err
    )
    assert "Of the adapter's update 100.0% arrived" in err
    load_model(ModelSettings(name_or_path=str(tmp_path / "out")), device="cpu")
    files = [*(tmp_path / "out").iterdir(), *(trained / "runs" / "first" / "adapter").iterdir()]
    (tmp_path / "usual").touch()
    assert {path.stat().st_mode for path in files} == {(tmp_path / "usual").stat().st_mode}
    assert not (tmp_path / "out" / "manifest.json").exists()  # nobody wrote one for these files


def test_an_existing_folder_is_refused_before_anything_is_loaded(trained: Path, call: Call, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("")
    monkeypatch.setattr("finesight.export.export.load_model", lambda *_, **__: pytest.fail("loaded"))
    status, _, err = call("export", trained / "runs" / "first", "--to", "merged", "-o", tmp_path / "out")
    assert status == 2 and "exists already" in err and "Verified" not in err


def test_rows_without_answers_are_asked(trained: Path, tmp_path: Path) -> None:
    """Those of reinforcement; where no row has an image it is said."""
    said = StringIO()
    rows = [json.loads(line) for line in (trained / "data" / "rows.jsonl").read_text().splitlines()]
    for name, kept in (("prompts", rows[:4]), ("texts", rows[-1:])):
        data = trained / "data" / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"messages": row["messages"][:-1]}) + "\n" for row in kept))
        (tmp_path / name).mkdir()
        recipe = tiny_recipe(trained / "base", data, tmp_path / name)
        (tmp_path / name / "recipe.yaml").write_text(dump_recipe(recipe))
    asked = rows_of_run(tmp_path / "prompts", tmp_path / "prompts", 3, Console(file=said))
    assert len(asked) == 3 and all(row.answer is None for row in asked) and not said.getvalue()
    assert not rows_of_run(tmp_path / "texts", tmp_path / "texts", 3, Console(file=said)) and "has an image" in said.getvalue()


def test_adapter_where_the_data_is_gone(trained: Path, call: Call, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "moved")
    run = tmp_path / "moved" / "runs" / "first"
    text = (run / "recipe.yaml").read_text().replace(str(trained / "data"), str(tmp_path / "nowhere"))
    (run / "recipe.yaml").write_text(text)
    status, _, err = call("export", run / "adapter", "--to", "adapter", "--prompts", 1, "-o", tmp_path / "out")
    assert status == 0 and "the run's data cannot be read from here" in err and "Verified on drawn images: " in err
    assert PeftConfig.from_pretrained(str(tmp_path / "out")).r == 4


def test_merged_from_an_adapter_over_a_quantised_base(trained: Path, call: Call, tmp_path: Path) -> None:
    """The checkpoint is read as it is stored; --base says into which of its values is merged."""
    adapter = make_adapter(trained / "base", tmp_path / "adapter", "qwen3_vl", model={"load_in_8bit": True})
    for base in ("trained", "stored"):
        command = ("export", adapter, "--to", "merged", "--base", base, "--dtype", "float32", "--prompts", 1)
        status, _, err = call(*command, "-o", tmp_path / base)
        assert status == 0, err
        assert "--unquantized" not in err and ("these stand for" in err) is (base == "trained")
    weights = [load_file(tmp_path / base / "model.safetensors") for base in ("trained", "stored")]
    assert not torch.equal(*(each["model.language_model.layers.0.mlp.up_proj.weight"] for each in weights))


def test_hub_is_asked_for_first(trained: Path, call: Call, tmp_path: Path) -> None:
    status, _, err = call("export", trained / "runs" / "first", "--to", "hub", "-o", tmp_path / "out")
    assert status == 2 and "needs --repo" in err and not (tmp_path / "out").exists()


def test_hub_without_a_network(trained: Path, call: Call, tmp_path: Path) -> None:
    """Everything up to the upload: the folder with its card stays."""
    status, _, err = call(
        "export",
        trained / "runs" / "first",
        "--to",
        "hub",
        "--repo",
        "me/first",
        "--license",
        "mit",
        "--drawn",
        "--prompts",
        1,
        "-o",
        tmp_path / "out",
    )
    assert status == 2 and "upload to me/first failed" in err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and "rows.jsonl" in card and str(trained) not in card and "last training loss" in card
    assert json.loads((trained / "runs" / "first" / "run.json").read_text())["data_fingerprint"] in card


def test_gguf_without_llama_cpp(trained: Path, call: Call, tmp_path: Path, monkeypatch) -> None:
    """It is said before anything is merged."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    status, _, err = call("export", trained / "runs" / "first", "--to", "gguf", "--drawn", "--prompts", 1, "-o", tmp_path / "out")
    assert status == 2 and "convert_hf_to_gguf.py was not found" in err and not (tmp_path / "out").exists()


def test_list_and_compare(trained: Path, call: Call, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    shutil.copytree(trained / "runs" / "first", tmp_path / "runs" / "second")
    recipe = tmp_path / "runs" / "second" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("learning_rate: 0.01", "learning_rate: 0.02"))
    status, out, _ = call("runs", "list", tmp_path / "runs")
    assert status == 0 and "first" in out and "second" in out and "report" in out and "versions" not in out
    status, out, _ = call("runs", "compare", tmp_path / "runs" / "first", tmp_path / "runs" / "second")
    assert status == 0 and "training.learning_rate" in out and "0.02" in out and "training.seed" not in out
    assert call("runs", "compare", tmp_path / "runs" / "first")[0] == 2
    assert "There are no runs" in call("runs", "list", trained / "data")[1]


def test_resume_with_the_runs_own_recipe(trained: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that lost its last step goes on from the one before, wherever its folder lies now."""
    run = tmp_path / "elsewhere"
    shutil.copytree(trained / "runs" / "first", run)
    before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    for name in ("checkpoint-2", "adapter"):
        shutil.rmtree(run / name)
    status, out, err = call("runs", "resume", run)
    assert status == 0, err
    assert "Going on from" in out and "step 1 of 2" in out
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before
    status, _, err = call("runs", "resume", run, "training.max_steps=60")
    assert status == 2 and "A resumed run keeps its settings; training.max_steps=60 cannot be changed here" in err
    assert "was begun in" not in out
    begun_in = Path.cwd()
    monkeypatch.chdir(tmp_path)
    status, out, err = call("runs", "resume", "elsewhere")
    assert status == 0, err
    assert f"cd {begun_in} && finesight runs resume {run}\n" in out and f"present folder, {tmp_path}." in out
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    status, _, err = call("runs", "resume", run)
    assert status == 2 and "no checkpoint to go on from" in err


def test_delete_asks(trained: Path, call: Call, tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "runs" / "first", run)
    asked: list[str] = []
    monkeypatch.setattr("typer.confirm", lambda text, default: asked.append(text))
    assert call("runs", "delete", run)[0] == 1 and run.is_dir() and "2 checkpoints, adapter" in asked[0]
    shutil.rmtree(run / "checkpoint-1")
    status, out, _ = call("runs", "delete", run, "--yes")
    assert status == 0 and not run.exists() and "1 checkpoint, adapter" in out
    status, _, err = call("runs", "delete", trained / "data", "--yes")
    assert status == 2 and "is not the folder of a run" in err and (trained / "data").is_dir()
