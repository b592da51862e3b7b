"""The arithmetic that a step of adapter training cannot do without, in closed form from configuration and batch.

Counted, two operations for each multiplication and addition of a matrix product: the language model's forward pass and the
gradients of its inputs, the adapters (forward, and gradients of both matrices and of their input), attention (forward, and
four products in its backward), the vocabulary matrix at supervised positions, and the frozen tower's forward.

Not counted, though a program may spend time on it: padding and filling, whatever is computed a second time (checkpointing,
attention probabilities and logits in the backward pass), weight gradients of frozen matrices, input gradients below the
first adapter, rows of the last layer that no target is predicted from, and everything that is no matrix product.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from finesight.data.layout import TowerShape, tower_layout
from finesight.data.pack import PackPlan


@dataclass(frozen=True)
class Work:
    """What a pack asks for, whatever the model's width. `a + b` is the work of both."""

    tokens: int = 0  # computed by the language model, each shared one once
    key_pairs: int = 0  # pairs of a token and a token that it attends to
    targets: int = 0  # target records
    target_pairs: int = 0  # of those pairs: the ones of tokens that a target is predicted from
    patches: int = 0
    frame_pairs: int = 0  # pairs of patches in the same frame
    window_pairs: int = 0  # pairs of patches in the same attention window; 0 for towers without windows
    visual_tokens: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def work_of(plan: PackPlan, tower: TowerShape) -> Work:
    """The work of a pack."""
    tokens = key_pairs = targets = target_pairs = 0
    for tree in plan.trees:
        for segment in tree.segments:
            # A token at depth i of its sample attends to i + 1 tokens, wherever its ancestors were computed.
            key_pairs += (segment.stop * (segment.stop + 1) - segment.start * (segment.start + 1)) // 2
            tokens += len(segment)
            trained = {place for index in segment.samples for place in _trained(plan, index, segment.start, segment.stop)}
            targets += len(trained)
            target_pairs += sum(trained)
    grids = [item.grid for item in plan.visual_items]
    if not grids:
        return Work(tokens, key_pairs, targets, target_pairs)
    layout = tower_layout(grids, tower)
    return Work(
        tokens, key_pairs, targets, target_pairs,
        patches=sum(grid.patches for grid in grids),
        frame_pairs=sum(length**2 for length in layout.frames.query_lengths),
        window_pairs=0 if layout.windows is None else sum(length**2 for length in layout.windows.query_lengths),
        visual_tokens=sum(grid.patches for grid in grids) // tower.merge_size**2,
    )  # fmt: skip


def _trained(plan: PackPlan, index: int, start: int, stop: int) -> Iterable[int]:
    """Places of a sample's targets in [start, stop): a target at place i is predicted from a token that sees i tokens."""
    return (start + place for place in plan.samples[index].trained[start:stop].nonzero()[0].tolist() if start + place > 0)


def needed_flop(config: Any, work: Work, *, r: int) -> dict[str, float]:
    """Floating-point operations by part, for adapters of rank `r` on all seven projections of the language model.

    Args:
        config: of transformers, of a Qwen-VL model without experts.
    """
    return {**_language_model(config.text_config, work, r), "tower": tower_forward(config.vision_config, work)}


def layer_matrices(text: Any) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the projections of one decoder layer."""
    hidden, head = text.hidden_size, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    mlp = text.intermediate_size
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, mlp),
        "up_proj": (hidden, mlp),
        "down_proj": (mlp, hidden),
    }


def _language_model(text: Any, work: Work, r: int) -> dict[str, float]:
    matrices = layer_matrices(text)
    per_pair = matrices["q_proj"][1]  # heads × head size
    base = adapters = attention = 0.0
    for layer in range(text.num_hidden_layers):
        last = layer == text.num_hidden_layers - 1
        attention += 12 * per_pair * (work.target_pairs if last else work.key_pairs)  # 2 products forward, 4 backward
        for name, (inputs, outputs) in matrices.items():
            rows = work.targets if last and name not in ("k_proj", "v_proj") else work.tokens
            below_adapters = layer == 0 and name in ("q_proj", "k_proj", "v_proj")  # nothing that trains lies below
            base += 2 * rows * inputs * outputs * (1 if below_adapters else 2)
            adapters += 2 * rows * r * (3 * (inputs + outputs) - (inputs if below_adapters else 0))
    return {
        "base": base,
        "adapters": adapters,
        "attention": attention,
        "vocabulary": 4.0 * work.targets * text.hidden_size * text.vocab_size,
    }


def tower_matrices(vision: Any) -> dict[str, float]:
    """Weights that each patch passes ("patch") and that each visual token passes ("token") in the tower and its mergers."""
    hidden, mlp, merged = vision.hidden_size, vision.intermediate_size, vision.hidden_size * vision.spatial_merge_size**2
    gated = hasattr(vision, "fullatt_block_indexes")  # Qwen2.5-VL's tower has a gated MLP
    block = 4 * hidden**2 + (3 if gated else 2) * hidden * mlp
    embedding = 3 * vision.temporal_patch_size * vision.patch_size**2 * hidden
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    return {"patch": vision.depth * block + embedding, "token": mergers * (merged**2 + merged * vision.out_hidden_size)}


def tower_forward(vision: Any, work: Work) -> float:
    """Operations of the tower and its mergers, forward only."""
    weights = tower_matrices(vision)
    whole = len(vision.fullatt_block_indexes) if hasattr(vision, "fullatt_block_indexes") else vision.depth
    pairs = whole * work.frame_pairs + (vision.depth - whole) * work.window_pairs
    return 2 * (weights["patch"] * work.patches + weights["token"] * work.visual_tokens) + 4 * vision.hidden_size * pairs
