"""`chart` in bf16 against peers whose batches are grouped by length: the least padding that a careful user could arrange."""

from __future__ import annotations

from bench.claim import Claim, Finding, Rows, main
from bench.claims.settings import labels, our_run, unchecked
from bench.comparison import faster

UNSLOTH = unchecked("unsloth", 16, 32, arguments=("--grouped",), suffix="-grouped")
TRL = unchecked("trl", 16, 8, arguments=("--grouped",), suffix="-grouped")


def judge(rows: Rows) -> list[Finding]:
    return [
        faster("ours over Unsloth, its batches grouped by length", 1.25, rows, ["ours"], labels(UNSLOTH)),
        faster("ours over TRL, its batches grouped by length", 2.0, rows, ["ours"], labels(TRL)),
    ]


CLAIM = Claim(
    "chart_grouped",
    "The same, the peers' batches grouped by length",
    (our_run(), UNSLOTH[0], TRL[0], *UNSLOTH[1:], *TRL[1:]),
    judge,
    note="Ours is not grouped: its order stays random.",
)

if __name__ == "__main__":
    main(CLAIM)
