"""Kept features: the same loss as computed ones, a budget that holds, no stale entry met."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from finesight.data.pack import pack_step
from finesight.errors import ModelError
from finesight.models.features import FeatureCache, tower_fingerprint
from finesight.models.packed import PackedModel
from finesight.models.vision import VisualFeatures
from parity.reference import Builder, gradients, reference_loss
from parity.test_packed_parity import mixed
from tiny import tiny_model

CPU = torch.device("cpu")


def features(tokens: int, seed: int = 0) -> VisualFeatures:
    torch.manual_seed(seed)
    return VisualFeatures(torch.randn(tokens, 8), (torch.randn(tokens, 8),))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_second_pass_over_kept_features_is_the_same(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.model.visual.requires_grad_(False)
    builder = Builder(model)
    samples = mixed(builder)
    expected_loss = reference_loss(model, builder, samples)
    expected = gradients(expected_loss, model)
    packed = PackedModel(copy.deepcopy(model))
    packed.feature_cache = FeatureCache("tower", budget_bytes=3000, folder=tmp_path)  # some in memory, the rest on disk
    (plan,) = pack_step(samples, token_budget=4096, share=True)
    denominator = sum(s.target_weight for s in samples)
    for kept in (0, 3, len(plan.visual_items)):
        stored = {item.key for item in plan.visual_items[:kept]}
        batch = packed.feature_cache.prefetch(plan.build(builder.pixels_of, stored=stored), CPU).result()
        assert len(batch.stored_keys) == kept
        loss = -(batch.weight * packed(batch)).sum() / denominator
        packed.feature_cache.finish()
        assert torch.allclose(loss, expected_loss, rtol=1e-6)
        found = gradients(loss, packed.model)
        assert all(torch.allclose(found[n], e, rtol=1e-4, atol=1e-6) for n, e in expected.items())
    figures = packed.feature_cache.figures
    assert figures.memory_bytes <= 3000
    assert figures.disk_bytes > 0
    assert figures.entries == len(plan.visual_items)
    assert figures.hits == 3 + len(plan.visual_items)


def test_budget_holds_and_what_is_past_it_is_counted() -> None:
    cache = FeatureCache("t", budget_bytes=2 * 2 * 4 * 8 * 4)
    cache.store(["a", "b", "c"], [4, 4, 4], features(12))
    cache.finish()
    assert ("a" in cache, "b" in cache, "c" in cache) == (True, True, False)
    assert cache.figures.refused == 1
    cache.store(["a"], [4], features(4, seed=1))
    cache.finish()
    assert cache.figures.entries == 2


def test_disk_entries_serve_another_run_of_the_same_tower_only(tmp_path: Path) -> None:
    first = FeatureCache("one", budget_bytes=0, folder=tmp_path)
    first.store(["a"], [4], features(4))
    first.finish()
    assert "a" in FeatureCache("one", budget_bytes=0, folder=tmp_path)
    assert "a" not in FeatureCache("two", budget_bytes=0, folder=tmp_path)
    (tmp_path / "one").joinpath(next((tmp_path / "one").iterdir()).name).write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cannot be read"):
        FeatureCache("one", budget_bytes=0, folder=tmp_path)._entry("a")


def test_fingerprint_sees_any_change_of_tower_or_pixels() -> None:
    model = tiny_model("qwen3_vl")
    visual = model.model.visual
    before = tower_fingerprint(visual, ("mean", 0.5))
    assert tower_fingerprint(visual, ("mean", 0.5)) == before
    assert tower_fingerprint(visual, ("mean", 0.4)) != before
    with torch.no_grad():
        visual.blocks[1].mlp.linear_fc1.weight[3, 4] += 1e-3
    assert tower_fingerprint(visual, ("mean", 0.5)) != before
    with torch.no_grad():
        weight = visual.blocks[1].mlp.linear_fc1.weight
        weight[3, 4] -= 1e-3
        weight[[0, 1]] = weight[[1, 0]].clone()  # the same values in other places
    assert tower_fingerprint(visual, ("mean", 0.5)) != before


def test_nothing_is_kept_of_a_tower_that_trains() -> None:
    model = tiny_model("qwen3_vl")
    builder = Builder(model)
    packed = PackedModel(model)
    packed.feature_cache = FeatureCache("tower", budget_bytes=10**9)
    (plan,) = pack_step(mixed(builder)[:3], token_budget=4096, share=True)
    packed(plan.build(builder.pixels_of))
    packed.feature_cache.finish()
    assert packed.feature_cache.figures.entries == 0
