"""How much of the rate of bf16 matrix products, as measured on the machine, goes into arithmetic that the step needs."""

from __future__ import annotations

from bench.claim import Claim, Finding, Row, Rows, Run, main
from bench.claims.settings import our_run
from bench.comparison import single
from bench.rows import significant

ROOFLINE = Run("roofline", "bench.roofline", ("--model", "{model}"))
UNIT = "%"


def judge(rows: Rows) -> list[Finding]:
    return [
        _share("needed arithmetic over the rate of bf16 products, nothing recomputed", 68, rows, single(rows, "ours")),
        _share("the same with full checkpointing", 50, rows, single(rows, "ours-full")),
    ]


def _share(what: str, reach: float, rows: Rows, row: Row | None) -> Finding:
    rate = None if row is None else _rate_beside(row, rows)
    if row is None or rate is None:
        return Finding(what, reach, None, UNIT, reason="no row of ours" if row is None else "the rate of products was not measured")
    value = significant(100 * row["needed_tflop_s"] / rate["square_tflop_s"], 3)
    return Finding(what, reach, value, UNIT, compared=(row["label"], rate["label"]))


def _rate_beside(row: Row, rows: Rows) -> Row | None:
    """The rate of products on the machine of a row, since its start."""
    here = [rate for rate in rows.get("roofline", ()) if rate.get("machine", {}).get("boot") == row.get("machine", {}).get("boot")]
    found = {rate["precision"]: rate for rate in here if "square_tflop_s" in rate}
    return found.get("bf16") or found.get("float32")


CLAIM = Claim(
    "arithmetic_share",
    "Share of the machine's measured rate of matrix products that goes into needed arithmetic",
    (ROOFLINE, our_run(), our_run("ours-full", "--activations", "full")),
    judge,
    note="Needed: the language model forward and the gradients of its inputs, adapters, attention, the tower forward, the vocabulary "
    "matrix at supervised tokens; no padding, nothing computed twice. The rate is that of two square matrices of side 8192, random values, measured "
    "beside each row on its machine.",
)

if __name__ == "__main__":
    main(CLAIM)
