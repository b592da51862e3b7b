"""Float8 base weights: bounded rounding, exact on a CPU beside the dequantised model, plain peft around them."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from finesight.errors import ModelError, RecipeError
from finesight.families import FAMILIES as TABLE
from finesight.models.adapters import apply_tuning
from finesight.models.float8 import (
    Float8Linear,
    dequantize_rows,
    float8_products,
    float8_refusal,
    quantize_rows,
)
from finesight.models.linear import AccumulatedLinear, accumulate_adapters, project
from finesight.models.packed import PackedModel
from finesight.models.quantize import Scheme, dequantize, quantization_notes, quantize
from finesight.recipe import TuningSettings
from finesight.recipe_files import parse_recipe
from parity.reference import Builder, gradients, packed_loss
from parity.test_packed_parity import mixed
from tiny import FAMILIES, tiny_model

FLOAT8 = Scheme("fp8")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Of torch.library.opcheck; its check of the schema compares inputs in a way that float8 tensors do not have.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def matrix(rows: int = 48, columns: int = 64, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = (
        torch.randn(rows, columns, generator=generator, dtype=torch.float64) * torch.logspace(-9, 6, rows, dtype=torch.float64)[:, None]
    )
    values[3] = 0
    return values


class TestRows:
    @pytest.mark.parametrize(("dtype", "mantissa", "smallest"), [(E4M3, 3, 2.0**-9), (E5M2, 2, 2.0**-16)])
    def test_error_of_every_entry(self, dtype: torch.dtype, mantissa: int, smallest: float) -> None:
        """Half a step of the format: relative to the number, or to the smallest step where numbers are subnormal."""
        values = matrix()
        stored, scale = quantize_rows(values, dtype)
        error = (stored.double() * scale.double() - values).abs()
        assert (error <= torch.maximum(values.abs() * 2.0 ** -(mantissa + 1), scale.double() * smallest / 2)).all()
        assert stored.float().isfinite().all()
        assert stored.shape == values.shape and scale.shape == (48, 1)

    @pytest.mark.parametrize("dtype", [E4M3, E5M2])
    def test_scales_are_the_least_powers_of_two(self, dtype: torch.dtype) -> None:
        values = matrix()
        _, scale = quantize_rows(values, dtype)
        assert torch.equal(torch.exp2(torch.round(torch.log2(scale))), scale)
        largest = (values / scale.double()).abs().amax(1)
        limit = torch.finfo(dtype).max
        nonzero = values.abs().amax(1) > 0
        assert (largest[nonzero] <= limit * (1 + 1e-6)).all() and (largest[nonzero] > limit / 2 * (1 - 1e-6)).all()

    def test_the_limit_itself_fits(self) -> None:
        stored, scale = quantize_rows(torch.tensor([[448.0, -1.0], [-448.0 * 2**-20, 0.0]]))
        assert scale.view(-1).tolist() == [1.0, 2.0**-20]
        assert stored.float().tolist() == [[448.0, -1.0], [-448.0, 0.0]]

    def test_zeros_stay_zeros(self) -> None:
        stored, scale = quantize_rows(torch.zeros(2, 32))
        assert not stored.float().any() and scale.isfinite().all() and (scale > 0).all()

    @pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
    def test_what_is_not_finite_is_seen(self, bad: float) -> None:
        values = torch.ones(2, 16)
        values[1, 5] = bad
        stored, scale = quantize_rows(values)
        back = dequantize_rows(stored, scale, torch.float32)
        assert torch.equal(back[0], torch.ones(16)) and back[1].isnan().all()

    def test_dequantised_weights_are_exact_in_bfloat16_and_stable(self) -> None:
        stored, scale = quantize_rows(matrix().float())
        exact = dequantize_rows(stored, scale, torch.float32)
        assert torch.equal(dequantize_rows(stored, scale, torch.bfloat16).float(), exact)
        again, scale_again = quantize_rows(exact)
        assert torch.equal(dequantize_rows(again, scale_again, torch.float32), exact)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_every_precision_gives_the_same_bytes(self, dtype: torch.dtype) -> None:
        values = torch.randn(8, 32).bfloat16().clamp(-4, 4) + 2**-6
        expected, scale = quantize_rows(values.float())
        found, found_scale = quantize_rows(values.to(dtype))
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(found_scale, scale)


def float8_product(values: torch.Tensor, scale: torch.Tensor, other: torch.Tensor, other_scale: torch.Tensor) -> torch.Tensor:
    """What a float8 matrix unit computes, in float64: (T, K) times (N, K)ᵀ, scales applied to rows and columns of the result."""
    return values.double() @ other.double().T * scale.double().view(-1, 1) * other_scale.double().view(1, -1)


class TestProducts:
    """The arithmetic of the GPU, written out in float64 on the same float8 numbers."""

    def test_forward(self) -> None:
        torch.manual_seed(0)
        x, weight = torch.randn(64, 256), torch.randn(96, 256) / 16
        stored, scale = quantize_rows(weight)
        found = float8_product(*quantize_rows(x), stored, scale)
        exact = x.double() @ weight.double().T
        assert (found - exact).norm() / exact.norm() < 0.045  # two factors of 2.6% root mean square each

    @pytest.mark.parametrize(("dtype", "bound"), [(E4M3, 0.033), (E5M2, 0.066)])
    def test_backward_with_the_scale_folded_in(self, dtype: torch.dtype, bound: float) -> None:
        """g W with W's scales along the inner dimension: exact before quantisation, bounded after it, gradients of any size."""
        torch.manual_seed(0)
        weights = [torch.randn(n, 64) * torch.logspace(-2, 1, n)[:, None] for n in (96, 32, 16)]
        grads = [torch.randn(40, n) * torch.logspace(-8, -2, 40)[:, None] for n in (96, 32, 16)]
        stored, scales = zip(*(quantize_rows(w) for w in weights), strict=True)
        exact = sum(g.double() @ dequantize_rows(w, s, torch.float64) for g, w, s in zip(grads, stored, scales, strict=True))
        folded = torch.cat([g * s.view(1, -1) for g, s in zip(grads, scales, strict=True)], dim=1)
        joined = torch.cat([w.double() for w in stored])
        assert torch.allclose(folded.double() @ joined, exact, rtol=1e-12)
        values, scale = quantize_rows(folded, dtype)
        found = float8_product(values, scale, joined.T, torch.ones(64))
        relative = (found - exact).norm(dim=1) / exact.norm(dim=1)
        assert relative.mean() < bound and relative.max() < 2 * bound

    def test_joining_hurts_no_small_gradient(self) -> None:
        """The gradients of q, k and v share a scale: small ones beside large ones keep their precision in the sum."""
        torch.manual_seed(0)
        large, small = torch.randn(16, 64), torch.randn(16, 64) * 2**-8
        values, scale = quantize_rows(torch.cat([large, small], dim=1))
        back = dequantize_rows(values, scale, torch.float64)[:, 64:]
        assert (back - small).norm() / small.norm() < 0.03


