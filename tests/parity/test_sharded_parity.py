"""A model divided over two processes against the same one whole: loss and every gradient, packs of text and of images beside each other."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from finesight.data.batch import PackedBatch
from finesight.data.pack import pack_step
from finesight.families import FAMILIES
from finesight.models.adapters import apply_tuning
from finesight.models.packed import PackedModel
from finesight.models.sharding import gathered, own_part, shard
from finesight.recipe import TuningSettings
from tiny import tiny_model

from .reference import Builder, worst_error
from .test_packed_parity import BOUND, mixed

PROCESSES = 2
TOWER = {"finetune_vision_layers": True, "finetune_merger": True}
# Family, tuning, activation policy.
CASES = [
    ("qwen3_vl", {"method": "full", **TOWER}, "full"),
    ("qwen3_vl", {"r": 4, **TOWER}, "offload"),
    ("qwen2_5_vl", {"method": "full", **TOWER}, "selective"),
    ("qwen3_vl_moe", {"method": "full"}, "none"),
]


def tuned_model(family: str, tuning: dict) -> torch.nn.Module:
    model = apply_tuning(tiny_model(family), TuningSettings(**tuning), FAMILIES[family], seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # zero at first, where A would have no gradient
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def step_of(family: str) -> list[PackedBatch]:
    """Small packs, one of them of text alone; not as many as the processes could share evenly."""
    builder = Builder(tiny_model(family))
    plans = pack_step(mixed(builder)[4:], token_budget=20, share=True)
    batches = [plan.build(builder.pixels_of) for plan in plans]
    assert any(not batch.grids for batch in batches) and len(batches) % PROCESSES
    return batches


def loss_and_gradients(
    packed: PackedModel, batches: list[PackedBatch], weight: float, scale: int = 1
) -> tuple[float, dict[str, torch.Tensor]]:
    total = 0.0
    for batch in batches:
        loss = -(packed(batch) * batch.weight).sum() / weight
        (loss * scale).backward()
        total += loss.item()
    return total, {name: p.grad for name, p in packed.model.named_parameters() if p.grad is not None}


def compare(rank: int, family: str, tuning: dict, policy: str) -> None:
    batches = step_of(family)
    weight = sum(float(batch.weight.sum()) for batch in batches)
    expected_loss, expected = loss_and_gradients(PackedModel(tuned_model(family, tuning)).train(), batches, weight)
    packed = PackedModel(tuned_model(family, tuning), gradient_checkpointing=policy).train()
    shard(packed, torch.device("cpu"), PROCESSES)
    trains = [p for p in packed.model.parameters() if p.requires_grad]
    held = sum(own_part(p).numel() for p in trains)
    assert held <= 0.52 * sum(p.numel() for p in trains), "a process holds more than its part"
    mine = batches[rank::PROCESSES]
    mine += [batches[0].without_weight()] * (math.ceil(len(batches) / PROCESSES) - len(mine))
    # FSDP2 averages over processes, whose parts of the loss add up.
    own_loss, parts = loss_and_gradients(packed, mine, weight, scale=PROCESSES)
    loss = torch.tensor(own_loss, dtype=torch.float64)
    distributed.all_reduce(loss)
    found = gathered(parts, keep=True)
    assert found.keys() == expected.keys()
    error, name = worst_error(found, expected)
    if rank == 0:
        print(f"{family} {tuning} {policy}: loss {abs(loss.item() - expected_loss) / expected_loss:.1e}, gradient {error:.1e} ({name})")
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    assert error < BOUND, f"{family} {tuning} {policy}, {name}: {error:.1e}"


def _process(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES)
    for case in CASES:
        compare(rank, *case)
    distributed.destroy_process_group()


def test_loss_and_every_gradient_of_a_divided_model(tmp_path: Path) -> None:
    multiprocessing.spawn(_process, (str(tmp_path / "meeting"),), nprocs=PROCESSES)
