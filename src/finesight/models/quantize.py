"""Which matrices of a model are kept in fewer bits, and exchanging its layers for such ones.

The layers themselves: :mod:`quantized_linear` (4 and 8 bits), :mod:`float8`, :mod:`quantized_vocabulary`. While a
checkpoint is read, :mod:`quantized_loading` calls :func:`quantize_parameter` here for one matrix after the other;
:func:`quantize` does the same to a model that is in memory already. What is not named by a :class:`Scheme` stays as it
is: norms, biases, routers, convolutions, position embeddings, and everything that trains.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

from finesight.errors import ModelError
from finesight.models.experts import NF4Experts, NF4Scales, dequantize_experts, hold_in_4bit
from finesight.models.float8 import Float8Linear, float8_refusal, product_dtype
from finesight.models.parameters import part_of
from finesight.models.quantized_linear import FourBitLinear, Int8Linear, QuantizedLinear, require_bitsandbytes
from finesight.models.quantized_vocabulary import Int8Embedding, Int8Head
from finesight.recipe import ModelSettings

Precision = Literal["4bit", "8bit", "fp8"]
# Quantises fused experts: (model, full name of the parameter, its values) -> the tensor that takes the parameter's place.
# It puts whatever else it needs (scales, another class of module) into the model itself.
ExpertQuantizer = Callable[[nn.Module, str, torch.Tensor], torch.Tensor]

# Modules by name; `base_layer` where peft has wrapped one.
LANGUAGE = re.compile(r"language_model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)(?:\.base_layer)?$")
TOWER = re.compile(r"visual\.(?:blocks\.\d+\.(?:attn|mlp)|merger|deepstack_merger_list)\.(?:.+)$")
VOCABULARY = re.compile(r"(?:language_model\.embed_tokens|(?:^|\.)lm_head)$")
EXPERTS = re.compile(r"\.mlp\.experts\.(?:gate_up_proj|down_proj)$")  # parameters, not modules

_KINDS: Mapping[Precision, type[QuantizedLinear] | type[Float8Linear]] = {
    "4bit": FourBitLinear,
    "8bit": Int8Linear,
    "fp8": Float8Linear,
}
_WORDS = {
    FourBitLinear: "4-bit",
    NF4Experts: "4-bit",
    NF4Scales: "4-bit",
    Int8Linear: "8-bit",
    Int8Embedding: "8-bit",
    Int8Head: "8-bit",
    Float8Linear: "float8",
}
_FLOAT8_MULTIPLE = 16  # sides of a matrix that float8 products take


@dataclass(frozen=True)
class Scheme:
    """What of a model is kept in fewer bits, and in how many."""

    precision: Precision | None  # of the language model's linear layers; None: they stay as they are
    vocabulary: bool = False  # embedding and lm_head, in 8 bits
    tower: Precision | None = None  # of the linear layers of tower and merger
    experts: ExpertQuantizer | None = None  # of a mixture of experts; None: they stay as they are

    @classmethod
    def of(cls, settings: ModelSettings) -> Scheme | None:
        """What a recipe asks for; None: nothing."""
        if settings.quantization == "none":
            return None
        return cls(
            settings.quantization,
            settings.quantize_vocabulary,
            settings.quantization if settings.quantize_tower else None,
            hold_in_4bit if settings.load_in_4bit else None,
        )

    def layer_of(self, name: str, module: nn.Module) -> type[nn.Module] | None:
        """The class that this module becomes; None: it stays.

        Raises:
            ModelError: it should be float8, and has sides that float8 products do not take.
        """
        if VOCABULARY.search(name):
            if not self.vocabulary:
                return None
            return {nn.Embedding: Int8Embedding, nn.Linear: Int8Head}.get(type(module))
        if type(module) is not nn.Linear:
            return None
        precision = self.precision if LANGUAGE.search(name) else self.tower if TOWER.search(name) else None
        if precision == "fp8" and (module.out_features % _FLOAT8_MULTIPLE or module.in_features % _FLOAT8_MULTIPLE):
            if TOWER.search(name):
                return Int8Linear  # as small; the MLP of Qwen2.5-VL's tower has such sides
            raise ModelError(
                f"{name} is {module.out_features} × {module.in_features}: float8 products take multiples of {_FLOAT8_MULTIPLE} only. "
                "Set model.load_in_fp8: false."
            )
        return None if precision is None else _KINDS[precision]

    def takes_parameter(self, model: nn.Module, name: str) -> bool:
        """Whether the parameter of this full name is to be quantised."""
        if EXPERTS.search(name):
            return self.experts is not None
        path, _, leaf = name.rpartition(".")
        return leaf == "weight" and self.layer_of(path, model.get_submodule(path)) is not None


def check(model: nn.Module, scheme: Scheme, device: torch.device) -> None:
    """Whether a scheme can be carried out on a device; the model may be on the meta device still.

    Raises:
        ModelError: a library is missing, the GPU lacks float8, a matrix has sides that float8 does not take, or there is
            nothing to quantise.
    """
    wanted = {layer for name, module in model.named_modules() if (layer := scheme.layer_of(name, module)) is not None}
    if FourBitLinear in wanted:
        require_bitsandbytes("model.load_in_4bit")
    if Float8Linear in wanted:
        if (refusal := float8_refusal(device)) is not None:
            raise ModelError(f"model.load_in_fp8 cannot be used: {refusal}.")
        if device.type == "cuda":
            product_dtype(device.index)
    if not wanted and not any(scheme.takes_parameter(model, name) for name, _ in model.named_parameters() if EXPERTS.search(name)):
        raise ModelError("No matrix of this model can be quantised. Set model.load_in_4bit, load_in_8bit and load_in_fp8: false.")


@torch.no_grad()
def quantize_parameter(model: nn.Module, scheme: Scheme, name: str, value: torch.Tensor) -> torch.Tensor:
    """Puts a quantised layer in the place of the one that a parameter belongs to.

    Args:
        name: full name of a parameter that `scheme` takes; the layer that it belongs to may be on the meta device.
        value: its values, in the compute precision and on the device where they are to stay.

    Returns:
        The tensor that has taken the parameter's place.

    Raises:
        ModelError: the values are of another shape than the parameter.
    """
    if EXPERTS.search(name) and scheme.experts is not None:
        return scheme.experts(model, name, value)
    path = name.rpartition(".")[0]
    module = model.get_submodule(path)
    layer = scheme.layer_of(path, module)
    expected = cast(torch.Tensor, module.weight).shape
    if value.shape != expected:
        raise ModelError(f"{name} is of shape {tuple(value.shape)}, and {tuple(expected)} is needed.")
    module.weight = nn.Parameter(value, requires_grad=False)
    quantised = cast(type[Int8Linear], layer).of(cast(nn.Linear, module))
    model.set_submodule(path, quantised.train(module.training))
    return quantised.weight


def tie_vocabulary(model: nn.Module) -> None:
    """Lets a tied lm_head read the embedding's matrix in 8 bits; whether it is tied is told by its weight being the same."""
    embeddings = [module for module in model.modules() if isinstance(module, Int8Embedding)]
    heads = [(name, m) for name, m in model.named_modules() if name.rpartition(".")[2] == "lm_head" and isinstance(m, nn.Linear)]
    for name, head in heads:
        for embedding in embeddings:
            if head.weight is embedding.weight:
                shape = (embedding.num_embeddings, embedding.embedding_dim)
                tied = Int8Head([embedding.weight, embedding.scale], "int8", shape, head.bias, embedding.compute_dtype)
                model.set_submodule(name, tied.train(head.training))


