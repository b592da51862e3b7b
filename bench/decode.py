"""Decoding: tokens a second of the sampler, and how much of the memory-bandwidth bound its steps reach. A line of JSON for each part.

    python -m bench.decode --model qwen3-vl-4b --bpe qwen.tiktoken

A step must read the weights of the language model and of the vocabulary once, and the keys and values of all rows, those of a
prompt that rows have in common once, as they are stored. These bytes over the bandwidth of a copy on the same machine are
the least time of a step. Measured are the sampler as it runs (`sampler`: host work included) and, as CUDA graphs of their own,
the step that it replays (`step`) and parts of it: the forward pass, the drawing of tokens, attention, and all matrix products of
weights alone. `profile` names the kernels of one step. Each for the base and with an unmerged adapter, compiled and not;
attention and products, which these do not change, once.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bench import models
from bench.checkpoint import write_processor
from bench.group_prompts import conversations, encoded
from bench.profile_step import profiled
from bench.roofline import COPY_BYTES, copy_rate, seconds_of
from bench.rows import Row, emit, failed, part, significant
from bench.workload import TINY_GROUP, GroupSetting
from finesight.data.processor import Processor, load_processor
from finesight.data.sample import Sample
from finesight.models.adapters import apply_tuning
from finesight.models.compilation import keep_compiled_code
from finesight.models.decoding import BLOCK_TOKENS, block_bytes, decode_attention, divide_attention
from finesight.models.packed import PackedModel
from finesight.recipe import Recipe
from finesight.recipe_files import load_recipe
from finesight.sampling.drawing import uniform_draws
from finesight.sampling.engine import DecodingEngine, answering
from finesight.sampling.requests import EngineSize, Request, blocks_for
from finesight.sampling.rows import Rows, StepKind
from finesight.sampling.types import Completion, SamplingSettings

KERNELS = 12  # named in a profile
_WARM_TOKENS = 4  # of the completions before measuring: kernels are compiled and graphs captured


@dataclass(frozen=True)
class Form:
    """How the model computes."""

    adapter: bool
    compiled: bool


FORMS = tuple(Form(adapter, compiled) for adapter in (False, True) for compiled in (False, True))


def weight_bytes(packed: PackedModel) -> int:
    """What a step reads of weights: all layers of the language model, adapters included, the last norm and the vocabulary matrix."""
    text: Any = packed.base.model.language_model
    read = {id(p): p for module in (text.layers, text.norm, packed.base.lm_head) for p in module.parameters()}
    return sum(p.numel() * p.element_size() for p in read.values())


def live_tokens(prompt_tokens: int, rows: int, own_tokens: int) -> int:
    """Tokens of a group whose keys and values a step reads, as stored: whole blocks of the prompt once, the rest in each row.

    Args:
        own_tokens: of a row beyond its prompt.
    """
    shared = prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS
    return shared + rows * (prompt_tokens - shared + own_tokens) if rows else 0


class Bound:
    """The least seconds of a step.

    Args:
        bytes_s: of a copy, read and written.
    """

    def __init__(self, packed: PackedModel, bytes_s: float) -> None:
        config = packed.base.config.text_config
        self.weights, self.bytes_s = weight_bytes(packed), bytes_s
        self.token_bytes = block_bytes(config, packed.compute_dtype) / BLOCK_TOKENS

    def figures(self, tokens: float, step_s: float) -> Row:
        """What a step over so many live tokens reads, and the share of the bound that it reaches."""
        read = self.weights + tokens * self.token_bytes
        return {
            "weights_gb": significant(self.weights / 1e9),
            "keys_values_gb": significant(tokens * self.token_bytes / 1e9),
            "bound_ms": significant(1e3 * read / self.bytes_s),
            "share_percent": significant(100 * read / self.bytes_s / step_s, 3),
        }


class DecodeBench:
    """One model, measured in one form after another.

    Args:
        a: options of the script.
        common: of every row.
    """

    def __init__(self, a: argparse.Namespace, processor: Processor, recipe: Recipe, bytes_s: float, common: Row) -> None:
        self.a, self.processor, self.recipe, self.bytes_s, self.common = a, processor, recipe, bytes_s, common
        self.setting: GroupSetting = a.setting
        self.prompts = encoded(processor, conversations(processor, self.setting, a.rows // self.setting.generations))
        dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
        self.model: Any = models.build(a.model, device=a.device, dtype=dtype).eval()
        self.adapted = False
        self.notes: list[str] = []

    def rows(self, form: Form) -> Iterator[Row]:
        """Rows of one form; a part that fails is a row with its reason."""
        common = {**self.common, "adapter": form.adapter, "compiled": form.compiled}
        try:
            engine = self._engine(form)
        except Exception as error:
            yield failed({**common, "what": "sampler"}, error)
            return
        bound = Bound(engine.packed, self.bytes_s)
        with answering(engine.packed):
            yield self._part({**common, "what": "sampler"}, lambda: self._sampled(engine, bound))
            graphs: list[StepGraph] = []
            yield self._part({**common, "what": "step"}, lambda: self._step(engine, bound, graphs))
            yield from self._parts(engine, form, common)
            if not graphs:
                yield failed({**common, "what": "profile"}, "there is no step to profile")
                return
            yield self._part({**common, "what": "profile"}, lambda: profile_of(graphs[0], self.a.device))

    def clear(self) -> None:
        """Lets go of everything but the model."""
        gc.collect()
        if self.a.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _part(self, row: Row, measure: Callable[[], Row]) -> Row:
        return part(row, measure, stop_at=self.a.stop_at, notes=self.notes)

    def _engine(self, form: Form) -> DecodingEngine:
        """As the sampler makes it for a rollout of these prompts."""
        if form.adapter and not self.adapted:
            self.model = apply_tuning(self.model, self.recipe.tuning, self.processor.family, self.recipe.training.seed)
            self.adapted = True
        packed = PackedModel(self.model)
        length = self.setting.prompt_tokens + self.setting.completion_tokens
        own = Request(self.prompts[0], self._settings()).own_blocks
        blocks = 1 + self.a.rows * own + (len(self.prompts) + 1) * blocks_for(self.setting.prompt_tokens)
        size = EngineSize(self.a.rows, length, self.setting.completion_tokens, blocks)
        self.notes.clear()
        return DecodingEngine(packed, self.processor, size, compile_layers=form.compiled, say=self._say)

    def _say(self, text: str) -> None:
        self.notes.append(text)
        sys.stderr.write(text + "\n")

    def _settings(self, tokens: int | None = None) -> SamplingSettings:
        return SamplingSettings(
            max_completion_length=tokens or self.setting.completion_tokens,
            temperature=1.0,
            batch_size=self.a.rows,
            num_generations=self.setting.generations,
            seed=1,
        )

    # --- the sampler as it runs ---------------------------------------------------------------------------------

    def _sampled(self, engine: DecodingEngine, bound: Bound) -> Row:
        """A whole rollout, after a short one that compiles and captures."""
        begun = time.perf_counter()
        roll_out(engine, self.prompts, self._settings(_WARM_TOKENS))
        ready_s = time.perf_counter() - begun
        lengths, calls = roll_out(engine, self.prompts, self._settings())
        # The first call prefills, draws first tokens and starts a step; each later one takes what the step before drew.
        steps, decoding_s = max(map(max, lengths)) - 1, sum(calls[1:])
        prompt = self.setting.prompt_tokens
        live = [sum(live_tokens(prompt, sum(length > step for length in group), step) for group in lengths) for step in range(1, steps + 1)]
        drawn = sum(map(sum, lengths))
        return {
            "steps": steps,
            "completions": sum(map(len, lengths)),
            "completion_tokens_mean": significant(drawn / sum(map(len, lengths))),
            "step_ms": significant(1e3 * decoding_s / steps),
            "step_ms_median": significant(1e3 * statistics.median(calls[1:])),
            "tokens_s": significant((drawn - sum(map(len, lengths))) / decoding_s),
            "prefill_s": significant(calls[0]),
            "tokens_s_with_prefill": significant(drawn / sum(calls)),
            "ready_s": significant(ready_s),  # compiling, capturing
            **bound.figures(statistics.fmean(live), decoding_s / steps),
        }

    # --- a step by itself ---------------------------------------------------------------------------------------

    def _step(self, engine: DecodingEngine, bound: Bound, kept: list[StepGraph]) -> Row:
        """The step of all rows at half of their completions, replayed without anything in between."""
        rows = filled_rows(engine, self.prompts, self._settings(), self.a.rows)
        own = self.setting.completion_tokens // 2

        def step() -> None:
            rows.step(engine.decoder, self.a.rows, StepKind())

        graph = StepGraph(step, self.a.device)
        kept.append(graph)
        rows.lengths.fill_(self.setting.prompt_tokens + max(0, own - 12))  # timing takes 25 steps
        seconds = graph.seconds()
        live = len(self.prompts) * live_tokens(self.setting.prompt_tokens, self.setting.generations, own)
        rows.lengths.fill_(self.setting.prompt_tokens + own)
        return {"step_ms": significant(1e3 * seconds), "tokens_s": significant(self.a.rows / seconds), **bound.figures(live, seconds)}

    def _parts(self, engine: DecodingEngine, form: Form, common: Row) -> Iterator[Row]:
        """Parts of a step, each timed alone."""
        try:
            parts = self._functions(engine, form)
        except Exception as error:
            yield failed({**common, "what": "forward"}, error)
            return
        for name, function in parts.items():

            def measured(function: Callable[[], object] = function) -> Row:
                return {"step_ms": significant(1e3 * StepGraph(function, self.a.device).seconds())}

            yield self._part({**common, "what": name}, measured)

    def _functions(self, engine: DecodingEngine, form: Form) -> dict[str, Callable[[], object]]:
        """The forward pass and drawing; in the first form also what is the same in all of them."""
        count, packed, config = self.a.rows, engine.packed, engine.packed.base.config.text_config
        rows = filled_rows(engine, self.prompts, self._settings(), count)
        rows.lengths.fill_(self.setting.prompt_tokens + self.setting.completion_tokens // 2)
        like: dict[str, Any] = {"dtype": packed.compute_dtype, "device": packed.device}
        logits = torch.randn(count, config.vocab_size, **like)
        query = torch.randn(count, config.num_attention_heads, engine.pool.keys.shape[-1], **like)
        text: Any = packed.base.model.language_model
        linears = [m for layer in text.layers for name, m in layer.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in name]
        inputs = {m.in_features: torch.randn(count, m.in_features, **like) for m in (*linears, packed.base.lm_head)}

        def attention() -> None:
            parts = divide_attention(rows.table, rows.prompt_blocks, rows.lengths) if query.is_cuda else None
            for keys, values in zip(engine.pool.keys, engine.pool.values, strict=True):
                decode_attention(query, keys, values, rows.table, rows.lengths, parts, text.layers[0].self_attn.scaling)

        def products() -> None:
            for linear in (*linears, packed.base.lm_head):
                F.linear(inputs[linear.in_features], linear.weight)

        alike: dict[str, Callable[[], object]] = {
            "attention": attention,
            "products": products,
        }
        forward: dict[str, Callable[[], object]] = {
            "forward": lambda: engine.decoder.step(rows.tokens, rows.positions, rows.lengths, rows.table, rows.prompt_blocks),
            "drawing": lambda: rows.draw_tokens(logits, rows.uniform[:, 0], rows.settings),
        }
        return forward if form != FORMS[0] else {**forward, **alike}


def roll_out(engine: DecodingEngine, prompts: Sequence[Sample], settings: SamplingSettings) -> tuple[list[list[int]], list[float]]:
    """Answers all prompts; lengths of each prompt's completions, and seconds of each call of the engine."""
    done: list[list[Completion]] = [[] for _ in prompts]
    for place, sample in enumerate(prompts):
        engine.submit(Request(sample, settings, place=place, on_end=lambda number, one, own=done[place]: own.append(one)))  # type: ignore[misc]
    calls = []
    while engine.busy:
        begun = time.perf_counter()
        engine.step()
        calls.append(time.perf_counter() - begun)
    engine.finish()
    return [[len(one.token_ids) for one in own] for own in done], calls


