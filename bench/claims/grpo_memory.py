"""How the memory of an update grows with the number of completions of a prompt."""

from __future__ import annotations

from bench.claim import Claim, Finding, Rows, main
from bench.claims.grpo_update import MODELS, RUNS
from bench.rows import significant

FEW, MANY = 4, 32  # completions


def judge(rows: Rows) -> list[Finding]:
    return [_growth(rows, label, name) for label, (_, name) in MODELS.items()]


def _growth(rows: Rows, label: str, name: str) -> Finding:
    """Growth of the peak over that of the completions' own share, groups split over packs of up to 8 completions."""
    what = f"{name} LoRA, growth of an update's memory from {FEW} to {MANY} completions, over their own share"
    measured = [row for row in rows.get(label, ()) if row["row"] == "grpo_memory"]
    split = min((row["token_budget"] for row in measured), default=None)
    found = {row["generations"]: row for row in measured if row["token_budget"] == split}
    if FEW not in found or MANY not in found:
        return Finding(what, 1.3, None, at_most=True, reason="one of the groups is missing")
    if any("activations_gib" not in found[size] for size in (FEW, MANY)):
        return Finding(what, 1.3, None, at_most=True, reason="a CPU tells no memory")
    grown, own = (found[MANY][key] - found[FEW][key] for key in ("activations_gib", "own_share_gib"))
    return Finding(what, 1.3, significant(grown / own, 3), at_most=True, compared=(label,))


CLAIM = Claim(
    "grpo_memory",
    "The update's memory from 4 to 32 completions of a prompt",
    RUNS,
    judge,
    note="Activation policy full. The completions' own share is taken in closed form: the inputs of all decoder layers (hidden size × layers × 2 bytes) at each of "
    "their tokens, which that policy keeps; nothing for the working memory of a layer or for logits. Judged is the group split over packs of up to 8 completions, "
    "which gives the same gradient; the rows of larger packs hold the whole group in one.",
)

if __name__ == "__main__":
    main(CLAIM)
