"""One door: an nn.Module whose forward takes a packed batch to the log-probabilities of its targets.

The loops over layers are ours, the modules are transformers' (and peft's inside them). Everything a training step
computes passes through :meth:`PackedModel.forward`, so that DDP, FSDP2 and compilers see one forward.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from finesight.data.layout import TowerShape, tower_layout
from finesight.data.pack import PackedBatch
from finesight.models.attention import use_forest_attention
from finesight.models.linear import accumulate_adapters
from finesight.models.logprobs import target_logprobs
from finesight.models.vision import VisualFeatures, tower_features


class PackedModel(nn.Module):
    """A Qwen-VL model that computes forests.

    Args:
        model: Qwen2.5-VL, Qwen3-VL or Qwen3-VL-MoE for conditional generation, or a peft model around one.
        gradient_checkpointing: compute layers again in the backward pass instead of keeping their activations.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        self.gradient_checkpointing = gradient_checkpointing
        use_forest_attention(self.base)
        if isinstance(model, PeftModel):
            accumulate_adapters(model)
        self.tower_shape = TowerShape.of(self.base.model.visual.config)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model; adapters, where there are any, sit inside its layers."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Log-probabilities (N,) of the batch's target records, in float32."""
        hidden = self.hidden_states(batch)
        return target_logprobs(hidden.index_select(0, batch.predict_from), self.base.lm_head.weight, batch.token)

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """(T, D): the final hidden state of every packed token."""
        text = self.base.model.language_model
        features = self.visual_features(batch)
        hidden = text.embed_tokens(batch.input_ids)
        if features is not None:
            merged = features.merged.index_select(0, batch.visual_source).to(hidden.dtype)
            hidden = hidden.index_copy(0, batch.visual_index, merged)
        hidden = hidden.unsqueeze(0)
        rotary = text.rotary_emb(hidden, batch.position_ids.unsqueeze(1))
        arguments: dict[str, Any] = dict(attention_mask=None, position_embeddings=rotary, forest=batch.layout)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for index, layer in enumerate(text.layers):
            if recompute:
                hidden = checkpoint(layer, hidden, use_reentrant=False, **arguments)
            else:
                hidden = layer(hidden, **arguments)
            if features is not None and index < len(features.deepstack):
                level = features.deepstack[index].index_select(0, batch.visual_source).to(hidden.dtype)
                hidden = hidden.squeeze(0).index_add(0, batch.visual_index, level).unsqueeze(0)
        return text.norm(hidden).squeeze(0)

    def visual_features(self, batch: PackedBatch) -> VisualFeatures | None:
        """Features of the batch's distinct images and videos; without a graph where the tower does not train."""
        if not batch.grids:
            return None
        visual = self.base.model.visual
        trains = any(parameter.requires_grad for parameter in visual.parameters())
        layout = batch.tower or tower_layout(batch.grids, self.tower_shape).to(batch.patches.device, non_blocking=True)
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            return tower_features(
                visual, batch.patches, layout, recompute=self.gradient_checkpointing and trains and torch.is_grad_enabled()
            )
