"""Bytes of what stays on the device between steps: weights, adapters, optimizer state; and of gradients.

Every number follows from the table of parameters in `shapes.py`. Formats: bitsandbytes NF4 with double quantisation (Dettmers
et al. 2023, QLoRA: 4 bits a number, blocks of 64 with an 8-bit scale, blocks of 256 of those with a float32 one), int8 and
float8 with a float32 scale a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from finesight.planner.calibration import ROUNDING_BYTES, ROUNDING_CHUNK_BYTES, ROUNDING_VALUES
from finesight.planner.shapes import ModelShape, Parameter, Part, parameters
from finesight.recipe import ModelSettings, Recipe, TuningSettings

Precision = Literal["bfloat16", "float16", "float32"]
BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}

NF4_BLOCK, NF4_OUTER_BLOCK = 64, 256
NF4_TABLES_BYTES = 4 * 256 + 4  # the code of the scales and their offset, of each matrix
# bitsandbytes: smaller tensors keep float32 state; blocks of 256 share a float32 scale in each of the two moments.
ADAM_8BIT_FROM, ADAM_8BIT_BLOCK = 4096, 256
PAGED_FROM = 100_000  # smaller state stays on the device
_MATRICES = {"mlp": "MLP"}
_OUTSIDE_MUON = ("embed_tokens", "lm_head", "pos_embed", "patch_embed")


def precision_on(recipe: Recipe, capability: tuple[int, int]) -> Precision:
    """Precision of the base on a GPU of this compute capability, as `models/load.py` chooses it."""
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    return "bfloat16" if capability >= (8, 0) else "float16"


def stored_bytes(parameter: Parameter, settings: ModelSettings, precision: Precision) -> int:
    """Bytes of all tensors of a parameter as the base keeps them."""
    form = storage_of(parameter, settings)
    return parameter.count * _bytes_in(form, parameter.shape, BYTES[precision])


def storage_of(parameter: Parameter, settings: ModelSettings) -> Literal["plain", "4bit", "8bit", "fp8"]:
    """How the base keeps a parameter: `plain` is the precision it computes in."""
    kind = settings.quantization
    if kind == "none":
        return "plain"
    if parameter.kind == "vocabulary":
        return "8bit" if settings.quantize_vocabulary else "plain"
    if not parameter.is_matrix or (parameter.part in ("tower", "merger") and not settings.quantize_tower):
        return "plain"
    if parameter.kind == "experts":  # fused stacks: only the 4-bit path keeps them smaller
        return "4bit" if kind == "4bit" and not parameter.plain else "plain"
    return kind


def matrices_by_storage(model: ModelShape, settings: ModelSettings) -> dict[str, list[str]]:
    """Which matrices of a model the base keeps in which form, in words; forms as :func:`storage_of` names them."""
    found: dict[str, list[str]] = {}
    for parameter in parameters(model):
        if not parameter.is_matrix and parameter.kind != "vocabulary":
            continue
        in_layers = parameter.part == "language_model" and parameter.kind in ("attention", "mlp")
        name = parameter.kind if in_layers or parameter.kind in ("experts", "vocabulary") else parameter.part
        names = found.setdefault(storage_of(parameter, settings), [])
        if (word := _MATRICES.get(name, name)) not in names:
            names.append(word)
    return found


def _bytes_in(form: str, shape: tuple[int, ...], width: int) -> int:
    numbers = prod(shape)
    if form == "plain":
        return numbers * width
    if form == "4bit":
        blocks = -(-numbers // NF4_BLOCK)
        return -(-numbers // 2) + blocks + 4 * -(-blocks // NF4_OUTER_BLOCK) + NF4_TABLES_BYTES
    return numbers + 4 * prod(shape[:-1])


def weight_bytes(model: ModelShape, settings: ModelSettings, precision: Precision) -> dict[Part, int]:
    """Bytes of the base by part."""
    found: dict[Part, int] = {}
    for parameter in parameters(model):
        found[parameter.part] = found.get(parameter.part, 0) + stored_bytes(parameter, settings, precision)
    return found


def largest_dequantised_bytes(model: ModelShape, settings: ModelSettings, precision: Precision) -> int:
    """Bytes of the largest weight brought back to the precision of the product, with its scales on the way."""
    forms = [(p, storage_of(p, settings)) for p in parameters(model) if p.part == "language_model"]
    sizes = [
        p.numel * BYTES[precision] + (4 * p.numel // NF4_BLOCK if form == "4bit" else 0) for p, form in forms if form in ("4bit", "8bit")
    ]
    return max(sizes, default=0)


@dataclass(frozen=True)
class Trainable:
    """`count` tensors of one shape that train."""

    name: str
    part: Part
    shape: tuple[int, ...]
    count: int
    width: int  # bytes a number, of weight and gradient alike
    adapter: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def total(self) -> int:
        return self.numel * self.count


def trainables(model: ModelShape, tuning: TuningSettings, precision: Precision) -> list[Trainable]:
    """What trains: adapters and what `bias` adds, or the weights themselves."""
    table = parameters(model)
    if tuning.method == "full":
        return [Trainable(p.name, p.part, p.shape, p.count, BYTES[precision]) for p in table if _tuned(p, tuning)]
    adapted = [p for p in table if _adapted(p, tuning)]
    found = [tensor for p in adapted for tensor in _adapter_of(p, tuning.r)]
    if tuning.bias != "none":
        modules = {p.name.removesuffix(".weight") for p in adapted}
        parts = {p.part for p in adapted}
        for p in table:
            is_bias = p.name.endswith(".bias")
            if is_bias and (p.part in parts if tuning.bias == "all" else p.name.removesuffix(".bias") in modules):
                found.append(Trainable(p.name, p.part, p.shape, p.count, BYTES[precision]))
    return found


def _adapted(p: Parameter, tuning: TuningSettings) -> bool:
    """Whether a matrix gets an adapter (as the patterns in `models/adapters.py`)."""
    if p.kind == "experts":
        return tuning.finetune_experts
    if p.kind == "merger":
        return tuning.finetune_merger
    layers = tuning.finetune_language_layers if p.part == "language_model" else tuning.finetune_vision_layers
    chosen = {"attention": tuning.finetune_attention_modules, "mlp": tuning.finetune_mlp_modules}
    return p.is_matrix and layers and chosen[p.kind]


def _adapter_of(p: Parameter, r: int) -> list[Trainable]:
    """A (r, I) and B (O, r) in float32; of a stack of experts one pair for each, side by side."""
    outputs, inputs = p.shape[-2:]
    stack = prod(p.shape[:-2])
    shapes = {"lora_A": (r * stack, inputs), "lora_B": (outputs, r * stack)}
    return [
        Trainable(f"{p.name.removesuffix('.weight')}.{name}", p.part, shape, p.count, 4, adapter=True) for name, shape in shapes.items()
    ]


def _tuned(p: Parameter, tuning: TuningSettings) -> bool:
    """Whether a weight trains under full tuning (as `_train_weights` in `models/adapters.py`)."""
    trains = {"tower": tuning.finetune_vision_layers, "merger": tuning.finetune_merger}.get(p.part, tuning.finetune_language_layers)
    steps = set(p.name.split("."))
    if p.part != "merger":
        attention = bool(steps & {"self_attn", "attn"})
        if (attention and not tuning.finetune_attention_modules) or ("mlp" in steps and not tuning.finetune_mlp_modules):
            return False
        if p.name.endswith(".mlp.gate.weight"):
            return False  # the router
    return trains


@dataclass(frozen=True)
class TrainingBytes:
    """What training adds on the device, apart from activations."""

    adapters: int
    masters: int  # float32 copies of low-precision weights
    state: int  # of the optimizer
    gradients: int  # as the backward pass leaves them
    collected: int  # added up in float32 beside the masters
    step: int  # working memory of the update itself
    largest_gradient: int  # of one tensor


def training_bytes(model: ModelShape, recipe: Recipe, precision: Precision) -> TrainingBytes:
    """Adapters, gradients and optimizer state of a recipe."""
    t = trainables(model, recipe.tuning, precision)
    rounded = [x for x in t if x.width < 4]
    masters = recipe.tuning.bf16_updates == "float32_masters"
    largest_rounded = max((x.numel for x in rounded), default=0)
    step = 0
    if rounded and not masters:  # a chunk of weights and gradients in float32; then what rounding makes in place of the gradients
        chunk = max(ROUNDING_CHUNK_BYTES, 4 * largest_rounded)
        step = chunk + max(chunk, ROUNDING_BYTES * min(ROUNDING_VALUES, largest_rounded))
    if recipe.training.optim == "muon":
        step += 10 * max((x.numel for x in t if _takes_muon(x)), default=0)  # a float32 update and three bf16 matrices of its size
    if any(x.width < 4 for x in t) and masters and recipe.training.gradient_release:
        step += 4 * largest_rounded
    return TrainingBytes(
        adapters=sum(x.total * x.width for x in t if x.adapter),
        masters=sum(4 * x.total for x in rounded) if masters else 0,
        state=sum(x.count * _state_bytes(x, recipe.training.optim) for x in t),
        gradients=sum(x.total * x.width for x in t),
        collected=sum(4 * x.total for x in rounded) if masters else 0,
        step=step,
        largest_gradient=max((x.numel * x.width for x in t), default=0),
    )


def _state_bytes(x: Trainable, optim: str) -> int:
    """Of one tensor, on the device."""
    if optim == "muon" and _takes_muon(x):
        return 4 * x.numel
    if optim in ("adamw", "muon") or x.numel < ADAM_8BIT_FROM:
        return 8 * x.numel
    if optim == "paged_adamw_8bit" and x.numel >= PAGED_FROM:
        return 2 * 4 * -(-x.numel // ADAM_8BIT_BLOCK)  # the scales are not paged
    return 2 * x.numel + 2 * 4 * -(-x.numel // ADAM_8BIT_BLOCK)


def _takes_muon(x: Trainable) -> bool:
    return len(x.shape) == 2 and not any(outside in x.name for outside in _OUTSIDE_MUON)
