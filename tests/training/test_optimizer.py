"""Groups, schedules, and the survival of small updates in low-precision weights."""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import pytest
import torch
from torch import nn

from finesight.errors import RecipeError, TrainingError
from finesight.models import rounding
from finesight.models.rounding import stochastic_round, stochastic_round_into
from finesight.planner.calibration import ROUNDING_BYTES
from finesight.recipe import TrainingSettings
from finesight.training.optimizer import StepOptimizer, learning_rate_factor, warmup_steps
from finesight.training.parameter_groups import load_optimizer_state, takes_muon
from live_bytes import LiveBytes
from tiny import tiny_model

LAYER = "model.language_model.layers.0.mlp.up_proj"


def settings(**values) -> TrainingSettings:
    return TrainingSettings(**values)


def weights(dtype=torch.float32, names=(f"{LAYER}.weight",), shape=(8, 6)):
    torch.manual_seed(0)
    return [(name, nn.Parameter(torch.randn(shape).to(dtype))) for name in names]


def test_schedules_rise_and_fall():
    steps = dict(total_steps=12, warmup_steps=2)
    cosine = [learning_rate_factor(s, kind="cosine", **steps) for s in range(12)]
    assert cosine[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert all(a > b > 0 for a, b in pairwise(cosine[2:]))
    assert learning_rate_factor(7, kind="linear", **steps) == pytest.approx(0.5)
    assert learning_rate_factor(7, kind="cosine", **steps) == pytest.approx(0.5)
    assert learning_rate_factor(12, kind="cosine_with_min_lr", min_lr_ratio=0.1, **steps) == pytest.approx(0.1)
    assert [learning_rate_factor(s, kind="constant", **steps) for s in (0, 11)] == [1.0, 1.0]
    assert [learning_rate_factor(s, kind="constant_with_warmup", **steps) for s in (0, 11)] == [pytest.approx(1 / 3), 1.0]


def test_warmup_steps_go_before_the_ratio():
    assert warmup_steps(settings(warmup_ratio=0.03), 100) == 3
    assert warmup_steps(settings(warmup_ratio=0.03), 10) == 1
    assert warmup_steps(settings(warmup_ratio=0.5, warmup_steps=0), 10) == 0


def test_groups_follow_part_and_shape():
    model = tiny_model("qwen3_vl")
    chosen = settings(learning_rate=1e-3, vision_learning_rate=1e-4, merger_learning_rate=1e-5, weight_decay=0.1)
    optimizer = StepOptimizer(model.named_parameters(), chosen)
    assert optimizer.learning_rates() == {"tower": 1e-4, "merger": 1e-5, "language_model": 1e-3}
    for group in optimizer.optimizers[0].param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] == 0.1) for p in group["params"])
    grouped = sum(p.numel() for g in optimizer.optimizers[0].param_groups for p in g["params"])
    assert grouped == sum(p.numel() for p in model.parameters())
    optimizer.set_factor(0.5)
    assert optimizer.learning_rates()["tower"] == pytest.approx(5e-5)


def test_muon_takes_hidden_matrices_only():
    model = tiny_model("qwen3_vl_moe")
    optimizer = StepOptimizer(model.named_parameters(), settings(optim="muon", learning_rate=1e-3, muon_learning_rate=1e-2))
    muon, adamw = optimizer.optimizers
    assert isinstance(muon, torch.optim.Muon) and all(g["adjust_lr_fn"] == "match_rms_adamw" for g in muon.param_groups)
    by_id = {id(p): n for n, p in model.named_parameters()}
    in_muon = {by_id[id(p)] for g in muon.param_groups for p in g["params"]}
    in_adamw = {by_id[id(p)] for g in adamw.param_groups for p in g["params"]}
    assert in_muon | in_adamw == set(by_id.values()) and not in_muon & in_adamw
    assert not [n for n in in_muon if "embed" in n or "lm_head" in n or "norm" in n or "experts" in n]
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in in_muon
    assert {g["lr"] for g in muon.param_groups} == {1e-2}
    assert not takes_muon("lm_head.weight", torch.empty(2, 2))


def test_float32_step_is_plain_adamw():
    (name, weight), reference = weights()[0], weights()[0][1]
    optimizer = StepOptimizer([(name, weight)], settings(learning_rate=1e-2, weight_decay=0.1))
    plain = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        reference.grad = weight.grad.clone()
        optimizer.step()
        plain.step()
    assert torch.equal(weight, reference)


