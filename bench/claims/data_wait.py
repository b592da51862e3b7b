"""How long the GPU has nothing to do for want of data, with 8 workers that decode PNG files."""

from __future__ import annotations

from bench.claim import Claim, Finding, Rows, main
from bench.claims.settings import our_run
from bench.comparison import single
from bench.rows import significant


def judge(rows: Rows) -> list[Finding]:
    findings = []
    for label, what in (("ours-png", "of a step waiting for data, PNG files"), ("ours", "of a step waiting for data, images in memory")):
        row = single(rows, label)
        value = None if row is None else significant(100 * row["wait_share"], 3)
        findings.append(Finding(what, 2, value, "%", at_most=True, compared=(label,) if row else ()))
    return findings


CLAIM = Claim(
    "data_wait",
    "Time in which the GPU waits for data, 8 workers",
    (our_run("ours-png", "--images", "png"), our_run()),
    judge,
    note="An upper bound: the whole time for which the host waited for a step while the GPU had run out of work.",
)

if __name__ == "__main__":
    main(CLAIM)
