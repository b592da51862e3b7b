"""Adapted layers over a bfloat16 base on a GPU: nothing of a small update is lost, gradients are those of the plain sum."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from finesight.models import low_rank
from finesight.models.linear import accumulate_adapters, project

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DTYPES = [torch.bfloat16, torch.float16]


def adapted(dtype: torch.dtype, size: int = 4096, **config: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size, bias=False, device="cuda", dtype=dtype))
    nn.init.normal_(model[0].weight, std=0.02)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=["0"], **config))
    accumulate_adapters(model)
    return model.base_model.model[0]


def survival(layer: nn.Module, update: float) -> float:
    """Share of an update of B that is found in the output: the projection on the exact change."""
    up = layer.lora_B["default"].weight
    x = torch.randn(4096, layer.in_features, device="cuda").to(layer.base_layer.weight.dtype)
    with torch.no_grad():
        up.zero_()
        before = layer(x).double()
        up.copy_(update * (torch.randint(0, 2, up.shape, device="cuda") * 2 - 1))
        seen = layer(x).double() - before
    exact = x.double() @ layer.lora_A["default"].weight.double().T @ up.double().T
    return ((seen * exact).sum() / exact.square().sum()).item()


@pytest.mark.parametrize("triton", [True, False], ids=["kernel", "without Triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_updates_survive(dtype: torch.dtype, triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton:
        monkeypatch.setattr(low_rank, "has_triton", lambda index: False)
    share = survival(adapted(dtype), 2e-5)
    print(f"{dtype}, Triton {triton}: share of a 2e-5 update that survives {share:.3f}")
    assert 0.95 < share < 1.05


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_near_float64(dropout: float) -> None:
    layer = adapted(torch.bfloat16, 512, lora_dropout=dropout).train()
    nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    x = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    probe = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
    wanted = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    torch.manual_seed(1)
    found = torch.autograd.grad((project([layer], x)[0] * probe).sum(), wanted)
    torch.manual_seed(1)
    dropped = layer.lora_dropout["default"](x) if dropout else x
    down, up = (m.double().detach().requires_grad_() for m in wanted[1:])
    exact_x = x.double().detach().requires_grad_()
    mask = (dropped.double() / x.double()).nan_to_num(0).detach()
    out = exact_x @ layer.base_layer.weight.double().T + (exact_x * mask) @ down.T @ up.T
    expected = torch.autograd.grad((out * probe.double()).sum(), [exact_x, down, up])
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() / b.norm() < 1e-2
