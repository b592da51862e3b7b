"""The plan for people: a bar for each part, the peak, whether it fits, and what would change it most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from finesight.planner.calibration import GIB
from finesight.planner.fit import Change
from finesight.planner.moments import MemoryPlan
from finesight.planner.weights import matrices_by_storage
from finesight.wording import counted

BAR_COLUMNS = 36
_FORMS = {"fp8": "8-bit float", "8bit": "8-bit integer", "4bit": "4-bit (NF4)"}  # others: the precision that the base computes in
_LEAST_SHOWN = 0.001  # of what is needed; smaller parts are added up


def gib(size: float) -> str:
    """Bytes for people: always in GiB, so that figures can be compared."""
    return f"{size / GIB:.2f} GiB"


def parts_of(plan: MemoryPlan) -> list[tuple[str, int]]:
    """The parts at the peak, those outside of what is allocated last."""
    parts = [(name, size) for name, size in plan.peak.parts.items() if size]
    least = _LEAST_SHOWN * plan.needed_bytes
    small = sum(size for _, size in parts if size < least)
    shown = sorted(((name, size) for name, size in parts if size >= least), key=lambda part: -part[1])
    shown += [("smaller parts", small)] if small else []
    if plan.correction_bytes:
        shown.append(("measured beyond the plan", plan.correction_bytes))
    return shown


def render(
    plan: MemoryPlan, available_bytes: int | None, changes: Sequence[Change], *, gpu_name: str = "", gpus: int | None = None
) -> RenderableType:
    """Everything that `finesight plan` prints.

    Args:
        gpus: on so many of these it would fit if they shared the model.
    """
    full = max(plan.needed_bytes, available_bytes or 0)
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for name, size in parts_of(plan):
        table.add_row(name, gib(size), Bar(full, 0, max(size, 0), width=BAR_COLUMNS))
    table.add_row(
        Text("peak allocated", style="bold"), Text(gib(plan.peak_bytes), style="bold"), Bar(full, 0, plan.peak_bytes, width=BAR_COLUMNS)
    )
    table.add_row("CUDA context", gib(plan.context_bytes), "")
    table.add_row("allocator slack", gib(plan.slack_bytes), "")
    lines: list[RenderableType] = [Text(line) for line in heading(plan)]
    lines += [Text(), table, Text(), verdict(plan, available_bytes, gpu_name)]
    lines += [Text(more_gpus(gpus))] if gpus is not None else []
    if changes:
        lines += [Text(), Text("What would change it most:")]
        ways = Table.grid(padding=(0, 1))
        for change in changes:  # settings are wrapped between one another, never cut
            ways.add_row(Text(f"  peak {gib(change.plan.peak_bytes):>10} with"), Text(str(change), overflow="fold"))
        lines.append(ways)
    return Group(*lines)


def heading(plan: MemoryPlan) -> list[str]:
    """What was planned, in words."""
    recipe, model = plan.recipe, plan.model
    method = "full tuning" if recipe.tuning.method == "full" else f"LoRA, r={recipe.tuning.r}"
    base = _FORMS.get(recipe.model.quantization, plan.precision)
    compiled = "compiled" if plan.execution.compiled else "not compiled"
    kept = []
    if recipe.model.quantization != "none":
        forms = matrices_by_storage(model, recipe.model)
        named = [f"{_FORMS.get(form, plan.precision)}: {', '.join(names)}" for form, names in sorted(forms.items())]
        kept = [f"Kept in {'; in '.join(named)}"]
    return [
        f"{model.name}: {method} on a base in {base}; dimensions from {model.source or 'its configuration'}",
        *kept,
        f"Activations: {plan.policy}, layers {compiled}. Packs: {plan.sizes.source or 'of the data'}; the largest has "
        f"{max(pack.tokens for pack in plan.sizes.packs):,} tokens, {max(pack.total_patches for pack in plan.sizes.packs):,} patches, "
        f"{max(pack.targets for pack in plan.sizes.packs):,} targets",
        *([f"Note: {plan.sizes.note}"] if plan.sizes.note else []),
        *_of_reinforcement(plan),
        *([_on_each(plan)] if plan.processes > 1 else []),
        f"Peak at: {plan.peak.name}",
    ]


def _of_reinforcement(plan: MemoryPlan) -> list[str]:
    """What is sampled at once, and what of a run of reinforcement is not in the plan."""
    grpo, rollout, sampled = plan.recipe.grpo, plan.recipe.rollout, plan.sizes.rollout
    if grpo is None or rollout is None:
        return []
    lines = []
    if sampled is not None:
        lines.append(
            f"Sampled at once (rollout.batch_size: {rollout.batch_size}): for {counted(sampled.groups, 'prompt')} of at most "
            f"{counted(sampled.prompt_tokens, 'token')} {sampled.completions} completions each, of at most {sampled.completion_tokens:,}"
        )
    if grpo.beta:
        lines.append(
            "Reference (grpo.beta): the base without its adapter, on the same packs without gradients; it adds nothing to the peak"
        )
    if rollout.engine != "builtin":
        lines.append(f"Not counted: the server of rollout.engine: {rollout.engine}, should it run on the same GPU")
    return lines


def _on_each(plan: MemoryPlan) -> str:
    if plan.recipe.training.sharding == "full":
        return f"On each of {plan.processes} GPUs, which share the model (training.sharding: full; counted, not measured)"
    return f"On each of {plan.processes} GPUs, which have all of the model each (training.sharding: none)"


def verdict(plan: MemoryPlan, available_bytes: int | None, gpu_name: str = "") -> Text:
    """Fits or not."""
    needed = f"{gib(plan.needed_bytes)} needed (peak, context and slack)"
    if available_bytes is None:
        return Text(f"{needed}. Give --gpu 16GiB or --gpu-name to see whether it fits.")
    where = f" of {gpu_name}" if gpu_name else ""
    if plan.fits(available_bytes):
        return Text(f"Fits: {needed} of {gib(available_bytes)}{where}.", style="green")
    return Text(f"Does not fit: {needed}, {gib(available_bytes)}{where} are there.", style="bold red")


def more_gpus(count: int) -> str:
    """What a plan says that does not fit as it is."""
    return f"On {count} such GPUs it fits with training.sharding=full, which divides the model over them."


def refusal(plan: MemoryPlan, available_bytes: int, ways: Sequence[Change], gpus: int | None = None) -> str:
    """Why a run is not begun, and the cheapest remedies.

    Args:
        gpus: on so many of these it would fit if they shared the model; None: not known.
    """
    lines = [
        f"This run is planned to need {gib(plan.needed_bytes)} of GPU memory (peak {gib(plan.peak_bytes)} at: {plan.peak.name}), and "
        f"{gib(available_bytes)} are there.",
        *([] if gpus is None else [more_gpus(gpus)]),
    ]
    if ways:
        lines.append("The cheapest remedies:")
        lines += [f"  {number}. {change}  (peak {gib(change.plan.peak_bytes)})" for number, change in enumerate(ways, start=1)]
        lines.append("Add one of them to the command, or --force to try all the same.")
    else:
        lines.append(
            "No change of token budget, activation policy, quantisation or pixels makes it fit: take a smaller model, or a larger GPU."
        )
    return "\n".join(lines)


def to_dict(plan: MemoryPlan, available_bytes: int | None, changes: Sequence[Change] = ()) -> dict[str, Any]:
    """The plan as JSON; bytes."""
    return {
        "model": plan.model.name,
        "dimensions_from": plan.model.source,
        "policy": plan.policy,
        "compiled": plan.execution.compiled,
        "gpus": plan.processes,
        "sharding": plan.recipe.training.sharding,
        "packs_from": plan.sizes.source,
        "note": plan.sizes.note,
        "rollout": None if plan.sizes.rollout is None else asdict(plan.sizes.rollout),
        "peak_moment": plan.peak.name,
        "peak_bytes": plan.peak_bytes,
        "context_bytes": plan.context_bytes,
        "slack_bytes": plan.slack_bytes,
        "needed_bytes": plan.needed_bytes,
        "available_bytes": available_bytes,
        "fits": None if available_bytes is None else plan.fits(available_bytes),
        "parts_bytes": {name: size for name, size in plan.peak.parts.items() if size},
        "moments_bytes": {moment.name: max(m.total for m in plan.moments if m.name == moment.name) for moment in plan.moments},
        "changes": [{"settings": dict(change.settings), "peak_bytes": change.plan.peak_bytes} for change in changes],
    }


def show(
    console: Console,
    plan: MemoryPlan,
    available_bytes: int | None,
    changes: Sequence[Change],
    gpu_name: str = "",
    gpus: int | None = None,
) -> None:
    """Prints a plan."""
    console.print(render(plan, available_bytes, changes, gpu_name=gpu_name, gpus=gpus))
