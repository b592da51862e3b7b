"""A reward that costs nothing and differs between completions, in the shape that TRL, Unsloth and this project call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def share_of_even_tokens(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """The share of each completion's tokens whose id is even."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) if ids else 0.0 for ids in completion_ids]
