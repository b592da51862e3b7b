"""What a layer keeps between forward and backward pass, tensor by tensor, as `models/packed.py` and `models/linear.py` compute it.

Each table names every tensor that autograd keeps of one layer or block, with its numbers a row and in which of the ways of
running the layer it is kept:

eager           uncompiled, everything kept
compiled        compiled, everything kept that the compiler does not rather compute again (norms in float32 are)
selective       compiled, results of products and attention, and what attention reads
eager_selective uncompiled, results of products and attention

Weights are not counted: they are there anyway. Tests count the tensors of real layers and hold these tables to them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from finesight.planner.shapes import ModelShape, TextShape
from finesight.planner.sizes import PackSizes
from finesight.recipe import TuningSettings

Way = Literal["eager", "compiled", "selective", "eager_selective"]
Rows = Literal["tokens", "keys", "outputs"]
_E, _C, _S, _ES = "eager", "compiled", "selective", "eager_selective"
_ALL = {_E, _C, _S, _ES}


@dataclass(frozen=True)
class Execution:
    """How layers are run.

    Attributes:
        compiled: layers and tower blocks are compiled.
        width: bytes of a number in the precision of the base.
        repeats_keys: attention repeats keys and values for each query head (torch before 2.12).
        patch_width: bytes of a value of a patch as it comes to the device; None: as the base, where that has two bytes, else four.
        grouped: attention gathers segments of equal length (without variable-length attention: CPUs, old GPUs).
    """

    compiled: bool = True
    width: int = 2
    repeats_keys: bool = False
    grouped: bool = False
    patch_width: int | None = None

    @property
    def patch_bytes(self) -> int:
        return self.patch_width or min(self.width, 4)

    @staticmethod
    def here(*, compiled: bool) -> Execution:
        """With attention as the torch that is installed has it on a GPU; none of it is imported."""
        major, minor = importlib.metadata.version("torch").split(".")[:2]
        return Execution(compiled=compiled, repeats_keys=(int(major), int(minor)) < (2, 12))


@dataclass(frozen=True)
class Kept:
    """One tensor of a layer.

    `rows` says how many rows it has: tokens (or patches); keys that attention reads; or outputs, which are the tokens
    too, but in the last layer only those that predict a target.
    """

    name: str
    numbers: float  # of one row
    bytes_each: int
    ways: frozenset[str]
    rows: Rows = "tokens"

    @property
    def bytes_a_row(self) -> float:
        return self.numbers * self.bytes_each


def decoder_layer(
    model: ModelShape, tuning: TuningSettings, execution: Execution, *, experts: bool = False, chunked: bool = False
) -> tuple[Kept, ...]:
    """The tensors kept of one layer of the language model.

    Args:
        experts: of a layer with a mixture of experts.
        chunked: its MLP is computed in chunks, and again in the backward pass: only what goes into it is kept.
    """
    t, w = model.text, execution.width
    norms = _norm_trains(tuning, w)
    attention = tuning.finetune_language_layers and tuning.finetune_attention_modules
    ranks = tuning.r if attention and tuning.method == "lora" else 0
    # Queries and keys have norms of their own in Qwen3-VL; without them nothing reads the product after its rotation.
    before_norm = {_C, _S} if model.attention_has_norms else set()
    return (
        _kept("input", t.hidden, w, {_C, _S, _ES}),
        _kept("input in float32, for its norm", t.hidden, 4, {_E}),
        _kept("input normed, for the norm's weight", t.hidden, w, {_E} if norms else set()),
        _kept("input normed, for q, k and v", t.hidden, w, {_E, _C} if attention else set()),
        _kept("queries", t.queries, w, before_norm | {_ES}),
        _kept("keys", t.keys, w, before_norm | {_ES}),
        _kept("values", t.keys, w, {_ES}),
        _kept("queries in float32, for their norm", t.queries, 4, {_E} if model.attention_has_norms else set()),
        _kept("keys in float32, for their norm", t.keys, 4, {_E} if model.attention_has_norms else set()),
        _kept(
            "queries and keys normed, for the norms' weights",
            t.queries + t.keys,
            w,
            {_E} if norms and model.attention_has_norms else set(),
        ),
        _kept("queries rotated", t.queries, w, {_E, _C, _S}),
        *_attention_operands(t.queries, t.keys, w, execution),
        _kept("attention", t.queries, w, _ALL),
        _kept("logsumexp of the scores", t.heads, 4, _ALL),
        *_grouped_copies(t.queries, w, execution),
        _kept("x Aᵀ of q, k and v", 3 * ranks, w, _ALL),
        _kept("x Aᵀ of o", ranks, w, _ALL, "outputs"),
        _kept("o", t.hidden, w, {_ES}, "outputs"),
        *(_second_half(model, tuning, w, experts=experts) if not chunked else [_kept("sum after attention", t.hidden, w, _ALL, "outputs")]),
    )


def second_half(model: ModelShape, tuning: TuningSettings, execution: Execution) -> tuple[Kept, ...]:
    """The tensors kept of a layer's MLP (of no experts) and the norm before it alone; a chunk of it brings these back."""
    return tuple(_second_half(model, tuning, execution.width, experts=False))


