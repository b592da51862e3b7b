"""How much of the memory-bandwidth bound decoding reaches, of the base alone and with an unmerged adapter."""

from __future__ import annotations

from bench.claim import Claim, Finding, Rows, Run, main
from bench.rows import significant

LABELS = {"4b": "qwen3-vl-4b", "8b": "qwen3-vl-8b"}
RUNS = tuple(Run(label, "bench.decode", ("--model", model, "--bpe={bpe}")) for label, model in LABELS.items())


def judge(rows: Rows) -> list[Finding]:
    return [
        _share(rows, "Qwen3-VL-4B bf16 decoding 64 rows, of the memory-bandwidth bound", 60, adapter=False),
        _share(rows, "the same with an unmerged adapter", 45, adapter=True),
    ]


def _share(rows: Rows, what: str, reach: float, *, adapter: bool) -> Finding:
    """Of the sampler as it runs, the better of compiled layers and plain ones."""
    found = [row["share_percent"] for row in rows.get("4b", ()) if row["what"] == "sampler" and row["adapter"] is adapter]
    if not found:
        return Finding(what, reach, None, "%", reason="no row of the sampler")
    return Finding(what, reach, significant(max(found), 3), "%", compared=("4b",))


CLAIM = Claim(
    "decode",
    "Decoding: share of the memory-bandwidth bound",
    RUNS,
    judge,
    note="64 rows in 8 groups, prompts of 1,024 image and 100 text tokens, completions of 256. The bound: weights of the language model and of the "
    "vocabulary, and the live keys and values of all rows (blocks of a common prompt once), over the rate of a copy on the same "
    "machine. `sampler`: a whole rollout after the prompts, host work included; `step`: the same step replayed as a CUDA graph at half of the "
    "completion; further rows: parts of the step, each alone. The better of compiled layers and plain ones counts. Launches overlap: in a "
    "profile a kernel's time includes what it waits for the one ahead of it.",
)

if __name__ == "__main__":
    main(CLAIM)
