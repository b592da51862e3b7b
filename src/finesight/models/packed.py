"""One door: an nn.Module whose forward takes a packed batch to the log-probabilities of its targets.

The loops over layers are ours, the modules are transformers' (and peft's inside them). Everything a training step
computes passes through :meth:`PackedModel.forward`, so that DDP, FSDP2 and compilers see one forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from finesight.data.batch import PackedBatch, Scoring
from finesight.data.layout import AttentionLayout, TowerLayout, TowerShape, tower_layout
from finesight.errors import ModelError
from finesight.geometry import Grid
from finesight.models.activations import Offload, activation_policy, in_chunks, selectively
from finesight.models.attention import forest_attention, use_forest_attention_in_tower
from finesight.models.compilation import CompiledFunction
from finesight.models.expert_adapters import compute_beside_experts
from finesight.models.experts import run_experts
from finesight.models.features import FeatureCache
from finesight.models.linear import accumulate_adapters, project
from finesight.models.logprobs import target_logprobs, target_logprobs_and_entropies
from finesight.models.quantized_vocabulary import Int8Head
from finesight.models.sharding import ShardedUnit
from finesight.models.tower import TowerPlace
from finesight.models.vision import VisualFeatures, patch_dtype, run_block, tower_features

_Function = Callable[..., torch.Tensor]
_Many = Callable[..., Any]
# Is handed the number of a layer, its rotated keys and its values, (T, G, d) each.
KeysAndValues = Callable[[int, torch.Tensor, torch.Tensor], None]


class PackedModel(nn.Module):
    """A Qwen-VL model that computes forests.

    Args:
        model: Qwen2.5-VL, Qwen3-VL or Qwen3-VL-MoE for conditional generation, or a peft model around one.
        gradient_checkpointing: what is kept of a layer for its backward pass: true for the policy full, false for none,
            or the name of a policy (see `activations.py`).
        compile_layers: compile the decoder layer and the tower block.
        mlp_chunk_tokens: compute the MLP of a decoder layer for so many tokens at a time, but for one of experts; none: for
            all at once.
        say: is told if that fails; the model then runs uncompiled.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        gradient_checkpointing: bool | str = False,
        compile_layers: bool = False,
        mlp_chunk_tokens: int | None = None,
        say: Callable[[str], None] = warnings.warn,
    ) -> None:
        super().__init__()
        self.model = model
        self.policy = activation_policy(gradient_checkpointing)
        text = self.base.model.language_model.config
        if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
            raise ModelError("The configuration asks for sliding-window attention in the language model, which Qwen-VL models do not use.")
        if hasattr(text, "num_experts") and text.hidden_act != "silu":
            raise ModelError(f"The configuration asks for experts with the activation {text.hidden_act}; Qwen-VL models have silu.")
        use_forest_attention_in_tower(self.base.model.visual)
        if isinstance(model, PeftModel):
            accumulate_adapters(model)
            compute_beside_experts(model)
        self.tower_shape = TowerShape.of(self.base.model.visual.config)
        self.tower_place = TowerPlace(self.base.model.visual, self.base)
        self.feature_cache: FeatureCache | None = None  # kept features of a frozen tower; set by whoever owns the budget
        self.units = nn.ModuleList()  # of a model that is divided over processes
        self._unit_of: dict[nn.Module, ShardedUnit] = {}
        self.blank_images = False  # whether the tower computes a blank image for packs without any
        self._blank: tuple[torch.Tensor, TowerLayout] | None = None  # its patches and their layout, once needed
        self._offload = Offload()
        self._run_layer, self._run_last, self._run_block = self._layer_functions(compile_layers, mlp_chunk_tokens, say)
        self._decoding: Sequence[_Many] | None = None

    def _layer_functions(self, compiled: bool, mlp_chunk_tokens: int | None, say: Callable[[str], None]) -> tuple[_Function, ...]:
        """How a decoder layer, the last of them (never compiled: its shapes differ) and a tower block are computed."""
        selective = self.policy == "selective"

        def prepared(function: _Function) -> _Function:
            if compiled:
                return CompiledFunction(function, say, keep_products_only=selective)
            return selectively(function) if selective else function

        if mlp_chunk_tokens is None:
            return prepared(run_layer), run_layer, prepared(run_block)
        # Chunks are cut outside of compiled code, which would be made anew for each number of them. They are computed
        # again whatever the policy, so that to keep products of theirs would be in vain.
        mix, last_mlp = prepared(run_attention), in_chunks(run_mlp, mlp_chunk_tokens)
        mlp = in_chunks(CompiledFunction(run_mlp, say), mlp_chunk_tokens) if compiled else last_mlp
        run = partial(_run_halves, prepared(run_layer), mix, mlp)
        return run, partial(_run_halves, run_layer, run_attention, last_mlp), prepared(run_block)

    def compiled_for_decoding(self, functions: Sequence[_Many], overlapped: Sequence[_Many], say: Callable[[str], None]) -> Sequence[_Many]:
        """Functions of a decoding step, compiled; the same at each call, so that every decoder of a run finds what the first one
        compiled, or that it could not be.

        Args:
            functions: the same at each call.
            overlapped: those of them whose kernels may overlap, see :class:`CompiledFunction`.
            say: is told, once, if one cannot be compiled.
        """
        if self._decoding is None:
            say = _once(say)
            self._decoding = [CompiledFunction(function, say, overlapped=function in overlapped) for function in functions]
        return self._decoding

    def add_unit(self, unit: ShardedUnit) -> None:
        """Lets a layer or block be computed inside the call of a unit, which gathers its weights."""
        self.units.append(unit)
        self._unit_of[unit.module] = unit

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model; adapters, where there are any, sit inside its layers."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def compute_dtype(self) -> torch.dtype:
        """Precision of hidden states."""
        weight: torch.Tensor = self.base.model.language_model.norm.weight
        return weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        weight: torch.Tensor = self.base.model.language_model.norm.weight
        return weight.device

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Log-probabilities (N,) of the batch's target records, in float32, under the distribution that the batch asks for.

        Where it asks for entropies too: (2, N), log-probabilities and entropies.
        """
        return self.score(self.target_states(batch), batch)

    def score(self, states: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """What :meth:`forward` gives, of the final hidden states (N, D) of :meth:`target_states`."""
        return self._within(self.base.lm_head, _score, states, batch)

    def target_states(self, batch: PackedBatch, observe: KeysAndValues | None = None) -> torch.Tensor:
        """(N, D): the final hidden state that must give each target.

        Args:
            observe: is handed the rotated keys and the values of each layer, to be kept for decoding.
        """
        text = self.base.model.language_model
        self._offload.begin()
        features = self.visual_features(batch)
        nothing = self._nothing_of_the_tower() if self.blank_images and not batch.grids else None
        hidden = self._within(text.embed_tokens, _look_up, batch.input_ids)
        if features is not None:
            merged = features.merged.index_select(0, batch.visual_source).to(hidden.dtype)
            hidden = hidden.index_copy(0, batch.visual_index, merged)
        if nothing is not None:
            hidden = hidden + nothing.to(hidden.dtype)
        cos, sin = rotary(text, batch.position_ids, hidden)
        levels = features.deepstack if features is not None else ()
        run = self._run_layer if observe is None else run_layer
        for index, layer in enumerate(text.layers):
            seen = None if observe is None else partial(observe, index)
            if index == len(text.layers) - 1 and index >= len(levels):
                # Nothing after the last layer mixes tokens: only rows that are read go through its second half.
                last = self._run_last if observe is None else run_layer
                hidden = self._kept(last, layer, hidden, cos, sin, batch.layout, batch.predict_from, *(() if seen is None else (seen,)))
                return text.norm(hidden)
            further = () if seen is None else (None, seen)
            hidden = self._kept(run, layer, hidden, cos, sin, batch.layout, *further)
            if index < len(levels):
                level = levels[index].index_select(0, batch.visual_source).to(hidden.dtype)
                hidden = hidden.index_add(0, batch.visual_index, level)
        return text.norm(hidden.index_select(0, batch.predict_from))

    def visual_features(self, batch: PackedBatch) -> VisualFeatures | None:
        """Features of the batch's distinct images and videos, computed ones first, then those that were kept.

        Without a graph where the tower does not train; then what is computed is handed to the cache, if there is one.
        """
        computed = self._computed_features(batch) if batch.grids else None
        if batch.stored is None:
            return computed
        levels = list(batch.stored.unbind(0))
        if computed is not None:
            levels = [torch.cat(pair) for pair in zip((computed.merged, *computed.deepstack), levels, strict=True)]
        return VisualFeatures(levels[0], tuple(levels[1:]))

    def _computed_features(self, batch: PackedBatch) -> VisualFeatures:
        visual = self.base.model.visual
        self.tower_place.present()
        trains = any(parameter.requires_grad for parameter in visual.parameters())
        layout = batch.tower or tower_layout(batch.grids, self.tower_shape).to(batch.patches.device, non_blocking=True)
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            features = tower_features(visual, batch.patches, layout, run_block=partial(self._kept, self._run_block))
        if self.feature_cache is not None and not trains:
            tokens = [grid.patches // self.tower_shape.merge_size**2 for grid in batch.grids]
            self.feature_cache.store(batch.item_keys, tokens, features)
        return features

    def _nothing_of_the_tower(self) -> torch.Tensor:
        """A zero that depends on all of the tower, which computes one visual token of a blank image for it."""
        visual, merge = self.base.model.visual, self.tower_shape.merge_size
        if self._blank is None:
            config, grid = visual.config, Grid(1, merge, merge)
            values = config.in_channels * config.temporal_patch_size * config.patch_size**2
            patches = torch.ones(grid.patches, values, dtype=patch_dtype(visual), device=self.device)
            self._blank = patches, tower_layout([grid], self.tower_shape).to(self.device)
        features = tower_features(visual, *self._blank, run_block=partial(self._kept, self._run_block))
        return torch.stack([level.sum() for level in (features.merged, *features.deepstack)]).sum() * 0

    def _kept(self, function: Callable[..., torch.Tensor], module: nn.Module, hidden: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """Runs a layer or block under the activation policy."""
        return self._within(module, partial(self._under_policy, function), hidden, *arguments)

    def _within(self, module: nn.Module, function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        """function(module, *arguments), with the module's weights gathered where they are divided."""
        unit = self._unit_of.get(module)
        result: torch.Tensor = function(module, *arguments) if unit is None else unit(function, *arguments)
        return result

    def _under_policy(
        self, function: Callable[..., torch.Tensor], module: nn.Module, hidden: torch.Tensor, *arguments: Any
    ) -> torch.Tensor:
        if self.policy in ("none", "selective") or not torch.is_grad_enabled():
            return function(module, hidden, *arguments)
        if self.policy == "offload":
            return self._offload.run(function, module, hidden, *arguments)
        return checkpoint(function, module, hidden, *arguments, use_reentrant=False)