def _second_half(model: ModelShape, tuning: TuningSettings, w: int, *, experts: bool) -> list[Kept]:
    hidden = model.text.hidden
    return [
        _kept("sum after attention", hidden, w, {_C, _S}, "outputs"),
        _kept("sum after attention in float32, for its norm", hidden, 4, {_E}, "outputs"),
        _kept("sum normed, for the norm's weight", hidden, w, {_E} if _norm_trains(tuning, w) else set(), "outputs"),
        *(_experts(model, tuning, w) if experts else _dense_mlp(model, tuning, w)),
    ]


def _attention_operands(queries: int, keys: int, w: int, execution: Execution) -> list[Kept]:
    """Keys and values as attention reads them: rotated, gathered where segments branch, repeated where it cannot group."""
    width = queries if execution.repeats_keys else keys
    return [
        _kept("keys and values as attention reads them", 2 * width, w, {_E, _C}, "keys"),
        _kept("keys rotated and values", 2 * keys, w, {_S}),
    ]


def _grouped_copies(queries: int, w: int, execution: Execution) -> list[Kept]:
    """Without variable-length attention: results of groups side by side, and put back in order."""
    if not execution.grouped:
        return []
    return [_kept("attention by groups", queries, w, _ALL), _kept("attention in order", queries, w, _ALL, "outputs")]


def _dense_mlp(model: ModelShape, tuning: TuningSettings, w: int) -> list[Kept]:
    t = model.text
    trains = tuning.finetune_language_layers and tuning.finetune_mlp_modules
    ranks = 0 if tuning.method == "full" or not trains else tuning.r
    return [
        _kept("sum normed, for gate and up", t.hidden, w, {_E, _C} if trains else set(), "outputs"),
        _kept("x Aᵀ of gate and up", 2 * ranks, w, _ALL, "outputs"),
        _kept("gate and up", 2 * t.mlp, w, _ALL, "outputs"),
        _kept("activated gate", t.mlp, w, {_E}, "outputs"),
        _kept("product for down", t.mlp, w, {_E, _C} if trains else set(), "outputs"),
        _kept("x Aᵀ of down", ranks, w, _ALL, "outputs"),
        _kept("down", t.hidden, w, {_ES}, "outputs"),
    ]


def _experts(model: ModelShape, tuning: TuningSettings, w: int) -> list[Kept]:
    """A mixture of experts: each token becomes a row for each of the experts that it is sent to.

    The activation is computed again from the product with gate and up in every way (`models/experts.py`).
    """
    t = model.text
    each, inner = t.experts_per_token * t.hidden, t.experts_per_token * t.expert_mlp
    adapted = tuning.finetune_experts and tuning.method == "lora"
    trains = adapted or (tuning.method == "full" and tuning.finetune_language_layers and tuning.finetune_mlp_modules)
    return [
        _kept("router's shares of the experts", t.experts, 4, _ALL, "outputs"),
        _kept("order of rows and their weights", 20 * t.experts_per_token, 1, _ALL, "outputs"),
        _kept("rows for the experts", each, w, {_E, _C} if trains else set(), "outputs"),
        _kept("gate and up", 2 * inner, w, _ALL, "outputs"),
        _kept("the adapters' part of gate and up", 2 * inner, w, _ALL if adapted else set(), "outputs"),
        _kept("product for down", inner, w, {_E, _C} if trains else set(), "outputs"),
        _kept("x Aᵀ of the experts", 2 * tuning.r * t.experts_per_token, w, _ALL if adapted else set(), "outputs"),
    ]


