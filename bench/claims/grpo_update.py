"""What sharing a group's prompt brings an update: time and activation memory against our own update with nothing shared."""

from __future__ import annotations

from collections.abc import Sequence

from bench.claim import Claim, Finding, Row, Rows, Run, main
from bench.claims.settings import PROJECT_ENVIRONMENT
from bench.rows import significant

MODELS = {"4b": ("qwen3-vl-4b", "Qwen3-VL-4B"), "8b": ("qwen3-vl-8b", "Qwen3-VL-8B")}
# Also of the claim `grpo_memory`: measured once.
RUNS = tuple(
    Run(label + suffix, "bench.group_update", ("--model", model, *compiled, "--bpe={bpe}"), environment=PROJECT_ENVIRONMENT)
    for suffix, compiled in (("", ()), ("-compiled", ("--compile",)))
    for label, (model, _) in MODELS.items()
)


def judge(rows: Rows) -> list[Finding]:
    findings = []
    for label, (_, name) in MODELS.items():
        measured, compiled = ([row for row in rows.get(of, ()) if row["row"] == "grpo_update"] for of in (label, f"{label}-compiled"))
        findings += [_speed(f"{label}-compiled", name, compiled), _memory(label, name, measured)]
    return findings


def _fastest(measured: Sequence[Row], *, shared: bool) -> Row | None:
    return min((row for row in measured if row["shared"] is shared), key=lambda row: float(row["step_s"]), default=None)


def _speed(label: str, name: str, measured: Sequence[Row]) -> Finding:
    what = f"{name} LoRA, update of groups of 8, over nothing shared"
    ours = _fastest(measured, shared=True)
    alike = [row for row in measured if ours and row.get("kept_features") == ours.get("kept_features")]
    if ours is None or (other := _fastest(alike, shared=False)) is None:
        return Finding(what, 3, None, reason="one of the forms is missing")
    return Finding(what, 3, significant(other["step_s"] / ours["step_s"], 3), compared=(label,))


def _memory(label: str, name: str, measured: Sequence[Row]) -> Finding:
    """Of one group in one pack, against the same with nothing shared."""
    what = f"{name} LoRA, its activation memory, of that with nothing shared"
    ours = _fastest(measured, shared=True)
    same = ("policy", "compiled", "token_budget", "generations")
    other = next((row for row in measured if ours and not row["shared"] and all(row[key] == ours[key] for key in same)), None)
    if ours is None or other is None:
        return Finding(what, 40, None, "%", at_most=True, reason="one of the forms is missing")
    if "activations_gib" not in ours or "activations_gib" not in other:
        return Finding(what, 40, None, "%", at_most=True, reason="a CPU tells no memory")
    value = significant(100 * ours["activations_gib"] / other["activations_gib"], 3)
    return Finding(what, 40, value, "%", at_most=True, compared=(label,))


CLAIM = Claim(
    "grpo_update",
    "The update of reinforcement: a prompt computed once for its group",
    RUNS,
    judge,
    note="Groups of 8 completions, 1,024 image and 100 text tokens of prompt, 256-token completions of random tokens, fixed advantages and old "
    "log-probabilities. Speed: steps of four groups, layers compiled, packs of 16,384 tokens in both forms, with images' features kept, as a "
    "rollout leaves them to the update of a run; without, the tower computes an image once for each pack that it is in. Memory: one group in one "
    "pack in both forms, nothing compiled; the peak of a step over what is allocated before it, adapter "
    "gradients included. The first table holds losses and gradients of both forms on the same weights.",
)

if __name__ == "__main__":
    main(CLAIM)
