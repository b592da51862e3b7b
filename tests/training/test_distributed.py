"""Two processes train as one does (gloo, CPU)."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finesight.recipe_files import dump_recipe
from finesight.training.run import train
from finesight.training.telemetry import read_metrics
from tiny_runs import tiny_recipe
from training.pair import launch

_NO_ROOM = """
import sys
sys.path[:0] = {path!r}
import os
import torch
torch.set_num_threads(1)
from pathlib import Path
from finesight.recipe_files import load_recipe
from finesight.training.prepare import prepare
from finesight.training.processes import start_accelerator
from finesight.training.session import Session
recipe = load_recipe(sys.argv[1])
session = Session(prepare(recipe), start_accelerator(recipe, Path(recipe.training.output_dir)))
def no_room(gradient):
    raise torch.OutOfMemoryError("CUDA out of memory.")
if os.environ["RANK"] == "1":
    next(p for n, p in session.model.named_parameters() if p.requires_grad).register_hook(no_room)
session.run()
"""


@pytest.fixture(scope="module")
def cases(checkpoint, rows, pair, tmp_path_factory):
    """Runs by two processes and by one: an adapter over a quantised base, tower included (rows of text leave it out); bfloat16 masters; one that is stopped."""
    folder = tmp_path_factory.mktemp("distributed")
    steps = {"num_train_epochs": 1.4, "adam_epsilon": 1.0, "learning_rate": 0.2, "save_strategy": "no", "token_budget": 200}

    def lora(name):
        return tiny_recipe(
            checkpoint, rows, folder / f"lora-{name}", tuning={"finetune_vision_layers": True}, data={"eval_split": str(rows)},
            model={"load_in_4bit": True, "quantize_vocabulary": True, "quantize_tower": True}, training={**steps, "eval_strategy": "epoch"},
        )  # fmt: skip

    def masters(name):
        return tiny_recipe(
            checkpoint, rows, folder / f"masters-{name}", model={"dtype": "bfloat16"}, tuning={"method": "full"},
            training={**steps, "adam_epsilon": 1e-2, "learning_rate": 1e-3, "max_steps": 2},
        )  # fmt: skip

    def policy(name, **more):
        """Several packs a step for each process: gradients of all but the last are not averaged at once."""
        return tiny_recipe(
            checkpoint, rows, folder / f"policy-{name}", tuning={"finetune_vision_layers": True},
            training={**steps, "token_budget": 100, "train_batch_size": 9, "max_steps": 2, "gradient_checkpointing": name, **more},
            data={"max_length_tokens": 4096},
        )  # fmt: skip

    policies = [policy("offload"), policy("selective", mlp_chunk_tokens=37)]
    endless = tiny_recipe(checkpoint, rows, folder / "endless", training={"num_train_epochs": 1000, "save_strategy": "no"})
    pair.begin([lora("two"), masters("two"), *policies, endless])
    metrics = folder / "endless" / "metrics.jsonl"
    for _ in range(900):
        if any(process.poll() is not None for process in pair.processes) or (metrics.exists() and metrics.stat().st_size > 0):
            break
        time.sleep(0.1)
    pair.processes[1].send_signal(signal.SIGTERM)
    pair.finish()
    return {
        "lora": (train(lora("one")), folder / "lora-two"),
        "masters": (train(masters("one")), folder / "masters-two"),
        "policies": (train(policy("none")), [Path(recipe.training.output_dir) for recipe in policies]),
        "endless": folder / "endless",
    }


def test_two_processes_equal_one(cases):
    one, two = cases["lora"]
    assert one.state.step == 5 and one.plan.num_samples == 9  # the third step has one sample: a process repeats it without weight
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one.weights_dir, two / "adapter"))
    worst = max(((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-12)).item() for n in a)
    assert worst < 2e-6, worst
    theirs = read_metrics(two / "metrics.jsonl")
    assert len(theirs) == len(one.history)  # one process writes
    for mine, other in zip(one.history, theirs, strict=True):
        assert mine["step"] == other["step"]
        for name in ("loss", "eval_loss", "grad_norm"):
            if name in mine:
                assert other[name] == pytest.approx(mine[name], rel=1e-5)


@pytest.mark.parametrize("number", [0, 1], ids=["offload", "selective in chunks"])
def test_activation_policies_of_two_processes_equal_none_of_one(cases, number):
    one, folders = cases["policies"]
    assert one.plan.packs_per_step > 3
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one.weights_dir, folders[number] / "adapter"))
    worst = max(((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-12)).item() for n in a)
    assert worst < 2e-6, worst


def test_masters_of_two_processes_follow_one(cases):
    """bfloat16 gradients are averaged by pack, so only about equal."""
    one, two = cases["masters"]
    a, b = (load_file(folder / "model.safetensors") for folder in (one.weights_dir, two / "model"))
    assert {t.dtype for t in b.values()} == {torch.bfloat16}
    assert max(((a[n] - b[n]).float().norm() / a[n].float().norm()).item() for n in a) < 5e-3
    for mine, other in zip(one.history, read_metrics(two / "metrics.jsonl"), strict=True):
        assert other["loss"] == pytest.approx(mine["loss"], rel=1e-2)


def test_a_signal_to_one_process_stops_both(cases):
    """Both processes of the fixture left the run by themselves after SIGTERM to the second one; a checkpoint of both was left."""
    last = read_metrics(cases["endless"] / "metrics.jsonl")[-1]["step"]
    assert last < 3000 and (cases["endless"] / f"checkpoint-{last}" / "random-1.json").is_file()


def test_out_of_memory_in_one_process_ends_both_and_says_what_to_set(checkpoint, rows, tmp_path):
    """The other waits for gradients in vain: the step is not begun again, and neither may hang."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(tiny_recipe(checkpoint, rows, tmp_path / "run")), encoding="utf-8")
    started = launch(_NO_ROOM.format(path=[path for path in sys.path if path]), str(recipe))
    try:
        errors = [process.communicate(timeout=90)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode for process in started)
    last = errors[1].strip().splitlines()[-1]
    assert "TrainingError: Process 1 is out of memory" in last and "training.token_budget:" in last and "--resume" in last
