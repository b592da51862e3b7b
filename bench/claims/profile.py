"""Where one steady step spends its time: nothing to be reached, but what remains to be gained is seen here."""

from __future__ import annotations

from bench.claim import Claim, Finding, Rows, Run, main

_STEP = (
    "--model",
    "{model}",
    "--checkpoint",
    "{checkpoint}",
    "--kind",
    "chart",
    "--batch",
    "64",
    "--budget",
    "8192",
    "--workers",
    "8",
    "--compile",
)


def judge(rows: Rows) -> list[Finding]:
    return []


CLAIM = Claim(
    "profile",
    "One steady step under the profiler",
    (
        Run("bf16", "bench.profile_step", _STEP),
        Run("fp8", "bench.profile_step", (*_STEP, "--fp8")),
        Run("bf16-full", "bench.profile_step", (*_STEP, "--activations", "full")),
    ),
    judge,
    note="Profiling slows a step down; shares are of the profiled step.",
)

if __name__ == "__main__":
    main(CLAIM)
