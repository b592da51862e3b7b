"""The plain transformers forward, one conversation at a time: what everything faster is held against."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from finesight.data.conversation import Part, RowSource
from finesight.data.pack import pack_step
from finesight.data.sample import Sample, VisualItem
from finesight.geometry import Grid


@dataclass
class Builder:
    """Writes conversations of random text, images and videos straight as tokens, for a tiny model."""

    model: torch.nn.Module
    seed: int = 0

    def __post_init__(self) -> None:
        self.config = self.model.config
        self.rng = np.random.default_rng(self.seed)
        self.patches: dict[str, np.ndarray] = {}
        vision = self.config.vision_config
        self.patch_values = 3 * vision.temporal_patch_size * vision.patch_size**2
        self.timestamps = self.config.model_type != "qwen2_5_vl"

    def pixels_of(self, item: VisualItem) -> np.ndarray:
        if item.key not in self.patches:
            rng = np.random.default_rng(zlib.crc32(item.key.encode()))
            self.patches[item.key] = rng.standard_normal((item.grid.patches, self.patch_values)).astype(np.float32)
        return self.patches[item.key]

    def conversation(self, *pieces: tuple, weight: float = 1.0) -> Sample:
        """Pieces: ("text", ids), ("answer", ids), ("image", key, (h, w)), ("video", key, (t, h, w))."""
        ids: list[int] = []
        trained: list[bool] = []
        items: list[VisualItem] = []

        def write(tokens: Sequence[int], train: bool = False) -> None:
            ids.extend(int(t) for t in tokens)
            trained.extend([train] * len(tokens))

        c = self.config
        for kind, *content in pieces:
            if kind in ("text", "answer"):
                write(content[0], kind == "answer")
                continue
            key, size = content
            grid = Grid(1, *size) if kind == "image" else Grid(*size)
            pad = c.image_token_id if kind == "image" else c.video_token_id
            frames = grid.t if kind == "video" and self.timestamps else 1
            runs = []
            for frame in range(frames):
                if kind == "video" and self.timestamps:
                    write([60 + frame, 61])  # stands for "<1.5 seconds>"
                write([c.vision_start_token_id])
                runs.append((len(ids), grid.patches // 4 // frames))
                write([pad] * runs[-1][1])
                write([c.vision_end_token_id])
            items.append(VisualItem(kind, Part(kind), grid, 0, 0, tuple(runs), key))
        sample = Sample(np.array(ids), np.zeros((3, len(ids)), int), np.array(trained), tuple(items), 0, RowSource("parity", 0), weight)
        inputs = self.inputs(sample)
        positions, delta = self.model.model.get_rope_index(**{k: v for k, v in inputs.items() if not k.startswith("pixel")})
        return Sample(
            sample.token_ids, positions[:, 0].numpy(), sample.trained, sample.visual_items,
            int(delta.item()) + len(ids), sample.source, weight,
        )  # fmt: skip

    def words(self, count: int) -> np.ndarray:
        return self.rng.integers(64, 300, count)

    def inputs(self, sample: Sample) -> dict[str, torch.Tensor]:
        """Keyword arguments of the transformers forward."""
        ids = torch.from_numpy(sample.token_ids)[None]
        c = self.config
        kinds = (ids == c.image_token_id).int() + 2 * (ids == c.video_token_id).int()
        inputs: dict[str, torch.Tensor] = {"input_ids": ids, "mm_token_type_ids": kinds}
        for kind, pixels, grids in (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")):
            items = [i for i in sample.visual_items if i.kind == kind]
            if items:
                inputs[pixels] = torch.from_numpy(np.concatenate([self.pixels_of(i) for i in items])).to(self.model.dtype)
                inputs[grids] = torch.tensor([list(i.grid) for i in items])
        if c.model_type == "qwen2_5_vl" and "video_grid_thw" in inputs:
            inputs["second_per_grid_ts"] = torch.full((len(inputs["video_grid_thw"]),), 1.5)
        return inputs


def reference_loss(model: torch.nn.Module, builder: Builder, samples: Sequence[Sample]) -> torch.Tensor:
    """Token-mean loss over all samples, each through transformers' own forward by itself."""
    total, denominator = 0.0, sum(s.target_weight for s in samples)
    for sample in samples:
        logits = model(**builder.inputs(sample), use_cache=False).logits[0]
        targets = torch.from_numpy(np.flatnonzero(sample.trained))
        labels = torch.from_numpy(sample.token_ids)[targets]
        total = total + sample.weight * F.cross_entropy(logits[targets - 1], labels, reduction="sum")
    return total / denominator


def packed_loss(packed: torch.nn.Module, builder: Builder, samples: Sequence[Sample], *, token_budget: int, share: bool) -> torch.Tensor:
    """The same loss through packs and shared prefixes."""
    total, denominator = 0.0, sum(s.target_weight for s in samples)
    for plan in pack_step(samples, token_budget=token_budget, share=share):
        batch = plan.build(builder.pixels_of)
        total = total - (batch.weight.to(packed.base.dtype) * packed(batch)).sum()
    return total / denominator


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter's gradient; zeros where the loss does not reach it."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads, strict=True)}


def worst_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest per-tensor norm of the difference over the norm, and whose it is.

    A floor of 1e-4 of the largest gradient's norm keeps tensors whose true gradient is zero (the key bias of a softmax,
    say) from being judged by their rounding alone.
    """
    floor = 1e-4 * max(g.norm().item() for g in expected.values())
    errors = {n: (found[n] - e).norm().item() / max(e.norm().item(), floor) for n, e in expected.items()}
    name = max(errors, key=errors.__getitem__)
    return errors[name], name
