"""How long it takes from starting the process to the end of the first step, without and with compiled code from before."""

from __future__ import annotations

from bench.claim import Claim, Finding, Rows, main, ours
from bench.comparison import single

_ARGUMENTS = (
    "--kind",
    "chart",
    "--batch",
    "64",
    "--budget",
    "8192",
    "--workers",
    "8",
    "--compile",
    "--steps",
    "3",
    "--warm",
    "1",
    "--load",
)
# Emptied before the claim: the first run finds nothing, the second what the first has left.
_CACHE = {"TORCHINDUCTOR_CACHE_DIR": "{scratch}/inductor", "TRITON_CACHE_DIR": "{scratch}/triton"}
COLD = ours("cold", *_ARGUMENTS, environment=_CACHE, repeats=True)
WARM = ours("warm", *_ARGUMENTS, environment=_CACHE, repeats=True)


def judge(rows: Rows) -> list[Finding]:
    findings = []
    for run, what, reach in (
        (WARM, "from the start of the process to the end of the first step, compiled code from before", 20),
        (COLD, "the same, nothing compiled before", 60),
    ):
        row = single(rows, run.label)
        value = None if row is None else row["since_start_s"]["first_step"]
        findings.append(Finding(what, reach, value, " s", at_most=True, compared=(run.label,) if row else ()))
    return findings


CLAIM = Claim(
    "first_step",
    "Time to the end of the first step",
    (COLD, WARM),
    judge,
    note="From the start of the interpreter: imports, 192 samples encoded, the checkpoint read from disk (in the page cache), compiling, the step itself.",
)

if __name__ == "__main__":
    main(CLAIM)
