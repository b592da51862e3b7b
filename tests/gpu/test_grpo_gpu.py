"""Reinforcement on a GPU: what the sampler's graphs and kernels draw is what the trainer scores."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from torch._dynamo.utils import counters

from finesight.data.conversation import Conversation, Part, RowSource, Turn
from finesight.models.load import load
from finesight.models.packed import PackedModel
from finesight.sampling.forking_sampler import ForkingSampler
from finesight.sampling.types import SamplingSettings
from finesight.training.run import train
from tiny import FAMILIES, tiny_checkpoint
from tiny_runs import tiny_recipe, write_rows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("bfloat16", 0.2)])
def test_sampler_and_trainer_agree(tmp_path, family, dtype, bound):
    if family == "qwen3_vl_moe" and dtype == "bfloat16":
        bound = 0.5  # rounding can send a token to another expert
    code = tmp_path / "own.py"
    code.write_text("def low(completion_ids, **kwargs):\n    return [sum(t < 100 for t in ids) / len(ids) for ids in completion_ids]\n")
    recipe = tiny_recipe(
        tiny_checkpoint(tmp_path / "base", family),
        write_rows(tmp_path / "rows"),
        tmp_path / "run",
        model={"dtype": dtype},
        training={"train_batch_size": 12, "max_steps": 4, "num_train_epochs": 9, "learning_rate": 1e-3, "save_strategy": "no"},
        grpo={"num_generations": 4, "num_iterations": 2, "beta": 0.05, "image_ablation_steps": 2},
        rollout={"max_completion_length": 12, "temperature": 0.8},
        rewards=[f"{code}:low"],
    )
    lines = [line for line in train(recipe).history if "loss" in line]
    assert len(lines) == 4 and "image_ablation/reward/without_image" in lines[0]
    for line in lines:
        assert line["sampling/sampling_logp_difference/max"] < bound
        assert line["sampling/sampling_logp_difference/mean"] < bound / 10
    assert lines[0]["kl"] < bound and lines[0]["ratio_mean"] == pytest.approx(1.0, abs=1e-6)


def test_compiled_rollouts_agree_with_the_trainer(tmp_path):
    out = io.StringIO()
    code = tmp_path / "own.py"
    code.write_text("def low(completion_ids, **kwargs):\n    return [sum(t < 100 for t in ids) / len(ids) for ids in completion_ids]\n")
    recipe = tiny_recipe(
        tiny_checkpoint(tmp_path / "base", "qwen3_vl"),
        write_rows(tmp_path / "rows"),
        tmp_path / "run",
        model={"dtype": "bfloat16"},
        training={"train_batch_size": 12, "max_steps": 3, "num_train_epochs": 9, "torch_compile": True, "save_strategy": "no"},
        grpo={"num_generations": 4, "image_ablation_steps": 0},
        rollout={"max_completion_length": 12},
        rewards=[f"{code}:low"],
    )
    lines = [line for line in train(recipe, console=Console(file=out, width=300)).history if "loss" in line]
    assert all(line["sampling/sampling_logp_difference/mean"] < 0.02 for line in lines)
    assert "uncompiled" not in out.getvalue()


def test_a_later_rollout_finds_what_the_first_one_compiled(tmp_path):
    """Each has a decoder of its own."""
    loaded = load(tiny_checkpoint(tmp_path / "base", "qwen3_vl"), dtype="float32")
    prompt = Conversation((Turn("user", (Part("text", text="read the number"),)),), RowSource("test", 0))
    packed, told = PackedModel(loaded.model), []
    settings = SamplingSettings(max_completion_length=6, num_generations=4)
    (expected, *_) = ForkingSampler(packed, loaded.processor).generate([prompt], settings)
    sampler = ForkingSampler(packed, loaded.processor, compile_layers=True, say=told.append)
    first = sampler.generate([prompt], settings)[0]
    compiled = counters["stats"]["unique_graphs"]
    again = sampler.generate([prompt], settings)[0]
    assert compiled > 0 and counters["stats"]["unique_graphs"] == compiled and not told
    assert first.token_ids == again.token_ids == expected.token_ids
