"""How much of the rate of bf16 matrix products, as measured on the machine, goes into arithmetic that the step needs."""

from __future__ import annotations

from bench.claim import Claim, Finding, Row, Rows, Run, main
from bench.claims.settings import our_run
from bench.comparison import single
from bench.rows import significant

ROOFLINE = Run("roofline", "bench.roofline", ("--model", "{model}"))
UNIT = "%"


def judge(rows: Rows) -> list[Finding]:
    rate = single(rows, "roofline", precision="bf16") or single(rows, "roofline", precision="float32")
    return [
        _share("needed arithmetic over the rate of bf16 products, nothing recomputed", 68, single(rows, "ours"), rate),
        _share("the same with full checkpointing", 50, single(rows, "ours-full"), rate),
    ]


def _share(what: str, reach: float, row: Row | None, rate: Row | None) -> Finding:
    if row is None or rate is None:
        return Finding(what, reach, None, UNIT, reason="no row of ours" if row is None else "the rate of products was not measured")
    value = significant(100 * row["needed_tflop_s"] / rate["square_tflop_s"], 3)
    return Finding(what, reach, value, UNIT, compared=(row["label"], rate["label"]))


CLAIM = Claim(
    "arithmetic_share",
    "Share of the machine's measured rate of matrix products that goes into needed arithmetic",
    (ROOFLINE, our_run(), our_run("ours-full", "--activations", "full")),
    judge,
    note="Needed: the language model forward and the gradients of its inputs, adapters, attention, the tower forward, the vocabulary "
    "matrix at supervised tokens; no padding, nothing computed twice. The rate is that of two square matrices of side 8192, random values.",
)

if __name__ == "__main__":
    main(CLAIM)
