"""The dimensions of a model and every parameter that follows from them, read from a configuration.

One table of parameters (:func:`parameters`) is what weights, adapters, gradients and optimizer state are counted from. Its
names and shapes are those of the transformers classes; tests hold it equal to them on the meta device.

Letters: D hidden size of the language model, Q heads × head size, G key-value heads × head size, M width of the MLP,
C hidden size of the tower, F width of its MLP, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from finesight.errors import ModelError
from finesight.families import Family, family_of

Part = Literal["language_model", "embeddings", "lm_head", "tower", "merger"]
PARTS: tuple[Part, ...] = ("language_model", "embeddings", "lm_head", "tower", "merger")
Kind = Literal["attention", "mlp", "experts", "merger", "vocabulary", "other"]


@dataclass(frozen=True)
class TextShape:
    """The language model."""

    hidden: int
    layers: int
    mlp: int  # of a dense layer
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool  # one matrix for embedding and lm_head
    experts: int = 0
    experts_per_token: int = 0
    expert_mlp: int = 0
    dense_layers: int | None = None  # of a mixture of experts: layers without experts; None: all are dense

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def expert_layers(self) -> int:
        return 0 if self.dense_layers is None else self.layers - self.dense_layers


@dataclass(frozen=True)
class VisionShape:
    """The vision tower with its mergers."""

    depth: int
    hidden: int
    mlp: int
    heads: int
    patch_size: int  # pixels
    merged_hidden: int  # D
    deepstack_levels: int = 0
    positions: int = 0  # learned ones; 0: rotary alone
    gated: bool = False  # Qwen2.5-VL: gated MLP, RMS norms, no bias on the patch embedding
    merge_size: int = 2
    temporal_patch_size: int = 2
    channels: int = 3
    whole_frame_blocks: int | None = None  # blocks that see the whole frame; None: all of them
    window_patches: int = 0  # patches of an attention window of the other blocks

    @property
    def patch_values(self) -> int:
        return self.channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class ModelShape:
    """A whole model.

    Attributes:
        source: where the dimensions were read: a file, or the catalogue.
        stored: the bits that the checkpoint's weights were brought to by bitsandbytes.
    """

    name: str
    family: Family
    text: TextShape
    vision: VisionShape
    source: str = ""
    stored: Literal["none", "4bit", "8bit"] = "none"
    plain_experts: bool = False  # they are in full precision whatever the recipe says of the language model

    @property
    def attention_has_norms(self) -> bool:
        """Norms on queries and keys (Qwen3-VL); otherwise biases on their projections (Qwen2.5-VL)."""
        return self.family.model_type != "qwen2_5_vl"


@dataclass(frozen=True)
class Parameter:
    """`count` tensors of one name (`*` stands for the number of a layer) and shape."""

    name: str
    part: Part
    shape: tuple[int, ...]
    count: int
    kind: Kind = "other"  # of linear layers: which; "other": norms, biases, tables, the router
    plain: bool = False  # never in fewer bits

    @property
    def numel(self) -> int:
        """Numbers in one of them."""
        return prod(self.shape)

    @property
    def total(self) -> int:
        """Numbers in all of them."""
        return self.numel * self.count

    @property
    def is_matrix(self) -> bool:
        """The weight of a linear layer, or a stack of them."""
        return self.kind not in ("other", "vocabulary")


def parameters(model: ModelShape) -> list[Parameter]:
    """Every parameter; a tied matrix once, under the embeddings."""
    return [*_text_parameters(model), *_vision_parameters(model)]


def _text_parameters(model: ModelShape) -> Iterator[Parameter]:
    t = model.text
    root = "model.language_model"
    yield Parameter(f"{root}.embed_tokens.weight", "embeddings", (t.vocabulary, t.hidden), 1, "vocabulary")
    if not t.tied:
        yield Parameter("lm_head.weight", "lm_head", (t.vocabulary, t.hidden), 1, "vocabulary")
    layer = f"{root}.layers.*"
    for name, inputs, outputs in (("q", t.hidden, t.queries), ("k", t.hidden, t.keys), ("v", t.hidden, t.keys), ("o", t.queries, t.hidden)):
        yield Parameter(f"{layer}.self_attn.{name}_proj.weight", "language_model", (outputs, inputs), t.layers, "attention")
        if not model.attention_has_norms and name != "o":
            yield Parameter(f"{layer}.self_attn.{name}_proj.bias", "language_model", (outputs,), t.layers)
    if model.attention_has_norms:
        for name in ("q_norm", "k_norm"):
            yield Parameter(f"{layer}.self_attn.{name}.weight", "language_model", (t.head_size,), t.layers)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Parameter(f"{layer}.{name}.weight", "language_model", (t.hidden,), t.layers)
    if dense := t.layers - t.expert_layers:
        for name, inputs, outputs in (("gate", t.hidden, t.mlp), ("up", t.hidden, t.mlp), ("down", t.mlp, t.hidden)):
            yield Parameter(f"{layer}.mlp.{name}_proj.weight", "language_model", (outputs, inputs), dense, "mlp")
    if t.expert_layers:
        stacks = (("gate_up_proj", (t.experts, 2 * t.expert_mlp, t.hidden)), ("down_proj", (t.experts, t.hidden, t.expert_mlp)))
        for name, shape in stacks:
            yield Parameter(f"{layer}.mlp.experts.{name}", "language_model", shape, t.expert_layers, "experts", plain=model.plain_experts)
        yield Parameter(f"{layer}.mlp.gate.weight", "language_model", (t.experts, t.hidden), t.expert_layers)
    yield Parameter(f"{root}.norm.weight", "language_model", (t.hidden,), 1)


def _vision_parameters(model: ModelShape) -> Iterator[Parameter]:
    v = model.vision
    root = "model.visual"
    yield Parameter(
        f"{root}.patch_embed.proj.weight", "tower", (v.hidden, v.channels, v.temporal_patch_size, v.patch_size, v.patch_size), 1
    )
    if not v.gated:
        yield Parameter(f"{root}.patch_embed.proj.bias", "tower", (v.hidden,), 1)
    if v.positions:
        yield Parameter(f"{root}.pos_embed.weight", "tower", (v.positions, v.hidden), 1)
    mlp = ("gate_proj", "up_proj", "down_proj") if v.gated else ("linear_fc1", "linear_fc2")
    block = f"{root}.blocks.*"
    linears: list[tuple[str, int, int, Kind]] = [
        ("attn.qkv", v.hidden, 3 * v.hidden, "attention"),
        ("attn.proj", v.hidden, v.hidden, "attention"),
        *((f"mlp.{name}", v.hidden, v.mlp, "mlp") for name in mlp[:-1]),
        (f"mlp.{mlp[-1]}", v.mlp, v.hidden, "mlp"),
    ]
    for name, inputs, outputs, kind in linears:
        yield Parameter(f"{block}.{name}.weight", "tower", (outputs, inputs), v.depth, kind)
        yield Parameter(f"{block}.{name}.bias", "tower", (outputs,), v.depth)
    for norm in ("norm1", "norm2"):
        yield Parameter(f"{block}.{norm}.weight", "tower", (v.hidden,), v.depth)
        if not v.gated:
            yield Parameter(f"{block}.{norm}.bias", "tower", (v.hidden,), v.depth)
    merged = v.hidden * v.merge_size**2
    mergers = [(f"{root}.merger", 1, v.hidden), (f"{root}.deepstack_merger_list.*", v.deepstack_levels, merged)]
    first, second, norm = ("mlp.0", "mlp.2", "ln_q") if v.gated else ("linear_fc1", "linear_fc2", "norm")
    for name, count, norm_size in mergers:
        if not count:
            continue
        yield Parameter(f"{name}.{norm}.weight", "merger", (norm_size,), count)
        if not v.gated:
            yield Parameter(f"{name}.{norm}.bias", "merger", (norm_size,), count)
        for linear, outputs in ((first, merged), (second, v.merged_hidden)):
            yield Parameter(f"{name}.{linear}.weight", "merger", (outputs, merged), count, "merger")
            yield Parameter(f"{name}.{linear}.bias", "merger", (outputs,), count)


def counts(model: ModelShape) -> dict[Part, int]:
    """Numbers of parameters by part."""
    found: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for parameter in parameters(model):
        found[parameter.part] += parameter.total
    return found


def shape_of(config: Mapping[str, Any], *, name: str, source: str = "") -> ModelShape:
    """The shape that a checkpoint's `config.json` describes.

    Raises:
        ModelError: the model type is not supported, or a number is missing.
    """
    family = family_of(str(config.get("model_type")))
    try:
        # Qwen2.5-VL's published files keep the numbers of the language model at the top.
        text: Mapping[str, Any] = config.get("text_config") or config
        vision: Mapping[str, Any] = config["vision_config"]
        tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
        given = config.get("quantization_config") or {}
        stored: Literal["none", "4bit", "8bit"] = "4bit" if given.get("load_in_4bit") else "8bit" if given.get("load_in_8bit") else "none"
        text_shape = _text_shape(text, family, tied)
        return ModelShape(name, family, text_shape, _vision_shape(vision, family, int(text["hidden_size"])), source, stored)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{source or name}: the configuration cannot be planned with: {error!r}. Fetch the checkpoint again.") from None


def _text_shape(text: Mapping[str, Any], family: Family, tied: bool) -> TextShape:
    layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
    experts: dict[str, int] = {}
    if family.moe:
        every, without = int(text.get("decoder_sparse_step", 1)), set(text.get("mlp_only_layers") or ())
        dense = sum(1 for layer in range(layers) if layer in without or (layer + 1) % every)
        experts = {
            "experts": int(text.get("num_experts") or text["num_local_experts"]),  # transformers writes the latter name too
            "experts_per_token": int(text["num_experts_per_tok"]),
            "expert_mlp": int(text["moe_intermediate_size"]),
            "dense_layers": dense,
        }
    return TextShape(
        hidden=int(text["hidden_size"]),
        layers=layers,
        mlp=int(text["intermediate_size"]),
        heads=heads,
        kv_heads=int(text["num_key_value_heads"]),
        head_size=int(text.get("head_dim") or int(text["hidden_size"]) // heads),
        vocabulary=int(text["vocab_size"]),
        tied=tied,
        **experts,
    )


def _vision_shape(vision: Mapping[str, Any], family: Family, merged_hidden: int) -> VisionShape:
    gated = family.model_type == "qwen2_5_vl"
    patch, merge = int(vision.get("patch_size", family.patch_size)), int(vision.get("spatial_merge_size", 2))
    window = int(vision.get("window_size", 112)) // merge // patch if gated else 0
    return VisionShape(
        depth=int(vision["depth"]),
        hidden=int(vision["hidden_size"]),
        mlp=int(vision["intermediate_size"]),
        heads=int(vision.get("num_heads", 16)),
        patch_size=patch,
        merged_hidden=int(vision.get("out_hidden_size", merged_hidden)),
        deepstack_levels=len(vision.get("deepstack_visual_indexes") or ()),
        positions=0 if gated else int(vision["num_position_embeddings"]),
        gated=gated,
        merge_size=merge,
        temporal_patch_size=int(vision.get("temporal_patch_size", 2)),
        channels=int(vision.get("in_channels", vision.get("in_chans", 3))),
        whole_frame_blocks=len(vision.get("fullatt_block_indexes", (7, 15, 23, 31))) if gated else None,
        window_patches=(window * merge) ** 2,
    )


def read_shape(folder: str | Path) -> ModelShape:
    """The shape of a checkpoint folder.

    Raises:
        ModelError: its config.json is missing, damaged, or of another kind of model.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}). Name a checkpoint folder, or a model on the hub.") from None
    return shape_of(config, name=str(folder), source=str(path))
