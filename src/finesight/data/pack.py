"""Samples -> trees -> packed batch: the forest.

The unit of work is a *segment*: a run of tokens that attends to its ancestors and, causally, to itself. Samples that
begin alike share their first segment (a system prompt and an image, say) and branch where they part; trees are laid
end to end up to a token budget, without padding. What must be predicted travels as target records.

Everything here is pure: integers in, arrays out. Pixels are asked for only in :meth:`PackPlan.build`.

Shapes: T tokens of a pack, S segments, K gathered keys, N targets, V visual tokens, P patches.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch

from finesight.data.sample import Sample, VisualItem
from finesight.geometry import Grid

# Fewer common tokens than this are computed again: a branch costs a gather of its ancestors' keys, which a chat
# header's worth of tokens does not repay.
MIN_SHARED_TOKENS = 16


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of tokens of one tree: tokens [start, stop) of each of its samples, computed once."""

    parent: int | None  # index in the tree's segments
    samples: tuple[int, ...]  # the samples that pass through it; all are alike here, the first one stands for them
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Tree:
    """Segments in an order in which parents come before their branches."""

    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(segment) for segment in self.segments)


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """Which keys each segment's queries see. Queries of a segment stand side by side in the packed sequence.

    `key_index` names, segment after segment, the packed tokens whose keys it sees: its ancestors' from the root, then
    its own. None where every segment sees only itself.
    """

    query_lengths: tuple[int, ...]  # (S,)
    key_lengths: tuple[int, ...]  # (S,), equal to query_lengths where there are no ancestors
    cu_queries: torch.Tensor  # (S + 1,) int32, cumulative query lengths
    cu_keys: torch.Tensor  # (S + 1,) int32
    key_index: torch.Tensor | None = None  # (K,) int64

    @staticmethod
    def of_lengths(
        query_lengths: Sequence[int], key_lengths: Sequence[int] | None = None, key_index: torch.Tensor | None = None
    ) -> AttentionLayout:
        """A layout of segments with these lengths, on the CPU."""
        key_lengths = query_lengths if key_lengths is None else key_lengths
        return AttentionLayout(tuple(query_lengths), tuple(key_lengths), _cumulative(query_lengths), _cumulative(key_lengths), key_index)

    @property
    def max_queries(self) -> int:
        return max(self.query_lengths, default=0)

    @property
    def max_keys(self) -> int:
        return max(self.key_lengths, default=0)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AttentionLayout:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            cu_queries=move(self.cu_queries),
            cu_keys=move(self.cu_keys),
            key_index=None if self.key_index is None else move(self.key_index),
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


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One forward pass: a packed sequence of T tokens, its images, and its target records."""

    input_ids: torch.Tensor  # (T,) int64
    position_ids: torch.Tensor  # (3, T) int64: M-RoPE axes time, height, width
    layout: AttentionLayout
    patches: torch.Tensor  # (P, channels * frames * patch * patch) float32, each distinct image or video once
    grids: tuple[Grid, ...]  # of the distinct images and videos, in the order of `patches`
    item_keys: tuple[str, ...]  # identity of each distinct image or video
    visual_index: torch.Tensor  # (V,) int64: packed tokens that hold visual features
    visual_source: torch.Tensor  # (V,) int64: the row of the tower's output for each
    predict_from: torch.Tensor  # (N,) int64: packed token whose hidden state must give `token`
    token: torch.Tensor  # (N,) int64
    weight: torch.Tensor  # (N,) float32; a target in a shared prefix weighs as often as it is shared
    sequence: torch.Tensor  # (N,) int64: the sample it belongs to (of those that share it, the first)
    num_sequences: int

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_targets(self) -> int:
        return int(self.token.shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on a device."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (torch.Tensor, AttentionLayout)):
                moved[field.name] = value.to(device, non_blocking=non_blocking)
        return replace(self, **moved)

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, so that copies to a GPU can overlap compute."""
        moved: dict[str, object] = {
            field.name: value.pin_memory() for field in fields(self) if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        layout = self.layout
        moved["layout"] = replace(
            layout,
            cu_queries=layout.cu_queries.pin_memory(),
            cu_keys=layout.cu_keys.pin_memory(),
            key_index=None if layout.key_index is None else layout.key_index.pin_memory(),
        )
        return replace(self, **moved)

    def without_weight(self) -> PackedBatch:
        """The same work with no effect on a loss: for a process that has fewer packs in a step than the others."""
        return replace(self, weight=torch.zeros_like(self.weight))


@dataclass(frozen=True, eq=False)
class PackPlan:
    """What goes into one pack, before any pixel is decoded."""

    samples: tuple[Sample, ...]
    trees: tuple[Tree, ...]  # their segments name samples of this plan

    @cached_property
    def num_tokens(self) -> int:
        return sum(tree.num_tokens for tree in self.trees)

    @cached_property
    def unshared_tokens(self) -> int:
        """Tokens that would be computed if nothing were shared."""
        return sum(len(sample) for sample in self.samples)

    @cached_property
    def num_targets(self) -> int:
        """Supervised tokens, each sample's counted by itself."""
        return sum(int(sample.trained.sum()) for sample in self.samples)

    @cached_property
    def target_weight(self) -> float:
        return sum(sample.target_weight for sample in self.samples)

    @cached_property
    def visual_items(self) -> tuple[VisualItem, ...]:
        """Distinct images and videos, in the order in which they are first met."""
        return tuple({item.key: item for sample in self.samples for item in sample.visual_items}.values())

    def build(self, patches_of: Callable[[VisualItem], np.ndarray], merge_size: int = 2) -> PackedBatch:
        """Lays the trees end to end and fetches pixels.

        Args:
            patches_of: the patches of an image or video, (grid.patches, patch values) float32.
            merge_size: patches on a side of a visual token.
        """
        items = self.visual_items
        arrays = [patches_of(item) for item in items]
        patches = torch.from_numpy(np.concatenate(arrays)) if arrays else torch.empty(0, 0)
        first_rows, row = {}, 0
        for item in items:
            first_rows[item.key] = row
            row += item.grid.patches // merge_size**2
        parts = _TreeArrays(self.samples, first_rows)
        for tree in self.trees:
            parts.add(tree)
        return PackedBatch(patches=patches, grids=tuple(i.grid for i in items), item_keys=tuple(i.key for i in items), **parts.finish())


def pack_step(samples: Sequence[Sample], *, token_budget: int, share: bool) -> list[PackPlan]:
    """Lays out the samples of one optimizer step as packs of at most `token_budget` tokens.

    Trees go, largest first, into the fullest pack that still has room (best-fit decreasing). A tree larger than the
    budget is divided: its prefix is then computed more than once. A single sample larger than the budget gets a pack of
    its own; whether that is allowed was decided when it was encoded.

    Args:
        share: whether samples that begin alike are joined into one tree.
    """
    trees = grow_forest(samples, token_budget=token_budget, share=share)
    bins: list[list[Tree]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for tree in sorted(trees, key=lambda t: -t.num_tokens):
        at = bisect_left(room, (tree.num_tokens, -1))
        if at == len(room):
            bins.append([tree])
            insort(room, (token_budget - tree.num_tokens, len(bins) - 1))
        else:
            left, index = room.pop(at)
            bins[index].append(tree)
            insort(room, (left - tree.num_tokens, index))
    return [_plan(samples, trees) for trees in bins]


def grow_forest(samples: Sequence[Sample], *, token_budget: int, share: bool) -> list[Tree]:
    """Trees over all samples; segments name samples by their place in `samples`."""
    if not share:
        return [Tree((Segment(None, (index,), 0, len(sample)),)) for index, sample in enumerate(samples)]
    identities = [_identity(sample) for sample in samples]
    # Sorted by content, samples that begin alike stand side by side; what neighbours have in common says everything.
    order = sorted(range(len(samples)), key=lambda i: identities[i].astype(">i8").tobytes())
    common = [_common_length(identities[a], identities[b]) for a, b in zip(order, order[1:], strict=False)]
    trees: list[Tree] = []
    for low, high in _divide(common, 0, len(order), depth=0):
        _grow_within_budget(order, common, low, high, identities, token_budget, trees)
    return trees


def _grow_within_budget(
    order: Sequence[int], common: Sequence[int], low: int, high: int, identities: Sequence[np.ndarray], budget: int, trees: list[Tree]
) -> None:
    segments: list[Segment] = []
    _grow(order, common, low, high, 0, None, identities, segments)
    tree = Tree(tuple(segments))
    if tree.num_tokens <= budget or high - low == 1:
        trees.append(tree)
        return
    middle = (low + high) // 2
    _grow_within_budget(order, common, low, middle, identities, budget, trees)
    _grow_within_budget(order, common, middle, high, identities, budget, trees)


def _grow(
    order: Sequence[int], common: Sequence[int], low: int, high: int, depth: int, parent: int | None,
    identities: Sequence[np.ndarray], segments: list[Segment],
) -> None:  # fmt: skip
    """Appends the segments of samples order[low:high], which are alike up to `depth`, below `parent`."""
    if high - low == 1:
        length = len(identities[order[low]])
        if length > depth:
            segments.append(Segment(parent, (order[low],), depth, length))
        return
    shared = min(common[low : high - 1])
    if shared - depth >= MIN_SHARED_TOKENS:
        segments.append(Segment(parent, tuple(sorted(order[low:high])), depth, shared))
        parent, depth = len(segments) - 1, shared
    for begin, end in _divide(common, low, high, depth):
        _grow(order, common, begin, end, depth, parent, identities, segments)


def _divide(common: Sequence[int], low: int, high: int, depth: int) -> list[tuple[int, int]]:
    """Cuts a range of neighbours wherever they share less than is worth sharing beyond `depth`."""
    cuts = [low, *(i + 1 for i in range(low, high - 1) if common[i] - depth < MIN_SHARED_TOKENS), high]
    return list(zip(cuts, cuts[1:], strict=False))


def _identity(sample: Sample) -> np.ndarray:
    """(L,) int64: equal prefixes of it mean equal tokens, pixels and positions.

    A visual token is its item's content and its place in it; the spacing of its positions is part of the content,
    since two videos of the same frames may differ in their rate.
    """
    identity = sample.token_ids.astype(np.int64, copy=True)
    for item in sample.visual_items:
        places = np.concatenate([np.arange(start, start + count) for start, count in item.runs])
        spacing = (sample.position_ids[:, places] - sample.position_ids[:, places[:1]]).tobytes()
        digest = hashlib.blake2b(item.key.encode() + spacing, digest_size=8).digest()
        # 39 bits of content and 24 of place, negative so that it never equals a token id.
        content = int.from_bytes(digest, "big") & ((1 << 39) - 1)
        identity[places] = -((content << 24) + np.arange(len(places)) + 1)
    return identity


def _common_length(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n


def _plan(samples: Sequence[Sample], trees: Sequence[Tree]) -> PackPlan:
    """A plan with its samples renumbered from 0."""
    used = sorted({index for tree in trees for segment in tree.segments for index in segment.samples})
    renumbered = {index: place for place, index in enumerate(used)}
    moved = tuple(Tree(tuple(replace(s, samples=tuple(renumbered[i] for i in s.samples)) for s in tree.segments)) for tree in trees)
    return PackPlan(tuple(samples[index] for index in used), moved)


def _cumulative(lengths: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.cumsum((0, *lengths)).astype(np.int32))


class _TreeArrays:
    """Collects the arrays of a packed batch, tree by tree."""

    def __init__(self, samples: Sequence[Sample], first_rows: dict[str, int]) -> None:
        self.samples, self.first_rows = samples, first_rows
        self.offset = 0  # packed token at which the next segment begins
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.query_lengths: list[int] = []
        self.keys: list[np.ndarray] = []
        self.branched = False
        self.visual: list[tuple[np.ndarray, np.ndarray]] = []
        self.targets: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, tree: Tree) -> None:
        paths: list[np.ndarray] = []  # of each segment: the packed tokens from the root to its end
        for segment in tree.segments:
            sample = self.samples[segment.samples[0]]
            own = np.arange(self.offset, self.offset + len(segment))
            path = own if segment.parent is None else np.concatenate([paths[segment.parent], own])
            self.branched |= segment.parent is not None
            paths.append(path)
            self.ids.append(sample.token_ids[segment.start : segment.stop])
            self.positions.append(sample.position_ids[:, segment.start : segment.stop])
            self.query_lengths.append(len(segment))
            self.keys.append(path)
            self._add_visual(sample, segment)
            self._add_targets(segment, path)
            self.offset += len(segment)

    def _add_visual(self, sample: Sample, segment: Segment) -> None:
        for item in sample.visual_items:
            done = 0  # visual tokens of the item in the runs before
            for start, count in item.runs:
                low, high = max(start, segment.start), min(start + count, segment.stop)
                if low < high:
                    rows = self.first_rows[item.key] + done + np.arange(low - start, high - start)
                    self.visual.append((self.offset + np.arange(low - segment.start, high - segment.start), rows))
                done += count

    def _add_targets(self, segment: Segment, path: np.ndarray) -> None:
        weights = np.zeros(len(segment), dtype=np.float64)
        for index in segment.samples:
            sample = self.samples[index]
            weights += sample.weight * sample.trained[segment.start : segment.stop]
        trained = np.zeros(len(segment), dtype=bool)
        for index in segment.samples:
            trained |= self.samples[index].trained[segment.start : segment.stop]
        places = segment.start + np.flatnonzero(trained)
        places = places[places > 0]  # nothing comes before a first token
        first = self.samples[segment.samples[0]]
        self.targets.append(
            (path[places - 1], first.token_ids[places], weights[places - segment.start], np.full(len(places), segment.samples[0]))
        )

    def finish(self) -> dict[str, object]:
        key_lengths = [len(path) for path in self.keys]
        key_index = torch.from_numpy(np.concatenate(self.keys)) if self.branched else None
        visual_index, visual_source = (
            np.concatenate(column).astype(np.int64) if self.visual else np.empty(0, np.int64)
            for column in (list(zip(*self.visual, strict=True)) or [(), ()])
        )
        predict_from, token, weight, sequence = (np.concatenate(column) for column in zip(*self.targets, strict=True))
        return dict(
            input_ids=torch.from_numpy(np.concatenate(self.ids).astype(np.int64)),
            position_ids=torch.from_numpy(np.concatenate(self.positions, axis=1).astype(np.int64)),
            layout=AttentionLayout.of_lengths(self.query_lengths, key_lengths, key_index),
            visual_index=torch.from_numpy(visual_index),
            visual_source=torch.from_numpy(visual_source),
            predict_from=torch.from_numpy(predict_from.astype(np.int64)),
            token=torch.from_numpy(token.astype(np.int64)),
            weight=torch.from_numpy(weight.astype(np.float32)),
            sequence=torch.from_numpy(sequence.astype(np.int64)),
            num_sequences=len(self.samples),
        )
