"""One door: an nn.Module whose forward takes a packed batch to the log-probabilities of its targets.

The loops over layers are ours, the modules are transformers' (and peft's inside them). Everything a training step
computes passes through :meth:`PackedModel.forward`, so that DDP, FSDP2 and compilers see one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from finesight.data.layout import AttentionLayout, TowerShape, tower_layout
from finesight.data.pack import PackedBatch
from finesight.models.attention import forest_attention, use_forest_attention
from finesight.models.linear import accumulate_adapters
from finesight.models.logprobs import target_logprobs
from finesight.models.vision import VisualFeatures, run_block, tower_features


class PackedModel(nn.Module):
    """A Qwen-VL model that computes forests.

    Args:
        model: Qwen2.5-VL, Qwen3-VL or Qwen3-VL-MoE for conditional generation, or a peft model around one.
        gradient_checkpointing: compute layers again in the backward pass instead of keeping their activations.
        compile_layers: compile the decoder layer and the tower block; wants batches built to a steady length.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, gradient_checkpointing: bool = False, compile_layers: bool = False) -> None:
        super().__init__()
        self.model = model
        self.gradient_checkpointing = gradient_checkpointing
        use_forest_attention(self.base)
        if isinstance(model, PeftModel):
            accumulate_adapters(model)
        self.tower_shape = TowerShape.of(self.base.model.visual.config)
        self._run_layer = torch.compile(run_layer, dynamic=False) if compile_layers else run_layer
        self._run_block = torch.compile(run_block, dynamic=True) if compile_layers else run_block

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model; adapters, where there are any, sit inside its layers."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Log-probabilities (N,) of the batch's target records, in float32."""
        return target_logprobs(self.target_states(batch), self.base.lm_head.weight, batch.token)

    def target_states(self, batch: PackedBatch) -> torch.Tensor:
        """(N, D): the final hidden state that must give each target."""
        text = self.base.model.language_model
        features = self.visual_features(batch)
        hidden = text.embed_tokens(batch.input_ids)
        if features is not None:
            merged = features.merged.index_select(0, batch.visual_source).to(hidden.dtype)
            hidden = hidden.index_copy(0, batch.visual_index, merged)
        hidden = hidden.unsqueeze(0)
        cos, sin = text.rotary_emb(hidden, batch.position_ids.unsqueeze(1))
        levels = features.deepstack if features is not None else ()
        for index, layer in enumerate(text.layers[:-1]):
            hidden = self._recomputed(self._run_layer, layer, hidden, cos, sin, batch.layout)
            hidden = self._with_deepstack(hidden, levels, index, batch)
        if len(text.layers) <= len(levels):  # DeepStack after the last layer reaches whole rows
            hidden = self._recomputed(self._run_layer, text.layers[-1], hidden, cos, sin, batch.layout)
            hidden = self._with_deepstack(hidden, levels, len(text.layers) - 1, batch)
            hidden = hidden.index_select(1, batch.predict_from)
        else:
            hidden = self._recomputed(run_last_layer, text.layers[-1], hidden, cos, sin, batch.layout, batch.predict_from)
        return text.norm(hidden).squeeze(0)

    def visual_features(self, batch: PackedBatch) -> VisualFeatures | None:
        """Features of the batch's distinct images and videos; without a graph where the tower does not train."""
        if not batch.grids:
            return None
        visual = self.base.model.visual
        trains = any(parameter.requires_grad for parameter in visual.parameters()) and torch.is_grad_enabled()
        layout = batch.tower or tower_layout(batch.grids, self.tower_shape).to(batch.patches.device, non_blocking=True)
        with torch.set_grad_enabled(trains):
            return tower_features(visual, batch.patches, layout, run_block=partial(self._recomputed, self._run_block))

    def _recomputed(self, function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    @staticmethod
    def _with_deepstack(hidden: torch.Tensor, levels: Sequence[torch.Tensor], index: int, batch: PackedBatch) -> torch.Tensor:
        if index >= len(levels):
            return hidden
        level = levels[index].index_select(0, batch.visual_source).to(hidden.dtype)
        return hidden.squeeze(0).index_add(0, batch.visual_index, level).unsqueeze(0)


def run_layer(layer: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, forest: AttentionLayout) -> torch.Tensor:
    """One decoder layer over packed hidden states (1, T, D)."""
    return layer(hidden, attention_mask=None, position_embeddings=(cos, sin), forest=forest)


def run_last_layer(
    layer: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, forest: AttentionLayout, rows: torch.Tensor
) -> torch.Tensor:
    """The last decoder layer, at the rows (N,) that somebody reads: (1, T, D) -> (1, N, D).

    Every token's key and value are needed, but the output projection and the MLP only where a target is predicted.
    The order of modules is transformers' decoder layer's, which is the same in all families.
    """
    attention = layer.self_attn
    states = layer.input_layernorm(hidden).squeeze(0)
    mixed = forest_attention(*_projections(attention, states, cos, sin), forest, causal=True, scale=attention.scaling)
    mixed = mixed.flatten(1).index_select(0, rows).unsqueeze(0)
    hidden = hidden.index_select(1, rows) + attention.o_proj(mixed)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _projections(
    attention: nn.Module, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated queries (T, H, d), rotated keys (T, G, d) and values (T, G, d) of packed states (T, D)."""
    size = attention.head_dim
    query, key, value = (project(states).unflatten(-1, (-1, size)) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    if cos.ndim == 4:  # Qwen2.5-VL up to transformers 5.17 keeps the axes (3, 1, T, d) apart until here
        sections = attention.config.rope_parameters["mrope_section"] * 2
        cos, sin = (torch.cat([part[i % 3] for i, part in enumerate(x.split(sections, dim=-1))], dim=-1) for x in (cos, sin))
    cos, sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
    query, key = (x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], dim=-1) * sin for x in (query, key))
    return query, key, value
