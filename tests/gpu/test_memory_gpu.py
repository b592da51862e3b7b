"""Memory on a GPU: running out of it for real, a paged optimizer, segments that grow."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

from finesight.recipe import TrainingSettings
from finesight.training.optimizer import StepOptimizer
from finesight.training.run import train
from tiny import tiny_checkpoint, tiny_config
from tiny_runs import tiny_recipe, write_rows
from training.test_loop import THREE_STEPS, distance, weights

pytestmark = pytest.mark.gpu


@pytest.fixture
def wide_checkpoint(tmp_path):
    """A tiny model but for its MLPs, of which a token takes some megabytes: activations are nearly all that counts."""
    folder = tiny_checkpoint(tmp_path / "checkpoint", "qwen3_vl")
    config = tiny_config("qwen3_vl")
    config.text_config.intermediate_size = 65_536
    torch.manual_seed(0)
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_a_step_that_does_not_fit_is_computed_in_halves(wide_checkpoint, tmp_path):
    rows = write_rows(tmp_path / "rows")

    def recipe(name):
        settings = {**THREE_STEPS, "token_budget": 4096, "gradient_checkpointing": "none", "torch_compile": False}
        return tiny_recipe(wide_checkpoint, rows, tmp_path / name, training=settings)

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    undisturbed = train(recipe("undisturbed"))
    peak = torch.cuda.max_memory_allocated()
    expected = weights(undisturbed)
    del undisturbed
    gc.collect()  # a run's objects refer to one another
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.7 * peak / torch.cuda.mem_get_info()[1])
    try:
        result = train(recipe("capped"), force=True)  # the plan would refuse it
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print(
        f"peak {peak / 2**20:.0f} MiB, {result.state.out_of_memory} packs divided, at most {result.state.token_limit} tokens from then on"
    )
    assert result.state.out_of_memory >= 1 and result.state.step == 3
    assert distance(weights(result), expected) < 1e-4


def test_a_paged_state_survives_a_checkpoint_and_is_paged_again():
    pytest.importorskip("bitsandbytes")
    name = "model.language_model.layers.0.mlp.up_proj.weight"

    def make():
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(512, 512, device="cuda"))
        return weight, StepOptimizer([(name, weight)], TrainingSettings(optim="paged_adamw_8bit", learning_rate=1e-2))

    def advance(weight, optimizer, steps):
        for step in steps:
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)).cuda()
            optimizer.step()
            optimizer.zero_grad()

    weight, optimizer = make()
    advance(weight, optimizer, range(3))
    other_weight, other = make()
    other_weight.data.copy_(weight.data)
    other.load_state_dict(optimizer.state_dict())
    for each in (optimizer, other):
        (state,) = each.optimizers[0].state.values()
        assert state["state1"].is_paged and state["state2"].is_paged and state["absmax1"].is_cuda
    advance(weight, optimizer, range(3, 6))
    advance(other_weight, other, range(3, 6))
    assert torch.equal(weight, other_weight)


@pytest.mark.parametrize("first", ["", "import torch"], ids=["before torch", "after torch"])
def test_segments_grow(first):
    code = (
        f"{first}\nfrom finesight.allocator import use_expandable_segments\nuse_expandable_segments()\nimport torch\nuse_expandable_segments()\n"
        "kept = torch.empty(2**26, device='cuda')\nprint(all(segment['is_expandable'] for segment in torch.cuda.memory_snapshot()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "True"
