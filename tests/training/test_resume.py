"""Going on bit for bit: an interrupted and resumed run ends with the weights of one that was never interrupted."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from finesight.errors import CheckpointError
from finesight.recipe_files import dump_recipe
from finesight.training.checkpoint import list_checkpoints, newest_valid
from finesight.training.prepare import prepare
from finesight.training.processes import start_accelerator
from finesight.training.run import train
from finesight.training.session import Session
from finesight.training.sft import SupervisedFineTuning
from finesight.training.telemetry import read_metrics
from tiny_runs import tiny_recipe


class Interrupting(SupervisedFineTuning):
    """Sends SIGTERM while a step is computed."""

    def __init__(self, at_step: int) -> None:
        self.at_step, self.seen = at_step, set()

    def loss(self, logprobs, batch, step):
        if (step.epoch, step.index) not in self.seen and len(self.seen) + 1 == self.at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        self.seen.add((step.epoch, step.index))
        return super().loss(logprobs, batch, step)


def interrupted(recipe, at_step: int):
    accelerator = start_accelerator(recipe, Path(recipe.training.output_dir), torch.device("cpu"))
    return Session(prepare(recipe), accelerator, algorithm=Interrupting(at_step)).run()


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def losses(output_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(output_dir / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize(
    ("model", "tuning", "training"),
    [
        ({}, {"lora_dropout": 0.3}, {}),
        ({}, {"lora_dropout": 0.3, "bias": "all", "finetune_vision_layers": True}, {"num_workers": 2, "lr_scheduler_type": "linear"}),
        ({}, {"method": "full", "finetune_vision_layers": True, "finetune_merger": True}, {"optim": "muon"}),
        ({"dtype": "bfloat16"}, {"method": "full"}, {}),
        ({"dtype": "bfloat16"}, {"method": "full", "bf16_updates": "stochastic_rounding"}, {}),
        ({"dtype": "float16"}, {"lora_dropout": 0.1}, {}),
        ({"dtype": "bfloat16"}, {"method": "full", "bf16_updates": "stochastic_rounding"}, {"optim": "paged_adamw_8bit"}),
    ],
    ids=["lora", "lora-biases-tower-workers", "full-muon", "full-bf16-masters", "full-bf16-rounding", "lora-fp16-scaler", "full-bf16-8bit"],
)
def test_resumed_run_ends_with_the_same_bits(checkpoint, rows, tmp_path, model, tuning, training):
    if "8bit" in training.get("optim", ""):
        pytest.importorskip("bitsandbytes")

    def recipe(name, **more):
        settings = {"num_train_epochs": 2.5, "learning_rate": 3e-3, "token_budget": 128, **training, **more}
        return tiny_recipe(checkpoint, rows, tmp_path / name, model=model, tuning=tuning, training=settings)

    whole = train(recipe("whole"))
    assert whole.plan.total_steps == 8
    first = interrupted(recipe("parts"), 4)  # in the middle of the second epoch
    assert first.interrupted and first.state.step == 4 and (first.state.epoch, first.state.index) == (1, 1)
    second = train(recipe("parts", resume=True))
    assert second.state.step == 8 and second.stop_reason == "finished"
    a, b = all_weights(whole.weights_dir), all_weights(second.weights_dir)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    for name in ("step", "num_tokens", "num_targets", "num_samples", "skipped_updates"):
        assert getattr(whole.state, name) == getattr(second.state, name)


def test_dropout_draws_differ_without_the_saved_random_state(checkpoint, rows, tmp_path):
    """The test above would pass for nothing if dropout did not matter."""
    runs = [
        train(
            tiny_recipe(
                checkpoint, rows, tmp_path / str(p), tuning={"lora_dropout": p}, data={"share_prefixes": False}, training={"max_steps": 2}
            )
        )
        for p in (0.3, 0.0)
    ]
    a, b = (all_weights(run.weights_dir) for run in runs)
    assert any(not torch.equal(a[name], b[name]) for name in a)


_KILLED_WHILE_SAVING = """
import os, signal, sys
sys.path[:0] = {path!r}
from finesight.recipe_files import load_recipe
from finesight.training import checkpoint
from finesight.training.run import train
real, saves, calls = os.fsync, 0, 0
def fsync(descriptor):
    global calls
    calls += saves == 2
    if saves == 2 and calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)  # after some files of the second checkpoint, before the others
    real(descriptor)
def write_folder(*arguments):
    global saves
    saves += 1
    return whole(*arguments)
whole, checkpoint.write_folder = checkpoint.write_folder, write_folder
os.fsync = fsync
train(load_recipe({recipe!r}))
"""


@pytest.mark.parametrize("call", [1, 4, 9])
def test_killed_in_the_middle_of_a_save_it_goes_on_from_the_checkpoint_before(checkpoint, rows, tmp_path, call):
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    tuning = {"lora_dropout": 0.3}
    recipe = tiny_recipe(checkpoint, rows, tmp_path / "run", tuning=tuning, training=settings)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    script = _KILLED_WHILE_SAVING.format(path=[p for p in sys.path if p], call=call, recipe=str(tmp_path / "recipe.yaml"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert any(p.name.startswith(".saving-checkpoint-4") for p in (tmp_path / "run").iterdir())
    resumed = train(recipe.model_copy(update={"training": recipe.training.model_copy(update={"resume": True})}))
    whole = train(tiny_recipe(checkpoint, rows, tmp_path / "whole", tuning=tuning, training=settings))
    a, b = all_weights(whole.weights_dir), all_weights(resumed.weights_dir)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


_RUN = """
import sys
sys.path[:0] = {path!r}
from finesight.recipe_files import load_recipe
from finesight.training.run import train
print(train(load_recipe({recipe!r})).stop_reason)
"""


def test_a_signal_to_the_whole_process_group_leaves_workers_alone(checkpoint, rows, tmp_path):
    """What a terminal's Ctrl-C or a batch system does: workers get the signal too, and must not take the step down."""
    recipe = tiny_recipe(checkpoint, rows, tmp_path / "run", training={"num_train_epochs": 5000, "num_workers": 2, "save_strategy": "no"})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    script = _RUN.format(path=[p for p in sys.path if p], recipe=str(tmp_path / "recipe.yaml"))
    started = subprocess.Popen(
        [sys.executable, "-c", script], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while started.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGTERM)
    printed, errors = started.communicate(timeout=60)
    assert (started.returncode, printed.strip()) == (0, "interrupted"), errors
    assert "Traceback" not in errors
    assert newest_valid(tmp_path / "run").path is not None