def layer(bias: bool = True, dtype: torch.dtype = torch.float32, inputs: int = 64, outputs: int = 48, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False).to(dtype)


def adapted(base: nn.Linear, **config) -> nn.Module:
    torch.manual_seed(1)
    config = dict(r=4, lora_alpha=8, init_lora_weights=False) | config
    return get_peft_model(nn.Sequential(base), LoraConfig(target_modules=["0"], **config))


def twins(bias: bool = True, dtype: torch.dtype = torch.float32, **config) -> tuple[nn.Module, nn.Module]:
    """An adapted float8 layer, and peft's own over a plain layer of the same numbers."""
    ours = adapted(Float8Linear.of(layer(bias, dtype)), **config)
    theirs = adapted(Float8Linear.of(layer(bias, dtype)).dequantized(), **config)
    assert accumulate_adapters(ours) == 1
    return ours, theirs


class TestAdaptedLayer:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("rslora", [False, True])
    def test_equal_to_peft_over_the_dequantised_layer(self, bias: bool, rslora: bool) -> None:
        ours, theirs = twins(bias, use_rslora=rslora)
        x = torch.randn(3, 5, 64, requires_grad=True)
        probe = torch.randn(3, 5, 48)
        found, expected = ours(x), theirs(x)
        assert torch.allclose(found, expected, atol=1e-5)
        grads = [
            torch.autograd.grad((out * probe).sum(), [x, *(p for p in m.parameters() if p.requires_grad)])
            for out, m in ((found, ours), (expected, theirs))
        ]
        for a, b in zip(*grads, strict=True):
            assert torch.allclose(a, b, atol=1e-5)

    def test_without_an_adapter(self) -> None:
        plain = Float8Linear.of(layer())
        x = torch.randn(2, 3, 64, requires_grad=True)
        same = plain.dequantized()
        assert torch.allclose(plain(x), same(x), atol=1e-6)
        (found,), (expected,) = (torch.autograd.grad(m(x).pow(2).sum(), [x]) for m in (plain, same))
        assert torch.allclose(found, expected, atol=1e-4)

    @pytest.mark.parametrize("count", [2, 3, 5])
    @pytest.mark.parametrize("with_adapter", [True, False])
    def test_layers_of_one_input(self, count: int, with_adapter: bool) -> None:
        layers = [Float8Linear.of(layer(outputs=16 * (i + 1), seed=i)) for i in range(count)]
        if with_adapter:
            wrapped = [adapted(base, r=2 + i) for i, base in enumerate(layers)]
            assert [accumulate_adapters(m) for m in wrapped] == [1] * count
            layers = [m.base_model.model[0] for m in wrapped]
        x = torch.randn(7, 64, requires_grad=True)
        parameters = [x, *(p for m in layers for p in m.parameters() if p.requires_grad)]
        joined, single = project(layers, x), [m(x) for m in layers]
        for a, b in zip(joined, single, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
        losses = [sum(out.sin().sum() for out in outs) for outs in (joined, single)]
        for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
            assert torch.allclose(a, b, atol=1e-5)

    def test_an_output_that_nobody_reads(self) -> None:
        layers = [Float8Linear.of(layer(outputs=16, seed=i)) for i in range(2)]
        x = torch.randn(7, 64, requires_grad=True)
        project(layers, x)[1].sum().backward()
        assert torch.allclose(x.grad, layers[1].dequantized().weight.sum(0).expand(7, 64), atol=1e-5)

    def test_float8_beside_plain_layers(self) -> None:
        ours, theirs = twins()
        accumulate_adapters(theirs)
        x = torch.randn(4, 64)
        found = project([ours.base_model.model[0], theirs.base_model.model[0]], x)
        assert torch.allclose(*found, atol=1e-5)

    def test_small_updates_survive_bfloat16(self) -> None:
        ours, _ = twins(bias=False, dtype=torch.bfloat16)
        adapter = ours.base_model.model[0]
        nn.init.normal_(adapter.lora_B["default"].weight, std=2e-4)
        x = torch.randn(65536, 64).bfloat16()  # many rows: rounding noise averages out
        exact = F.linear(F.linear(x.double(), adapter.lora_A["default"].weight.double()), adapter.lora_B["default"].weight.double()) * 2
        with torch.no_grad():
            seen = ours(x).double()
            with ours.disable_adapter():
                seen -= ours(x).double()
        assert ours(x).dtype == torch.bfloat16
        assert ((seen * exact).sum() / exact.pow(2).sum()).item() > 0.95

    def test_dropout_and_switching_off(self) -> None:
        ours, _ = twins(lora_dropout=0.5)
        x = torch.randn(8, 64, requires_grad=True)
        ours.train()
        torch.manual_seed(2)
        found = ours(x)
        adapter = ours.base_model.model[0]
        torch.manual_seed(2)
        dropped = F.dropout(x, 0.5)
        weights = [m["default"].weight for m in (adapter.lora_A, adapter.lora_B)]
        expected = adapter.base_layer.dequantized()(x) + F.linear(F.linear(dropped, weights[0]), weights[1]) * 2
        assert torch.allclose(found, expected, atol=1e-5)
        for a, b in zip(*(torch.autograd.grad(out.sin().sum(), [x, *weights]) for out in (found, expected)), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        with ours.disable_adapter():
            assert torch.equal(ours(x), adapter.base_layer(x))

    def test_dropout_is_summed_in_float32_too(self) -> None:
        ours, _ = twins(bias=False, dtype=torch.bfloat16, lora_dropout=0.1)
        ours.train()
        adapter, x = ours.base_model.model[0], torch.randn(4096, 64).bfloat16()
        nn.init.constant_(adapter.lora_B["default"].weight, 0)
        base = x.float() @ adapter.base_layer.dequantized().weight.float().T
        assert torch.equal(ours(x), base.bfloat16())
        assert ours(x).dtype == torch.bfloat16

    def test_computed_again_and_compiled(self) -> None:
        ours, _ = twins()
        x = torch.randn(6, 64, requires_grad=True)
        parameters = [x, *(p for p in ours.parameters() if p.requires_grad)]

        def grads(function) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(function(x).sin().sum(), parameters)

        plain = grads(ours)
        torch._dynamo.reset()
        for again in (lambda x: checkpoint(ours, x, use_reentrant=False), torch.compile(ours, backend="aot_eager", fullgraph=True)):
            for a, b in zip(grads(again), plain, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("rank", [4, 0])
    def test_registration(self, rank: int) -> None:
        """torch's own check: fake result and gradient agree with what is computed."""
        stored, scale = quantize_rows(torch.randn(48, 64))
        x, down, up = (torch.randn(*shape, requires_grad=True) for shape in ((5, 64), (rank, 64), (48, rank)))
        for out_dtype in (torch.float32, torch.float64):
            arguments = (x, [stored], [scale.view(-1)], [down], [up], [2.0], out_dtype)
            torch.library.opcheck(float8_products, arguments, test_utils=CHECKS)

    def test_autocast(self) -> None:
        ours, _ = twins()
        x = torch.randn(4, 64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ours(x).dtype == torch.bfloat16


class TestPeft:
    def test_adapter_is_float32_and_drawn_as_over_a_plain_layer(self) -> None:
        over_float8 = adapted(Float8Linear.of(layer(dtype=torch.bfloat16)), init_lora_weights=True)
        over_plain = adapted(layer(dtype=torch.bfloat16), init_lora_weights=True)
        found = {n: p for n, p in over_float8.named_parameters() if p.requires_grad}
        expected = {n: p for n, p in over_plain.named_parameters() if p.requires_grad}
        assert found.keys() == expected.keys()
        for name, parameter in found.items():
            assert parameter.dtype == torch.float32 and torch.equal(parameter, expected[name])

    def test_files_are_plain_peft(self, tmp_path) -> None:
        ours, theirs = twins()
        ours.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
        files = []
        for name in ("ours", "theirs"):
            with safe_open(tmp_path / name / "adapter_model.safetensors", framework="pt") as file:
                files.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())

    def test_merging_is_refused_until_dequantised(self) -> None:
        ours, theirs = twins()
        x = torch.randn(4, 64)
        with pytest.raises(ModelError, match="cannot be merged into float8"):
            ours.merge_adapter()
        plain = ours(x)
        assert dequantize(ours) == 1
        assert torch.allclose(ours(x), plain, atol=1e-5)
        ours.merge_adapter()
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)

    def test_merging_before_the_layers_are_exchanged_does_not_pass_silently(self) -> None:
        with pytest.raises(RuntimeError, match="Float8"):
            adapted(Float8Linear.of(layer())).merge_adapter()


class TestLayer:
    def test_precision_changes_leave_the_stored_numbers(self) -> None:
        plain = Float8Linear.of(layer(dtype=torch.bfloat16))
        stored, scale = plain.weight.view(torch.uint8).clone(), plain.scale.clone()
        x = torch.randn(2, 64)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            moved = nn.Sequential(plain).to(dtype)[0]
            assert moved.compute_dtype == moved.bias.dtype == dtype
            assert torch.equal(moved.weight.view(torch.uint8), stored) and torch.equal(moved.scale, scale)
            assert moved.weight.dtype == E4M3 and moved.scale.dtype == torch.float32
            assert moved(x.to(dtype)).dtype == dtype
        assert plain.to("meta").weight.is_meta

    def test_state_and_copies(self) -> None:
        plain = Float8Linear.of(layer())
        other = Float8Linear.of(layer(seed=1))
        other.load_state_dict(plain.state_dict())
        x = torch.randn(2, 64)
        assert torch.equal(other(x), plain(x)) and torch.equal(copy.deepcopy(plain)(x), plain(x))
        assert "float8_e4m3fn" in repr(plain)

    def test_a_weight_that_trains_is_refused(self) -> None:
        plain = Float8Linear.of(layer()).requires_grad_(True)
        with pytest.raises(ModelError, match="cannot train"):
            plain(torch.randn(2, 64))


def language_projections(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, Float8Linear)}


class TestModel:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_which_layers(self, family: str) -> None:
        model = tiny_model(family, dtype=torch.bfloat16)
        before = sum(p.numel() * p.itemsize for p in model.parameters())
        names = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".language_model.layers." in n and n.endswith("_proj")}
        assert quantize(model, FLOAT8) == len(names) == (12 if TABLE[family].moe else 21)
        assert language_projections(model) == names
        assert model.dtype == torch.bfloat16 and not model.training
        saved = sum(model.get_submodule(n).weight.numel() for n in names)
        assert sum(p.numel() * p.itemsize for p in model.parameters()) == before - saved

    @pytest.mark.parametrize("family", FAMILIES)
    def test_loss_and_gradients_are_those_of_the_dequantised_model(self, family: str) -> None:
        original = tiny_model(family)
        builder = Builder(original)
        samples = mixed(builder)[:6]
        model = copy.deepcopy(original)
        quantize(model, FLOAT8)
        plain = copy.deepcopy(model)
        dequantize(plain)
        losses, found = [], []
        for base in (model, plain):
            tuned = apply_tuning(base, TuningSettings(r=4), TABLE[family], seed=0)
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
            packed = PackedModel(tuned)
            losses.append(packed_loss(packed, builder, samples, token_budget=256, share=True))
            found.append(gradients(losses[-1], tuned))
        assert torch.allclose(*losses, rtol=1e-6)
        assert found[0].keys() == found[1].keys() and any(g.norm() > 0 for g in found[0].values())
        for name, gradient in found[0].items():
            assert (gradient - found[1][name]).norm() <= 1e-4 * found[1][name].norm() + 1e-8, name
        with torch.no_grad():
            exact = packed_loss(PackedModel(original), builder, samples, token_budget=256, share=True)
            rounded = packed_loss(PackedModel(tuned.unload()), builder, samples, token_budget=256, share=True)
        assert abs(rounded - exact) < 0.03 * exact  # random weights of a large spread: the worst case

    def test_before_or_after_peft(self) -> None:
        builder = Builder(tiny_model("qwen3_vl"))
        samples = mixed(builder)[:2]
        losses = []
        for order in ("before", "after"):
            model = tiny_model("qwen3_vl")
            if order == "before":
                quantize(model, FLOAT8)
            model = apply_tuning(model, TuningSettings(r=4), TABLE["qwen3_vl"], seed=0)
            if order == "after":
                assert quantize(model, FLOAT8) == 21
            packed = PackedModel(model)
            assert all(isinstance(m.base_layer, Float8Linear) for m in model.modules() if isinstance(m, AccumulatedLinear))
            losses.append(packed_loss(packed, builder, samples, token_budget=256, share=True))
        assert torch.equal(*losses)

    def test_computed_again_gives_the_same_gradients(self) -> None:
        builder = Builder(tiny_model("qwen3_vl"))
        samples = mixed(builder)[:2]
        model = tiny_model("qwen3_vl")
        quantize(model, FLOAT8)
        model = apply_tuning(model, TuningSettings(r=4), TABLE["qwen3_vl"], seed=0)
        results = []
        for checkpointing in (False, True):
            packed = PackedModel(model, gradient_checkpointing=checkpointing)
            results.append(gradients(packed_loss(packed, builder, samples, token_budget=256, share=True), model))
        assert all(torch.equal(g, results[1][n]) for n, g in results[0].items())

    def test_notes(self) -> None:
        model = tiny_model("qwen3_vl_moe")
        assert quantization_notes(model) == []
        quantize(model, FLOAT8)
        notes = quantization_notes(model)
        assert "float8" in notes[0] and "Experts" in notes[1]

    def test_refusals(self) -> None:
        assert float8_refusal("cpu") is None
        assert float8_refusal("cuda", capability=(9, 0)) is None and float8_refusal("cuda", capability=(10, 3)) is None
        assert "compute capability 9.0" in float8_refusal("cuda", capability=(8, 6))
        assert "NVIDIA" in float8_refusal("mps")
        with pytest.raises(ModelError, match="No matrix"):
            quantize(nn.Sequential(nn.Linear(16, 16)), FLOAT8)
        narrow = tiny_model("qwen3_vl")
        narrow.model.language_model.layers[0].mlp.up_proj = nn.Linear(32, 24)
        with pytest.raises(ModelError, match="multiples of 16"):
            quantize(narrow, FLOAT8)


class TestRecipe:
    def test_full_tuning_is_refused(self) -> None:
        settings = {"model": {"name_or_path": "x", "load_in_fp8": True}}
        assert parse_recipe(settings).model.load_in_fp8
        with pytest.raises(RecipeError, match="load_in_fp8"):
            parse_recipe(settings | {"tuning": {"method": "full"}})
