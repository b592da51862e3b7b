"""A run as users have it, put together for measuring: the project's own preparation, session, loop, optimizer and feed.

Two things differ from `finesight train`: rows come from `bench.workload` in place of a file, and the weights are random
and made on the device (or, with --load, read from a checkpoint by the project's own loader). The clock only listens.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from bench import models, quantized, workload
from bench.checkpoint import write_processor
from bench.encoding import conversations
from finesight.data.feed import Feed, Step
from finesight.data.formats import ReadResult
from finesight.models.load import LoadedModel
from finesight.recipe import Recipe
from finesight.recipe_files import load_recipe
from finesight.training.loop import StepSource, TrainingLoop
from finesight.training.prepare import Prepared, prepare
from finesight.training.processes import start_accelerator
from finesight.training.saving import RunSaver
from finesight.training.session import RunResult, Session
from finesight.training.state import TrainerState
from finesight.training.telemetry import StepFigures, Telemetry

CACHE_GIB = 24.0  # of main memory, for kept features
ACTIVATIONS = ("none", "selective", "full", "offload")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every script that trains with our side."""
    parser.add_argument("--model", default="qwen3-vl-8b", choices=models.NAMES)
    parser.add_argument("--layers", type=int, help="fewer decoder layers than published, to try things out")
    parser.add_argument("--kind", default="chart", choices=workload.KINDS)
    parser.add_argument("--per-image", type=int, default=1, help="questions for each image")
    parser.add_argument("--no-share", action="store_true", help="compute what samples have in common once for each")
    parser.add_argument("--budget", type=int, default=8192, help="most tokens of a pack")
    parser.add_argument("--batch", type=int, default=64, help="samples of an optimizer step")
    parser.add_argument("--activations", default="none", choices=ACTIVATIONS, help="what is kept of a layer for its backward pass")
    parser.add_argument("--compile", action="store_true", help="compile the decoder layer and the tower block")
    parser.add_argument("--fp8", action="store_true", help="frozen weights in 8-bit floating point")
    parser.add_argument("--four-bit", action="store_true", help="frozen weights in 4 bits (NF4)")
    parser.add_argument("--quantize-all", action="store_true", help="with those: vocabulary matrices and the tower too")
    parser.add_argument("--cache", action="store_true", help="keep the features of the frozen tower")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps, those to warm up included")
    parser.add_argument("--warm", type=int, default=4, help="steps before measuring begins")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the samples; the steps are divided among them")
    parser.add_argument("--workers", type=int, default=8, help="processes that open and cut images")
    parser.add_argument("--images", default="memory", choices=("memory", "png"), help="decoded in memory, or PNG files that workers decode")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--seed", type=int, default=3407)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="any further setting of a recipe")
    parser.add_argument("--checkpoint", type=Path, help="folder with the processor's files (and weights, for --load); else made anew")
    parser.add_argument("--load", action="store_true", help="read the weights from --checkpoint, as users do, in place of making them")
    parser.add_argument("--bpe", type=Path, help="the file qwen.tiktoken, where there is no --checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further step begins")


def recipe_of(a: argparse.Namespace, checkpoint: Path, output_dir: Path) -> Recipe:
    """The options as the recipe that a user would write.

    Raises:
        RecipeError: this version of the project does not know a setting that an option stands for.
    """
    training = {
        "output_dir": str(output_dir),
        "train_batch_size": a.batch,
        "token_budget": a.budget,
        "max_steps": a.steps,
        "learning_rate": a.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
        # true and false where these say it all: the other policies have names only.
        "gradient_checkpointing": {"none": False, "full": True}.get(a.activations, a.activations),
        "seed": a.seed,
        "save_strategy": "no",
        "num_workers": a.workers,
        "torch_compile": a.compile,
        "feature_cache_gib": CACHE_GIB if a.cache else 0,
    }
    overrides = [f"model.name_or_path={checkpoint}", f"data.share_prefixes={not a.no_share}"]
    overrides += [f"training.{name}={value}" for name, value in training.items()]
    overrides += ["model.load_in_fp8=true"] if a.fp8 else []
    overrides += ["model.load_in_4bit=true"] if a.four_bit else []
    overrides += ["model.quantize_vocabulary=true", "model.quantize_tower=true"] if a.quantize_all else []
    return load_recipe(None, [*overrides, *a.set])


