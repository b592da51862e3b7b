"""Linear layers of few rows: what reading their weights takes, by cuBLAS and by kernels of our own. A line of JSON for each group.

    python -m bench.few_rows --model qwen3-vl-4b --rows 64

A group is the layers of one input in a decoder layer: queries, keys and values; attention's output; gate and up; down. Each is
captured as a CUDA graph over so many copies of its weights that none stays in the L2 cache, and told in microseconds for one
copy and in GB of matrices a second. `separate` is a product of cuBLAS for each layer, with adapters as without kernels for few
rows; other names are divisions (`Tiles`: outputs, inputs, parts, warps, stages), the first the one that is in use.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

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
# Divisions to compare: of outputs, inputs, warps, stages; and the numbers of programs aimed at.
SHAPES = ((128, 64, 4, 4), (128, 64, 8, 4), (64, 128, 4, 4), (64, 64, 4, 6), (32, 128, 4, 4))
PROGRAMS = (132, 264)


class Group:
    """Copies of the layers of one input, with matrices of adapters.

    Args:
        sizes: outputs of each.
    """

    def __init__(self, sizes: Sequence[int], inputs: int, rows: int, rank: int) -> None:
        self.sizes, self.inputs, self.rank = list(sizes), inputs, rank
        self.weight_bytes = 2 * inputs * sum(sizes)
        copies = max(2, COPIED_BYTES // self.weight_bytes)
        self.x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
        self.weights = [[torch.randn(size, inputs, device="cuda", dtype=torch.bfloat16) for size in sizes] for _ in range(copies)]
        self.downs = [[torch.randn(rank, inputs, device="cuda") for _ in sizes] for _ in range(copies)]
        self.ups = [[torch.randn(size, rank, device="cuda") for size in sizes] for _ in range(copies)]

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

    def seconds(self, way: Callable[[int], object]) -> float:
        """Of one copy."""

        def every() -> None:
            for copy in range(len(self.weights)):
                way(copy)

        return StepGraph(every, "cuda").seconds() / len(self.weights)


def divisions(sizes: Sequence[int], inputs: int) -> Iterator[Tiles]:
    """Those to compare, the one in use first."""
    seen = {used := tiles_for(sizes, inputs)}
    yield used
    for outputs, width, warps, stages in SHAPES:
        for programs in PROGRAMS:
            parts = max(1, min(16, round(programs / sum(-(-size // outputs) for size in sizes))))
            tiles = Tiles(outputs, width, parts, warps, stages)
            if tiles not in seen:
                seen.add(tiles)
                yield tiles


def measured(group: Group, adapter: bool, stop_at: float) -> Row:
    """Microseconds and GB a second of each way; the largest difference from the separate products, relative to their norm."""
    ways: dict[str, Callable[[int], list[torch.Tensor]]] = {"separate": lambda copy: group.separate(copy, adapter)}
    for tiles in divisions(group.sizes, group.inputs):
        ways["/".join(map(str, tiles))] = lambda copy, tiles=tiles: group.streamed(copy, adapter, tiles)  # type: ignore[misc]
    expected, row, difference = group.separate(0, adapter), {}, 0.0
    for name, way in ways.items():
        if time.monotonic() > stop_at:
            row[name] = None
            continue
        try:
            found = way(0)
            difference = max([difference, *(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))])
            seconds = group.seconds(way)
        except Exception as error:  # a division that this GPU has no room for
            row[name] = failed({}, error)["reason"]
            continue
        row[name] = [significant(1e6 * seconds, 3), significant(group.bytes(adapter) / seconds / 1e9, 3)]
    return {"us_and_gb_s": row, "difference": significant(difference, 2)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-vl-4b", choices=models.NAMES)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16, help="of adapters")
    parser.add_argument("--time-limit", type=float, default=45, help="seconds after which nothing further is measured")
    a = parser.parse_args(arguments)
    stop_at = time.monotonic() + a.time_limit
    row: Row = {"row": "few_rows", "model": a.model, "rows": a.rows, "rank": a.rank}
    matrices = layer_matrices(models.configuration(a.model).text_config)
    for names in GROUPS:
        for adapter in (False, True):
            mine = {**row, "group": "+".join(names), "adapter": adapter}
            try:
                group = Group([matrices[name][1] for name in names], matrices[names[0]][0], a.rows, a.rank)
                emit({**mine, **measured(group, adapter, stop_at)})
            except Exception as error:
                emit(failed(mine, error))


if __name__ == "__main__":
    with torch.no_grad():
        main()
