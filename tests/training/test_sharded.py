"""Two processes that each hold a part of the model train as one process does (FSDP2 over gloo, CPU)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from finesight.errors import RecipeError
from finesight.recipe import Recipe
from finesight.training.processes import load_for_training
from finesight.training.run import train
from finesight.training.state import load_tree
from finesight.training.telemetry import read_metrics
from tiny import tiny_model
from tiny_runs import tiny_recipe

ADAPTER, MODEL = "adapter/adapter_model.safetensors", "model/model.safetensors"


@pytest.fixture(scope="module")
def cases(checkpoint, rows, pair, tmp_path_factory):
    """The folders of runs in parts by two processes, and of the same ones whole in a single process, by name."""
    folder = tmp_path_factory.mktemp("sharded")
    # A large epsilon keeps Adam's update a smooth function of the gradient, so that weights are equal where gradients are.
    steps = {"num_train_epochs": 1.4, "token_budget": 100, "train_batch_size": 6, "adam_epsilon": 1e-2, "learning_rate": 1e-2}
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}

    tied = shutil.copytree(checkpoint, folder / "tied")
    model = tiny_model("qwen3_vl")
    model.config.tie_word_embeddings = True  # as in the smaller checkpoints: one matrix under two names
    model.tie_weights()
    model.save_pretrained(tied)

    def recipe(name: str, tuning: dict, model: dict | None = None, **training: object) -> Recipe:
        return tiny_recipe(
            tied if name.startswith("full") else checkpoint, rows, folder / name, tuning=tuning, model=model or {}, data={"eval_split": str(rows)},
            training={**steps, **saves, "eval_strategy": "epoch" if tuning is tower else "no", **training},
        )  # fmt: skip

    tower = {"finetune_vision_layers": True, "finetune_merger": True}  # rows of text leave it out
    full, low = {"method": "full"}, {"dtype": "bfloat16"}
    train(recipe("adapter, whole", tower))
    pair.train(
        [
            recipe("adapter", tower, sharding="full", gradient_checkpointing="none"),
            recipe("adapter, resumed in parts", tower, sharding="full", resume=str(folder / "adapter, whole" / "checkpoint-1")),
            recipe("full", full, sharding="full", gradient_checkpointing="full"),
            recipe("adapter over bfloat16", tower, low, sharding="full"),
            recipe("masters", full, low, sharding="full"),
            recipe("masters, resumed", full, low, sharding="full", resume=str(folder / "masters" / "checkpoint-1")),
        ]
    )
    train(recipe("full, whole", full, gradient_checkpointing="none"))
    train(recipe("full, resumed whole", full, resume=str(folder / "full" / "checkpoint-1")))
    return folder


def worst_difference(one: Path, two: Path) -> float:
    a, b = (load_file(path) for path in (one, two))
    assert a.keys() == b.keys() and all(a[n].dtype == b[n].dtype for n in a)
    return max(((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-12)).item() for n in a)


@pytest.mark.parametrize(("case", "file"), [("adapter", ADAPTER), ("full", MODEL)])
def test_parts_in_two_processes_train_as_the_whole_in_one(cases, case, file):
    whole = read_metrics(cases / f"{case}, whole" / "metrics.jsonl")
    parts = read_metrics(cases / case / "metrics.jsonl")
    assert len(parts) == len(whole) >= 3
    for mine, other in zip(whole, parts, strict=True):
        for name in {"loss", "eval_loss", "grad_norm"} & mine.keys():
            assert other[name] == pytest.approx(mine[name], rel=1e-5)
    assert worst_difference(cases / f"{case}, whole" / file, cases / case / file) < 1e-5


@pytest.mark.parametrize("case", ["adapter", "full"])
def test_a_checkpoint_in_parts_holds_the_optimizer_in_one_piece(cases, case):
    whole, parts = (load_tree(cases / name / "checkpoint-2", "optimizer") for name in (f"{case}, whole", case))
    assert parts["names"] == whole["names"]
    for number, values in whole["optimizers"][0]["state"].items():
        for name, value in values.items():
            assert torch.allclose(parts["optimizers"][0]["state"][number][name], value, rtol=1e-3, atol=1e-6 * value.abs().max().item())


@pytest.mark.parametrize(
    ("resumed", "uninterrupted", "file"),
    [("adapter, resumed in parts", "adapter, whole", ADAPTER), ("full, resumed whole", "full, whole", MODEL)],
)
def test_a_run_goes_on_with_another_number_of_processes(cases, resumed, uninterrupted, file):
    assert next(line["step"] for line in read_metrics(cases / resumed / "metrics.jsonl") if "loss" in line) == 2
    assert worst_difference(cases / uninterrupted / file, cases / resumed / file) < 1e-5


def test_a_float32_adapter_over_a_bfloat16_base(cases):
    """Units of two precisions; about equal, since a pack is dealt otherwise and its sums are rounded otherwise."""
    low, exact = (read_metrics(cases / name / "metrics.jsonl") for name in ("adapter over bfloat16", "adapter"))
    assert [line["loss"] for line in low if "loss" in line] == pytest.approx([line["loss"] for line in exact if "loss" in line], rel=1e-2)
    assert {t.dtype for t in load_file(cases / "adapter over bfloat16" / ADAPTER).values()} == {torch.float32}


def test_float32_masters_are_resumed_to_the_bit(cases):
    a, b = (load_file(cases / name / MODEL) for name in ("masters", "masters, resumed"))
    assert {t.dtype for t in a.values()} == {torch.bfloat16}
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"load_in_4bit": True}},
        {"model": {"load_in_fp8": True}},
        {"training": {"optim": "adamw_8bit"}},
        {"tuning": {"finetune_experts": True}},
        {"tuning": {"bias": "lora_only"}},
        {"tuning": {"method": "full", "bf16_updates": "stochastic_rounding"}},
        {"training": {"sample_answers": 2}},
    ],
)
def test_what_cannot_be_divided_is_refused(checkpoint, rows, tmp_path, sections):
    training = {"sharding": "full", **sections.get("training", {})}
    with pytest.raises((RecipeError, ValidationError), match="sharding: full cannot be used together with"):
        tiny_recipe(checkpoint, rows, tmp_path, **{**sections, "training": training})


def test_float16_is_refused_before_the_weights_are_read(tmp_path):
    recipe = tiny_recipe(tmp_path / "no checkpoint", tmp_path, tmp_path, model={"dtype": "float16"}, training={"sharding": "full"})
    with pytest.raises(RecipeError, match="cannot be used in float16"):
        load_for_training(recipe, torch.device("cpu"))


def test_one_process_has_nobody_to_share_with(checkpoint, rows, tmp_path):
    with pytest.raises(RecipeError, match="torchrun --nproc-per-node 2"):
        train(tiny_recipe(checkpoint, rows, tmp_path / "run", training={"sharding": "full"}))
