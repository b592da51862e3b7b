"""Layers of few rows on a GPU: near float64, alike for a row whatever its neighbours, captured and compiled."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from finesight.models import few_rows
from finesight.models.few_rows import MOST_ROWS, Tiles, products_without_graph
from finesight.models.linear import AccumulatedLinear, accumulate_adapters, project

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

# Sizes of Qwen3-VL-4B, of Qwen3-VL-2B's keys, and one that no tile divides.
SHAPES = [((4096, 1024, 1024), 2560), ((9728, 9728), 2560), ((2560,), 4096), ((2560,), 9728), ((1024, 48), 2048), ((70, 33, 130), 1000)]
RANKS = [(0, 0, 0), (8, 8, 8), (16, 0, 5), (64, 64, 64), (128, 128, 128)]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


class Layers:
    """Random layers of one input."""

    def __init__(self, sizes: tuple[int, ...], inputs: int, ranks: tuple[int, ...], biased: bool, dtype: torch.dtype) -> None:
        torch.manual_seed(0)

        def drawn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, device="cuda") * scale).to(dtype)

        ranks = ranks[: len(sizes)]
        self.x = drawn(MOST_ROWS, inputs, dtype=dtype)
        self.weights = [drawn(size, inputs, dtype=dtype, scale=inputs**-0.5) for size in sizes]
        self.biases = [drawn(size if biased else 0, dtype=dtype) for size in sizes]
        self.downs = [drawn(rank, inputs, dtype=torch.float32, scale=inputs**-0.5) for rank in ranks if any(ranks)]
        self.ups = [drawn(size, rank, dtype=torch.float32) for size, rank in zip(sizes, ranks, strict=True) if any(ranks)]
        self.scales = [0.5 + place for place in range(len(sizes)) if any(ranks)]

    def found(self, x: torch.Tensor) -> list[torch.Tensor]:
        return products_without_graph(x, self.weights, self.biases, self.downs, self.ups, self.scales)

    def exact(self, x: torch.Tensor) -> list[torch.Tensor]:
        """In float64, of matrices rounded to the precision of the product."""
        outs = []
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            out = x.double() @ weight.double().T + (bias.double() if bias.numel() else 0)
            if self.downs:
                down, up = (m[place].to(x.dtype).double() for m in (self.downs, self.ups))
                out = out + self.scales[place] * (x.double() @ down.T) @ up.T
            outs.append(out)
        return outs


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Within half a step of the precision, and what a sum in float32 may be off."""
    error = (found.double() - exact).abs() - exact.abs() * ROUNDING[found.dtype]
    assert error.max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize(("sizes", "inputs"), SHAPES, ids=str)
