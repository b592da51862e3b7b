"""Bytes of one GPU of several that share a model (`training.sharding: full`, see `models/sharding.py`).

Weights, gradients and optimizer state of n GPUs take an n-th on each. Besides, a unit (a decoder layer, a tower block, the
embedding, `lm_head`) is there in whole while it is used. FSDP2 gathers it into one buffer, copies that out into the unit's
weights and holds it until the buffer of the next unit, asked for ahead, has arrived. Whole gradients of a unit are copied
into a float32 buffer to be summed over GPUs, which is held until the next unit's is on its way. What belongs to no unit (the
root: norms, trained mergers, a matrix that embedding and `lm_head` share) is whole from the beginning to the end of a pass.
Counted from the code of torch 2.13, not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from finesight.planner.shapes import ModelShape, Parameter, Part, parameters
from finesight.planner.weights import BYTES, Precision, Trainable, trainables
from finesight.recipe import Recipe

Unit = Literal["layer", "block", "embedding", "lm_head", "root"]
# Whose gradients are complete only at the end of a pass.
SUMMED_LAST: tuple[Unit, ...] = ("embedding", "root")
# Of a unit, while one of its kind is computed: its weights, the buffer they came in, and the buffer of the next.
GATHERED_COPIES = 3
# Buffers of gradients that are being summed over GPUs, and the bytes of a number in them.
BUFFERS_IN_FLIGHT, SUMMED_BYTES = 2, 4


@dataclass(frozen=True)
class Sharding:
    """How a model is divided.

    Attributes:
        shards: GPUs that share it; 1: each has all of it.
        weights: bytes of one unit of each kind, adapters included.
        gradients: of one unit, as its backward pass leaves them.
        summed: the same in the precision in which they are summed.
        whole: parts that stay whole.
    """

    shards: int
    weights: Mapping[Unit, int]
    gradients: Mapping[Unit, int]
    summed: Mapping[Unit, int]
    whole: frozenset[Part]

    @staticmethod
    def of(model: ModelShape, recipe: Recipe, precision: Precision, processes: int) -> Sharding:
        """That of a recipe on so many GPUs."""
        tuning = recipe.tuning
        whole: frozenset[Part] = frozenset() if tuning.finetune_vision_layers or tuning.finetune_merger else frozenset({"tower", "merger"})
        counts = _unit_counts(model)
        weights, gradients, summed = (dict.fromkeys(counts, 0) for _ in range(3))
        for p in parameters(model):
            if p.part not in whole:
                unit = _unit_of(p, model)
                weights[unit] += p.total * BYTES[precision] // counts[unit]
        for x in trainables(model, tuning, precision):
            unit = _unit_of(x, model)
            numbers = x.total // counts[unit]
            weights[unit] += numbers * x.width if x.adapter else 0
            gradients[unit] += numbers * x.width
            summed[unit] += numbers * SUMMED_BYTES
        return Sharding(processes if recipe.training.sharding == "full" else 1, weights, gradients, summed, whole)

    def at_rest(self, part: Part, size: int) -> int:
        """Bytes of a part's weights between passes."""
        return size if part in self.whole else size // self.shards

    def while_used(self, unit: Unit, *, forward: bool = False) -> dict[str, int]:
        """What is gathered while units of a kind are computed, and what of their gradients is on its way to be summed.

        Args:
            forward: in a forward pass, where there are no gradients.
        """
        if self.shards == 1:
            return {}
        w, g, s = self.weights, self.gradients, self.summed
        gathered = (
            w["root"]
            + {
                "layer": GATHERED_COPIES * w["layer"],
                "block": GATHERED_COPIES * w["block"],
                "lm_head": 2 * w["lm_head"] + w["layer"],
                "embedding": 2 * w["embedding"] + w["layer"],
                "root": w["layer"],
            }[unit]
        )
        # When the last layer's are complete, lm_head's buffer may still be there.
        flying = {
            "layer": g["layer"] + BUFFERS_IN_FLIGHT * s["layer"],
            "block": g["block"] + BUFFERS_IN_FLIGHT * s["block"],
            "lm_head": g["layer"] + s["layer"] + s["lm_head"],
            "embedding": g["embedding"] + s["embedding"] + s["layer"],
            "root": s["root"] + s["layer"],
        }[unit]
        return {"gathered weights": gathered, **({} if forward else {"gradients on their way": flying})}

    def gradients_of(self, total: int, *, root_is_there: bool) -> int:
        """Bytes of gradients at the end of a pass, of `total` in all: an n-th, but for those of the root until they are summed."""
        if self.shards == 1:
            return total
        root = self.gradients["root"] if root_is_there else 0
        return (total - root) // self.shards + root


def _unit_counts(model: ModelShape) -> dict[Unit, int]:
    return {"layer": model.text.layers, "block": model.vision.depth, "embedding": 1, "lm_head": 1, "root": 1}


def _unit_of(x: Parameter | Trainable, model: ModelShape) -> Unit:
    if ".layers." in x.name:
        return "layer"
    if ".blocks." in x.name:
        return "block"
    if x.part == "embeddings" and not model.text.tied:
        return "embedding"
    return "lm_head" if x.part == "lm_head" else "root"
