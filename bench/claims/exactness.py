"""Losses and gradients in bf16, packed, shared and compiled, held against transformers' own forward and against float32."""

from __future__ import annotations

from bench.claim import Claim, Finding, Rows, Run, main
from bench.comparison import single
from bench.rows import significant

_COMMON = ("--model", "{model}", "--checkpoint", "{checkpoint}", "--per-image", "2")
RUNS = (
    Run("charts", "bench.exactness", (*_COMMON, "--kind", "chart", "--samples", "8", "--compile")),
    Run("photos", "bench.exactness", (*_COMMON, "--kind", "llava", "--samples", "4", "--compile")),
)


def judge(rows: Rows) -> list[Finding]:
    findings = []
    for run in RUNS:
        row = single(rows, run.label)
        loss, gradient = f"loss off the plain forward's, {run.label}", f"gradients' error over that of transformers in bf16, {run.label}"
        if row is None:
            findings += [
                Finding(loss, 1, None, "%", at_most=True),
                Finding(gradient, 1, None, at_most=True),
            ]
            continue
        findings.append(Finding(loss, 1, significant(100 * row["loss_off_plain"], 3), "%", at_most=True, compared=(run.label,)))
        errors = row["gradient_errors"]
        if "plain_autocast" not in errors:
            findings.append(Finding(gradient, 1, None, at_most=True, reason="bf16 was not measured: this is a CPU"))
            continue
        findings.append(
            Finding(gradient, 1, significant(errors["ours"] / errors["plain_autocast"], 3), at_most=True, compared=(run.label,))
        )
    return findings


CLAIM = Claim(
    "exactness",
    "Exactness in bf16: packed, shared and compiled",
    RUNS,
    judge,
    note="Errors are against transformers' forward in float32 on the same weights. That packing changes nothing at all is held in float32 by tests/parity.",
)

if __name__ == "__main__":
    main(CLAIM)