def tower_block(model: ModelShape, tuning: TuningSettings, execution: Execution) -> tuple[Kept, ...]:
    """The tensors kept of one tower block, where tower or merger train; a row is a patch."""
    v, w = model.vision, execution.width
    attention = tuning.finetune_vision_layers and tuning.finetune_attention_modules
    mlp = tuning.finetune_vision_layers and tuning.finetune_mlp_modules
    lora = tuning.method == "lora"
    projections = 3 if v.gated else 2
    return (
        # A layer norm keeps its input as it is; an RMS norm (Qwen2.5-VL) a copy in float32.
        _kept("input", v.hidden, w, {_C, _S, _ES} | (set() if v.gated else {_E})),
        _kept("input and sum in float32, for their norms", 2 * v.hidden, 4, {_E} if v.gated else set()),
        _kept("input and sum normed, for the norms' weights", 2 * v.hidden, w, {_E} if v.gated and _norm_trains(tuning, w) else set()),
        _kept("input normed", v.hidden, w, {_E, _C} if attention else set()),
        _kept("queries, keys and values", 3 * v.hidden, w, _ALL),
        _kept("attention", v.hidden, w, _ALL),
        _kept("logsumexp of the scores", v.heads, 4, _ALL),
        *_grouped_copies(v.hidden, w, execution),
        _kept("sum after attention", v.hidden, w, {_C, _S, _ES} | (set() if v.gated else {_E})),
        _kept("sum normed", v.hidden, w, {_E, _C} if mlp else set()),
        _kept("x Aᵀ", ((2 if attention else 0) + (projections if mlp else 0)) * tuning.r if lora else 0, w, _ALL),
        _kept("products into the MLP", (projections - 1) * v.mlp, w, _ALL),
        _kept("activated", v.mlp, w, {_E} if v.gated else set()),
        _kept("product for the last", v.mlp, w, {_E, _C} if mlp else set()),
    )


def mergers(model: ModelShape, tuning: TuningSettings, execution: Execution) -> tuple[Kept, ...]:
    """The tensors kept of all mergers together, which always run uncompiled; a row is a patch."""
    v, w = model.vision, execution.width
    count = 1 + v.deepstack_levels
    return (
        _kept("input", count * v.hidden, 4 if v.gated else w, {_E}),
        _kept("input normed, for the norm's weight", count * v.hidden, w, {_E} if v.gated and _norm_trains(tuning, w) else set()),
        _kept("input normed, and around the activation", 3 * count * v.hidden, w, {_E}),
    )


def _norm_trains(tuning: TuningSettings, width: int) -> bool:
    """Whether an uncompiled RMS norm keeps its result before the weight: the weight trains, and that result is not the float32 one."""
    return tuning.method == "full" and width < 4


def _kept(name: str, numbers: float, bytes_each: int, ways: set[str], rows: Rows = "tokens") -> Kept:
    return Kept(name, numbers, bytes_each, frozenset(ways), rows)


def kept_bytes(tensors: Sequence[Kept], way: Way, *, rows: int, keys: int | None = None, outputs: int | None = None) -> int:
    """Bytes of what one layer keeps.

    Args:
        rows: tokens or patches.
        keys: that attention reads; None: as many as rows.
        outputs: rows of the second half of the layer; None: all.
    """
    count = {"tokens": rows, "keys": rows if keys is None else keys, "outputs": rows if outputs is None else outputs}
    return int(sum(tensor.bytes_a_row * count[tensor.rows] for tensor in tensors if way in tensor.ways))


def attention_gradient_bytes(queries: int, keys: int, pack: PackSizes, rows: int, execution: Execution, rows_per_segment: int) -> int:
    """Working memory of attention's backward pass: gradients of its operands, and those of the queries in float32 on the way.

    FlashAttention 2 rounds the float32 rows of each segment up.
    """
    gathered = pack.gathered_keys or rows
    repeated = queries if execution.repeats_keys else keys
    exact = 4 * queries * (rows + rows_per_segment * pack.segments)
    repeats = 2 * keys * gathered * execution.width if execution.repeats_keys else 0
    return exact + queries * rows * execution.width + 2 * repeated * gathered * execution.width + repeats


def mlp_backward_bytes(text: TextShape, rows: int, width: int, dequantised: int, *, float8: bool) -> int:
    """Working memory of an MLP's backward pass, computed operation by operation, beyond what is kept of it.

    The most of three moments: the product of `down`, with the gradient of what goes into it; the activation, with three gradients of the
    MLP's width as that of its result is still there and the result is gone; the products of gate and up, whose two gradients are there, and
    four kept tensors gone. What the products take besides, they take at their own moment.

    Args:
        width: bytes of a number.
        dequantised: bytes of a weight brought back to that precision for its product.
        float8: the products are computed in float8.
    """
    each = rows * text.mlp * width
    down, gate_and_up = each + dequantised, dequantised - 2 * each
    if float8:  # the gradient quantised, and the weight transposed
        down += text.hidden * (rows + text.mlp)
        gate_and_up += float8_gradient_bytes(text, rows)
    return max(down, 2 * each, gate_and_up)


def float8_gradient_bytes(text: TextShape, rows: int) -> int:
    """Gradients of gate and up (of experts: of the queries) quantised as one row, and their weights transposed."""
    return (text.queries if text.expert_layers else 2 * text.mlp) * (rows + text.hidden)
