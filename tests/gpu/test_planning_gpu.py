"""Plans on the GPU at hand: its memory is read, a cap counts, a probe measures and changes nothing."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from finesight.errors import PlanError
from finesight.planner.gpus import GPUS
from finesight.training.planning import available_bytes, decide, gpu_here, situation_of
from finesight.training.prepare import prepare
from finesight.training.processes import start_accelerator
from finesight.training.run import train
from tiny import tiny_checkpoint
from tiny_runs import tiny_recipe, write_rows

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "qwen3_vl", "qwen3_vl")
    return tiny_recipe(
        checkpoint, write_rows(tmp_path_factory.mktemp("rows")), tmp_path_factory.mktemp("runs") / "run", model={"dtype": "bfloat16"}
    )


def test_the_gpu_is_known_and_has_room():
    gpu = gpu_here(GPU)
    assert gpu.capability == torch.cuda.get_device_capability(GPU)
    assert gpu.bf16_tflop_s in {known.bf16_tflop_s for known in GPUS}
    _, total = torch.cuda.mem_get_info(GPU)
    for device in (GPU, torch.device("cuda")):
        assert 0 < available_bytes(device) <= total * 1.01


def test_what_cannot_fit_is_refused(recipe, tmp_path):
    prepared = prepare(recipe)
    situation = situation_of(prepared, start_accelerator(recipe, tmp_path), total_steps=3)
    assert decide(situation, recipe).fits(situation.available_bytes)
    small = type(situation)(**{**situation.__dict__, "available_bytes": 1})
    with pytest.raises(PlanError):
        decide(small, recipe)


def test_a_probe_measures_and_changes_nothing(recipe, tmp_path):
    out = io.StringIO()
    probed = train(recipe, probe=True, console=Console(file=out, width=300))
    assert "Probe of the largest pack" in out.getvalue() and "measured" in out.getvalue()
    elsewhere = recipe.training.model_copy(update={"output_dir": str(tmp_path / "plain")})
    plain = train(recipe.model_copy(update={"training": elsewhere}))
    losses = [[line["loss"] for line in result.history if "loss" in line] for result in (probed, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
