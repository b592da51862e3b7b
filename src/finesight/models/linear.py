"""Adapted linear layers whose updates are not rounded away.

peft computes `base(x) + delta(x)`. In bfloat16 the base product already lies on the bfloat16 grid, so an update smaller
than half a step of that grid is rounded back to nothing, at every step of training. Here the base product is
accumulated onto the delta in the matrix unit's float32 and rounded once. peft's modules, parameter names and files stay
as they are; only how they compute changes.

Shapes: T tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn


class AccumulatedLinear(PeftLinear):
    """peft's adapted linear layer, computing its sum in one product."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(…, I) -> (…, O). Anything but one plain, active, unmerged adapter is left to peft."""
        name = self._only_adapter()
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base, dropout = self.base_layer, self.lora_dropout[name]
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else base.weight.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        weight, down, up = (w.to(dtype) for w in (base.weight, self.lora_A[name].weight, self.lora_B[name].weight))
        scale = float(self.scaling[name])
        if isinstance(dropout, nn.Dropout) and dropout.p > 0 and self.training:
            delta = (dropout(rows) @ down.T * scale) @ up.T
            out = torch.addmm(delta, rows, weight.T)
        else:
            out = _AdaptedProduct.apply(rows, weight, down, up, scale)
        if base.bias is not None:
            # Last, never onto the delta alone: a bias is on the grid too, and would round the delta away.
            out = out + base.bias.to(dtype)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _only_adapter(self) -> str | None:
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A:
            return None
        name = active[0]
        return None if name in self.lora_variant or self.lora_bias.get(name, False) else name


class _AdaptedProduct(torch.autograd.Function):
    """x Wᵀ + s (x Aᵀ) Bᵀ, each sum of two products accumulated in one, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
        inner = (x @ down.T).mul_(scale)
        ctx.save_for_backward(x, inner, weight, down, up)
        ctx.scale = scale
        return torch.addmm(inner @ up.T, x, weight.T)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, inner, weight, down, up = ctx.saved_tensors
        needs_x, needs_weight, needs_down, needs_up, _ = ctx.needs_input_grad
        grad_inner = (grad @ up).mul_(ctx.scale) if needs_x or needs_down else None
        return (
            torch.addmm(grad_inner @ down, grad, weight) if needs_x else None,
            grad.T @ x if needs_weight else None,
            grad_inner.T @ x if needs_down else None,
            grad.T @ inner if needs_up else None,
            None,
        )


def accumulate_adapters(model: nn.Module) -> int:
    """Lets every plain adapted linear layer of a peft model compute its sum in one product; returns how many.

    Layers over quantised bases are of other peft classes and stay as they are.
    """
    count = 0
    for module in model.modules():
        if type(module) is PeftLinear and type(module.base_layer) is nn.Linear and not module.fan_in_fan_out:
            module.__class__ = AccumulatedLinear  # the same state, another way to compute
            count += 1
    return count
