"""Whether a whole step of reinforcement of Qwen3-VL-8B, rollouts included, runs while torch may reserve no more than 16 GiB."""

from __future__ import annotations

from bench.claim import Claim, Finding, Rows, main
from bench.claims.memory import RUNS, under_cap

RUN = next(run for run in RUNS if run.label == "8b-grpo")  # also of the claim `memory`: measured once


def judge(rows: Rows) -> list[Finding]:
    measured = [row for row in rows.get(RUN.label, ()) if "name" in row and row["group"]["generations"] == 8]
    return [under_cap("Qwen3-VL-8B QLoRA GRPO, G=8, under a cap", 16, measured, "8b-grpo")]


CLAIM = Claim(
    "grpo_cap",
    "Reinforcement of Qwen3-VL-8B under a cap of 16 GiB",
    (RUN,),
    judge,
    note="Whole steps through the project's own session: rollout, rewards, update. Prompts of 1,024 image and 100 text tokens, 256-token completions, two "
    "groups a step. Base in 4 bits, vocabulary and tower in 8, 8-bit Adam. The cap is set with `torch.cuda.set_per_process_memory_fraction`.",
)

if __name__ == "__main__":
    main(CLAIM)
