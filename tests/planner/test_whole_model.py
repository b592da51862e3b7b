"""A whole forward pass of a real model, uncompiled: what autograd keeps in all, against the plan, policy by policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finesight.families import FAMILIES
from finesight.models.adapters import apply_tuning
from finesight.models.packed import PackedModel
from finesight.planner.activations import Execution
from finesight.planner.moments import Policy
from finesight.planner.plan import plan_memory
from finesight.planner.shapes import shape_of
from finesight.planner.sizes import RunSizes
from finesight.recipe import TuningSettings
from finesight.training.prepare import prepare
from finesight.training.run_sizes import pack_sizes
from tiny import tiny_checkpoint, tiny_model
from tiny_runs import tiny_recipe, write_rows


class Kept:
    """Counts the floating-point tensors that autograd keeps, each storage once, parameters left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.passed = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.alive: list[torch.Tensor] = []  # held, so that no two storages share an address
        self.found: dict[int, int] = {}

    def note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.passed and tensor.is_floating_point():
            self.alive.append(tensor.detach())
            self.found[storage.data_ptr()] = storage.nbytes()
        return tensor


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_kept_until_the_backward_pass(family: str, policy: Policy, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "data", images=6, questions=1, text_rows=0)
    recipe = tiny_recipe(
        tiny_checkpoint(tmp_path / "checkpoint", family), rows, tmp_path / "run",
        tuning={"r": 2}, training={"token_budget": 2048, "train_batch_size": 6},
    )  # fmt: skip
    feed = prepare(recipe).feed()
    (pack,) = feed.plan(0, 0).plans
    batch = feed.build_pack(pack)
    model = apply_tuning(tiny_model(family), TuningSettings(r=2), FAMILIES[family], 0)
    packed = PackedModel(model, gradient_checkpointing=policy)
    kept = Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor):
        packed(batch)
    shape = shape_of(packed.base.config.to_dict(), name=family)
    execution = Execution(compiled=False, grouped=True)
    plan = plan_memory(shape, recipe, RunSizes(((pack_sizes(pack),),)), policy=policy, execution=execution, precision="float32")
    moment = next(moment for moment in plan.moments if moment.name == "log-probabilities")
    assert moment.parts["activations: language model"] == pytest.approx(sum(kept.found.values()), rel=0.05)
