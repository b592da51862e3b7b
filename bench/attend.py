"""Attention of decoding: microseconds of a layer, and the rate at which keys and values are read. A line of JSON for each form.

    python -m bench.attend --model qwen3-vl-4b --rows 64

Rows in groups of one prompt each, as in a rollout halfway; all layers in turn, each with keys and values of its own, as a CUDA graph.
Bytes: those of a prompt that rows have in common once, as they are stored. Names are divisions: the fewest tokens of a part, then
programs for each processor, tokens of a tile, tiles read at once, warps of a program, registers of a thread; the first is in use.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch

from bench import models
from bench.decode import StepGraph, live_tokens
from bench.rows import Row, emit, failed, significant
from bench.workload import GroupSetting
from finesight.models.compilation import CompiledFunction
from finesight.models.decoding import BLOCK_TOKENS, MOST_PARTS, PART_TOKENS, KeyValuePool, Parts, decode_attention, divide_attention
from finesight.sampling.requests import blocks_for

# Tokens of a part; and forms of `AttentionTiles`.
PART_LENGTHS = (PART_TOKENS, 384)
TILES: tuple[tuple[Any, ...], ...] = (
    (4, 32, 3, 4, 128, False),
    (4, 32, 2, 4, 128, True),
    (3, 32, 4, 4, 168, True),
    (2, 64, 3, 4, 255, True),
)


class Attention:
    """Keys and values of all layers, and one query a row."""

    def __init__(self, name: str, rows: int, setting: GroupSetting) -> None:
        config = models.configuration(name).text_config
        own_tokens = setting.completion_tokens // 2
        prompt, shared = setting.prompt_tokens, setting.prompt_tokens // BLOCK_TOKENS
        own_blocks = blocks_for(prompt + setting.completion_tokens) - shared
        groups = rows // setting.generations
        self.pool = KeyValuePool(config, 1 + groups * shared + rows * own_blocks, torch.bfloat16, torch.device("cuda"))
        for values in (self.pool.keys, self.pool.values):
            values.normal_()
        prompts = [self.pool.take(shared) for _ in range(groups)]
        table = [[*prompts[row // setting.generations], *self.pool.take(own_blocks)] for row in range(rows)]
        self.table = torch.tensor(table, device="cuda")
        self.prompt_blocks = torch.full((rows,), shared, device="cuda")
        self.lengths = torch.full((rows,), prompt + own_tokens, device="cuda")
        heads, size = config.num_attention_heads, self.pool.keys.shape[-1]
        self.query = torch.randn(rows, heads, size, device="cuda", dtype=torch.bfloat16)
        self.scale = size**-0.5
        self.layer_bytes = groups * live_tokens(prompt, setting.generations, own_tokens) * self.pool.keys[0, 0].numel() * 2 * 2

    def divided(self, part_tokens: int) -> Parts:
        """What a step divides once for all layers."""
        return divide_attention(self.table, self.prompt_blocks, self.lengths, part_tokens)

    def every_layer(self, part_tokens: int, tiles: tuple[Any, ...] | None = None) -> None:
        """All layers in turn."""
        parts = self.divided(part_tokens)
        for layer in range(len(self.pool.keys)):
            self.layer(layer, parts, tiles)

    def layer(self, layer: int, parts: Parts, tiles: tuple[Any, ...] | None = None) -> torch.Tensor:
        """One of them."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        if tiles is None:
            return decode_attention(self.query, keys, values, self.table, self.lengths, parts, self.scale)
        from finesight.models import decoding_kernels  # needs Triton

        own = decoding_kernels.AttentionTiles(*tiles)
        return decoding_kernels.decode_attention(self.query, keys, values, self.table, parts, self.scale, BLOCK_TOKENS, own)


def measured(attention: Attention, stop_at: float) -> Iterator[Row]:
    """Of each form."""
    expected = attention.layer(0, attention.divided(PART_TOKENS)).float()
    layers = len(attention.pool.keys)
    compiled = CompiledFunction(divide_attention, print)
    dividing = {
        "division": lambda: attention.divided(PART_TOKENS),
        "division, compiled": lambda: compiled(attention.table, attention.prompt_blocks, attention.lengths),
    }
    for form, function in dividing.items():
        yield {"form": form, "us": significant(1e6 * StepGraph(function, "cuda").seconds(), 3)}
    for tiles in (None, *TILES):
        for part_tokens in PART_LENGTHS:
            if time.monotonic() > stop_at:
                return
            form = "/".join(map(str, (part_tokens, *(tiles or ("in use",)))))
            try:
                found = attention.layer(0, attention.divided(part_tokens), tiles).float()

                def run(part_tokens: int = part_tokens, tiles: tuple[Any, ...] | None = tiles) -> None:
                    attention.every_layer(part_tokens, tiles)

                seconds = StepGraph(run, "cuda").seconds() / layers
            except Exception as error:  # a division that this GPU has no room for
                yield failed({"form": form}, error)
                continue
            difference = ((found - expected).norm() / expected.norm()).item()
            rate = attention.layer_bytes / seconds / 1e9
            yield {
                "form": form,
                "us": significant(1e6 * seconds, 3),
                "gb_s": significant(rate, 3),
                "difference": significant(difference, 2),
            }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-vl-4b", choices=models.NAMES)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--time-limit", type=float, default=45, help="seconds after which nothing further is measured")
    a = parser.parse_args(arguments)
    stop_at = time.monotonic() + a.time_limit
    row: Row = {"row": "attend", "model": a.model, "rows": a.rows, "most_parts": MOST_PARTS}
    for figures in measured(Attention(a.model, a.rows, GroupSetting()), stop_at):
        emit({**row, **figures})


if __name__ == "__main__":
    with torch.no_grad():
        main()
