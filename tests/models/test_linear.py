"""Adapted layers: equal to peft's in float32, and small updates survive in bfloat16."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from finesight.models.linear import AccumulatedLinear, accumulate_adapters, adapted_products, project


def adapted(bias: bool = False, size: int = 64, std: float = 0.05, **config) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size, bias=bias))
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False, **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_equal_to_peft_in_float64(bias: bool, rslora: bool) -> None:
    model = adapted(bias, use_rslora=rslora).double()
    x = torch.randn(3, 5, 64, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(3, 5, 64, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = model(x)
    expected_grads = torch.autograd.grad((expected * probe).sum(), [x, *parameters])
    assert accumulate_adapters(model) == 1
    found = model(x)
    assert torch.allclose(found, expected, atol=1e-12)
    for a, b in zip(torch.autograd.grad((found * probe).sum(), [x, *parameters]), expected_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def survives(model: nn.Module, x: torch.Tensor) -> float:
    """Mean share of the adapter's update that is seen in the output: the projection on the exact update."""
    layer = model.base_model.model[0]
    exact = (
        torch.nn.functional.linear(
            torch.nn.functional.linear(x.double(), layer.lora_A["default"].weight.double()), layer.lora_B["default"].weight.double()
        )
        * layer.scaling["default"]
    )
    with torch.no_grad():
        seen = model(x).double()
        with model.disable_adapter():
            seen = seen - model(x).double()
    return ((seen * exact).sum() / exact.pow(2).sum()).item()


@pytest.mark.parametrize("bias", [False, True])
def test_small_updates_survive_bfloat16(bias: bool) -> None:
    model = adapted(bias, size=512, std=2e-5)
    layer = model.base_model.model[0].base_layer
    layer.weight.data = (torch.randn(512, 512) / 16).bfloat16()
    if bias:
        layer.bias.data = torch.randn(512).bfloat16() * 3
    x = torch.randn(16384, 512).bfloat16()  # many rows: rounding noise averages out
    by_peft = survives(model, x)
    accumulate_adapters(model)
    ours = survives(model, x)
    print(f"share of a 2e-5 update that survives: peft {by_peft:.3f}, accumulated {ours:.3f}")
    assert by_peft < 0.3
    assert ours > 0.95


def test_dropout_disabling_and_merging_keep_their_meaning() -> None:
    model = adapted(lora_dropout=0.5)
    accumulate_adapters(model)
    x = torch.randn(8, 64)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    plain = model(x)
    with model.disable_adapter():
        assert torch.allclose(model(x), model.base_model.model[0].base_layer(x))
    model.merge_adapter()
    assert torch.allclose(model(x), plain, atol=1e-5)
    model.unmerge_adapter()
    assert isinstance(model.base_model.model[0], AccumulatedLinear)


def test_files_are_plain_peft(tmp_path) -> None:
    model = adapted()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    accumulate_adapters(model)
    assert model.state_dict().keys() == before.keys()
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}


def several(count: int = 3, **config) -> tuple[list[nn.Module], list[nn.Module]]:
    """Layers of one input as peft computes them, and the same as they are computed here; float64."""
    theirs, ours = [], []
    for index in range(count):
        for kind in (theirs, ours):
            torch.manual_seed(index)
            lora = LoraConfig(r=2 + index, lora_alpha=5, target_modules=["0"], init_lora_weights=False, **config)
            kind.append(get_peft_model(nn.Sequential(nn.Linear(24, 8 * (index + 1))), lora).double())
        assert accumulate_adapters(ours[-1]) == 1
    return [m.base_model.model[0] for m in theirs], [m.base_model.model[0] for m in ours]


class TestLayersOfOneInput:
    @pytest.mark.parametrize("x_needs", [True, False], ids=["x needed", "x not needed"])
    @pytest.mark.parametrize("trains", ["adapters", "bases too", "one base", "adapters of one"])
    def test_exactly_the_gradients_that_are_asked_for(self, trains: str, x_needs: bool) -> None:
        theirs, ours = several()
        for layers in (theirs, ours):
            if trains == "adapters of one":
                for layer in layers[1:]:
                    layer.requires_grad_(False)
            for layer in {"bases too": layers, "one base": layers[1:2]}.get(trains, []):
                layer.base_layer.requires_grad_(True)
        x = torch.randn(7, 24, dtype=torch.float64, requires_grad=x_needs)
        results = []
        for layers, outs in ((theirs, [layer(x) for layer in theirs]), (ours, project(ours, x))):
            names = [(i, n, p) for i, layer in enumerate(layers) for n, p in layer.named_parameters() if p.requires_grad]
            inputs = [p for _, _, p in names] + ([x] if x_needs else [])
            results.append(torch.autograd.grad(sum(out.sin().sum() for out in outs), inputs))
        assert len(results[0]) == len(results[1]) > 0
        for found, expected in zip(results[1], results[0], strict=True):
            assert torch.allclose(found, expected, atol=1e-12)

    def test_an_output_that_nobody_reads(self) -> None:
        theirs, ours = several()
        x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(project(ours, x)[1].sin().sum(), [x])
        (expected,) = torch.autograd.grad(theirs[1](x).sin().sum(), [x])
        assert torch.allclose(found, expected, atol=1e-12)

    def test_computed_again_and_compiled(self) -> None:
        _, ours = several()
        x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
        parameters = [x, *(p for layer in ours for p in layer.parameters() if p.requires_grad)]

        def loss(x: torch.Tensor) -> torch.Tensor:
            return sum(out.sin().sum() for out in project(ours, x))

        plain = torch.autograd.grad(loss(x), parameters)
        torch._dynamo.reset()
        for again in (lambda x: checkpoint(loss, x, use_reentrant=False), torch.compile(loss, backend="aot_eager", fullgraph=True)):
            for found, expected in zip(torch.autograd.grad(again(x), parameters), plain, strict=True):
                assert torch.allclose(found, expected, atol=1e-12)

    def test_registration(self) -> None:
        """torch's own check: schema, fake result and gradient agree with what is computed."""
        double = dict(dtype=torch.float64, requires_grad=True)
        weights, downs = [torch.randn(n, 8, **double) for n in (4, 6)], [torch.randn(r, 8, **double) for r in (2, 3)]
        ups = [torch.randn(4, 2, **double), torch.randn(6, 3, **double)]
        torch.library.opcheck(adapted_products, (torch.randn(5, 8, **double), weights, downs, ups, [2.0, 0.3]))
        torch.autograd.gradcheck(
            lambda x, *m: adapted_products(x, list(m[:2]), list(m[2:4]), list(m[4:]), [2.0, 0.3])[:2],
            (torch.randn(5, 8, **double), *weights, *downs, *ups),
        )

    def test_dropout_and_several_adapters_are_left_to_each_layer(self) -> None:
        theirs, ours = several(lora_dropout=0.5)
        x = torch.randn(7, 24, dtype=torch.float64)
        for layers in (theirs, ours):
            for layer in layers:
                layer.train()
        torch.manual_seed(0)
        expected = [layer(x) for layer in theirs]
        torch.manual_seed(0)
        for out, same in zip(project(ours, x), expected, strict=True):
            assert torch.allclose(out, same, atol=1e-12)