@pytest.fixture
def finished(checkpoint, rows, tmp_path):
    """A finished run of three steps with a checkpoint after each, and a way to write its recipe anew."""

    def recipe(training=None, **sections):
        return tiny_recipe(
            checkpoint, rows, tmp_path / "run",
            training={"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, **(training or {})}, **sections,
        )  # fmt: skip

    train(recipe())
    return recipe


def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path):
    newest = list_checkpoints(tmp_path / "run")[-1]
    (newest / "optimizer-00000.safetensors").write_bytes(b"")
    assert newest_valid(tmp_path / "run").path.name == "checkpoint-2"
    result = train(finished({"resume": True}))
    assert result.state.step == 3
    assert newest_valid(tmp_path / "run").path == newest  # written anew


def test_all_damaged_is_an_error_not_a_new_start(finished, tmp_path):
    for path in list_checkpoints(tmp_path / "run"):
        (path / "trainer.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)No checkpoint .*checkpoint-3 .*trainer\.json is missing"):
        train(finished({"resume": True}))


def test_other_settings_are_refused_by_name(finished):
    with pytest.raises(CheckpointError, match=r"training\.learning_rate: 0\.01 in the checkpoint, 0\.02 in the recipe"):
        train(finished({"resume": True, "learning_rate": 0.02}))


def test_other_data_is_refused(finished, rows):
    text = rows.read_text()
    try:
        rows.write_text(text.replace("answer 0", "answer 9"))
        with pytest.raises(CheckpointError, match="other data"):
            train(finished({"resume": True}))
    finally:
        rows.write_text(text)


def test_a_new_run_does_not_mix_with_an_old_one(finished):
    with pytest.raises(CheckpointError, match=r"holds adapter of an earlier run.*training\.resume: true"):
        train(finished())


def test_resume_from_a_named_checkpoint(finished, tmp_path):
    result = train(finished({"resume": str(tmp_path / "run" / "checkpoint-1"), "output_dir": str(tmp_path / "other")}))
    assert result.state.step == 3 and [step for step, _ in losses(tmp_path / "other")] == [2, 3]
    a, b = (all_weights(tmp_path / name / "adapter") for name in ("run", "other"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train(finished({"resume": str(tmp_path)}))


def test_a_checkpoint_without_optimizer_state_cannot_be_resumed(checkpoint, rows, tmp_path):
    recipe = tiny_recipe(checkpoint, rows, tmp_path / "run", training={"max_steps": 1, "save_only_model": True})
    train(recipe)
    with pytest.raises(CheckpointError, match="save_only_model"):
        train(tiny_recipe(checkpoint, rows, tmp_path / "run", training={"max_steps": 1, "resume": True}))
    with pytest.raises(CheckpointError, match=r"model\.adapter"):
        train(tiny_recipe(checkpoint, rows, tmp_path / "run", training={"max_steps": 1, "resume": str(tmp_path / "run" / "checkpoint-1")}))


def test_resume_true_without_a_checkpoint_starts_anew_and_says_so(checkpoint, rows, tmp_path):
    def printed(training):
        console = Console(file=io.StringIO(), width=400)
        assert train(tiny_recipe(checkpoint, rows, tmp_path / "run", training=training), console=console).state.step == 1
        return console.file.getvalue()

    settings = {"max_steps": 1, "save_strategy": "no"}
    first = printed({**settings, "resume": True})
    assert f"Note: there is no checkpoint in {tmp_path / 'run'} to go on from: training begins at step 1." in first
    assert "of an earlier run" not in first
    assert f"{tmp_path / 'run' / 'adapter'}, of an earlier run, is replaced at its end" in printed({**settings, "resume": True})


@pytest.mark.parametrize("what", ["settings", "data"])
def test_another_run_is_refused_before_its_model_is_loaded(finished, rows, what):
    console, text = Console(file=io.StringIO(), width=400), rows.read_text()
    try:
        if what == "data":
            rows.write_text(text.replace("answer 0", "answer 9"))
        recipe = finished({"resume": True, **({"weight_decay": 0.5} if what == "settings" else {})})
        with pytest.raises(CheckpointError, match="another run" if what == "settings" else "other data"):
            train(recipe, console=console)
    finally:
        rows.write_text(text)
    assert "Loading" not in console.file.getvalue()


def test_resuming_a_finished_run_only_writes_its_result(finished, tmp_path):
    before = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer.json").read_text())["state"]
    result = train(finished({"resume": True}))
    assert result.stop_reason == "finished" and result.state.to_json() == before
