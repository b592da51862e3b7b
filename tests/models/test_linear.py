"""Adapted layers: equal to peft's in float32, and small updates survive in bfloat16."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from finesight.models.linear import AccumulatedLinear, accumulate_adapters


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
