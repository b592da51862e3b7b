"""Which tokens attend to which, and where patches stand: what a packed batch says of its own shape.

Pure functions of integers. Host-side lengths serve implementations that work on rectangular groups; everything that a
GPU kernel reads is a tensor or a fixed integer, so that nothing waits for the device.

Shapes: T tokens, S segments, K gathered keys, P patches, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, Self

import numpy as np
import torch

from finesight.geometry import Grid

# Compiled code is made anew for each number of segments: rounded up to a multiple of this there are few.
STEADY_SEGMENTS = 64


class Movable:
    """A frozen dataclass whose tensors (and movable fields) go to a device or to pinned memory together."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """In page-locked memory, so that copies to a GPU can overlap compute."""
        return self._each(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Marks every tensor as used by a stream, so that its memory is not given away while that stream reads it."""
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Movable) or (isinstance(value, torch.Tensor) and value.is_cuda):
                value.record_stream(stream)

    def _each(self, change: Any) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        changed = {name: change(value) for name, value in values.items() if isinstance(value, (torch.Tensor, Movable))}
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class AttentionLayout(Movable):
    """Which keys each segment's queries see. Queries of a segment stand side by side in the packed sequence.

    `key_index` names, segment after segment, the packed tokens whose keys it sees: its ancestors' from the root, then
    its own. None where every segment sees only itself.
    """

    query_lengths: tuple[int, ...]  # (S,)
    key_lengths: tuple[int, ...]  # (S,), equal to query_lengths where there are no ancestors
    max_queries: int  # at least the longest; rounded up where shapes are to stay the same from batch to batch
    max_keys: int
    cu_queries: torch.Tensor  # (S + 1,) int32, cumulative query lengths; empty segments may follow
    cu_keys: torch.Tensor  # (S + 1,) int32
    key_index: torch.Tensor | None = None  # (K,) int64
    # Its inverse, for gradients of keys: the gathered rows in the order of their packed tokens, and where those of each token begin.
    key_uses: torch.Tensor | None = None  # (K,) int32
    cu_key_uses: torch.Tensor | None = None  # (T + 1,) int32

    @staticmethod
    def of_lengths(
        query_lengths: Sequence[int],
        key_lengths: Sequence[int] | None = None,
        key_index: torch.Tensor | None = None,
        *,
        steady: bool = False,
    ) -> AttentionLayout:
        """A layout of segments with these lengths, on the CPU.

        Args:
            steady: round what a compiler would specialise on (longest lengths, number of segments) up to few values.
        """
        key_lengths = query_lengths if key_lengths is None else key_lengths
        longest = [max(lengths, default=0) for lengths in (query_lengths, key_lengths)]
        empty = 0
        if steady:
            longest = [_power_of_two(length) for length in longest]
            empty = -len(query_lengths) % STEADY_SEGMENTS
        key_uses = cu_key_uses = None
        if key_index is not None:
            key_uses = key_index.argsort(stable=True).to(torch.int32)
            cu_key_uses = _cumulative(key_index.bincount(minlength=sum(query_lengths)).numpy())
        return AttentionLayout(
            query_lengths=tuple(query_lengths),
            key_lengths=tuple(key_lengths),
            max_queries=longest[0],
            max_keys=longest[1],
            cu_queries=_cumulative([*query_lengths, *[0] * empty]),
            cu_keys=_cumulative([*key_lengths, *[0] * empty]),
            key_index=key_index,
            key_uses=key_uses,
            cu_key_uses=cu_key_uses,
        )

    @cached_property
    def shape_groups(self) -> tuple[tuple[int, int, torch.Tensor, torch.Tensor], ...]:
        """Segments of equal shape together: (queries, keys, query tokens (g, queries), key rows (g, keys)).

        For implementations that work on rectangular batches; key rows index the gathered keys.
        """
        starts_q, starts_k = np.cumsum((0, *self.query_lengths)), np.cumsum((0, *self.key_lengths))
        groups: dict[tuple[int, int], list[int]] = {}
        for segment, shape in enumerate(zip(self.query_lengths, self.key_lengths, strict=True)):
            if shape[0]:
                groups.setdefault(shape, []).append(segment)
        device = self.cu_queries.device
        return tuple(
            (
                queries,
                keys,
                torch.from_numpy(starts_q[members][:, None] + np.arange(queries)).to(device),
                torch.from_numpy(starts_k[members][:, None] + np.arange(keys)).to(device),
            )
            for (queries, keys), members in groups.items()
        )


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
class TowerLayout(Movable):
    """Where the patches of a batch stand, in the order in which the tower computes them."""

    rotary: torch.Tensor  # (P, 2) int64: row and column of each patch
    frames: AttentionLayout  # every frame sees itself
    windows: AttentionLayout | None  # for towers with window attention
    window_order: torch.Tensor | None  # (V,) int64: the visual token computed at each place
    reading_order: torch.Tensor | None  # (V,) int64: its inverse
    taps: torch.Tensor | None  # (P, 4) int64: learned positions that are blended for each patch
    tap_weights: torch.Tensor | None  # (P, 4) float32


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
    raster = np.stack(np.meshgrid(np.arange(grid.h), np.arange(grid.w), indexing="ij"))
    places = raster.reshape(2, grid.h // merge, merge, grid.w // merge, merge).transpose(1, 3, 2, 4, 0).reshape(-1, 2)
    taps, tap_weights = _bilinear_taps(places[:, 0], places[:, 1], grid, shape.positions_per_side or 1)
    rotary = np.tile(places, (grid.t, 1))
    order: np.ndarray = np.empty(0, np.int64)
    lengths: tuple[int, ...] = ()
    if shape.window_tokens:  # rotary positions follow the order in which patches are computed
        order, lengths = _windows(grid, merge, shape.window_tokens)
        rotary = rotary.reshape(-1, merge * merge, 2)[order].reshape(-1, 2)
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


def _cumulative(lengths: Sequence[int] | np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.cumsum(np.concatenate(([0], lengths))).astype(np.int32))


def _power_of_two(length: int) -> int:
    return 1 << max(length - 1, 0).bit_length()
