"""Adapted linear layers whose updates are not rounded away.

peft computes `base(x) + delta(x)`. In bfloat16 the base product already lies on the bfloat16 grid, so an update smaller
than half a step of that grid is rounded back to nothing, at every step of training. Here base product and delta are
summed before the one rounding (:mod:`finesight.models.low_rank`; over a float8 base :mod:`finesight.models.float8`, over
one in 4 or 8 bits, which is dequantised for the product, :mod:`finesight.models.quantized_linear`). peft's modules,
parameter names and files stay as they are; only how they compute changes.

Shapes: T tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from finesight.errors import ModelError
from finesight.models.few_rows import products_without_graph
from finesight.models.float8 import Float8Linear, float8_project
from finesight.models.low_rank import (
    Adapter,
    adapted_sums,
    add_bias,
    compute_dtype,
    inner_gradient,
    low_rank_gradients,
    low_rank_sum,
)
from finesight.models.quantized_linear import FourBitLinear, Int8Linear, QuantizedLinear, quantized_project

_BASES = (nn.Linear, Float8Linear, FourBitLinear, Int8Linear)


class AccumulatedLinear(PeftLinear):
    """peft's adapted linear layer, rounding its sum once."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(…, I) -> (…, O). Anything but one plain, active, unmerged adapter is left to peft."""
        name = self.only_adapter()
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        if not self.drops(name):
            return project([self], x)[0]
        # The adapter reads another input than the base here, so that the two are not one product.
        rows, down, up = self.operands(name, x)
        left = self.lora_dropout[name](rows) @ down.T * float(self.scaling[name])
        if (products := _products_over([self.base_layer])) is not None:
            (base,) = products([self.base_layer], [None], x, exact=True)
            out = (base + left @ up.T).to(rows.dtype)
        else:
            out = low_rank_sum(rows, self.base_layer.weight.to(rows.dtype), left, up)
        return add_bias(out, self.base_layer.bias, x)

    def only_adapter(self) -> str | None:
        """Name of the adapter in use if there is exactly one plain one, neither merged nor switched off."""
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A:
            return None
        name = active[0]
        return None if name in self.lora_variant or self.lora_bias.get(name, False) else name

    def drops(self, name: str) -> bool:
        """Whether dropout is at work before the adapter."""
        dropout = self.lora_dropout[name]
        return isinstance(dropout, nn.Dropout) and dropout.p > 0 and self.training

    def operands(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows (T, I), A (r, I) and B (O, r), in the precision of the product."""
        base = self.base_layer
        dtype = compute_dtype(x, getattr(base, "compute_dtype", base.weight.dtype))
        return x.reshape(-1, x.shape[-1]).to(dtype), self.lora_A[name].weight.to(dtype), self.lora_B[name].weight.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As in peft.

        Raises:
            ModelError: the base weight is quantised, and on its coarse grid an update would be lost.
        """
        if isinstance(self.base_layer, (Float8Linear, QuantizedLinear)):
            kind = "float8" if isinstance(self.base_layer, Float8Linear) else f"{self.base_layer.bits}-bit"
            raise ModelError(
                f"An adapter cannot be merged into {kind} weights: its update would be rounded away. Merge it into the base loaded without "
                "quantisation, or call finesight.models.quantize.dequantize(model) first."
            )
        super().merge(safe_merge, adapter_names)


def project(layers: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """Several linear layers of one input, (…, I) -> (…, O) each.

    Where all of them are plainly adapted, x is read once for all their A matrices (and quantised once over float8
    bases), and the gradient of x is accumulated over all their products instead of being summed from separate ones.
    Without a graph on a GPU they are one operator, adapted or not (:mod:`finesight.models.few_rows`).
    """
    if (parts := _parts_without_graph(layers, x)) is not None:
        return _project_without_graph(*parts, x)
    if (products := _products_over(layers)) is not None:
        outs = products(layers, [None] * len(layers), x)
        return [add_bias(out, layer.bias, x) for layer, out in zip(layers, outs, strict=True)]
    names = [layer.only_adapter() if isinstance(layer, AccumulatedLinear) else None for layer in layers]
    plain = [layer for layer, name in zip(layers, names, strict=True) if name is not None and not layer.drops(name)]
    bases = [layer.base_layer for layer in plain]
    products = _products_over(bases)
    if len(plain) < len(layers) or (products is None and any(isinstance(base, (Float8Linear, QuantizedLinear)) for base in bases)):
        return [layer(x) for layer in layers]
    scalings = [float(layer.scaling[name]) for layer, name in zip(plain, names, strict=True)]
    if products is not None:
        adapters = [
            Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, s) for layer, name, s in zip(plain, names, scalings, strict=True)
        ]
        outs = products(bases, adapters, x)
    else:
        operands = [layer.operands(name, x) for layer, name in zip(plain, names, strict=True)]
        rows = operands[0][0]
        weights = [base.weight.to(rows.dtype) for base in bases]
        *outs, _ = adapted_products(rows, weights, [down for _, down, _ in operands], [up for _, _, up in operands], scalings)
    return [add_bias(out, base.bias, x) for base, out in zip(bases, outs, strict=True)]


def _parts_without_graph(layers: Sequence[nn.Module], x: torch.Tensor) -> tuple[list[nn.Linear], list[Adapter | None]] | None:
    """Plain bases and their adapters, where nothing needs a gradient of products on a GPU; None anywhere else."""
    if torch.is_grad_enabled() or not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda"):
        return None
    bases, adapters = [], []
    for layer in layers:
        base, adapter = layer, None
        if isinstance(layer, AccumulatedLinear):
            base = layer.base_layer
            if (name := layer.only_adapter()) is not None and not layer.drops(name):
                adapter = Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))
            elif not layer.disable_adapters or layer.merged:
                return None
        if type(base) is not nn.Linear or base.weight.dtype != x.dtype or base.weight.device != x.device:
            return None
        bases.append(base)
        adapters.append(adapter)
    return bases, adapters


