"""The plan: bytes by part at each moment of a step, the largest of which is the peak.

A step goes through few moments at which memory can be at its peak: the tower's forward pass, the log-probabilities of the
targets (everything is kept by then), the backward pass of the last layer, of a layer at the top and of one at the bottom (kept
tensors go, gradients come), the tower's backward pass, and the update. The bytes of each are summed here; a rollout adds
moments of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from finesight.planner import calibration as measured
from finesight.planner.activations import (
    Execution,
    Way,
    attention_gradient_bytes,
    decoder_layer,
    float8_gradient_bytes,
    kept_bytes,
    mergers,
    mlp_backward_bytes,
    second_half,
    tower_block,
)
from finesight.planner.moments import MemoryPlan, Moment, Policy
from finesight.planner.rollouts import rollout_bytes
from finesight.planner.shapes import ModelShape, Part
from finesight.planner.sharding import SUMMED_LAST, Sharding
from finesight.planner.sizes import PackSizes, RolloutSizes, RunSizes
from finesight.planner.weights import BYTES, Precision, TrainingBytes, largest_dequantised_bytes, training_bytes, weight_bytes
from finesight.recipe import Recipe

WEIGHT_LABELS: dict[Part, str] = {
    "language_model": "language model",
    "embeddings": "embeddings",
    "lm_head": "lm_head",
    "tower": "vision tower",
    "merger": "merger",
}


def policy_of(recipe: Recipe) -> Policy | None:
    """The activation policy that a recipe names; None: auto."""
    asked = recipe.training.gradient_checkpointing
    if asked == "auto":
        return None
    return {True: "full", False: "none"}[asked] if isinstance(asked, bool) else asked  # type: ignore[return-value]


def plan_memory(
    model: ModelShape,
    recipe: Recipe,
    sizes: RunSizes,
    *,
    policy: Policy | None = None,
    execution: Execution | None = None,
    precision: Precision = "bfloat16",
    processes: int = 1,
    rollout: RolloutSizes | None = None,
) -> MemoryPlan:
    """Plans the memory of one device.

    Args:
        policy: of activations; None: the recipe's, full where that is auto.
        execution: None: compiled, in this precision.
        processes: GPUs that train side by side. Each has the whole model, and gradients pass through buckets; or, as
            `training.sharding` says, weights, gradients and optimizer state are divided over them.
        rollout: answers that are sampled between updates; None: as the sizes say.
    """
    execution = execution or Execution()
    execution = replace(execution, width=BYTES[precision])
    chosen = policy or policy_of(recipe) or "full"
    builder = _Moments(model, recipe, sizes, chosen, execution, precision, processes)
    moments = [moment for pack in _candidates(sizes) for moment in builder.of_pack(pack)]
    moments.append(builder.update())
    rollout = rollout or sizes.rollout
    if rollout is not None:
        sampling = rollout_bytes(model, rollout, execution.width)
        moments += [Moment(f"rollout: {name}", {**builder.resident, **parts}) for name, parts in sampling.items()]
    return MemoryPlan(model, recipe, chosen, execution, precision, sizes, tuple(moments), processes)


def _candidates(sizes: RunSizes) -> list[PackSizes]:
    """The packs of which one is the largest in some way; the others need not be looked at."""
    packs = sizes.packs
    chosen = {max(packs, key=measure) for measure in (lambda p: (p.tokens, p.targets), lambda p: p.total_patches, lambda p: p.targets)}
    branched = [pack for pack in packs if pack.gathered_keys]
    if branched:
        chosen.add(max(branched, key=lambda p: p.gathered_keys + p.tokens))
    return sorted(chosen, key=lambda p: (p.tokens, p.total_patches, p.targets))


class _Moments:
    """Builds the moments of a step."""

    def __init__(
        self,
        model: ModelShape,
        recipe: Recipe,
        sizes: RunSizes,
        policy: Policy,
        execution: Execution,
        precision: Precision,
        processes: int,
    ) -> None:
        self.model, self.recipe, self.sizes, self.policy, self.execution = model, recipe, sizes, policy, execution
        self.sharding = Sharding.of(model, recipe, precision, processes)
        self.training: TrainingBytes = training_bytes(model, recipe, precision)
        self.weights = weight_bytes(model, recipe.model, precision)
        self.dequantised = largest_dequantised_bytes(model, recipe.model, precision)
        tuning = recipe.tuning
        self.tower_trains = tuning.finetune_vision_layers or tuning.finetune_merger
        chunked = recipe.training.mlp_chunk_tokens is not None
        self.layer = decoder_layer(model, tuning, execution, chunked=chunked)
        self.expert_layer = decoder_layer(model, tuning, execution, experts=True) if model.text.expert_layers else None
        # Layers that keep everything are compiled or not; the last one never is.
        self.everything: Way = "compiled" if execution.compiled else "eager"
        self.products: Way = "selective" if execution.compiled else "eager_selective"
        self.releases = recipe.training.gradient_release and sizes.most_packs == 1
        self.buckets = self.training.gradients if processes > 1 and self.sharding.shards == 1 else 0
        self.resident = self._resident()

    def _resident(self) -> dict[str, int]:
        """What stays on the device all the time."""
        t, n = self.training, self.sharding.shards
        parts = {f"weights: {WEIGHT_LABELS[part]}": self.sharding.at_rest(part, size) for part, size in self.weights.items()}
        parts |= {
            "adapters": t.adapters // n,
            "float32 copies of weights": t.masters // n,
            "optimizer state": t.state // n,
            "gradient buckets": self.buckets,
            "workspaces": measured.WORKSPACE_BYTES,
        }
        return {name: size for name, size in parts.items() if size}

    # --- one pack -----------------------------------------------------------------------------------------------

    def of_pack(self, pack: PackSizes) -> Iterator[Moment]:
        """The moments of a pack's forward and backward pass, as the first of a step or as a later one, whichever takes more."""
        if self.execution.compiled:
            pack = replace(pack, tokens=_up(pack.tokens, measured.STEADY_TOKENS), segments=_up(pack.segments, measured.STEADY_SEGMENTS))
        packs = self.sizes.most_packs
        # The last pack of a step has none moved ahead beside it: the next step's first one follows its backward pass.
        situations = [list(self._of_pack(pack, ahead=min(packs - 1, measured.PACKS_AHEAD), before=0))]
        if packs > 1:
            ahead = min(packs - 2, measured.PACKS_AHEAD)
            situations.append(list(self._of_pack(pack, ahead=ahead, before=self._gradients_at_rest())))
        for same in zip(*situations, strict=True):
            yield max(same, key=lambda moment: moment.total)

    def _of_pack(self, pack: PackSizes, *, ahead: int, before: int) -> Iterator[Moment]:
        """The moments of a pack.

        Args:
            ahead: packs that were moved to the device before their time.
            before: bytes of gradients that earlier packs of the step left.
        """
        layers, tower, own = self.model.text.layers, self._tower_kept(pack), self._pack_bytes(pack)
        base = {**self.resident, "packs": own, **({"packs moved ahead": ahead * own} if ahead else {})}
        if pack.patches:
            gathered = self.sharding.while_used("block", forward=True)
            yield Moment(
                "tower, forward", {**base, **gathered, "gradients": before, "activations: tower": tower + self._tower_forward(pack)}
            )
        kept, last = self._kept_of_others(pack), self._last_layer(pack)
        rotary = 2 * pack.tokens * self.model.text.head_size * self.execution.width
        shared = {**base, "activations: tower": tower}
        text = {**shared, "activations: language model": kept + last + rotary}
        features = 0 if self.tower_trains else self._features(pack)
        last_forward = {"gradients": before, "visual features": features, "working memory": self._forward_working(pack)}
        yield Moment("forward, last layer", {**text, **self.sharding.while_used("layer", forward=True), **last_forward})
        at_head = {**text, "gradients": before}
        yield Moment(
            "log-probabilities", {**at_head, **self.sharding.while_used("lm_head", forward=True), "working memory": self._logprobs(pack)}
        )
        yield Moment(
            "backward, last layer", {**at_head, **self.sharding.while_used("lm_head"), "working memory": self._last_backward(pack)}
        )
        if self.recipe.training.gradient_release and self._head_trains_alone():
            # In a step's last pack; the head is the first weight whose gradient is complete.
            released = {"gradients": max(before, self.training.largest_gradient), "working memory": self.training.step}
            yield Moment("update of the head, backward", {**text, **released})
        one, working = self._layer_again(pack), self._layer_backward(pack)
        top, bottom = self._gradients_at_top(before), self._gradients_in_full(before)
        if layers > 1:
            layer = {**shared, **self.sharding.while_used("layer"), "working memory": working}
            yield Moment("backward, upper layer", {**layer, "activations: language model": kept + one + rotary, "gradients": top})
            lowest = self._kept_of_one(pack) + one + rotary
            yield Moment("backward, lowest layer", {**layer, "activations: language model": lowest, "gradients": bottom})
        if self.tower_trains and pack.patches:
            block = {**shared, **self.sharding.while_used("block")}
            yield Moment("backward, tower", {**block, "gradients": bottom, "working memory": self._tower_backward(pack)})
        if self.sharding.shards > 1:
            for unit in SUMMED_LAST:
                yield Moment(f"gradients of the {unit}", {**base, **self.sharding.while_used(unit), "gradients": bottom})

    def _pack_bytes(self, pack: PackSizes) -> int:
        """Bytes of a pack on the device."""
        v = self.model.vision
        patch = v.patch_values * self.execution.patch_bytes + 2 * 8 + (4 * 12 if v.positions else 0)
        return (
            pack.total_patches * patch
            + pack.tokens * (8 + 3 * 8)
            + 28 * pack.targets
            + 16 * pack.visual_tokens(self.model)
            + (12 * pack.gathered_keys + 4 * pack.tokens if pack.gathered_keys else 0)  # their index and its inverse
        )

    def _features(self, pack: PackSizes) -> int:
        v = self.model.vision
        return pack.visual_tokens(self.model) * v.merged_hidden * (1 + v.deepstack_levels) * self.execution.width

    # --- the tower ----------------------------------------------------------------------------------------------

    def _tower_kept(self, pack: PackSizes) -> int:
        """Kept of the tower where it trains; features are part of it."""
        if not self.tower_trains or not pack.patches:
            return 0
        v, rows = self.model.vision, pack.total_patches
        if self.policy in ("full", "offload"):
            blocks = (v.depth if self.policy == "full" else measured.OFFLOADED_INPUTS_ON_DEVICE) * rows * v.hidden * self.execution.width
        else:
            way = self.everything if self.policy == "none" else self.products
            blocks = v.depth * kept_bytes(tower_block(self.model, self.recipe.tuning, self.execution), way, rows=rows)
        embedded = rows * v.patch_values * self.execution.width if self.recipe.tuning.method == "full" else 0
        rotary = 2 * rows * (v.hidden // v.heads) * 4
        return (
            blocks
            + embedded
            + rotary
            + kept_bytes(mergers(self.model, self.recipe.tuning, self.execution), "eager", rows=rows)
            + self._features(pack)
        )

    def _tower_forward(self, pack: PackSizes) -> int:
        """Working memory of the tower's forward pass: its embedding, or one block with what earlier blocks left."""
        v, w, rows = self.model.vision, self.execution.width, pack.total_patches
        # Four learned positions of each patch, in the base's precision and weighed in float32.
        cast = v.patch_values * w if self.execution.patch_bytes != w else 0
        embedding = rows * (cast + (4 * v.hidden * (w + 4) if v.positions else 0) + v.hidden * w)
        if self.execution.compiled:
            mlp, hidden = measured.TOWER_FORWARD_COMPILED
            block = mlp * v.mlp + hidden * v.hidden
        else:
            block = max(measured.TOWER_FORWARD_EAGER_ROWS * v.hidden, 2 * v.mlp + 2.5 * v.hidden)
        levels = 0 if self.tower_trains else self._features(pack)
        rotary = 2 * rows * (v.hidden // v.heads) * 4
        return max(embedding, int(rows * (block + v.hidden) * w) + rotary + levels)

    def _tower_backward(self, pack: PackSizes) -> int:
        v, w, rows = self.model.vision, self.execution.width, pack.total_patches
        mlp, hidden = measured.TOWER_BACKWARD
        again = kept_bytes(tower_block(self.model, self.recipe.tuning, self.execution), self.everything, rows=rows)
        recomputed = again if self.policy in ("full", "offload") else 0
        return recomputed + int(rows * (mlp * v.mlp + hidden * v.hidden) * w)

    # --- the language model -------------------------------------------------------------------------------------

    def _layer_kept(self, way: Way, pack: PackSizes, *, experts: bool, outputs: int | None = None) -> int:
        table = self.expert_layer if experts and self.expert_layer is not None else self.layer
        return kept_bytes(table, way, rows=pack.tokens, keys=pack.gathered_keys or None, outputs=outputs)

    def _kept_by_policy(self, pack: PackSizes, experts: bool) -> int:
        """Kept of one layer below the last until its backward pass."""
        if self.policy in ("full", "offload"):
            return pack.tokens * self.model.text.hidden * self.execution.width
        return self._layer_kept(self.everything if self.policy == "none" else self.products, pack, experts=experts)

    def _kept_of_others(self, pack: PackSizes) -> int:
        """Kept of all layers but the last."""
        t = self.model.text
        if self.policy == "offload":
            return min(t.layers - 1, measured.OFFLOADED_INPUTS_ON_DEVICE) * self._kept_by_policy(pack, False)
        experts = max(t.expert_layers - 1, 0)
        dense = t.layers - 1 - experts
        return dense * self._kept_by_policy(pack, False) + (experts * self._kept_by_policy(pack, True) if experts else 0)

    def _kept_of_one(self, pack: PackSizes) -> int:
        return self._kept_by_policy(pack, self.expert_layer is not None)

    def _last_layer(self, pack: PackSizes) -> int:
        """Of the last layer, which runs uncompiled and only where a target is predicted from, and of the final norm."""
        rows, t, w = min(pack.targets, pack.tokens), self.model.text, self.execution.width
        # The final norm's input in float32, and its result.
        norm = rows * t.hidden * (4 + w)
        if self.policy in ("full", "offload"):
            return norm + pack.tokens * t.hidden * w
        read = rows * t.queries * w  # of attention's result, for o
        return norm + read + self._layer_kept("eager", pack, experts=self.expert_layer is not None, outputs=rows)

    def _layer_again(self, pack: PackSizes) -> int:
        """What computing one layer again brings back beyond what was kept of it."""
        if self.policy == "none" or (self.policy == "selective" and self.execution.compiled):
            return 0
        experts = self.expert_layer is not None
        if self.policy == "selective":
            return max(0, self._layer_kept("eager", pack, experts=experts) - self._layer_kept("eager_selective", pack, experts=experts))
        return self._layer_kept(self.everything, pack, experts=experts)

    def _mlp_width(self) -> float:
        """Numbers of a row in the widest part of the MLP."""
        t = self.model.text
        if not t.expert_layers:
            return t.mlp
        return t.experts_per_token * (t.expert_mlp + t.hidden)

    def _layer_backward(self, pack: PackSizes) -> int:
        """Working memory of one layer's backward pass beyond what is kept of the layer."""
        t, w = self.model.text, self.execution.width
        rows, again = pack.tokens, 0
        chunk = self.recipe.training.mlp_chunk_tokens
        chunked = chunk is not None and chunk < rows and self.expert_layer is None  # experts are never computed in chunks
        if chunk is not None and chunked:
            rows = chunk
            again = kept_bytes(second_half(self.model, self.recipe.tuning, self.execution), self.everything, rows=rows)
        attention = attention_gradient_bytes(t.queries, t.keys, pack, pack.tokens, self.execution, measured.ATTENTION_ROWS_PER_SEGMENT)
        float8 = self.recipe.model.quantization == "fp8"
        if not self.execution.compiled and self.expert_layer is None:
            # Operation by operation, and each lets go of what was kept for it: of the layer's second half nothing is left by the time of
            # attention.
            if not chunked:
                attention -= kept_bytes(second_half(self.model, self.recipe.tuning, self.execution), "eager", rows=rows)
            outside = again + pack.tokens * t.hidden * w  # with the gradient of the layer's output
            return max(outside + mlp_backward_bytes(t, rows, w, self.dequantised, float8=float8), attention)
        # One function goes backward through the whole layer, and what is kept of it stays to the end. Layers of experts too are counted so.
        by_policy = measured.BACKWARD_SELECTIVE if self.policy == "selective" else measured.BACKWARD_COMPILED
        mlp, hidden = by_policy if self.execution.compiled else measured.BACKWARD_EAGER
        through_mlp = again + int(rows * mlp * self._mlp_width() * w + pack.tokens * hidden * t.hidden * w)
        return max(through_mlp + (float8_gradient_bytes(t, rows) if float8 else 0), attention) + self.dequantised

    def _forward_working(self, pack: PackSizes) -> int:
        """Working memory of a layer's forward pass: base products are held in float32 until the adapter's part is added.

        The last layer computes its MLP for few rows only; where layers keep no more than their input, one below it is
        larger: gate and up, and the float32 product of one of them.
        """
        t, w, rows = self.model.text, self.execution.width, pack.tokens
        if self.policy in ("none", "selective"):
            return t.queries * rows * (4 + w) + self.dequantised
        return int(rows * self._mlp_width() * (4 + 2 * w)) + self.dequantised

    def _last_backward(self, pack: PackSizes) -> int:
        """Working memory of the last layer's backward pass: attention of all tokens, the rest of few rows."""
        t, w = self.model.text, self.execution.width
        rows = min(pack.targets, pack.tokens)
        mlp, hidden = measured.BACKWARD_EAGER
        through_mlp = int(rows * (mlp * self._mlp_width() + hidden * t.hidden) * w)
        attention = attention_gradient_bytes(t.queries, t.keys, pack, pack.tokens, self.execution, measured.ATTENTION_ROWS_PER_SEGMENT)
        again = 0
        if self.policy in ("full", "offload"):
            again = self._layer_kept("eager", pack, experts=self.expert_layer is not None, outputs=rows)
        return again + max(through_mlp + self.dequantised, attention)

    def _logprobs(self, pack: PackSizes) -> int:
        """Working memory of the targets' log-probabilities, as `models/logprobs.py` computes them without kernels.

        Logits, their difference to the logsumexp and its exponential, in float32; from the second chunk on, beside them
        the gradient of the chunk before. With kernels it is less, one chunk in the precision of the product: not counted, since
        what was measured to compare with (bench/results/memory.json) is from before there were any.
        """
        t, w = self.model.text, self.execution.width
        rows = min(pack.targets, measured.CHUNK_TARGETS)
        chunks = 3 * 4 + (w if pack.targets > measured.CHUNK_TARGETS else 0)
        working = rows * t.vocabulary * chunks
        if self.recipe.model.quantize_vocabulary:  # a block of the matrix in float32 and rounded
            working = max(working, rows * t.vocabulary * 4 * 2 + measured.VOCABULARY_BLOCK_TOKENS * t.hidden * (4 + w))
        tuning = self.recipe.tuning
        if tuning.method == "full" and tuning.finetune_language_layers:  # the vocabulary matrix's gradient, added up in float32
            working += t.vocabulary * t.hidden * (4 + w)
        return working

    # --- gradients and the update -------------------------------------------------------------------------------

    def _gradients_at_rest(self) -> int:
        """All gradients between two packs."""
        t = self.training
        return self.sharding.gradients_of(t.collected or t.gradients, root_is_there=False)

    def _gradients_at_top(self, before: int) -> int:
        """As the backward pass leaves the uppermost layers: the vocabulary matrix's gradient, where it trains, is there."""
        if self.releases or self.recipe.tuning.method != "full" or not self.recipe.tuning.finetune_language_layers:
            return before
        t = self.model.text
        size = t.vocabulary * t.hidden * self.execution.width
        return before + (size if t.tied else size // self.sharding.shards)

    def _gradients_in_full(self, before: int) -> int:
        """At the end of the backward pass: this pack's, beside those collected before."""
        if self.releases:  # in the only backward pass of the step; with several packs only the last one can
            return self.training.largest_gradient
        left = before if self.training.collected else 0
        return self.sharding.gradients_of(self.training.gradients, root_is_there=True) + left

    def _head_trains_alone(self) -> bool:
        """Whether the vocabulary matrix of the logits trains, and is not the embedding's too."""
        return self.recipe.tuning.method == "full" and self.recipe.tuning.finetune_language_layers and "lm_head" in self.weights

    def update(self) -> Moment:
        """The optimizer's step; the first pack of the next step is moved meanwhile."""
        gradients = self.training.largest_gradient if self.recipe.training.gradient_release else self._gradients_at_rest()
        ahead = max(self._pack_bytes(pack) for pack in self.sizes.packs)
        parts = {"packs moved ahead": ahead, "gradients": gradients, "working memory": self.training.step}
        return Moment("update", {**self.resident, **parts})


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
