"""Linear layers of few rows: what reading their weights takes, by cuBLAS and by kernels of our own. A line of JSON for each group.

    python -m bench.few_rows --model qwen3-vl-4b --rows 64

A group is the layers of one input in a decoder layer: queries, keys and values; attention's output; gate and up; down. Each is
captured as a CUDA graph over so many copies of its weights that none stays in the L2 cache, and told in microseconds for one
copy and in GB of matrices a second. `separate` is a product of cuBLAS for each layer, with adapters as without kernels for few
rows; other names are divisions (`Tiles`: outputs, inputs, parts, warps, stages) and how launches follow one another: `in turn`,
or `ahead`, each begun before the one before it has ended. The first is the one that is in use.

A chain is all groups of several decoder layers in turn; `between` is the same with a small kernel of PyTorch before each group,
which changes its input as a norm does, and that kernel's time is part of the figure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch.nn import functional as F

from bench import models
from bench.arithmetic import layer_matrices
from bench.decode import StepGraph
from bench.rows import Row, emit, failed, significant
from finesight.models.few_rows import Tiles, tiles_for
from finesight.models.low_rank import adapted_sums

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
COPIED_BYTES = 512 * 2**20  # of one group's weights, ten times an L2 cache
CHAINED_LAYERS = 8
# Divisions to compare: of outputs, inputs, warps, stages; and the numbers of programs aimed at.
SHAPES = ((128, 64, 4, 4), (128, 64, 4, 6), (64, 128, 4, 4), (64, 64, 4, 6), (256, 64, 8, 4), (128, 128, 8, 3))
PROGRAMS = (96, 132, 192)
MOST_PARTS = 8


class Group:
    """Copies of the layers of one input, with matrices of adapters.

    Args:
        sizes: outputs of each.
        copies: None for as many as no L2 cache holds.
    """

    def __init__(self, sizes: Sequence[int], inputs: int, rows: int, rank: int, copies: int | None = None) -> None:
        self.sizes, self.inputs, self.rank = list(sizes), inputs, rank
        self.weight_bytes = 2 * inputs * sum(sizes)
        self.copies = copies or max(2, COPIED_BYTES // self.weight_bytes)
        self.x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
        self.weights = [[torch.randn(size, inputs, device="cuda", dtype=torch.bfloat16) for size in sizes] for _ in range(self.copies)]
        self.downs = [[torch.randn(rank, inputs, device="cuda") for _ in sizes] for _ in range(self.copies)]
        self.ups = [[torch.randn(size, rank, device="cuda") for size in sizes] for _ in range(self.copies)]

    def bytes(self, adapter: bool) -> int:
        """Of the matrices of one copy."""
        return self.weight_bytes + (4 * self.rank * (self.inputs * len(self.sizes) + sum(self.sizes)) if adapter else 0)

    def separate(self, copy: int, adapter: bool) -> list[torch.Tensor]:
        """Without kernels for few rows."""
        if not adapter:
            return [F.linear(self.x, weight) for weight in self.weights[copy]]
        downs, ups = ([matrix.to(self.x.dtype) for matrix in matrices[copy]] for matrices in (self.downs, self.ups))
        return adapted_sums(self.x, self.weights[copy], downs, ups, [2.0] * len(self.sizes))[0]

    def streamed(self, copy: int, adapter: bool, tiles: Tiles) -> list[torch.Tensor]:
        """By kernels for few rows."""
        from finesight.models import few_rows_kernels  # needs Triton

        count = len(self.sizes)
        adapters = (self.downs[copy], self.ups[copy], [2.0] * count) if adapter else ([], [], [])
        return few_rows_kernels.few_rows_products(self.x, self.weights[copy], [None] * count, *adapters, tiles)


def divided(sizes: Sequence[int], shape: tuple[int, int, int, int], programs: int) -> Tiles:
    """A shape with parts for about so many programs."""
    outputs, inputs, warps, stages = shape
    parts = round(programs / sum(-(-size // outputs) for size in sizes))
    return Tiles(outputs, inputs, max(1, min(MOST_PARTS, parts)), warps, stages)


def followings(used: Tiles) -> Iterator[Tiles]:
    """A division with both ways for launches to follow one another, the one in use first."""
    yield used
    yield used._replace(overlapped=not used.overlapped)


def divisions(sizes: Sequence[int], inputs: int) -> Iterator[Tiles]:
    """Those to compare, the one in use first."""
    used = tiles_for(sizes, inputs)
    others = [divided(sizes, shape, programs) for shape in SHAPES for programs in PROGRAMS]
    yield from dict.fromkeys((*followings(used), *others))


def label(tiles: Tiles) -> str:
    return "/".join(map(str, tiles[:5])) + (" ahead" if tiles.overlapped else " in turn")


def graph_seconds(functions: Sequence[Callable[[], object]]) -> float:
    """Of one of them, when all are launched as one CUDA graph."""

    def every() -> None:
        for function in functions:
            function()

    return StepGraph(every, "cuda").seconds() / len(functions)


def figures(ways: Mapping[str, Callable[[], float]], matrix_bytes: int, stop_at: float) -> Row:
    """Microseconds and GB of matrices a second of each way; None past the time limit, and the reason where one fails."""
    row: Row = {}
    for name, seconds_of_way in ways.items():
        if time.monotonic() > stop_at:
            row[name] = None
            continue
        try:
            seconds = seconds_of_way()
            row[name] = [significant(1e6 * seconds, 3), significant(matrix_bytes / seconds / 1e9, 3)]
        except Exception as error:  # a division that this GPU has no room for
            row[name] = failed({}, error)["reason"]
    return row


def measured(group: Group, adapter: bool, stop_at: float) -> Row:
    """Figures of each way; the largest difference from the separate products, relative to their norm."""
    expected, differences = group.separate(0, adapter), [0.0]

    def seconds(way: Callable[[int], list[torch.Tensor]]) -> float:
        differences.extend(((a - b).norm() / b.norm()).item() for a, b in zip(way(0), expected, strict=True))
        return graph_seconds([partial(way, copy) for copy in range(group.copies)])

    ways = {"separate": partial(seconds, lambda copy: group.separate(copy, adapter))}
    for tiles in divisions(group.sizes, group.inputs):
        ways[label(tiles)] = partial(seconds, lambda copy, tiles=tiles: group.streamed(copy, adapter, tiles))
    row = figures(ways, group.bytes(adapter), stop_at)
    return {"us_and_gb_s": row, "difference": significant(max(differences), 2)}


def chained(groups: Sequence[Group], adapter: bool, between: bool, stop_at: float) -> Row:
    """Figures of one decoder layer's groups in turn, by the divisions in use."""

    def seconds(all_tiles: Sequence[Tiles]) -> float:
        def layer(copy: int) -> None:
            for group, tiles in zip(groups, all_tiles, strict=True):
                if between:
                    group.x.mul_(1)
                group.streamed(copy, adapter, tiles)

        return graph_seconds([partial(layer, copy) for copy in range(CHAINED_LAYERS)])

    used = [tiles_for(group.sizes, group.inputs) for group in groups]
    ways = {}
    for following in zip(*(followings(tiles) for tiles in used), strict=True):
        ways[label(following[0]).partition(" ")[2]] = partial(seconds, following)
    return {"us_and_gb_s": figures(ways, sum(group.bytes(adapter) for group in groups), stop_at)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-vl-4b", choices=models.NAMES)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16, help="of adapters")
    parser.add_argument("--time-limit", type=float, default=90, help="seconds after which nothing further is measured")
    a = parser.parse_args(arguments)
    stop_at = time.monotonic() + a.time_limit
    row: Row = {"row": "few_rows", "model": a.model, "rows": a.rows, "rank": a.rank}
    matrices = layer_matrices(models.configuration(a.model).text_config)

    def group_of(names: Sequence[str], copies: int | None = None) -> Group:
        return Group([matrices[name][1] for name in names], matrices[names[0]][0], a.rows, a.rank, copies)

    def of_chain(adapter: bool, between: bool) -> Row:
        return chained([group_of(names, CHAINED_LAYERS) for names in GROUPS], adapter, between, stop_at)

    def of_group(names: Sequence[str], adapter: bool) -> Row:
        return measured(group_of(names), adapter, stop_at)

    parts: list[tuple[Row, Callable[[], Row]]] = [
        ({"group": "chain", "between": between, "adapter": adapter}, partial(of_chain, adapter, between))
        for adapter in (False, True)
        for between in (False, True)
    ]
    for names in GROUPS:
        parts += [({"group": "+".join(names), "adapter": adapter}, partial(of_group, names, adapter)) for adapter in (False, True)]
    for mine, part in parts:
        try:
            emit({**row, **mine, **part()})
        except Exception as error:
            emit(failed({**row, **mine}, error))


if __name__ == "__main__":
    with torch.no_grad():
        main()
