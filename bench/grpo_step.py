"""Whole steps of GRPO with our side: completions, their rewards, the update. One setting, one line of JSON.

    python -m bench.grpo_step --bpe qwen.tiktoken --model qwen3-vl-4b --compile

The project's own session, sampler, loop and optimizer train LoRA (r=16 on the language model) on weights made on the device.
Answers cannot end before their full length: the sampler never draws the tokens that end one, and the update counts
log-probabilities under the same restriction.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import assembly, models
from bench.checkpoint import write_processor
from bench.prompts import as_conversation
from bench.rows import Row, emit, failed, significant, speeds
from bench.step_settings import LEARNING_RATE, RANK, SEED, add_arguments, pinned, prompts_of, step_tokens
from finesight.data.formats import ReadResult
from finesight.recipe import Recipe
from finesight.recipe_files import parse_recipe
from finesight.sampling.forking_sampler import ForkingSampler
from finesight.training.prepare import prepare

REWARD = "bench.rewards:share_of_even_tokens"
# Figures of the run's own metrics that a row keeps, as means over the steady steps.
_KEPT = (
    "rollout_s", "scoring_s", "reward", "reward_std", "frac_reward_zero_std", "entropy", "completions/min_length", "completions/max_length",
    "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
)  # fmt: skip


class FullLengthSession(assembly.MeasuredSession):
    """A timed session whose completions have their full length."""

    def _rollout_source(self, feed: Any, sampler: ForkingSampler, *further: Any) -> Any:
        full_length = ForkingSampler(
            sampler.packed, sampler.processor, image_first=self.recipe.data.image_first, forbidden=sampler.stop_ids,
            compile_layers=sampler.compile_layers, say=sampler.say,
        )  # fmt: skip
        return super()._rollout_source(feed, full_length, *further)


def recipe_of(a: argparse.Namespace, checkpoint: Path, output_dir: Path) -> Recipe:
    """The options as the recipe that a user would write."""
    return parse_recipe(
        {
            "model": {"name_or_path": str(checkpoint)},
            "tuning": {"method": "lora", "r": RANK, "lora_alpha": RANK},
            "training": {
                "output_dir": str(output_dir),
                "train_batch_size": a.prompts * a.generations,
                "token_budget": a.budget,
                "max_steps": a.steps,
                "learning_rate": LEARNING_RATE,
                "warmup_steps": 1,
                "gradient_checkpointing": {"none": False, "full": True}.get(a.activations, a.activations),
                "seed": SEED,
                "save_strategy": "no",
                "logging_steps": 1,
                "num_workers": a.workers,
                "torch_compile": a.compile,
            },
            "grpo": {"num_generations": a.generations, "image_ablation_steps": 0},
            "rewards": [REWARD],
            "rollout": {"max_completion_length": a.completion_tokens, "batch_size": a.prompts * a.generations},
        },
        origin="the measured recipe",
    )


def settings_of(a: argparse.Namespace) -> Row:
    """What a row says of how it was measured."""
    return {
        **pinned(a),
        "system": "finesight",
        "model": a.model,
        "precision": "float32" if a.device == "cpu" else "bf16",
        "recompute": a.activations,
        "compiled": a.compile,
        "token_budget": a.budget,
        "layers": a.layers,
    }


def measure(a: argparse.Namespace, folder: Path) -> Row:
    """Trains, and tells how long steps took.

    Raises:
        ValueError: a completion has another length than asked for.
    """
    checkpoint = a.checkpoint or write_processor(a.model, folder / "processor", a.bpe)
    rows = [as_conversation(prompt) for prompt in prompts_of(a, checkpoint)]
    prepared = prepare(recipe_of(a, checkpoint, folder / "run"), sources=[ReadResult(rows, [], "messages", "prompts")])
    session = FullLengthSession(prepared, a, assembly.made(a, prepared), time.perf_counter())
    result = session.run()
    steady = [line for line in result.history if "rollout_s" in line][a.warm :]
    kept = {name: significant(statistics.fmean(line[name] for line in steady)) for name in _KEPT if all(name in line for line in steady)}
    if not steady or (kept["completions/min_length"], kept["completions/max_length"]) != (a.completion_tokens, a.completion_tokens):
        raise ValueError(f"completions were to have {a.completion_tokens} tokens each; the run tells {kept}")
    clock = session.clock
    step_s = clock.step_s[a.warm :]
    memory = {}
    if clock.device.type == "cuda":
        memory["peak_gib"] = significant(torch.cuda.max_memory_allocated() / 2**30)
        memory["reserved_gib"] = significant(torch.cuda.max_memory_reserved() / 2**30)
    return {
        **speeds(step_s, a.prompts * a.generations, tokens=len(step_s) * step_tokens(a)),
        "step_s": [round(seconds, 4) for seconds in clock.step_s],
        "figures": kept,
        "first_step_s": round(clock.step_s[0], 2),
        "trainable": result.parameters.trainable,
        "notes": session.notes,
        **memory,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--model", default="qwen3-vl-4b", choices=models.NAMES)
    parser.add_argument("--layers", type=int, help="fewer decoder layers than published, to try things out")
    parser.add_argument("--budget", type=int, default=13312, help="most tokens of a pack")
    parser.add_argument("--activations", default="none", choices=assembly.ACTIVATIONS, help="what is kept of a layer for its backward pass")
    parser.add_argument("--compile", action="store_true", help="compile the decoder layer and the tower block")
    parser.add_argument("--workers", type=int, default=0, help="processes that open and cut images")
    parser.add_argument("--checkpoint", type=Path, help="folder with the processor's files; else made anew")
    parser.add_argument("--bpe", type=Path, help="the file qwen.tiktoken, where there is no --checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further step begins")
    a = parser.parse_args(arguments)
    row = settings_of(a)
    try:
        with tempfile.TemporaryDirectory(prefix="finesight-bench-") as name:
            emit({**row, **measure(a, Path(name))})
    except Exception as error:  # one setting of many: the others go on
        emit(failed(row, error))


if __name__ == "__main__":
    main()
