"""Two processes that each hold a part of the model train as one process does (FSDP2 over gloo, CPU)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from finesight.errors import RecipeError
from finesight.recipe_files import parse_recipe
from finesight.training.run import train
from finesight.training.telemetry import read_metrics
from tiny_runs import tiny_recipe

from test_distributed import finish, launch

# A large epsilon keeps Adam's update a smooth function of the gradient, so that weights are equal where gradients are.
STEPS = {"num_train_epochs": 1.4, "adam_epsilon": 1.0, "learning_rate": 0.2, "token_budget": 100, "train_batch_size": 6}


@pytest.fixture(scope="module")
def cases(checkpoint, rows, tmp_path_factory):
    """Runs in parts by two processes and whole by one: an adapter, tower included, with a held-out loss; full tuning with the tower; and one resumed."""
    folder = tmp_path_factory.mktemp("sharded")

    def lora(name, sharding="full", **more):
        return tiny_recipe(
            checkpoint, rows, folder / f"lora-{name}", tuning={"finetune_vision_layers": True, "finetune_merger": True},
            data={"eval_split": str(rows)}, training={**STEPS, "eval_strategy": "epoch", "save_strategy": "no", "sharding": sharding, **more},
        )  # fmt: skip

    def full(name, sharding="full", **more):
        training = {**STEPS, "adam_epsilon": 1e-2, "learning_rate": 1e-3, "sharding": sharding, "save_strategy": "no", **more}
        return tiny_recipe(checkpoint, rows, folder / f"full-{name}", tuning={"method": "full"}, training=training)

    recipes = [
        lora("two", gradient_checkpointing="none"),
        full("two", gradient_checkpointing="full", save_strategy="steps", save_steps=1),
    ]
    finish(launch(recipes, folder))
    return {
        "lora": (train(lora("one", "none")), folder / "lora-two"),
        "full": (train(full("one", "none", gradient_checkpointing="none")), folder / "full-two"),
    }


def worst_difference(one: Path, two: Path) -> float:
    a, b = (load_file(path) for path in (one, two))
    assert a.keys() == b.keys() and all(a[n].dtype == b[n].dtype for n in a)
    return max(((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-12)).item() for n in a)


@pytest.mark.parametrize(("case", "file"), [("lora", "adapter/adapter_model.safetensors"), ("full", "model/model.safetensors")])
def test_parts_in_two_processes_equal_the_whole_in_one(cases, case, file):
    one, two = cases[case]
    assert one.plan.packs_per_step > 2 and one.state.step == 3
    assert worst_difference(one.output_dir / file, two / file) < 1e-5
    theirs = read_metrics(two / "metrics.jsonl")
    assert len(theirs) == len(one.history)
    for mine, other in zip(one.history, theirs, strict=True):
        for name in {"loss", "eval_loss", "grad_norm"} & mine.keys():
            assert other[name] == pytest.approx(mine[name], rel=1e-5)