def workload_rows(a: argparse.Namespace) -> list[workload.Row]:
    """The rows that the run will use, each once in an epoch."""
    return workload.rows(a.kind, a.batch * -(-a.steps // a.epochs), per_image=a.per_image)


@dataclass
class Clock:
    """Listens to a loop: when each step was done, and how long the device waited for data. Times are perf_counter's.

    Args:
        warm: steps before measuring begins; peak memory is counted from there.
        stop_at: no further step begins after this time; None: never.
        on_done: told how many steps are done: before the first step 0, then after each.
    """

    device: torch.device
    warm: int
    total_steps: int
    stop_at: float | None = None
    on_done: Callable[[int], None] | None = None
    begun: float = 0.0  # as the loop asked for the first step
    ended: list[float] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)  # of each step: the device had nothing to do, at most so long, for want of data
    allocated_bytes: list[int] = field(default_factory=list)  # on the GPU after the backward pass of each step, no pack there
    compilations: list[int] = field(default_factory=list)  # in all, as each step was done
    first_step_at: float | None = None  # time.time() as the first step was done

    def listen(self, loop: TrainingLoop) -> None:
        """Puts itself beside a loop that has not begun."""
        loop.source = _TimedSource(loop.source, self)
        tell = loop.telemetry.step

        def told(figures: StepFigures) -> None:
            tell(figures)
            self._done(figures)

        loop.telemetry.step = told  # type: ignore[method-assign]

    def start(self) -> None:
        """The loop asks for its first step."""
        if self.on_done is not None:
            self.on_done(0)
        self.begun = time.perf_counter()

    def asked(self) -> None:
        """The loop asks for a further step: the backward pass of the one before is on its way, the next pack is not.

        Only so are memory figures of different steps of the same things: a pack that waits on the GPU is pixels in one epoch
        and features in another, and the last step has none behind it.
        """
        if self.device.type == "cuda":
            self.allocated_bytes.append(torch.cuda.memory_allocated(self.device))

    def _done(self, figures: StepFigures) -> None:
        number = len(self.ended)
        # The loop has waited for the loss; only the optimizer may still be at work. It counts to the next step, but for
        # where measuring begins and ends.
        if number in (0, self.warm - 1, self.total_steps - 1) and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.first_step_at = self.first_step_at or time.time()
        self.wait_s.append(figures.data_wait_s)
        self.compilations.append(compiled_graphs())
        if self.device.type == "cuda" and number + 1 == self.warm:
            torch.cuda.reset_peak_memory_stats(self.device)
        self.ended.append(time.perf_counter())
        if self.on_done is not None:
            self.on_done(len(self.ended))

    @property
    def out_of_time(self) -> bool:
        return self.stop_at is not None and time.perf_counter() > self.stop_at and len(self.ended) > self.warm

    @property
    def step_s(self) -> list[float]:
        """Seconds of each step, from the end of the one before (of the first: from being asked for) to its own."""
        return [end - begin for begin, end in zip([self.begun, *self.ended[:-1]], self.ended, strict=True)]


class _TimedSource:
    """A feed whose beginning is noticed, and which ends when time is up."""

    def __init__(self, source: StepSource, clock: Clock) -> None:
        self.source, self.clock = source, clock

    @property
    def steps_per_epoch(self) -> int:
        return self.source.steps_per_epoch

    @property
    def can_go_ahead(self) -> bool:
        return self.source.can_go_ahead

    def divide(self, step: Step, number: int) -> Step | None:
        return self.source.divide(step, number)

    def limit_tokens(self, token_budget: int) -> None:
        self.source.limit_tokens(token_budget)

    def stream(self, epoch: int, index: int, count: int) -> Iterator[Step]:
        self.clock.start()
        for step in self.source.stream(epoch, index, count):
            yield step
            self.clock.asked()
            if self.clock.out_of_time:
                return


def compiled_graphs() -> int:
    """Graphs compiled so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def compile_seconds() -> float:
    """Seconds that compiling took in this process, as torch counts them: tracing, forward and backward graphs."""
    from torch._dynamo.utils import compilation_time_metrics as times

    return sum(sum(times.get(name, ())) for name in ("_compile.compile_inner", "backward._backward_impl"))


def graph_breaks() -> int:
    """Places at which compiling gave up so far in this process."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


class MeasuredSession(Session):
    """A session whose steps are timed."""

    clock: Clock
    feed: Feed
    on_done: Callable[[int], None] | None = None  # see Clock

    def __init__(self, prepared: Prepared, a: argparse.Namespace, loaded: LoadedModel | None, started: float) -> None:
        self._options, self._started = a, started
        self.notes: list[str] = []  # what a user would be told beyond figures
        accelerator = start_accelerator(prepared.recipe, Path(prepared.recipe.training.output_dir), torch.device(a.device))
        super().__init__(prepared, accelerator, loaded=loaded, console=Console(stderr=True))

    def _say(self, text: str) -> None:
        super()._say(text)
        if text.startswith("Note:") or "uncompiled" in text or "the vision tower" in text:
            self.notes.append(text)

    def _loop(self, state: TrainerState, telemetry: Telemetry, saver: RunSaver) -> TrainingLoop:
        loop = super()._loop(state, telemetry, saver)
        self.feed = loop.source  # type: ignore[assignment]
        limit = self._options.time_limit
        stop_at = None if limit is None else self._started + limit
        self.clock = Clock(self.accelerator.device, self._options.warm, loop.total_steps, stop_at, self.on_done)
        self.clock.listen(loop)
        return loop


@dataclass(eq=False)
class Measured:
    """A run that is over."""

    session: MeasuredSession
    result: RunResult
    seconds: dict[str, float]  # from the start of the process on: what was done by when
    weights_bytes: int  # of all parameters and buffers, before training
    tower_bytes: int  # of the tower's, mergers included

    @property
    def text_config(self) -> Any:
        """Configuration of the language model."""
        return self.session.loaded.base.config.text_config

    @property
    def clock(self) -> Clock:
        return self.session.clock


def assemble(a: argparse.Namespace, folder: Path) -> tuple[MeasuredSession, dict[str, float]]:
    """Everything up to the first step.

    Args:
        folder: for images, the processor's files and the run's output.

    Returns:
        The session, and seconds from the start of the process to each stage's end.
    """
    started = time.perf_counter()
    seconds = {"imported": since_start()}
    checkpoint = a.checkpoint or write_processor(a.model, folder / "processor", a.bpe)
    recipe = recipe_of(a, checkpoint, folder / "run")
    rows = conversations(workload_rows(a), a.kind, folder if a.images == "png" else None)
    seconds["workload_made"] = since_start()
    prepared = prepare(recipe, sources=[ReadResult(rows, [], "messages", a.kind)])
    seconds["encoded"] = since_start()
    loaded = None if a.load else made(a, prepared)
    session = MeasuredSession(prepared, a, loaded, started)
    seconds["model_ready"] = since_start()
    return session, seconds


def run(a: argparse.Namespace, on_done: Callable[[int], None] | None = None) -> Measured:
    """Trains, and times it."""
    with tempfile.TemporaryDirectory(prefix="finesight-bench-") as name:
        session, seconds = assemble(a, Path(name))
        session.on_done = on_done
        weights, tower = weights_bytes(session.model), weights_bytes(session.packed.base.model.visual)
        result = session.run()
    if session.clock.first_step_at is not None:
        seconds["first_step"] = session.clock.first_step_at - psutil.Process().create_time()
    return Measured(session, result, seconds, weights, tower)


def made(a: argparse.Namespace, prepared: Prepared) -> LoadedModel:
    """The model that the options name, made on the device in the precision of the recipe."""
    device = torch.device(a.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = quantized.build(a.model, prepared.recipe.model, device=a.device, dtype=dtype, layers=a.layers)
    return LoadedModel(model.eval(), prepared.processor, device, dtype, prepared.processor.family)


def weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, storage that several share counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def since_start() -> float:
    """Seconds since this process began, the interpreter's start and all imports included."""
    return time.time() - psutil.Process().create_time()
