"""How exact the fast path is in bfloat16: losses and gradients against float32, beside transformers' own. One line of JSON.

    python -m bench.exactness --model qwen3-vl-8b --kind chart --per-image 2 --samples 8 --compile

Reference: transformers' own forward in float32 on the same (bfloat16) weights, one sample at a time. Beside it stand the same
forward in bfloat16, as trainers run it (autocast) and without autocast, and ours: packed, shared, and compiled where asked.
Gradients are those of the adapters, B drawn at random so that none is zero; their error is the norm of the difference of all of
them together over the norm of the reference.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from bench import models, workload
from bench.checkpoint import write_processor
from bench.encoding import encode
from bench.rows import Row, emit, failed, significant
from finesight.data.layout import TowerShape
from finesight.data.pack import pack_step
from finesight.data.pixels import visual_patches
from finesight.data.processor import Processor, load_processor
from finesight.data.sample import Sample
from finesight.models.adapters import apply_tuning
from finesight.models.compilation import STEADY_TOKENS
from finesight.models.packed import PackedModel
from finesight.recipe import TuningSettings

Gradients = dict[str, torch.Tensor]
B_STD = 1e-3  # of the adapters' second matrix: a trained adapter's size


def plain_inputs(sample: Sample, processor: Processor, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Keyword arguments of the transformers forward of one conversation with images."""
    ids = torch.from_numpy(sample.token_ids)[None].to(device)
    patches = torch.from_numpy(np.concatenate([visual_patches(item, processor) for item in sample.visual_items]))
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == processor.image_token_id).int(),
        "pixel_values": patches.to(device, dtype),
        "image_grid_thw": torch.tensor([list(item.grid) for item in sample.visual_items], device=device),
    }


def plain(model: Any, samples: Sequence[Sample], processor: Processor, device: str, *, autocast: bool = False) -> tuple[float, Gradients]:
    """Loss over all supervised tokens, and gradients, through transformers' own forward, one sample at a time."""
    denominator = sum(sample.target_weight for sample in samples)
    total = 0.0
    for sample in samples:
        with torch.autocast(device, dtype=torch.bfloat16) if autocast else nullcontext():
            logits = model(**plain_inputs(sample, processor, device, model.dtype), use_cache=False).logits[0]
        places = torch.from_numpy(np.flatnonzero(sample.trained)).to(device)
        labels = torch.from_numpy(sample.token_ids).to(device)[places]
        loss = F.cross_entropy(logits[places - 1].float(), labels, reduction="sum") / denominator
        loss.backward()
        total += loss.item()
    return total, _taken(model)


def packed(
    model: Any, samples: Sequence[Sample], processor: Processor, device: str, *, budget: int, compiled: bool, activations: str
) -> tuple[float, Gradients]:
    """The same through packs, with what samples have in common computed once."""
    ours = PackedModel(model, gradient_checkpointing=activations, compile_layers=compiled)
    tower = TowerShape.of(ours.base.model.visual.config)
    denominator = sum(sample.target_weight for sample in samples)
    total = 0.0
    for plan in pack_step(samples, token_budget=budget, share=True):
        length = -(-plan.num_tokens // STEADY_TOKENS) * STEADY_TOKENS if compiled else None
        batch = plan.build(lambda item: visual_patches(item, processor), tower=tower, length=length).to(device)
        loss = -(ours(batch) * batch.weight).sum() / denominator
        loss.backward()
        total += loss.item()
    return total, _taken(model)


def _taken(model: Any) -> Gradients:
    """The adapters' gradients, in float32, removed from the model."""
    taken = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            taken[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().float()
            parameter.grad = None
    return taken


def error(found: Gradients, reference: Gradients) -> float:
    """Norm of the difference of all gradients over the norm of the reference."""
    squares = [((found[name] - exact).double().square().sum(), exact.double().square().sum()) for name, exact in reference.items()]
    return float((sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5)


def worst_cosine(found: Gradients, reference: Gradients) -> tuple[float, str]:
    """The least cosine between the gradients of one matrix, and whose it is."""
    cosines = {
        name: float(F.cosine_similarity(found[name].flatten().double(), exact.flatten().double(), dim=0))
        for name, exact in reference.items()
    }
    name = min(cosines, key=cosines.__getitem__)
    return cosines[name], name


def measure(a: argparse.Namespace, folder: Path) -> Row:
    """All paths over the same samples and weights."""
    checkpoint = a.checkpoint or write_processor(a.model, folder, a.bpe)
    processor = load_processor(checkpoint)
    samples = encode(workload.rows(a.kind, a.samples, per_image=a.per_image), a.kind, checkpoint)
    dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
    model: Any = apply_tuning(
        models.build(a.model, device=a.device, layers=a.layers, dtype=dtype), TuningSettings(), processor.family, a.seed
    )
    generator = torch.Generator(a.device).manual_seed(a.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, B_STD, generator=generator)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    losses, errors, cosines = {}, {}, {}
    exact_model = copy.deepcopy(model).float()
    losses["plain_float32"], exact = plain(exact_model, samples, processor, a.device)
    del exact_model
    paths = {"plain": {}, **({"plain_autocast": {"autocast": True}} if a.device == "cuda" else {})}
    for name, options in paths.items():
        losses[name], gradients = plain(model, samples, processor, a.device, **options)
        errors[name], cosines[name] = error(gradients, exact), worst_cosine(gradients, exact)
    losses["ours"], gradients = packed(model, samples, processor, a.device, budget=a.budget, compiled=a.compile, activations=a.activations)
    errors["ours"], cosines["ours"] = error(gradients, exact), worst_cosine(gradients, exact)
    return {
        "losses": {name: round(loss, 7) for name, loss in losses.items()},
        "gradient_errors": {name: significant(value) for name, value in errors.items()},
        "worst_cosines": {name: [round(cosine, 7), where] for name, (cosine, where) in cosines.items()},
        "loss_off_plain": significant(abs(losses["ours"] / losses["plain_autocast" if a.device == "cuda" else "plain"] - 1), 3),
        "tokens": sum(len(sample) for sample in samples),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-vl-8b", choices=models.NAMES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--kind", default="chart", choices=workload.KINDS)
    parser.add_argument("--per-image", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--budget", type=int, default=8192)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--activations", default="none", choices=("none", "selective", "full", "offload"))
    parser.add_argument("--seed", type=int, default=3407)
    parser.add_argument("--checkpoint", type=Path, help="folder with the processor's files; else made anew")
    parser.add_argument("--bpe", type=Path, help="the file qwen.tiktoken, where there is no --checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(arguments)
    row = {
        "row": "exactness", "model": a.model, "layers": a.layers, "kind": a.kind, "per_image": a.per_image, "samples": a.samples,
        "token_budget": a.budget, "compiled": a.compile, "recompute": a.activations,
    }  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix="finesight-bench-") as folder:
            emit({**row, **measure(a, Path(folder))})
    except Exception as problem:  # one setting of many: the others go on
        emit(failed(row, problem))


if __name__ == "__main__":
    main()
