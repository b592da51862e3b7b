"""Peak memory of many configurations of one model, each trained for a few real steps; one line of JSON for each.

    python -m bench.memory 8b-quantised --bpe qwen.tiktoken
    python -m bench.memory 8b-quantised --names 8b-least 8b-4bit-full-2048 --bpe qwen.tiktoken

Every step is of the same samples, the first ones of the workload that fill its packs; the packs are told in full. Peaks are
what torch has allocated at most from the second step on (weights, adapters, optimizer state and whatever a step needs);
reserved memory and the CUDA context come on top. A model is built once for neighbouring configurations that can share it;
between two of them everything else is let go, and `left_gib` says what was not. On a CPU no memory is told.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import assembly, group_prompts, models, quantized, workload
from bench.checkpoint import write_processor
from bench.encoding import conversations
from bench.memory_settings import GROUPS, Configuration
from bench.planned import pack_of, planned
from bench.rows import Row, emit, failed
from finesight.data.conversation import Conversation
from finesight.data.encode import Encoder
from finesight.data.formats import ReadResult
from finesight.data.pack import PackPlan
from finesight.data.processor import Processor, load_processor
from finesight.data_settings import DataSettings
from finesight.models.adapters import apply_tuning
from finesight.models.load import LoadedModel
from finesight.recipe import Recipe
from finesight.training.prepare import Prepared, prepare
from finesight.training.rollout_source import RolloutSource
from finesight.training.run_sizes import rollout_sizes

KIND: workload.Kind = "chart"
ROWS = 128  # of the workload, to choose from
_FILL = 0.98  # of the budget: packs of a step are laid out evenly, and must still fit
GIB = 2**30


class MemorySession(assembly.MeasuredSession):
    """A measured session that leaves no weights on the disk."""

    def _fill(self, weights: dict[str, torch.Tensor] | None, folder: Path) -> None:
        pass


@dataclass(eq=False)
class Base:
    """A model in memory, for all configurations that can share it."""

    loaded: LoadedModel  # with the adapter, if there is to be one: it stays as it is from configuration to configuration
    weights_bytes: int  # of its tensors, before any adapter
    allocated_bytes: int  # on the GPU with nothing but this model
    build_peak_bytes: int
    seconds: float


class Bench:
    """Measures configurations one after another and keeps the model for the next one."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.gpu = a.device == "cuda"
        self.base: Base | None = None
        self.key: tuple[object, ...] | None = None
        self.problem: Exception | None = None  # why the present base could not be built
        self.workload = workload.rows(KIND, ROWS)
        gc.collect()
        gc.freeze()  # what is there by now stays: collections between configurations need not look at it
        self.processors: dict[tuple[str, int | None], Processor] = {}  # by model and pixel limit: reading one takes a second

    def rows(self, configurations: Sequence[Configuration]) -> Iterator[Row]:
        """A row for each; what fails is a row too, and the others go on."""
        begun = time.monotonic()
        for configuration in configurations:
            if time.monotonic() - begun > self.a.time_limit:
                yield failed(self.settings_of(configuration), "not measured: the time of this group was used up")
                continue
            try:
                row = self.measure(configuration)
            except Exception as error:  # one setting of many: the others go on
                row = failed(self.settings_of(configuration), error)
            # Outside of the handler: an error keeps the tensors of its frames.
            self.clear()
            yield row

    def settings_of(self, configuration: Configuration) -> Row:
        """What a row says of how it was measured."""
        return {
            "row": "memory",
            "system": "finesight",
            "name": configuration.name,
            "model": configuration.model,
            "kind": configuration.kind,
            "method": configuration.method,
            "recompute": configuration.activations,
            "token_budget": configuration.budget,
            "max_pixels": configuration.max_pixels,
            "compiled": configuration.compiled,
            "cap_gib": configuration.cap_gib,
            "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "default",
            "torch": torch.__version__,
            "steps": configuration.steps,
            "further": list(configuration.settings),
            **({} if configuration.group is None else {"group": asdict(configuration.group)}),
        }

    def measure(self, configuration: Configuration) -> Row:
        """Builds the model if it is not there, trains, and reads the counters."""
        checkpoint = self.checkpoint(configuration.model)
        a = self.arguments(configuration, checkpoint)
        with tempfile.TemporaryDirectory(prefix="finesight-bench-") as folder:
            processor = self.processor(configuration, checkpoint, assembly.recipe_of(a, checkpoint, Path(folder)).data)
            made, a.batch = self.conversations(configuration, processor)
            recipe = assembly.recipe_of(a, checkpoint, Path(folder) / "run")
            prepared = prepare(recipe, processor=processor, sources=[ReadResult(made, [], "messages", configuration.kind)])
            base = self.prepared_base(configuration, prepared)
            left_bytes = self.allocated() - assembly.weights_bytes(base.loaded.model)
            session = MemorySession(prepared, a, base.loaded, time.perf_counter())
            result = session.run()
        losses = [round(line["loss"], 6) for line in result.history if "loss" in line]
        refuse_wrong(losses, session.loaded.base.config.text_config.vocab_size)
        packs = [pack_of(plan, session.packed.tower_shape) for plan in plans_of_step(session)]
        rollout = rollout_sizes(prepared)
        compiled = configuration.compiled and not any("uncompiled" in note for note in session.notes)
        row: Row = {
            **self.settings_of(configuration),
            "settings": settings_of_recipe(recipe),
            "dtype": str(base.loaded.dtype).removeprefix("torch."),
            "compiled": compiled,
            "packs_in_step": len(packs),
            "pack": max(packs, key=lambda pack: pack["tokens"]),
            "packs": packs,
            **({} if rollout is None else {"rollout": asdict(rollout), "rollouts": rollout_figures(result.history)}),
            "steps_done": len(session.clock.ended),
            "step_s": [round(seconds, 4) for seconds in session.clock.step_s],
            "losses": losses,
            "trainable": result.parameters.trainable,
            "out_of_memory": getattr(result.state, "out_of_memory", 0),
            "notes": session.notes,
            "build_s": round(base.seconds, 1),
            "weights_tensors_gib": gib(base.weights_bytes),
            **(self.memory(session, base, left_bytes) if self.gpu else {"no_memory": "a CPU tells no memory"}),
        }
        return {**row, "planned": planned(row, checkpoint)}

    def memory(self, session: MemorySession, base: Base, left_bytes: int) -> Row:
        """What torch's allocator has counted, in GiB."""
        return {
            "weights_gib": gib(base.allocated_bytes),
            "build_peak_gib": gib(base.build_peak_bytes),
            "left_gib": gib(left_bytes),
            "between_steps_gib": gib(session.clock.allocated_bytes[0]),  # weights, adapters, optimizer state; the next packs
            "peak_allocated_gib": gib(torch.cuda.max_memory_allocated()),
            "peak_reserved_gib": gib(torch.cuda.max_memory_reserved()),
        }

    def arguments(self, configuration: Configuration, checkpoint: Path) -> argparse.Namespace:
        """The options of `bench.sft` that stand for a configuration."""
        parser = argparse.ArgumentParser()
        assembly.add_arguments(parser)
        given = ["--model", configuration.model, "--checkpoint", str(checkpoint), "--device", self.a.device]
        given += ["--budget", str(configuration.budget), "--activations", configuration.activations, "--workers", "0"]
        given += ["--steps", str(configuration.steps), "--warm", "1", *(["--compile"] if configuration.compiled else [])]
        given += [argument for override in configuration.overrides for argument in ("--set", override)]
        return parser.parse_args(given)

    def conversations(self, configuration: Configuration, processor: Processor) -> tuple[list[Conversation], int]:
        """The rows to train on, and how many samples (of reinforcement: completions) make a step."""
        if configuration.group is not None:
            prompts = group_prompts.conversations(processor, configuration.group, configuration.packs * configuration.steps)
            return prompts, configuration.packs * configuration.group.generations
        rows = rows_that_fill(self.workload, processor, configuration.packs * configuration.budget)
        return conversations(rows, KIND), len(rows)

    def checkpoint(self, model: str) -> Path:
        """A folder with the model's processor and configuration; written where it is missing."""
        folder: Path = self.a.folder / model
        if not (folder / "config.json").exists():
            write_processor(model, folder, self.a.bpe)
        return folder

    def processor(self, configuration: Configuration, checkpoint: Path, data: DataSettings) -> Processor:
        key = configuration.model, configuration.max_pixels
        if key not in self.processors:
            self.processors[key] = load_processor(checkpoint, data=data)
        return self.processors[key]

    # --- the model in memory ------------------------------------------------------------------------------------

    def prepared_base(self, configuration: Configuration, prepared: Prepared) -> Base:
        """The model of a configuration: the present one, or else a new one.

        Raises:
            Exception: whatever kept it from being built, also for the configurations after the one that met it.
        """
        if self.key != configuration.base:
            self.base = self.problem = None
            self.clear()
            self.key = configuration.base
            self.cap(configuration.cap_gib)
            try:
                self.base = self.build(configuration, prepared)
            except Exception as error:
                self.problem = error.with_traceback(None)
                raise
        if self.base is None:
            raise RuntimeError(f"its model could not be made: {self.problem}")
        return self.base

    def build(self, configuration: Configuration, prepared: Prepared) -> Base:
        dtype = torch.bfloat16 if self.gpu else torch.float32
        begun, before = time.perf_counter(), self.allocated()
        recipe, family = prepared.recipe, prepared.processor.family
        model = quantized.build(configuration.model, recipe.model, device=self.a.device, dtype=dtype)
        seconds = time.perf_counter() - begun
        peak = torch.cuda.max_memory_allocated() if self.gpu else 0
        allocated, weights = self.allocated() - before, assembly.weights_bytes(model)
        tuned: Any = apply_tuning(model.eval(), recipe.tuning, family, recipe.training.seed)
        loaded = LoadedModel(tuned, prepared.processor, torch.device(self.a.device), dtype, family)
        return Base(loaded, weights, allocated, peak - before, seconds)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.gpu else 0

    def cap(self, cap_gib: float | None) -> None:
        """Lets torch reserve no more than this, as on a smaller card; None: all there is."""
        if self.gpu:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(1.0 if cap_gib is None else min(1.0, cap_gib * GIB / total))

    def clear(self) -> None:
        """Lets go of everything but the model: compiled code, gradients, caches, workspaces; and sets the counters back."""
        torch._dynamo.reset()
        if self.base is not None:
            for parameter in self.base.loaded.model.parameters():
                parameter.grad = None
        gc.collect()
        if self.gpu:
            torch.cuda.synchronize()
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def plans_of_step(session: MemorySession) -> tuple[PackPlan, ...]:
    """The packs of a step; of reinforcement with completions as long as they may be, as nearly all of random weights are."""
    source: Any = session.feed
    if isinstance(source, RolloutSource):
        return source.schedule.plan(0, 0, source.feed.token_budget).plans
    plans: tuple[PackPlan, ...] = source.plan(0, 0).plans
    return plans