def filled_rows(engine: DecodingEngine, prompts: Sequence[Sample], settings: SamplingSettings, count: int) -> Rows:
    """Rows as the engine fills them, over random keys and values; for use while the engine itself has nothing to do."""
    for values in (engine.pool.keys, engine.pool.values):
        values.normal_()
    forbidden = torch.tensor(sorted(engine.forbidden), device=engine.device)
    vocabulary = engine.packed.base.config.text_config.vocab_size
    table = blocks_for(engine.size.length_tokens)
    rows = Rows(count, table, engine.size.completion_tokens, vocabulary, engine.device, forbidden, engine.draw_tokens)
    blocks = iter(range(1, engine.pool.blocks))  # block 0 is the idle one
    for place, prompt in enumerate(prompts):
        shared = list(islice(blocks, len(prompt) // BLOCK_TOKENS))
        for number in range(settings.num_generations):
            own = list(islice(blocks, Request(prompt, settings).own_blocks))
            uniform = uniform_draws(settings.seed, place, number, settings.max_completion_length)
            row = place * settings.num_generations + number
            rows.fill(row, prompt.token_ids, prompt.next_position, [*shared, *own], settings, uniform)
    return rows


class StepGraph:
    """A function without arguments, as a CUDA graph; on a CPU as it is."""

    def __init__(self, function: Callable[[], object], device: str) -> None:
        self.function, self.device = function, device
        self.graph: torch.cuda.CUDAGraph | None = None
        if device != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and workspaces made before capture
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            function()

    def run(self) -> None:
        """Once."""
        if self.graph is None:
            self.function()
        else:
            self.graph.replay()

    def seconds(self) -> float:
        """Median of one run."""
        return seconds_of(self.run, self.device, repeats=20 if self.graph is not None else 3)


def profile_of(graph: StepGraph, device: str) -> Row:
    """What one run spends its time on; where a replay tells no kernels, those of a run without the graph."""
    row = {"replayed": graph.graph is not None, **profiled(graph.run, device, KERNELS)}
    return row if row["launches"] else {"replayed": False, **profiled(graph.function, device, KERNELS)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-vl-4b", choices=models.NAMES)
    parser.add_argument("--rows", type=int, default=64, help="completions side by side")
    parser.add_argument("--bpe", type=Path, help="the file qwen.tiktoken")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiled-only", action="store_true")
    parser.add_argument("--time-limit", type=float, default=75, help="seconds after which no further part begins")
    parser.add_argument("--tiny", action="store_true", help="only try it: the tiny model of the family, few rows, nothing compiled")
    a = parser.parse_args(arguments)
    a.stop_at = time.monotonic() + a.time_limit
    a.setting = TINY_GROUP if a.tiny else GroupSetting()
    if a.tiny:
        a.model, a.rows = models.tiny_of(a.model), 4
    row: Row = {
        "row": "decode", "model": a.model, "rows": a.rows, "generations": a.setting.generations, "visual_tokens": a.setting.visual_tokens,
        "text_tokens": a.setting.text_tokens, "completion_tokens": a.setting.completion_tokens, "temperature": 1.0,
        "precision": "bf16" if a.device == "cuda" else "float32",
    }  # fmt: skip
    try:
        bytes_s = copy_rate(COPY_BYTES if a.device == "cuda" else 2**20, a.device)
        emit({**row, "what": "copy", "gb_s": significant(bytes_s / 1e9)})
        with tempfile.TemporaryDirectory(prefix="finesight-bench-") as folder:
            if a.device == "cuda":
                keep_compiled_code()
            recipe = load_recipe(None, [f"model.name_or_path={write_processor(a.model, folder, a.bpe)}", "training.output_dir=none"])
            bench = DecodeBench(a, load_processor(folder, data=recipe.data), recipe, bytes_s, row)
            for form in FORMS:
                if a.compiled_only and not form.compiled:
                    continue
                if a.tiny and form.compiled:
                    continue  # takes longer on a CPU than all else together
                for measured in bench.rows(form):
                    emit(measured)
                bench.clear()
    except Exception as error:
        emit(failed({**row, "what": "sampler"}, error))


if __name__ == "__main__":
    main()
