"""A whole step of GRPO, completions by each system's own generate, against TRL and Unsloth."""

from __future__ import annotations

from collections.abc import Sequence

from bench.claim import Claim, Finding, Rows, Run, labelled, main
from bench.claims.settings import PROJECT_ENVIRONMENT
from bench.rows import Row, significant

# The work, which must be the same.
_PINNED = ("model", "prompts_per_step", "generations", "image_tokens", "text_tokens", "completion_tokens", "r")
OURS = ("ours", "ours-compiled", "ours-compiled-again")
TRL = ("trl-8", "trl-16", "trl-8-checkpointed")
UNSLOTH = ("unsloth-8", "unsloth-16", "unsloth-8-checkpointed")


def _ours(label: str, *arguments: str) -> Run:
    # One step to warm up, two more where layers are compiled for the shapes that they meet.
    return Run(label, "bench.grpo_step", ("--model", "{model}", "--checkpoint", "{checkpoint}", *arguments), PROJECT_ENVIRONMENT)


def _peer(label: str, system: str, *arguments: str) -> Run:
    return Run(label, "bench.grpo_peers", (system, "{checkpoint}", "--model", "{model}", *arguments))


def fastest(rows: Rows, labels: Sequence[str]) -> Row | None:
    """The row with the most completions a second."""
    return max(labelled(rows, *labels), key=lambda row: row["samples_s_wall"], default=None)


def faster(what: str, reach: float, rows: Rows, theirs: Sequence[str]) -> Finding:
    """Our fastest setting on the machine of a peer's over that, by the mean step or the median one, whichever is less."""
    other = fastest(rows, theirs)
    if other is None:
        return Finding(what, reach, None, reason="no row to compare with")
    beside = {label: [row for row in own if row["machine"]["boot"] == other["machine"]["boot"]] for label, own in rows.items()}
    row = fastest(beside, OURS)
    if row is None:
        return Finding(what, reach, None, reason="no row of ours" if fastest(rows, OURS) is None else "the machine differs")
    apart = [name for name in _PINNED if row[name] != other[name]]
    if apart:
        return Finding(what, reach, None, reason=f"{', '.join(apart)} differs")
    ratio = min(row[name] / other[name] for name in ("samples_s", "samples_s_wall"))
    return Finding(what, reach, significant(ratio, 3), compared=(row["label"], other["label"]))


def judge(rows: Rows) -> list[Finding]:
    return [
        faster("a whole step of GRPO, ours over TRL with its generate", 5.0, rows, TRL),
        faster("a whole step of GRPO, ours over Unsloth without vLLM", 3.0, rows, UNSLOTH),
        _apart(rows),
    ]


def _apart(rows: Rows) -> Finding:
    what = "sampler's log-probabilities off the update's, mean over tokens"
    row = fastest(rows, OURS)
    value = None if row is None else row["figures"].get("sampling/sampling_logp_difference/mean")
    return Finding(what, 0.05, value, unit="", at_most=True, compared=() if row is None else (row["label"],))


# The likeliest best settings come first, for a call that is cut short.
CLAIM = Claim(
    "grpo_step",
    "A whole step of GRPO: completions, rewards, update",
    (
        _ours("ours-compiled", "--compile", "--steps", "6", "--warm", "3"),
        _ours("ours", "--steps", "4", "--warm", "2"),
        _ours("ours-compiled-again", "--compile", "--steps", "6", "--warm", "3"),  # where a call has no time for both peers
        _peer("trl-8", "trl", "--batch", "8", "--no-gc", "--steps", "3", "--warm", "1"),
        _peer("unsloth-8-checkpointed", "unsloth", "--batch", "8", "--steps", "3", "--warm", "1"),
        _peer("unsloth-8", "unsloth", "--batch", "8", "--no-gc", "--steps", "4", "--warm", "2"),
        _peer("trl-16", "trl", "--batch", "16", "--no-gc", "--steps", "3", "--warm", "1"),
        _peer("unsloth-16", "unsloth", "--batch", "16", "--no-gc", "--steps", "4", "--warm", "2"),
        _peer("trl-8-checkpointed", "trl", "--batch", "8", "--steps", "3", "--warm", "1"),
    ),
    judge,
    note=(
        "A step: 8 prompts of one image each (1,024 visual tokens, 100 tokens of text), 8 completions of each with exactly 256 tokens, a reward "
        "that costs nothing and differs between completions, LoRA r=16 on the language model in bf16. No system can draw a token that ends a "
        "completion or stands for an image. Batch: completions of a forward pass of the peers' update; they generate all 64 at once."
    ),
    model="qwen3-vl-4b",
)

if __name__ == "__main__":
    main(CLAIM)