def _look_up(embedding: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = embedding(input_ids)
    return hidden


def _score(head: nn.Module, states: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """What the targets score, see :meth:`PackedModel.forward`, of their final hidden states (N, D)."""
    scoring = batch.scoring or Scoring()
    scale = head.scale if isinstance(head, Int8Head) else None
    under: dict[str, Any] = {"scale": scale, "temperature": scoring.temperature, "forbidden": scoring.forbidden}
    if scoring.entropies:
        return torch.stack(target_logprobs_and_entropies(states, head.weight, batch.token, **under))
    return target_logprobs(states, head.weight, batch.token, **under)


def run_layer(layer: nn.Module, hidden: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """One decoder layer over packed hidden states: transformers' modules, in the order of its decoder layer.

    Args:
        hidden: (T, D).
        arguments: of :func:`run_attention`.

    Returns:
        (T, D), or (N, D) where rows are given.
    """
    return run_mlp(layer, run_attention(layer, hidden, *arguments))


def _run_halves(whole: _Function, mix: _Function, mlp: _Function, layer: nn.Module, hidden: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """A layer's two halves by themselves; one of experts as a whole, since each chunk would dequantise their stacks anew."""
    return whole(layer, hidden, *arguments) if hasattr(layer.mlp, "experts") else mlp(layer, mix(layer, hidden, *arguments))


def run_attention(
    layer: nn.Module,
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    forest: AttentionLayout,
    rows: torch.Tensor | None = None,
    observe: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """The first half of a decoder layer, which mixes tokens.

    Args:
        hidden: (T, D).
        cos, sin: (T, d).
        rows: (N,) the tokens whose result is wanted; their keys and values are needed of all.
        observe: is handed keys and values, (T, G, d) each.

    Returns:
        (T, D), or (N, D) where rows are given.
    """
    query, key, value = attention_inputs(layer, hidden, cos, sin)
    if observe is not None:
        observe(key, value)
    mixed = forest_attention(query, key, value, forest, causal=True, scale=layer.self_attn.scaling)
    mixed = mixed.flatten(1)
    if rows is not None:
        mixed, hidden = mixed.index_select(0, rows), hidden.index_select(0, rows)
    return hidden + project([layer.self_attn.o_proj], mixed)[0]


def _once(say: Callable[[str], None]) -> Callable[[str], None]:
    """Tells the first text alone."""
    told: list[str] = []

    def tell(text: str) -> None:
        if not told:
            say(text)
        told.append(text)

    return tell


def attention_inputs(
    layer: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated queries (T, H, d), rotated keys and values (T, G, d) of hidden states (T, D)."""
    query, key, value = projections(layer, hidden)
    return *rotate(layer.self_attn, query, key, cos, sin), value


def projections(layer: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (T, H, d), keys and values (T, G, d) of hidden states (T, D), before they are normalised and rotated."""
    attention = layer.self_attn
    projected = project([attention.q_proj, attention.k_proj, attention.v_proj], layer.input_layernorm(hidden))
    query, key, value = (x.unflatten(-1, (-1, attention.head_dim)) for x in projected)
    return query, key, value


def rotary(text: nn.Module, position_ids: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (T, d) of positions (3, T), the M-RoPE axes joined.

    Args:
        text: the language model.
        like: whose precision they get.
    """
    cos, sin = text.rotary_emb(like, position_ids.unsqueeze(1))
    if cos.ndim == 4:  # Qwen2.5-VL up to transformers 5.17 leaves the axes (3, 1, T, d) to the attention
        sections = text.config.rope_parameters["mrope_section"] * 2
        cos, sin = (torch.cat([part[i % 3] for i, part in enumerate(x.split(sections, dim=-1))], dim=-1) for x in (cos, sin))
    return cos.squeeze(0), sin.squeeze(0)


def rotate(
    attention: nn.Module, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries (T, H, d) and keys (T, G, d), normalised where the family does that, and rotated by angles (T, d)."""
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def next_projections(
    layer: nn.Module, following: nn.Module, hidden: torch.Tensor, mixed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`finish_layer` of one layer, its result first, and :func:`projections` of the next: what lies between two attentions."""
    hidden = finish_layer(layer, hidden, mixed)
    return hidden, *projections(following, hidden)


def last_states(layer: nn.Module, norm: nn.Module, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    """:func:`finish_layer` of the last layer, and the norm that comes after it."""
    return norm(finish_layer(layer, hidden, mixed))


def finish_layer(layer: nn.Module, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    """What follows attention: output projection and MLP, each added to the residual stream; (T, D)."""
    return run_mlp(layer, hidden + project([layer.self_attn.o_proj], mixed)[0])


def run_mlp(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The second half of a decoder layer, which treats each token by itself: (T, D) -> (T, D)."""
    return hidden + _run_mlp(layer.mlp, layer.post_attention_layernorm(hidden))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of (T, H, d) by angles (T, d): Su et al. 2021, in transformers' half-split form."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def _run_mlp(mlp: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """(T, D) -> (T, D)."""
    if hasattr(mlp, "experts"):
        _, weights, chosen = mlp.gate(states)
        if isinstance(mlp.experts, BaseTunerLayer):
            return mlp.experts(states, chosen, weights)  # which leads to the same
        return run_experts(mlp.experts, states, chosen, weights)
    gate, up = project([mlp.gate_proj, mlp.up_proj], states)
    return project([mlp.down_proj], mlp.act_fn(gate) * up)[0]
