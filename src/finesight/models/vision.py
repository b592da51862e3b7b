"""The vision tower over a packed sequence of patches: a loop over transformers' own blocks.

What the tower needs to know of its images (which patch stands where, which patches attend to each other) depends on
their grids alone and is computed on the host, once per grid; nothing here waits for the device.

Shapes: P patches, V visual tokens (P / merge²), D hidden size of the tower, E of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from finesight.data.layout import TowerLayout


@dataclass(frozen=True, eq=False)
class VisualFeatures:
    """What the language model gets of the images of a batch."""

    merged: torch.Tensor  # (V, E), added in place of the embeddings of visual tokens
    deepstack: tuple[torch.Tensor, ...]  # each (V, E), added after the first layers (Qwen3-VL)


def tower_features(visual: nn.Module, patches: torch.Tensor, layout: TowerLayout, *, recompute: bool = False) -> VisualFeatures:
    """Runs the tower over packed patches.

    Args:
        visual: transformers' vision model.
        patches: (P, values of a patch), as the image processor gives them.
        layout: on the device of the patches.
        recompute: compute blocks again in the backward pass instead of keeping their activations.
    """
    hidden = visual.patch_embed(patches)
    if layout.taps is not None:
        positions = (visual.pos_embed(layout.taps) * layout.tap_weights[:, :, None]).sum(1)
        hidden = hidden + positions.to(hidden.dtype)
    if layout.window_order is not None:
        hidden = _reorder(hidden, layout.window_order)
    rotary = _rotary(visual, layout.rotary)
    whole_frame = set(getattr(visual, "fullatt_block_indexes", range(len(visual.blocks))))
    deepstack_after = list(getattr(visual, "deepstack_visual_indexes", ()))
    deepstack: list[torch.Tensor] = []
    for index, block in enumerate(visual.blocks):
        forest = layout.frames if layout.windows is None or index in whole_frame else layout.windows
        arguments = dict(cu_seqlens=forest.cu_queries, position_embeddings=rotary, max_seqlen=forest.max_queries, forest=forest)
        if recompute:
            hidden = checkpoint(block, hidden, use_reentrant=False, **arguments)
        else:
            hidden = block(hidden, **arguments)
        if index in deepstack_after:
            deepstack.append(visual.deepstack_merger_list[deepstack_after.index(index)](hidden))
    merged = visual.merger(hidden)
    if layout.reading_order is not None:
        merged = merged.index_select(0, layout.reading_order)
    return VisualFeatures(merged, tuple(deepstack))


def _reorder(hidden: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Patches regrouped by the visual token they belong to."""
    return hidden.view(order.shape[0], -1, hidden.shape[-1]).index_select(0, order).view(hidden.shape)


def _rotary(visual: nn.Module, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (P, head size): half of the angles turn with the row, half with the column."""
    frequencies = visual.rotary_pos_emb.inv_freq.to(device=places.device, dtype=torch.float32)
    angles = (places[:, :, None].float() * frequencies).flatten(1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()
