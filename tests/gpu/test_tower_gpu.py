"""The vision tower off the GPU and back: memory that really falls, the same loss, in one model and in whole runs."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

from finesight.data.pack import pack_step
from finesight.models.features import FeatureCache, tower_fingerprint
from finesight.models.packed import PackedModel
from finesight.training.prepare import prepare
from finesight.training.processes import start_accelerator
from finesight.training.run import train
from finesight.training.session import Session
from gpu.test_forest_gpu import middle_model
from parity.reference import Builder
from parity.test_packed_parity import mixed
from tiny import tiny_checkpoint
from tiny_runs import tiny_recipe, write_rows

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


def model_with_a_large_tower():
    """A tower of about 80 MB beside a small language model: the allocator's rounding does not count."""
    config = middle_model("qwen3_vl").config
    config.vision_config.update(dict(hidden_size=512, intermediate_size=2048, depth=8))
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(config).to(torch.bfloat16).eval()
    model.model.visual.requires_grad_(False)
    return model


def loss_of(packed, batch):
    return -(batch.weight * packed(batch)).sum().item()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_memory_falls_by_the_tower_and_the_loss_stays(compiled):
    torch._dynamo.reset()
    builder = Builder(model_with_a_large_tower().float())  # positions are counted on the CPU
    (plan,) = pack_step(mixed(builder), token_budget=4096, share=True)
    model = model_with_a_large_tower().to(GPU)
    complaints = []
    packed = PackedModel(model, compile_layers=compiled, say=complaints.append)
    packed.feature_cache = FeatureCache("tower", budget_bytes=10**9)
    visual, place = model.model.visual, packed.tower_place
    tower_bytes = sum(p.nbytes for p in visual.parameters())
    assert tower_bytes > 40e6
    fingerprint = tower_fingerprint(visual)
    with torch.no_grad():
        whole = plan.build(builder.pixels_of).to(GPU)
        stored = plan.build(builder.pixels_of, stored={item.key for item in plan.visual_items})
        computed_loss = loss_of(packed, whole)
        packed.feature_cache.finish()
        stored = packed.feature_cache.prefetch(stored, GPU).result().to(GPU)
        stored_loss = loss_of(packed, stored)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        assert place.leave() == tower_bytes
        freed = before - torch.cuda.memory_allocated()
        print(f"tower {tower_bytes}, freed {freed}")
        assert freed >= 0.95 * tower_bytes
        assert tower_fingerprint(visual) == fingerprint
        assert stored_loss == pytest.approx(computed_loss, rel=1e-4)
        assert loss_of(packed, stored) == pytest.approx(stored_loss, rel=1e-4)
        assert place.away
        assert loss_of(packed, whole) == pytest.approx(computed_loss, rel=1e-4)  # pixels bring it back
        assert not place.away and all(p.is_cuda for p in visual.parameters())
        assert tower_fingerprint(visual) == fingerprint
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() - before < 0.05 * tower_bytes
    assert not complaints


def test_adapters_learn_the_same_while_it_is_away():
    """Every gradient with the tower away, against the same pack with it there."""
    builder = Builder(model_with_a_large_tower().float())
    (plan,) = pack_step(mixed(builder), token_budget=4096, share=True)
    packed = PackedModel(model_with_a_large_tower().to(GPU))
    packed.feature_cache = FeatureCache("tower", budget_bytes=10**9)
    packed(plan.build(builder.pixels_of).to(GPU))
    packed.feature_cache.finish()
    batch = plan.build(builder.pixels_of, stored={item.key for item in plan.visual_items})
    batch = packed.feature_cache.prefetch(batch, GPU).result().to(GPU)
    found = []
    for away in (False, True):
        if away:
            packed.tower_place.leave()
        packed.zero_grad()
        (-(batch.weight * packed(batch)).sum()).backward()
        found.append({n: copy.deepcopy(p.grad) for n, p in packed.named_parameters() if p.grad is not None})
    assert found[0] and found[0].keys() == found[1].keys()
    for name, expected in found[0].items():  # kernels that add with atomics make it no more than nearly equal
        assert (found[1][name] - expected).float().norm() <= 1e-2 * expected.float().norm() + 1e-6, name


def test_a_run_lets_it_go_and_ends_with_a_whole_model(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", "qwen3_vl")
    rows, held_out = write_rows(tmp_path / "rows"), write_rows(tmp_path / "held_out", images=6, questions=1)

    def recipe(name, gib):
        return tiny_recipe(
            checkpoint,
            rows,
            tmp_path / name,
            data={"eval_split": str(held_out)},
            training={
                "num_train_epochs": 3, "num_workers": 2, "eval_strategy": "epoch", "sample_answers": 1, "feature_cache_gib": gib,
                "adam_epsilon": 1e-3,
            },
            evaluation={"max_completion_length": 4},
        )  # fmt: skip

    plain = train(recipe("plain", 0))
    kept = recipe("kept", "auto")
    out = io.StringIO()
    session = Session(prepare(kept), start_accelerator(kept, tmp_path / "kept"), console=Console(file=out, width=400))
    away = []
    session.packed.register_forward_pre_hook(lambda module, inputs: away.append(session.packed.tower_place.away))
    result = session.run()
    rates = [line["feature_hit_rate"] for line in result.history if "feature_hit_rate" in line]
    assert rates[0] == 0 and set(rates[3:]) == {1.0}
    assert not away[0] and away[-1] and sum(away) > 3
    assert out.getvalue().count("the vision tower moved to host memory") == 1
    assert all(parameter.is_cuda for parameter in result.model.parameters())
    a, b = (load_file(run.adapter_dir / "adapter_model.safetensors") for run in (plain, result))
    worst = max(((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-12)).item() for n in a)
    print("kept against computed:", worst)
    assert worst < 1e-3
