"""Whole runs on a GPU: bfloat16 adapters, full tuning, resume, workers with pinned memory."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from finesight.training.prepare import prepare
from finesight.training.processes import start_accelerator
from finesight.training.run import train
from finesight.training.session import Session
from finesight.training.sft import SupervisedFineTuning
from tiny import tiny_checkpoint
from tiny_runs import tiny_recipe, write_rows

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "qwen3_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize(
    ("model", "tuning", "training"),
    [
        ({"dtype": "bfloat16"}, {}, {"num_workers": 2}),
        ({"dtype": "auto"}, {"finetune_vision_layers": True, "finetune_merger": True}, {}),
        ({"dtype": "float16"}, {}, {}),
        ({"dtype": "bfloat16"}, {"method": "full"}, {"learning_rate": 2e-3}),
        ({"dtype": "bfloat16"}, {"method": "full", "bf16_updates": "stochastic_rounding"}, {"learning_rate": 2e-3}),
        ({"dtype": "float16"}, {"method": "full"}, {"learning_rate": 2e-3}),
        ({"dtype": "float32"}, {"method": "full"}, {"optim": "muon", "learning_rate": 2e-3}),
    ],
    ids=["lora", "lora-tower", "lora-fp16", "full-masters", "full-rounding", "full-fp16", "full-muon"],
)
def test_every_precision_learns(checkpoint, rows, tmp_path, model, tuning, training):
    recipe = tiny_recipe(
        checkpoint,
        rows,
        tmp_path / "run",
        model=model,
        tuning=tuning,
        data={"eval_split": str(rows)},
        training={"num_train_epochs": 4, "eval_strategy": "epoch", "sample_answers": 1, **training},
        evaluation={"max_completion_length": 4},
    )
    result = train(recipe)
    losses = [line["loss"] for line in result.history if "loss" in line]
    held_out = [line["eval_loss"] for line in result.history if "eval_loss" in line]
    print(model, tuning, losses[0], losses[-1], held_out)
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3]) and held_out[-1] < held_out[0]
    assert result.history[0]["memory_gib"] < 2
    assert next(result.model.parameters()).is_cuda


class Interrupting(SupervisedFineTuning):
    """Sends SIGTERM while the second epoch's first step is computed."""

    def loss(self, logprobs, batch, step):
        if (step.epoch, step.index) == (1, 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(logprobs, batch, step)


@pytest.mark.parametrize("tuning", [{"lora_dropout": 0.3}, {"method": "full"}], ids=["lora", "full"])
def test_resume_goes_on_where_it_stopped(checkpoint, rows, tmp_path, tuning):
    """Kernels that add with atomics make it no more than nearly equal."""

    def recipe(name, **more):
        settings = {"num_train_epochs": 2, "learning_rate": 1e-3, **more}
        return tiny_recipe(checkpoint, rows, tmp_path / name, model={"dtype": "bfloat16"}, tuning=tuning, training=settings)

    whole = train(recipe("whole"))
    first = recipe("parts")
    stopped = Session(prepare(first), start_accelerator(first, tmp_path / "parts"), algorithm=Interrupting()).run()
    assert stopped.interrupted and stopped.state.step == 4
    second = train(recipe("parts", resume=True))
    a, b = (load_file(next(result.weights_dir.glob("*.safetensors"))) for result in (whole, second))
    worst = max(((a[n] - b[n]).float().norm() / a[n].float().norm().clamp(min=1e-12)).item() for n in a)
    print("resumed against uninterrupted:", worst)
    assert worst < 1e-2


def test_an_update_on_the_gpu_is_the_update_on_the_cpu(checkpoint, rows, tmp_path):
    settings = {"max_steps": 3, "save_strategy": "no", "adam_epsilon": 1.0, "learning_rate": 0.2}
    on_gpu = train(tiny_recipe(checkpoint, rows, tmp_path / "gpu", training=settings))
    recipe = tiny_recipe(checkpoint, rows, tmp_path / "cpu", training=settings)
    on_cpu = Session(prepare(recipe), start_accelerator(recipe, tmp_path / "cpu", torch.device("cpu"))).run()
    a, b = (load_file(result.adapter_dir / "adapter_model.safetensors") for result in (on_gpu, on_cpu))
    worst = max(((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-12)).item() for n in a)
    print("GPU against CPU in float32:", worst)
    assert worst < 1e-3
