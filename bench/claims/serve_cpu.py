"""The same as `serve` with a tiny model on a CPU: ratios alone mean something, and those of this machine only."""

from __future__ import annotations

from bench.claim import TINY_MODEL, Claim, Finding, Rows, Run, main
from bench.claims.serve import faster

STREAMS = (1, 8, 32)


_ARGUMENTS = (
    "both", "{checkpoint}", "--model", "{model}", "--device", "cpu", "--streams", *map(str, STREAMS), "--turns", "3", "--limit", "60",
    "--image-tokens", "16", "--answer-tokens", "64", "--requests", "2",
)  # fmt: skip


def judge(rows: Rows) -> list[Finding]:
    return [faster(rows, streams, 1.0, " (tiny model, CPU)") for streams in STREAMS]


CLAIM = Claim(
    "serve_cpu",
    "Answers over HTTP on a CPU, a tiny model",
    (Run("in turns", "bench.serving", _ARGUMENTS, {"OMP_NUM_THREADS": "1"}, tiny=("--turns", "1")),),
    judge,
    note=(
        "Images of 16 visual tokens, 100 tokens of text, answers of 64 tokens; clients and server share the processor. Both servers run "
        "at the same time and are asked in turns, three rounds each, since other programs share the machine. Pillow decodes the images of "
        "`transformers serve` where torchvision's own part does not load."
    ),
    model=TINY_MODEL,
)

if __name__ == "__main__":
    main(CLAIM)
