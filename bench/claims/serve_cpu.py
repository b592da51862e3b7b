"""The same as `serve` with a tiny model on a CPU: ratios alone mean something, and those of this machine only."""

from __future__ import annotations

from bench.claim import TINY_MODEL, Claim, Finding, Rows, Run, main
from bench.claims.serve import faster

STREAMS = (1, 8, 32)


def _run(system: str, label: str) -> Run:
    size = ("--image-tokens", "16", "--answer-tokens", "64", "--requests", "4", "--limit", "15")
    given = (system, "{checkpoint}", "--model", "{model}", "--device", "cpu", "--streams", *map(str, STREAMS), *size)
    return Run(label, "bench.serving", given, {"OMP_NUM_THREADS": "1"}, repeats=True)


def judge(rows: Rows) -> list[Finding]:
    return [faster(rows, streams, 1.0, " (tiny model, CPU)") for streams in STREAMS]


CLAIM = Claim(
    "serve_cpu",
    "Answers over HTTP on a CPU, a tiny model",
    # In turns, each taken at its best: what else runs on the machine comes and goes.
    tuple(_run(system, f"{system}{again}") for again in ("", "-again") for system in ("ours", "transformers")),
    judge,
    note=(
        "Images of 16 visual tokens, 100 tokens of text, answers of 64 tokens; clients and server share the processor, and each "
        "server counts at the better of two turns. Pillow decodes the images of "
        "`transformers serve` where torchvision's own part does not load."
    ),
    model=TINY_MODEL,
)

if __name__ == "__main__":
    main(CLAIM)
