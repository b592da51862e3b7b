"""Linear layers without a graph of gradients: all layers of one input in one operator, with kernels of their own for few rows.

With few rows, as in decoding, the time of a linear layer is that of reading its weights, and what an adapter adds is time
between launches. See :mod:`finesight.models.few_rows_kernels`.

Shapes: T tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from finesight.models.low_rank import adapted_sums, has_triton

MOST_LAYERS = 3  # of one input that kernels take
MOST_ROWS = 64
MOST_RANK = 128


class Tiles(NamedTuple):
    """How the kernels divide a product; of the weights' shapes, so that results of a row do not depend on other rows."""

    outputs: int  # of a program, a power of two and at least 16
    inputs: int  # of a step of its loop, likewise
    parts: int  # that the inputs are divided into at most, each a program
    warps: int
    stages: int  # loads in flight
    overlapped: bool = True  # each launch begins before the one ahead of it has ended, where the GPU can


# One for each processor of a large GPU.
_PROGRAMS = 132
_MOST_PARTS = 8  # each is one more pass over the outputs in float32


def tiles_for(sizes: Sequence[int], inputs: int) -> Tiles:
    """For layers (O, I) of one input: the fastest of those measured for Qwen3-VL-4B on an H200 (bench/few_rows.py), by rule.

    Args:
        sizes: O of each.
    """
    if sum(sizes) >= 128 * _PROGRAMS:
        return Tiles(128, 64, 1, 4, 4)
    programs = sum(-(-size // 64) for size in sizes)
    return Tiles(64, 128, max(1, min(_MOST_PARTS, _PROGRAMS // programs, inputs // 512)), 4, 4)


def stages_that_fit(tiles: Tiles, row_block: int, down_block: int, down_bytes: int, shared_bytes: int) -> int:
    """Of tiles.stages as many as shared memory holds, at least one: a smaller GPU has room for fewer loads in flight.

    Weights and rows are taken to be of two bytes a number, as :func:`finesight.models.linear.project` hands them in.

    Args:
        row_block: rows of x in a tile.
        down_block: rows of an A matrix in a tile, of so many bytes a number; 0 without adapters.
        shared_bytes: that one program may use.
    """
    stage = tiles.inputs * (max(tiles.outputs * 2, down_block * down_bytes) + row_block * 2)
    return max(1, min(tiles.stages, shared_bytes // stage))


# Opaque to compilers, and the number of rows is looked at inside: code compiled for any number of rows serves all.
@torch.library.custom_op("finesight::products_without_graph", mutates_args=())
def products_without_graph(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    downs: list[torch.Tensor],
    ups: list[torch.Tensor],
    scales: list[float],
) -> list[torch.Tensor]:
    """x Wᵀ + s (x Aᵀ) Bᵀ + bias of each layer; (T, O) each.

    Args:
        x: (T, I).
        weights: (O, I) each, of x's precision.
        biases: (O,) each; empty ones, of layers without a bias.
        downs: (r, I) each, peft's A; ups: (O, r) each, peft's B; of rank 0 for layers without an adapter, and the lists empty
            if there is none. They are rounded to x's precision, as in :func:`finesight.models.linear.adapted_products`.
    """
    own_biases = [bias if bias.numel() else None for bias in biases]
    matrices = (x, *weights, *downs, *ups)
    rank = max((down.shape[0] for down in downs), default=0)
    if (
        x.is_cuda
        and 0 < x.shape[0] <= MOST_ROWS
        and len(weights) <= MOST_LAYERS
        and rank <= MOST_RANK
        and len({matrix.dtype for matrix in (*downs, *ups)}) <= 1
        and has_triton(x.device.index)
        and all(matrix.is_contiguous() for matrix in matrices)
    ):
        from finesight.models import few_rows_kernels

        tiles = tiles_for([weight.shape[0] for weight in weights], x.shape[1])
        with torch.cuda.device_of(x):
            return few_rows_kernels.few_rows_products(x, weights, own_biases, downs, ups, scales, tiles)
    if downs:
        outs, _ = adapted_sums(x, weights, [down.to(x.dtype) for down in downs], [up.to(x.dtype) for up in ups], scales)
        return [out if bias is None else out.add_(bias) for out, bias in zip(outs, own_biases, strict=True)]
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, own_biases, strict=True)]


@products_without_graph.register_fake
def _(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    downs: list[torch.Tensor],
    ups: list[torch.Tensor],
    scales: list[float],
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