def rollout_figures(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Of each step of reinforcement: seconds of the rollout, lengths, and how far the sampler's log-probabilities are from the update's."""
    names = (
        "rollout_s", "seconds", "reward", "completions/mean_length", "frac_reward_zero_std",
        "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
    )  # fmt: skip
    return [{name: line[name] for name in names if name in line} for line in history if "loss" in line]


def rows_that_fill(rows: Sequence[workload.Row], processor: Processor, tokens: int) -> list[workload.Row]:
    """The first rows that fill packs of so many tokens together; one at least.

    Raises:
        ValueError: all rows together do not fill them.
    """
    encoder = Encoder(processor)
    room, chosen = tokens * _FILL, []
    for row in rows:
        (conversation,) = conversations([row], KIND)
        room -= len(encoder.encode(conversation))
        if room < 0 and chosen:
            return chosen
        chosen.append(row)
    raise ValueError(f"{len(rows)} rows do not fill {tokens:,} tokens; raise ROWS")


def refuse_wrong(losses: Sequence[float], vocabulary: int) -> None:
    """
    Raises:
        ValueError: losses are far beyond those of random weights: what was measured is no training.
    """
    if not losses or max(losses) > 2 * math.log(vocabulary):
        raise ValueError(
            f"losses {list(losses)} are not those of random weights, about {math.log(vocabulary):.1f}: something is computed wrongly"
        )


def settings_of_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe that was measured, by section.name: all that differs from its defaults but names of folders."""
    given = recipe.model_dump(exclude_defaults=True)
    left_out = {("model", "name_or_path"), ("training", "output_dir")}
    return {
        **{
            f"{section}.{name}": value
            for section, settings in given.items()
            if isinstance(settings, dict)
            for name, value in settings.items()
            if (section, name) not in left_out
        },
        **{section: settings for section, settings in given.items() if isinstance(settings, list)},  # rewards
    }


def gib(size: int) -> float:
    return round(size / GIB, 4)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--names", nargs="+", metavar="NAME", help="only these configurations of the group")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "finesight-bench-processors", help="for processors' files"
    )
    parser.add_argument("--bpe", type=Path, help="the file qwen.tiktoken, where they are not there yet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--time-limit", type=float, default=280, help="seconds after which no further configuration begins")
    parser.add_argument("--tiny", action="store_true", help="only try it: the tiny model of the family, the group's first and last alone")
    a = parser.parse_args(arguments)
    chosen = [configuration for configuration in GROUPS[a.group] if not a.names or configuration.name in a.names]
    if a.names and len(chosen) < len(a.names):
        parser.error(f"{a.group} has no {', '.join(sorted(set(a.names) - {c.name for c in chosen}))}")
    if a.tiny:
        chosen = [one.tiny(models.tiny_of(one.model)) for one in dict.fromkeys((chosen[0], chosen[-1]))]
    for row in Bench(a).rows(chosen):
        emit(row)


if __name__ == "__main__":
    main()
