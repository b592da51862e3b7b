"""What the machine can do: rates of matrix products by themselves, and of copies. One line of JSON for each.

    python -m bench.roofline --model qwen3-vl-8b --tokens 8192

Products are timed with random operands (zeros run faster than any real data), the median of repetitions, each after
warm-up. `mix` is the rate that one decoder layer's own products would have, run one after another with nothing between
them: forward and input gradients, weighted by their arithmetic.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch

from bench import models
from bench.arithmetic import layer_matrices
from bench.rows import emit, failed, significant

REPEATS = 20
WARM = 5
COPY_BYTES = 4 * 2**30


def seconds_of(function: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """Median seconds of one call."""
    for _ in range(WARM):
        function()
    if device != "cuda":
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
        return statistics.median(times)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks)) / 1000


def product(rows: int, inputs: int, outputs: int, precision: str, device: str) -> Callable[[], object]:
    """A product (rows, inputs) × (inputs, outputs), the second operand stored as a linear layer's weight (outputs, inputs).

    Raises:
        ValueError: there is no such precision.
    """
    x = torch.randn(rows, inputs, device=device, dtype=torch.float32 if precision == "float32" else torch.bfloat16)
    weight = torch.randn(outputs, inputs, device=device, dtype=x.dtype)
    if precision in ("float32", "bf16"):
        return lambda: x @ weight.T
    if precision not in ("fp8", "fp8_exact"):
        raise ValueError(f"{precision!r} is none of float32, bf16, fp8, fp8_exact")
    largest = torch.finfo(torch.float8_e4m3fn).max
    x_scale, weight_scale = (matrix.abs().amax(1, keepdim=True).float() / largest for matrix in (x, weight))
    x8, weight8 = (x / x_scale).to(torch.float8_e4m3fn), (weight / weight_scale).to(torch.float8_e4m3fn)
    fast = precision == "fp8"  # sums kept in the tensor cores' shorter format between steps, or in float32
    return lambda: torch._scaled_mm(x8, weight8.T, scale_a=x_scale, scale_b=weight_scale.T, out_dtype=torch.bfloat16, use_fast_accum=fast)


def square_rate(size: int, precision: str, device: str) -> float:
    """FLOP a second of a product of two square matrices."""
    return 2 * size**3 / seconds_of(product(size, size, size, precision, device), device)


def mix_rate(model: str, tokens: int, precision: str, device: str) -> tuple[float, dict[str, float]]:
    """FLOP a second of one layer's products together, and of each shape (`inputs×outputs`) by itself."""
    shapes: dict[tuple[int, int], int] = {}
    for inputs, outputs in layer_matrices(models.configuration(model).text_config).values():
        for shape in ((inputs, outputs), (outputs, inputs)):  # forward; gradient of the input
            shapes[shape] = shapes.get(shape, 0) + 1
    seconds = {shape: seconds_of(product(tokens, *shape, precision, device), device) for shape in shapes}
    flop = {shape: 2.0 * tokens * shape[0] * shape[1] for shape in shapes}
    together = sum(flop[shape] * count for shape, count in shapes.items()) / sum(seconds[shape] * count for shape, count in shapes.items())
    return together, {f"{inputs}×{outputs}": flop[inputs, outputs] / seconds[inputs, outputs] for inputs, outputs in shapes}


def copy_rate(size_bytes: int, device: str) -> float:
    """Bytes a second, read and written, of a copy within the device's memory."""
    source = torch.randint(0, 255, (size_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / seconds_of(lambda: target.copy_(source), device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-vl-8b", choices=models.NAMES)
    parser.add_argument("--tokens", type=int, default=8192, help="rows of the layer's products")
    parser.add_argument("--size", type=int, default=8192, help="side of the square products")
    parser.add_argument("--precisions", nargs="+", help="of float32, bf16, fp8, fp8_exact")
    parser.add_argument("--copy-bytes", type=int, default=COPY_BYTES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(arguments)
    for precision in a.precisions or (["bf16", "fp8", "fp8_exact"] if a.device == "cuda" else ["float32"]):
        row = {"row": "roofline", "precision": precision, "model": a.model, "tokens": a.tokens, "size": a.size}
        try:
            mix, shapes = mix_rate(a.model, a.tokens, precision, a.device)
            rates = {name: significant(rate / 1e12) for name, rate in shapes.items()}
            square = significant(square_rate(a.size, precision, a.device) / 1e12)
            emit({**row, "square_tflop_s": square, "mix_tflop_s": significant(mix / 1e12), "shapes_tflop_s": rates})
        except Exception as error:  # one precision of several
            emit(failed(row, error))
    copy = {"row": "copy", "bytes": a.copy_bytes}
    try:
        emit({**copy, "gb_s": significant(copy_rate(a.copy_bytes, a.device) / 1e9)})
    except Exception as error:
        emit(failed(copy, error))


if __name__ == "__main__":
    main()