@pytest.mark.parametrize("updates", ["float32_masters", "stochastic_rounding"])
def test_small_updates_of_bfloat16_survive(updates):
    """300 steps of 1e-5 on weights of 1: plain bfloat16 (grid 2^-7) would not move at all."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = StepOptimizer([(f"{LAYER}.weight", weight)], settings(learning_rate=1e-5), updates)
    for _ in range(300):
        weight.grad = torch.ones_like(weight)
        optimizer.collect_gradients()
        optimizer.step()
        optimizer.zero_grad()
    if updates == "float32_masters":
        assert optimizer.state_dict()["masters"][f"{LAYER}.weight"].mean().item() == pytest.approx(1 - 300e-5, rel=1e-5)
    else:
        assert weight.float().mean().item() == pytest.approx(1 - 300e-5, abs=3e-4)
    assert weight.dtype == torch.bfloat16


def test_masters_step_like_float32_weights():
    """The masters of bfloat16 weights take exactly the steps that float32 weights would, gradients of packs added in float32."""
    name, weight = weights(torch.bfloat16)[0]
    reference = nn.Parameter(weight.detach().float())
    optimizer = StepOptimizer([(name, weight)], settings(learning_rate=1e-3))
    plain = torch.optim.AdamW([reference], lr=1e-3, weight_decay=0.0)
    assert optimizer.collects_each_pack
    for step in range(3):
        packs = [torch.randn(weight.shape, generator=torch.Generator().manual_seed(10 * step + i)).bfloat16() for i in range(4)]
        for gradient in packs:
            weight.grad = gradient
            optimizer.collect_gradients()
            assert weight.grad is None
        reference.grad = sum((g.float() for g in packs), torch.zeros(weight.shape))
        torch.testing.assert_close(optimizer.clip_gradients(0.5), torch.nn.utils.clip_grad_norm_([reference], 0.5))
        optimizer.step()
        plain.step()
        optimizer.zero_grad()
    torch.testing.assert_close(optimizer.state_dict()["masters"][name], reference.data, rtol=1e-6, atol=1e-7)
    assert torch.equal(weight, optimizer.state_dict()["masters"][name].bfloat16())


def test_stochastic_rounding_mixes_with_float32_parameters_and_chunks(monkeypatch):
    monkeypatch.setattr("finesight.training.optimizer.ROUNDING_CHUNK_BYTES", 4 * 8 * 6)
    named = weights(torch.bfloat16, [f"{LAYER}.{i}.weight" for i in range(3)]) + weights(names=[f"{LAYER}.lora_A.weight"])
    reference = nn.Parameter(named[-1][1].detach().clone())
    optimizer = StepOptimizer(named, settings(learning_rate=1e-2), "stochastic_rounding")
    plain = torch.optim.AdamW([reference], lr=1e-2, weight_decay=0.0)
    before = [p.detach().clone() for _, p in named]
    for _ in range(2):
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)
        reference.grad = torch.ones_like(reference)
        assert optimizer.clip_gradients(0.0).item() == pytest.approx((4 * 48) ** 0.5)
        optimizer.step()
        plain.step()
        optimizer.zero_grad()
    assert torch.equal(named[-1][1], reference)
    for (_, parameter), old in zip(named, before, strict=True):
        assert (parameter - old).float().mean().item() == pytest.approx(-0.02, rel=0.1)
    assert all(state["step"].item() == 2 for state in optimizer.optimizers[0].state.values())


def test_stochastic_round_is_unbiased():
    values = torch.tensor([1.0 + 2**-9, -1.0 - 2**-9, 3.14159, -1e-20, 0.0, 1.5])
    rounded = stochastic_round(values.expand(200_000, 6).contiguous(), torch.Generator().manual_seed(1)).float()
    spacing = torch.tensor([2**-7, 2**-7, 2**-6, 2**-74, 0, 0])
    assert ((rounded.double().mean(0) - values).abs() <= 0.01 * spacing.double()).all()
    assert (rounded - values).abs().max(0).values.le(spacing).all()


def test_stochastic_round_keeps_what_is_not_finite():
    special = torch.tensor([float("inf"), -float("inf"), float("nan")])
    out = stochastic_round(special.repeat(1000)).float().reshape(1000, 3)
    assert (out[:, 0] == float("inf")).all() and (out[:, 1] == -float("inf")).all() and out[:, 2].isnan().all()


def test_stochastic_round_into_goes_slice_by_slice(monkeypatch):
    monkeypatch.setattr(rounding, "SLICE_VALUES", 1000)
    values = torch.tensor([1.0 + 2**-9, -3.14159]).repeat(100_000).view(200, 1000)
    there, apart = torch.empty(200, 1000, dtype=torch.bfloat16), torch.empty(1000, 200, dtype=torch.bfloat16).T
    for target in (there, apart):
        stochastic_round_into(target, values, torch.Generator().manual_seed(1))
        assert (target.float() - values).abs().max() <= 2**-6
        assert target.reshape(-1, 2).double().mean(0).tolist() == pytest.approx([1.0 + 2**-9, -3.14159], abs=1e-4)
    assert torch.unique(there[:, ::2]).tolist() == [1.0, 1.0 + 2**-7]


def test_stochastic_round_takes_15_bytes_a_value():
    """As `planner/calibration.py` has it: noise, masked sum and size of the value in float32, and three truth values."""
    values = torch.randn(1000, 100)
    with LiveBytes() as memory:
        stochastic_round(values)
    assert memory.peak == ROUNDING_BYTES * values.numel()


def test_stochastic_rounding_refuses_float16():
    with pytest.raises(RecipeError, match="float32_masters"):
        StepOptimizer(weights(torch.float16), settings(), "stochastic_rounding")


@pytest.mark.parametrize("updates", ["float32_masters", "stochastic_rounding"])
@pytest.mark.parametrize("optim", ["adamw", "muon", "adamw_8bit", "paged_adamw_8bit"])
def test_state_continues_exactly(updates, optim):
    if "8bit" in optim:
        pytest.importorskip("bitsandbytes")
    names = [f"{LAYER}.weight", "lm_head.weight", f"{LAYER}.norm"]

    def make():
        shapes = [(80, 60), (5, 6), (6,)]  # bitsandbytes keeps states of 4,096 elements on in 8 bits
        torch.manual_seed(0)
        named = [(n, nn.Parameter(torch.randn(s).bfloat16())) for n, s in zip(names, shapes, strict=True)]
        return named, StepOptimizer(named, settings(optim=optim, learning_rate=1e-3), updates)

    def advance(named, optimizer, steps):
        for step in steps:
            for _, parameter in named:
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            optimizer.collect_gradients()
            optimizer.step()
            optimizer.zero_grad()

    named, optimizer = make()
    advance(named, optimizer, range(5))
    other_named, other = make()
    advance(other_named, other, range(2))
    third_named, third = make()
    for (_, a), (_, b) in zip(third_named, other_named, strict=True):
        a.data.copy_(b.data)
    third.load_state_dict(other.state_dict())
    advance(third_named, third, range(2, 5))
    for (_, a), (_, b) in zip(named, third_named, strict=True):
        assert torch.equal(a, b)


def test_state_of_other_parameters_is_refused():
    state = StepOptimizer(weights(), settings()).state_dict()
    with pytest.raises(TrainingError, match="lm_head"):
        StepOptimizer(weights(names=["lm_head.weight"]), settings()).load_state_dict(state)


def test_nothing_to_train_is_refused():
    frozen = [(f"{LAYER}.weight", nn.Parameter(torch.ones(2, 2), requires_grad=False))]
    with pytest.raises(TrainingError, match="Nothing trains"):
        StepOptimizer(frozen, settings())


def test_missing_bitsandbytes_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"finesight\[gpu\]"):
        StepOptimizer(weights(), settings(optim="adamw_8bit"))


@pytest.mark.parametrize("updates", ["float32_masters", "stochastic_rounding"])
def test_eight_bit_adam_steps_like_adam(updates):
    weight = nn.Parameter(torch.ones(128, 128, dtype=torch.bfloat16))
    optimizer = StepOptimizer([(f"{LAYER}.weight", weight)], settings(optim="adamw_8bit", learning_rate=1e-2), updates)
    for _ in range(5):
        weight.grad = torch.ones_like(weight)
        optimizer.collect_gradients()
        optimizer.step()
        optimizer.zero_grad()
    assert weight.float().mean().item() == pytest.approx(0.95, abs=5e-3)


def test_a_paged_state_is_paged_again_when_it_is_restored():
    """On a CPU bitsandbytes warns and pages nothing; what is restored must still be the state, tensor by tensor."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def make():
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(80, 60)), nn.Parameter(torch.randn(6))]
        return weights, bitsandbytes.optim.PagedAdamW8bit(weights, lr=1e-2)

    def advance(weights, optimizer, steps):
        for step in steps:
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        weights, optimizer = make()
        advance(weights, optimizer, range(2))
        others, other = make()
        load_optimizer_state(other, optimizer.state_dict())
    for mine, theirs in zip(weights, others, strict=True):
        theirs.data.copy_(mine.data)
        for name, value in optimizer.state[mine].items():
            restored = other.state[theirs][name]
            assert torch.equal(value, restored) if isinstance(value, torch.Tensor) else value == restored
        assert other.state[theirs]["state1"].data_ptr() != optimizer.state[mine]["state1"].data_ptr()
    advance(weights, optimizer, range(2, 4))
    advance(others, other, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_on_a_cpu_the_paged_optimizer_is_the_plain_one():
    """Its state is in main memory there as it is."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    (optimizer,) = StepOptimizer(weights(), settings(optim="paged_adamw_8bit")).optimizers
    assert type(optimizer) is bitsandbytes.optim.AdamW8bit


def test_each_parameter_has_an_optimizer_of_its_own_under_gradient_release():
    names = ["visual.blocks.0.attn.qkv.weight", f"{LAYER}.weight", "lm_head.weight"]
    optimizer = StepOptimizer(
        weights(names=names),
        settings(optim="muon", learning_rate=1e-3, muon_learning_rate=1e-2, vision_learning_rate=1e-4, gradient_release=True),
    )
    assert [type(each).__name__ for each in optimizer.optimizers] == ["Muon", "Muon", "AdamW"]
    optimizer.set_factor(0.5)
    # of a part under two optimizers AdamW's counts
    assert optimizer.learning_rates() == {"tower": pytest.approx(5e-4), "language_model": pytest.approx(5e-4)}