def test_near_float64_and_alike_for_a_row_whatever_its_neighbours(
    sizes: tuple[int, ...], inputs: int, ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    layers = Layers(sizes, inputs, ranks, biased=ranks[0] != 8, dtype=dtype)
    whole = layers.found(layers.x)
    for out, exact in zip(whole, layers.exact(layers.x), strict=True):
        assert_rounded_once(out, exact)
    for rows in (1, 3, 17, 33):
        for out, part in zip(whole, layers.found(layers.x[:rows]), strict=True):
            assert torch.equal(out[:rows], part), f"{rows} rows"
    for out, last in zip(whole, layers.found(layers.x[-1:]), strict=True):
        assert torch.equal(out[-1:], last)


TILES = [
    Tiles(16, 128, 4, 4, 4),
    Tiles(64, 128, 2, 4, 4, overlapped=False),
    Tiles(128, 64, 1, 4, 4),
    Tiles(128, 64, 8, 8, 5),
    Tiles(256, 64, 2, 8, 4),
]


@pytest.mark.parametrize("tiles", TILES)
def test_every_division_gives_the_same_sums(tiles: Tiles) -> None:
    from finesight.models import few_rows_kernels  # needs Triton, which only machines with a GPU have

    for ranks in ((0, 0, 0), (16, 8, 16)):
        layers = Layers((4096, 1024, 1024), 2560, ranks, biased=True, dtype=torch.bfloat16)
        found = few_rows_kernels.few_rows_products(layers.x, layers.weights, layers.biases, layers.downs, layers.ups, layers.scales, tiles)
        for out, exact in zip(found, layers.exact(layers.x), strict=True):
            assert_rounded_once(out, exact)


@pytest.mark.parametrize("ranks", [(0,), (16,)])
@pytest.mark.parametrize("tiles", [Tiles(64, 128, 4, 4, 4), Tiles(64, 64, 1, 4, 6), Tiles(64, 128, 4, 8, 4)])
def test_launches_that_follow_one_another_wait_for_what_they_read(tiles: Tiles, ranks: tuple[int, ...]) -> None:
    """A long chain, where each product's input, and at times its matrix, is written by the launch ahead: as launches that do not overlap."""
    from finesight.models import few_rows_kernels

    length, layers = 24, Layers((2560,), 2560, ranks, biased=True, dtype=torch.bfloat16)
    weights, fresh = [layers.weights[0].clone() for _ in range(length)], torch.empty_like(layers.weights[0])

    def chain(tiles: Tiles) -> torch.Tensor:
        x = layers.x
        for place, weight in enumerate(weights):
            if place % 4 == 3:  # by a kernel that does not know of those that overlap
                weight = fresh.copy_(weight)
            given = [[weight], layers.biases, layers.downs, layers.ups, layers.scales]
            x = few_rows_kernels.few_rows_products(x, *given, tiles)[0]
            if place % 3 == 2:
                x = x / x.float().std().to(x.dtype)
            fresh.zero_()
        return x

    expected = chain(tiles._replace(overlapped=False))
    assert expected.isfinite().all() and expected.std() > 0
    assert torch.equal(chain(tiles), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(tiles)
    for _ in range(50):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


def test_more_rows_and_strided_matrices_go_another_way() -> None:
    layers = Layers((256, 64), 512, (8, 8), biased=True, dtype=torch.bfloat16)
    x = torch.randn(MOST_ROWS + 1, 512, device="cuda", dtype=torch.bfloat16)
    for out, exact in zip(layers.found(x), layers.exact(x), strict=True):
        assert (out.double() - exact).norm() < 1e-2 * exact.norm()
    layers.weights[0] = layers.weights[0].T.contiguous().T
    for out, exact in zip(layers.found(layers.x), layers.exact(layers.x), strict=True):
        assert (out.double() - exact).norm() < 1e-2 * exact.norm()


class Adapted(nn.Module):
    """Two plain layers and one without an adapter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.plain = (
            nn.Linear(512, size, bias=size == 256, device="cuda", dtype=torch.bfloat16) for size in (512, 256, 128)
        )


def adapted() -> tuple[nn.Module, list[nn.Module]]:
    model = get_peft_model(Adapted(), LoraConfig(r=16, lora_alpha=8, target_modules=["query", "key"], init_lora_weights=False))
    assert accumulate_adapters(model) == 2
    inner = model.base_model.model
    return model, [inner.query, inner.key, inner.plain]


def graph_outputs(layers: list[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """With a graph of gradients, which goes the way of training."""
    with torch.enable_grad():
        return [out.detach() for out in project(layers, x)]


@pytest.mark.parametrize("rows", [5, 64, 100])
def test_without_a_graph_as_with_one(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from finesight.models import few_rows_kernels

    model, layers = adapted()
    assert isinstance(layers[0], AccumulatedLinear)
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    calls = []
    kernel = few_rows_kernels.few_rows_products
    monkeypatch.setattr(few_rows_kernels, "few_rows_products", lambda *given: calls.append(len(given[3])) or kernel(*given))
    with torch.no_grad():
        for a, b in zip(project(layers, x), graph_outputs(layers, x), strict=True):
            assert (a.double() - b.double()).norm() < 1e-2 * b.double().norm()
        with model.disable_adapter():
            for layer, a in zip(layers, project(layers, x), strict=True):
                expected = layer(x)
                assert (a.double() - expected.double()).norm() < 5e-3 * expected.double().norm()
    if rows <= few_rows.MOST_ROWS:
        assert calls[:2] == [3, 0]  # matrices of adapters: one a layer, and none where they are switched off


def test_compiled_once_for_any_number_of_rows_and_captured() -> None:
    torch._dynamo.reset()
    _, layers = adapted()
    compiled = torch.compile(lambda x: [out * 2 for out in project(layers, x)], dynamic=True)
    with torch.no_grad():
        for rows in (64, 7, 200):
            x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
            for a, b in zip(compiled(x), project(layers, x), strict=True):
                assert torch.equal(a, b * 2)
        x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
        torch.cuda.set_sync_debug_mode("error")
        try:
            compiled(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = compiled(x)
        x.normal_()
        graph.replay()
        for a, b in zip(captured, compiled(x), strict=True):
            assert torch.equal(a, b)
