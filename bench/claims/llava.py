"""`llava`, long answers about photos, in bf16 against the best settings of Unsloth and TRL, grouped batches among them."""

from __future__ import annotations

from bench.claim import Claim, Finding, Rows, main
from bench.claims.settings import labels, our_run, unchecked
from bench.comparison import faster

_GROUPED = {"arguments": ("--grouped",), "suffix": "-grouped"}
UNSLOTH = (*unchecked("unsloth", 16, kind="llava", **_GROUPED), *unchecked("unsloth", 16, 32, 8, kind="llava"))  # type: ignore[arg-type]
TRL = (*unchecked("trl", 16, kind="llava", **_GROUPED), *unchecked("trl", 16, 8, kind="llava"))  # type: ignore[arg-type]


def judge(rows: Rows) -> list[Finding]:
    return [
        faster("ours over Unsloth, long answers", 1.5, rows, ["ours"], labels(UNSLOTH)),
        faster("ours over TRL, long answers", 3.0, rows, ["ours"], labels(TRL)),
    ]


CLAIM = Claim(
    "llava",
    "Long answers about photos, bf16, memory to spare",
    (our_run(kind="llava"), *UNSLOTH[:2], *TRL[:2], *UNSLOTH[2:], *TRL[2:]),
    judge,
)

if __name__ == "__main__":
    main(CLAIM)
