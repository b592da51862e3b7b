"""One step of GRPO as it is pinned for every system: so many prompts, completions of each, and tokens of both."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.rows import Row
from bench.workload import Row as Prompt

RANK = 16
SEED = 3407
LEARNING_RATE = 1e-5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all systems take."""
    parser.add_argument("--prompts", type=int, default=8, help="distinct prompts of a step")
    parser.add_argument("--generations", type=int, default=8, help="completions of each")
    parser.add_argument("--image-tokens", type=int, default=1024)
    parser.add_argument("--text-tokens", type=int, default=100, help="of a prompt, what the template writes included")
    parser.add_argument("--completion-tokens", type=int, default=256, help="of every completion: none may end before")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps, those to warm up included")
    parser.add_argument("--warm", type=int, default=1, help="steps before measuring begins")


def pinned(a: argparse.Namespace) -> Row:
    """What a row says of the work that was asked for; rows are compared only where it agrees."""
    return {
        "row": "grpo_step",
        "prompts_per_step": a.prompts,
        "generations": a.generations,
        "image_tokens": a.image_tokens,
        "text_tokens": a.text_tokens,
        "completion_tokens": a.completion_tokens,
        "steps": a.steps,
        "warm": a.warm,
        "learning_rate": LEARNING_RATE,
        "r": RANK,
    }


def prompts_of(a: argparse.Namespace, checkpoint: Path) -> list[Prompt]:
    """A prompt is asked once: each step has prompts of its own."""
    from bench.prompts import prompts  # needs transformers, which Unsloth wants to change before

    return prompts(a.prompts * a.steps, checkpoint, image_tokens=a.image_tokens, text_tokens=a.text_tokens)


def step_tokens(a: argparse.Namespace) -> int:
    """Tokens of all completions of a step, each with its prompt."""
    return int(a.prompts * a.generations * (a.image_tokens + a.text_tokens + a.completion_tokens))