def _project_without_graph(bases: Sequence[nn.Linear], adapters: Sequence[Adapter | None], x: torch.Tensor) -> list[torch.Tensor]:
    """(…, I) -> (…, O) each; adapters go in as they are stored."""
    none = x.new_empty(0)
    biases = [none if base.bias is None else base.bias for base in bases]
    downs, ups, scales = [], [], []
    if (like := next((adapter for adapter in adapters if adapter is not None), None)) is not None:
        downs = [like.down.new_empty(0, base.in_features) if a is None else a.down for base, a in zip(bases, adapters, strict=True)]
        ups = [like.up.new_empty(base.out_features, 0) if a is None else a.up for base, a in zip(bases, adapters, strict=True)]
        scales = [1.0 if a is None else a.scaling for a in adapters]
    rows = x.reshape(-1, x.shape[-1])
    outs = products_without_graph(rows, [base.weight for base in bases], biases, downs, ups, scales)
    return [out.view(*x.shape[:-1], out.shape[-1]) for out in outs]


def _products_over(bases: Sequence[nn.Module]) -> Callable[..., list[torch.Tensor]] | None:
    """The function of products over these bases: of float8 ones or of quantised ones; None for plain or mixed bases."""
    if all(isinstance(base, Float8Linear) for base in bases):
        return float8_project
    if all(isinstance(base, QuantizedLinear) for base in bases):
        return quantized_project
    return None


# Opaque to compilers: all of it is matrix products and a kernel of our own, and only written this way are they
# accumulated in place. A functional addmm copies its first argument before adding to it, one more pass over every output.
@torch.library.custom_op("finesight::adapted_products", mutates_args=())
def adapted_products(
    x: torch.Tensor, weights: list[torch.Tensor], downs: list[torch.Tensor], ups: list[torch.Tensor], scales: list[float]
) -> list[torch.Tensor]:
    """x Wᵀ + s (x Aᵀ) Bᵀ for each layer, each sum rounded once.

    Args:
        x: (T, I).
        weights: (O, I) each; downs: (r, I) each, peft's A; ups: (O, r) each, peft's B.

    Returns:
        The sums, (T, O) each, and last x Aᵀ of all layers side by side, (T, sum of r), for the backward pass.
    """
    outs, inner = adapted_sums(x, weights, downs, ups, scales)
    return [*outs, inner]


@adapted_products.register_fake
def _(
    x: torch.Tensor, weights: list[torch.Tensor], downs: list[torch.Tensor], ups: list[torch.Tensor], scales: list[float]
) -> list[torch.Tensor]:
    return [*(x.new_empty(x.shape[0], w.shape[0]) for w in weights), x.new_empty(x.shape[0], sum(d.shape[0] for d in downs))]


@torch.library.custom_op("finesight::adapted_products_backward", mutates_args=())
def _adapted_products_backward(
    grads: list[torch.Tensor], x: torch.Tensor, inner: torch.Tensor, weights: list[torch.Tensor], downs: list[torch.Tensor],
    ups: list[torch.Tensor], scales: list[float], needs_x: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of x (empty unless needed), of each A and of each B."""
    grad_inner = inner_gradient(grads, ups, scales)
    grad_x = x.new_empty(0)
    if needs_x:
        grad_x = grad_inner @ torch.cat(downs)
        for g, weight in zip(grads, weights, strict=True):
            grad_x.addmm_(g, weight)
    return [grad_x, *low_rank_gradients(grads, grad_inner, x, inner, [down.shape[0] for down in downs], scales)]


@_adapted_products_backward.register_fake
def _(
    grads: list[torch.Tensor], x: torch.Tensor, inner: torch.Tensor, weights: list[torch.Tensor], downs: list[torch.Tensor],
    ups: list[torch.Tensor], scales: list[float], needs_x: bool,
) -> list[torch.Tensor]:  # fmt: skip
    grad_x = torch.empty_like(x) if needs_x else x.new_empty(0)
    return [grad_x, *(torch.empty_like(d) for d in downs), *(torch.empty_like(u) for u in ups)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    x, weights, downs, ups, ctx.scales = inputs
    ctx.layers = len(weights)
    ctx.save_for_backward(x, output[-1], *weights, *downs, *ups)


def _backward(ctx: Any, grads: list[torch.Tensor]) -> tuple[Any, ...]:
    x, inner, *matrices = ctx.saved_tensors
    n = ctx.layers
    weights, downs, ups = matrices[:n], matrices[n : 2 * n], matrices[2 * n :]
    needs_x, needs_weights, *_ = ctx.needs_input_grad
    grads = [g.contiguous() for g in grads[:n]]
    grad_x, *small = _adapted_products_backward(grads, x, inner, weights, downs, ups, ctx.scales, needs_x)
    grad_weights = [g.T @ x if needed else None for g, needed in zip(grads, needs_weights, strict=True)]
    return grad_x if needs_x else None, grad_weights, small[:n], small[n:], None


adapted_products.register_autograd(_backward, setup_context=_save_for_backward)


def accumulate_adapters(model: nn.Module) -> int:
    """Lets every plain adapted linear layer of a peft model round its sum once; returns how many were changed.

    Bases may be plain, float8 or quantised by :mod:`finesight.models.quantize`; others are of other peft classes and stay as they are.
    """
    count = 0
    for module in model.modules():
        if type(module) is PeftLinear and type(module.base_layer) in _BASES and not module.fan_in_fan_out:
            module.__class__ = AccumulatedLinear  # the same state, another way to compute
            count += 1
    return count
