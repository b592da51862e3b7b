"""`chart` in bf16 with memory to spare, host work included, against Unsloth and TRL at their best batch sizes."""

from __future__ import annotations

from bench.claim import Claim, Finding, Rows, main
from bench.claims.settings import labels, our_run, unchecked
from bench.comparison import faster

UNSLOTH = unchecked("unsloth", 16, 32, 8)
TRL = unchecked("trl", 16, 8)


def judge(rows: Rows) -> list[Finding]:
    return [
        faster("ours over Unsloth", 1.8, rows, ["ours"], labels(UNSLOTH)),
        faster("ours over TRL", 3.0, rows, ["ours"], labels(TRL)),
    ]


# The likeliest best settings come first, for a call that is cut short.
CLAIM = Claim(
    "chart_bf16",
    "Short answers about charts, bf16, memory to spare",
    (our_run(), UNSLOTH[0], TRL[0], *UNSLOTH[1:], *TRL[1:]),
    judge,
)

if __name__ == "__main__":
    main(CLAIM)
