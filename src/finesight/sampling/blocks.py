"""Blocks of keys and values: how many there is memory for, and where a row's tokens lie in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from finesight.errors import ModelError
from finesight.models.decoding import BLOCK_TOKENS, block_bytes
from finesight.models.packed import PackedModel

# Of the GPU memory that is free when answering begins, what keys and values may take.
_FREE_SHARE = 0.8


def fitting_blocks(packed: PackedModel, wanted: int, needed: int) -> int:
    """As many blocks as wanted, or as the free memory of a GPU has room for.

    Raises:
        ModelError: it has less than needed.
    """
    device = packed.device
    if device.type != "cuda":
        return wanted
    free_bytes = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    fitting = int(free_bytes * _FREE_SHARE) // block_bytes(packed.base.config.text_config, packed.compute_dtype)
    if fitting < needed:
        raise ModelError(
            f"The GPU has {free_bytes / 2**30:.1f} GiB free, too little for the keys and values of one answer "
            f"({(needed - 1) * BLOCK_TOKENS:,} tokens). Lower max_completion_length or data.max_pixels."
        )
    return min(wanted, fitting)


def slots_of(blocks: Sequence[int], tokens: int) -> np.ndarray:
    """(tokens,) int64: where in the pool the tokens of a row lie."""
    return (np.asarray(blocks)[:, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).reshape(-1)[:tokens].astype(np.int64)
