"""Layers without a graph in one operator: what it gives where no kernel runs, and how the kernels divide products."""

from __future__ import annotations

import pytest
import torch

from finesight.models.few_rows import products_without_graph, stages_that_fit, tiles_for


@pytest.mark.parametrize("ranks", [(), (4, 0, 8)])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_plain_formula(ranks: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    sizes = (48, 16, 32)
    x, weights = torch.randn(5, 24), [torch.randn(size, 24) for size in sizes]
    biases = [torch.randn(size if biased and size != 16 else 0) for size in sizes]
    downs = [torch.randn(rank, 24) for rank in ranks]
    ups = [torch.randn(size, rank) for size, rank in zip(sizes, ranks, strict=False)]
    scales = [0.5, 1.0, 2.0][: len(ranks)]
    found = products_without_graph(x, weights, biases, downs, ups, scales)
    for place, (out, weight, bias) in enumerate(zip(found, weights, biases, strict=True)):
        expected = x @ weight.T + (bias if bias.numel() else 0)
        if ranks:
            expected = expected + scales[place] * (x @ downs[place].T) @ ups[place].T
        torch.testing.assert_close(out, expected)
    torch.library.opcheck(products_without_graph, (x, weights, biases, downs, ups, scales), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("shared_kib", "down_block", "stages"),
    [(227, 0, 4), (227, 64, 4), (227, 128, 2), (99, 0, 3), (99, 64, 2), (99, 128, 1)],  # Hopper; Ada and consumer Ampere
)
def test_loads_in_flight_fit_the_shared_memory(shared_kib: int, down_block: int, stages: int) -> None:
    tiles = tiles_for((2560,), 4096)
    assert (tiles.outputs, tiles.inputs) == (64, 128)
    assert stages_that_fit(tiles, 64, down_block, 4, shared_kib * 1024) == stages


@pytest.mark.parametrize(
    ("sizes", "inputs"), [((4096, 1024, 1024), 2560), ((9728, 9728), 2560), ((2560,), 4096), ((2560,), 9728), ((512,), 512)]
)
def test_tiles_keep_a_large_gpu_busy(sizes: tuple[int, ...], inputs: int) -> None:
    """Programs of the layers of Qwen3-VL-4B: for most of the processors of an H200, where 96 to 152 were fastest."""
    tiles = tiles_for(sizes, inputs)
    programs = tiles.parts * sum(-(-size // tiles.outputs) for size in sizes)
    assert 96 <= programs <= 160 if inputs > 512 else programs == 8
    assert inputs // tiles.parts >= 2 * tiles.inputs, "a part is too short for loads to be in flight"