@torch.no_grad()
def quantize(model: nn.Module, scheme: Scheme) -> int:
    """Quantises a model that is in memory, in place, one matrix after the other; returns how many.

    Works before or after peft has wrapped the model; only one matrix at a time exists in both precisions.

    Raises:
        ModelError: as :func:`check`.
    """
    check(model, scheme, next(model.parameters()).device)
    head = model.get_submodule("lm_head") if hasattr(model, "lm_head") else None
    head_is_tied = isinstance(head, nn.Linear) and any(m.weight is head.weight for m in model.modules() if isinstance(m, nn.Embedding))
    names = [name for name, _ in model.named_parameters() if scheme.takes_parameter(model, name)]  # a tied matrix comes once
    for name in names:
        kept = quantize_parameter(model, scheme, name, model.get_parameter(name).detach())
        path, _, leaf = name.rpartition(".")
        if EXPERTS.search(name):
            setattr(model.get_submodule(path), leaf, nn.Parameter(kept, requires_grad=False))
        elif head_is_tied and VOCABULARY.search(path):
            cast(nn.Linear, head).weight = cast(nn.Parameter, kept)
    tie_vocabulary(model)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the places of the weights as they were
    return len(names)


@torch.no_grad()
def dequantize(model: nn.Module) -> int:
    """Turns all quantised layers back into plain ones of the same values, in place; returns how many.

    For merging an adapter into them, and for writing a whole checkpoint. Tied matrices stay tied.
    """
    kinds = (Float8Linear, QuantizedLinear, Int8Embedding)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    weights: dict[int, nn.Parameter] = {}  # by the stored one
    for name, module in found:
        if (shared := weights.get(id(module.weight))) is not None:
            plain: nn.Module = nn.Linear(shared.shape[1], shared.shape[0], bias=False, device="meta")
            plain.weight, plain.bias = shared, module.bias
        else:
            plain = module.dequantized()
            weights[id(module.weight)] = cast(nn.Parameter, plain.weight)
        model.set_submodule(name, plain.train(module.training))
    return len(found) + dequantize_experts(model)


def quantization_notes(model: nn.Module) -> list[str]:
    """What people should know of a quantised base: what is in which precision, in GiB. Empty for a plain one.

    Args:
        model: the transformers model, before an adapter is put on it.
    """
    owners = {f"{name}.{leaf}": module for name, module in model.named_modules() for leaf in _leaves(module)}
    if not any(type(module) in _WORDS for module in owners.values()):
        return []
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    seen: set[int] = set()
    for name, module in owners.items():
        tensor = cast(torch.Tensor, getattr(module, name.rpartition(".")[2]))
        if id(tensor) in seen or not tensor.numel():
            continue
        seen.add(id(tensor))
        precision = _WORDS.get(type(module)) or str(tensor.dtype).removeprefix("torch.")
        sizes[_part(name), precision] += tensor.nbytes
    total = sum(sizes.values())
    # Norms and biases say nothing to anybody.
    shown = [f"{part} {_gib(size)} GiB {precision}" for (part, precision), size in sizes.items() if size >= 0.005 * total]
    notes = [f"Weights take {_gib(total)} GiB: {', '.join(shown)}."]
    experts = {precision: size for (part, precision), size in sizes.items() if part == "experts" and "bit" not in precision}
    for precision, size in experts.items():
        notes.append(
            f"Experts are fused tensors, which only model.load_in_4bit quantises: they stay in {precision}, {100 * size / total:.0f}% of all bytes."
        )
    return notes


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of a model, wrapped by peft or not, is one of ours in fewer bits."""
    return any(type(module) in _WORDS for module in model.modules())


def _leaves(module: nn.Module) -> list[str]:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [name for name, _ in tensors]


def _part(name: str) -> str:
    return "experts" if ".mlp.experts." in name else part_of(name).replace("_", " ").replace("lm head", "lm_head")


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}"
