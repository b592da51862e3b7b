"""One script for each claim, in the order in which they are to be measured; `python -m bench.claims` runs several.

python -m bench.claims.chart_bf16 --bpe qwen.tiktoken --peers peers.tar.xz
"""

from __future__ import annotations

from importlib import import_module

from bench.claim import Claim

NAMES = (
    "chart_bf16",
    "chart_grouped",
    "chart_fp8",
    "chart_memory",
    "llava",
    "arithmetic_share",
    "fp8_over_bf16",
    "per_image",
    "second_epoch",
    "adapters",
    "data_wait",
    "exactness",
    "first_step",
    "profile",
    "memory",
    "memory_peers",
    "decode",
    "grpo_update",
    "grpo_memory",
    "grpo_cap",
    "grpo_step",
    "serve",
    "serve_cpu",
)


def claim_of(name: str) -> Claim:
    """The claim of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in NAMES:
        raise ValueError(f"{name!r} is no claim; there are {', '.join(NAMES)}")
    return import_module(f"bench.claims.{name}").CLAIM
