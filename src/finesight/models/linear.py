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
            out, _ = adapted_product(rows, weight, down, up, scale)
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


# Opaque to compilers: all of it is matrix products, and only written this way are they accumulated in place. A
# functional addmm copies its first argument before adding to it, one more pass over every output.
@torch.library.custom_op("finesight::adapted_product", mutates_args=())
def adapted_product(
    x: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x Wᵀ + s (x Aᵀ) Bᵀ, the base product accumulated onto the adapter's.

    Args:
        x: (T, I); weight: (O, I); down: (r, I), peft's A; up: (O, r), peft's B.

    Returns:
        The sum (T, O), and s x Aᵀ (T, r) for the backward pass.
    """
    inner = (x @ down.T).mul_(scale)
    return (inner @ up.T).addmm_(x, weight.T), inner


@adapted_product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], down.shape[0])


@torch.library.custom_op("finesight::adapted_product_backward", mutates_args=())
def _adapted_product_backward(
    grad: torch.Tensor, x: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor,
    scale: float, needs_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x (empty unless needed), A and B."""
    grad_inner = (grad @ up).mul_(scale)
    grad_x = (grad_inner @ down).addmm_(grad, weight) if needs_x else x.new_empty(0)
    return grad_x, grad_inner.T @ x, grad.T @ inner


@_adapted_product_backward.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor,
    scale: float, needs_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return torch.empty_like(x) if needs_x else x.new_empty(0), torch.empty_like(down), torch.empty_like(up)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, down, up, ctx.scale = inputs
    ctx.save_for_backward(x, output[1], weight, down, up)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, inner, weight, down, up = ctx.saved_tensors
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    grad_x, grad_down, grad_up = _adapted_product_backward(grad, x, inner, weight, down, up, ctx.scale, needs_x)
    return grad_x if needs_x else None, grad.T @ x if needs_weight else None, grad_down, grad_up, None


adapted_product.register_autograd(_backward, setup_context=_save_for_backward)


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
