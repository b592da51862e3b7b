"""The vision tower over a packed sequence of patches: a loop over transformers' own blocks.

What the tower needs to know of its images (which patch stands where, which patches attend to each other) depends on
their grids alone and is computed on the host, once per grid; nothing here waits for the device.

Shapes: P patches, V visual tokens (P / merge²), D hidden size of the tower, E of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from finesight.data.pack import AttentionLayout
from finesight.geometry import Grid


@dataclass(frozen=True)
class TowerShape:
    """What a tower's layout depends on, read from its configuration."""

    merge_size: int
    window_tokens: int | None  # side of an attention window in visual tokens; None: every block sees the whole frame
    positions_per_side: int | None  # side of the learned grid of position embeddings; None: rotary alone

    @staticmethod
    def of(config: object) -> TowerShape:
        """From a transformers vision configuration."""
        merge: int = config.spatial_merge_size  # type: ignore[attr-defined]
        window = getattr(config, "window_size", None)
        learned = getattr(config, "num_position_embeddings", None)
        return TowerShape(
            merge_size=merge,
            window_tokens=window // merge // config.patch_size if window else None,  # type: ignore[attr-defined]
            positions_per_side=int(learned**0.5) if learned else None,
        )


@dataclass(frozen=True, eq=False)
class TowerLayout:
    """Where the patches of a batch stand, in the order in which the tower computes them."""

    rotary: torch.Tensor  # (P, 2) int64: row and column of each patch
    frames: AttentionLayout  # every frame sees itself
    windows: AttentionLayout | None  # for towers with window attention
    window_order: torch.Tensor | None  # (V,) int64: the visual token computed at each place
    reading_order: torch.Tensor | None  # (V,) int64: its inverse
    taps: torch.Tensor | None  # (P, 4) int64: learned positions that are blended for each patch
    tap_weights: torch.Tensor | None  # (P, 4) float32

    def to(self, device: torch.device | str) -> TowerLayout:
        def move(value: torch.Tensor | AttentionLayout | None) -> torch.Tensor | AttentionLayout | None:
            return None if value is None else value.to(device, non_blocking=True)

        return TowerLayout(**{name: move(value) for name, value in self.__dict__.items()})  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class VisualFeatures:
    """What the language model gets of the images of a batch."""

    merged: torch.Tensor  # (V, E), added in place of the embeddings of visual tokens
    deepstack: tuple[torch.Tensor, ...]  # each (V, E), added after the first layers (Qwen3-VL)


def tower_layout(grids: Sequence[Grid], shape: TowerShape) -> TowerLayout:
    """The layout of images and videos laid end to end, on the CPU."""
    parts = [_grid_layout(Grid(*grid), shape) for grid in grids]
    frame_lengths = [grid.h * grid.w for grid in grids for _ in range(grid.t)]
    windows = window_order = reading_order = None
    if shape.window_tokens:
        windows = AttentionLayout.of_lengths([length for part in parts for length in part.window_lengths])
        offsets = np.cumsum([0, *(len(part.window_order) for part in parts)])
        order = np.concatenate([part.window_order + offset for part, offset in zip(parts, offsets, strict=False)])
        window_order, reading_order = torch.from_numpy(order), torch.from_numpy(np.argsort(order))
    taps = tap_weights = None
    if shape.positions_per_side:
        taps = torch.from_numpy(np.concatenate([part.taps for part in parts]))
        tap_weights = torch.from_numpy(np.concatenate([part.tap_weights for part in parts]))
    rotary = torch.from_numpy(np.concatenate([part.rotary for part in parts]))
    return TowerLayout(rotary, AttentionLayout.of_lengths(frame_lengths), windows, window_order, reading_order, taps, tap_weights)


@dataclass(frozen=True, eq=False)
class _GridLayout:
    rotary: np.ndarray
    window_order: np.ndarray
    window_lengths: tuple[int, ...]
    taps: np.ndarray
    tap_weights: np.ndarray


@lru_cache(maxsize=4096)
def _grid_layout(grid: Grid, shape: TowerShape) -> _GridLayout:
    merge = shape.merge_size
    # Patches come in blocks that will be merged: (block row, block column, row in block, column in block).
    rows, columns = np.meshgrid(np.arange(grid.h), np.arange(grid.w), indexing="ij")
    blocks = (grid.h // merge, merge, grid.w // merge, merge)
    rows, columns = (axis.reshape(blocks).transpose(0, 2, 1, 3).reshape(-1) for axis in (rows, columns))
    taps, tap_weights = _bilinear_taps(rows, columns, grid, shape.positions_per_side or 1)
    order, lengths = _windows(grid, merge, shape.window_tokens) if shape.window_tokens else (np.empty(0, np.int64), ())
    if shape.window_tokens:  # rotary positions follow the order in which patches are computed
        rows, columns = np.tile(rows, grid.t), np.tile(columns, grid.t)
        rows, columns = (axis.reshape(-1, merge * merge)[order].reshape(-1) for axis in (rows, columns))
        rotary = np.stack([rows, columns], axis=1)
    else:
        rotary = np.tile(np.stack([rows, columns], axis=1), (grid.t, 1))
    return _GridLayout(rotary, order, lengths, np.tile(taps, (grid.t, 1)), np.tile(tap_weights, (grid.t, 1)))


def _bilinear_taps(rows: np.ndarray, columns: np.ndarray, grid: Grid, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The four learned positions around each patch and their weights, corners aligned.

    Coordinates and weights are float32 as in transformers, so that both blend alike.
    """
    axes = []
    for places, length in ((rows, grid.h), (columns, grid.w)):
        coordinate = torch.linspace(0, side - 1, length).numpy()[places]
        low = coordinate.astype(np.int64)
        high = np.minimum(low + 1, side - 1)
        share = coordinate - low.astype(np.float32)
        axes.append((low, high, share))
    (top, bottom, down), (left, right, across) = axes
    taps = np.stack([top * side + left, top * side + right, bottom * side + left, bottom * side + right], axis=1)
    weights = np.stack([(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across], axis=1)
    return taps, weights.astype(np.float32)


def _windows(grid: Grid, merge: int, window: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Order of the visual tokens window by window, and the patches of each window (Qwen2.5-VL)."""
    height, width = grid.h // merge, grid.w // merge
    index = np.arange(grid.t * height * width).reshape(grid.t, height, width)
    pieces = [
        index[t, top : top + window, left : left + window].reshape(-1)
        for t in range(grid.t)
        for top in range(0, height, window)
        for left in range(0, width, window)
    ]
    return np.concatenate(pieces), tuple(len(piece) * merge * merge for piece in pieces)


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
