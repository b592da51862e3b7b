"""One forward and backward pass of the largest pack, measured: how far the plan is off on this very machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finesight.errors import PlanError, TrainingError
from finesight.planner.fit import corrected
from finesight.planner.moments import MemoryPlan
from finesight.planner.text import gib
from finesight.training.planning import available_bytes, largest_pack
from finesight.training.run_sizes import SURVEYED_STEPS

if TYPE_CHECKING:
    from finesight.training.session import Session


def probe_memory(session: Session, *, force: bool = False) -> MemoryPlan:
    """Computes the largest pack of the run without changing anything, and corrects the session's plan by the difference.

    Twice, since compiling takes memory of its own the first time. There is no update, so that the run is the same as
    without a probe: the optimizer's state, which is not there yet, is counted as planned.

    Raises:
        PlanError: there is no GPU or no plan, or the corrected plan does not fit (and `force` is not set).
        TrainingError: the GPU is out of memory.
    """
    device, plan = session.accelerator.device, session.memory
    if device.type != "cuda" or plan is None:
        raise PlanError("--probe measures GPU memory, and this run has no GPU or no plan of it. Leave --probe out.")
    feed = session.prepared.feed(tower=session.packed.tower_shape, steady_tokens=session.steady_tokens)
    pack = largest_pack([pack for step in session.prepared.schedule().survey(SURVEYED_STEPS) for pack in step.plans])
    batch = feed.build_pack(pack).to(device)
    cache, session.packed.feature_cache = session.packed.feature_cache, None  # features of a probe are not kept
    session.packed.train()
    try:
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats(device)
            logprobs = session.packed(batch)
            (-(logprobs * batch.weight).sum() / batch.weight.sum()).backward()
            session.optimizer.collect_gradients()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        raise TrainingError(f"The probe of the largest pack ran out of GPU memory: {error}. The plan was {gib(plan.peak_bytes)}.") from None
    finally:
        session.optimizer.zero_grad()
        session.packed.feature_cache = cache
    # What a step has besides: state of the optimizer, and the pack that is moved ahead.
    besides = plan.peak.parts.get("optimizer state", 0)
    ahead = plan.peak.parts.get("packs moved ahead", 0)
    measured = torch.cuda.max_memory_allocated(device) + besides + ahead
    session.memory = result = corrected(plan, measured)
    session.tell(
        f"Probe of the largest pack ({pack.num_tokens:,} tokens): peak {gib(measured)} measured, {gib(plan.peak_bytes)} planned "
        f"({plan.peak_bytes / measured - 1:+.1%}); needed with context and slack: {gib(result.needed_bytes)}"
    )
    room = available_bytes(device)
    if not force and not result.fits(room):
        raise PlanError(
            f"Corrected by the probe, the run needs {gib(result.needed_bytes)} of GPU memory, and {gib(room)} are there. --force tries it."
        )
    return result
