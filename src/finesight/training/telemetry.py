"""What a run tells while it runs: a live view, `metrics.jsonl`, and whatever trackers the user asked for.

Nothing here affects training. On a terminal the figures of the present step stand in a live table; elsewhere a line is
printed now and then.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    import torch

METRICS = "metrics.jsonl"
# Without a terminal, lines come at least this far apart.
PLAIN_INTERVAL_S = 5.0


@dataclass
class StepFigures:
    """What one optimizer step was. Counts are of the whole step, over all processes."""

    step: int  # counted from 1
    epoch: float
    loss: float
    grad_norm: float
    learning_rates: Mapping[str, float]  # of each part that trains
    seconds: float
    num_samples: int
    num_tokens: int  # computed
    unshared_tokens: int  # had nothing been shared
    padded_tokens: int  # had the step been padded to its longest sample, nothing shared
    num_targets: int  # supervised tokens
    memory_bytes: int  # peak so far: of the GPU, or of the process on a CPU
    data_wait_s: float = 0.0  # the device had nothing to do for at most so long, for want of data
    stored_items: int | None = None  # images and videos of this process whose features were kept; None: nothing is kept
    computed_items: int = 0  # whose features were computed
    further: Mapping[str, float] = field(default_factory=dict)  # what an algorithm has to tell besides


@dataclass
class _Window:
    """Steps since the last line of metrics."""

    figures: list[StepFigures] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        last, seconds = self.figures[-1], max(sum(f.seconds for f in self.figures), 1e-9)

        def total(name: str) -> int:
            return sum(getattr(f, name) for f in self.figures)

        rates = (
            {f"learning_rate_{part}": rate for part, rate in last.learning_rates.items()}
            if len(set(last.learning_rates.values())) > 1
            else {}
        )
        own = {
            "step": last.step,
            "epoch": round(last.epoch, 6),
            "loss": sum(f.loss * f.num_targets for f in self.figures) / max(total("num_targets"), 1),
            "learning_rate": last.learning_rates.get("language_model", next(iter(last.learning_rates.values()))),
            **rates,
            "grad_norm": last.grad_norm,
            "samples_per_s": total("num_samples") / seconds,
            "supervised_tokens_per_s": total("num_targets") / seconds,
            "tokens_per_s": total("num_tokens") / seconds,
            "padding_saved": padding_saved(total("unshared_tokens"), total("padded_tokens")),
            "sharing_ratio": sharing_ratio(total("unshared_tokens"), total("num_tokens")),
            "memory_gib": round(last.memory_bytes / 2**30, 3),
            "data_wait_share": min(1.0, sum(f.data_wait_s for f in self.figures) / seconds),
            **self._hit_rate(),
            "seconds": seconds,
        }
        # A reward function may log a figure under any name; it must not pass for one of the run's own.
        return own | {name if name not in own else f"logged/{name}": value for name, value in self._further().items()}

    def _further(self) -> dict[str, float]:
        """Means of what algorithms tell, each over the steps that told it."""
        names = dict.fromkeys(name for f in self.figures for name in f.further)
        told = {name: [f.further[name] for f in self.figures if name in f.further] for name in names}
        return {name: sum(values) / len(values) for name, values in told.items()}

    def _hit_rate(self) -> dict[str, float]:
        """Share of images and videos whose features were kept; nothing where none are, or there were no images."""
        stored = sum(f.stored_items or 0 for f in self.figures)
        items = stored + sum(f.computed_items for f in self.figures)
        return {} if self.figures[-1].stored_items is None or not items else {"feature_hit_rate": stored / items}


def padding_saved(unshared_tokens: int, padded_tokens: int) -> float:
    """Share of the tokens of a padded batch that would have been padding."""
    return 1.0 - unshared_tokens / padded_tokens if padded_tokens else 0.0


def sharing_ratio(unshared_tokens: int, num_tokens: int) -> float:
    """Tokens of the samples over tokens computed: 1 where nothing was shared."""
    return unshared_tokens / num_tokens if num_tokens else 1.0


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory allocated on a GPU; on a CPU what the process holds now."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, on the disk as soon as it is written.

    Args:
        resumed_step: lines of later steps, from before an interruption, are removed.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= resumed_step]
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            temporary.replace(path)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, content: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that a crash cut off is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    return [json.loads(line) for line in lines if _step_of(line) < float("inf")]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut off by a crash


class Telemetry:
    """Tells of a run's steps and evaluations. Used as a context manager, so that the terminal is left in order.

    Args:
        output_dir: where `metrics.jsonl` lies.
        total_steps: of the whole run.
        start_step: steps done before, on resume.
        logging_steps: steps between lines of metrics.
        console: where to print; None: nowhere.
        track: receives (values, step) for trackers.
        main_process: other processes stay silent and write nothing.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        total_steps: int,
        start_step: int = 0,
        logging_steps: int = 1,
        console: Console | None = None,
        track: Callable[[dict[str, Any], int], None] | None = None,
        main_process: bool = True,
    ) -> None:
        self.total_steps, self.logging_steps = total_steps, logging_steps
        self.console = console if console is not None and main_process else Console(quiet=True)
        self.track = track
        self.history: list[dict[str, Any]] = []
        self._metrics = MetricsFile(output_dir / METRICS, start_step) if main_process else None
        if main_process:
            self.history = read_metrics(output_dir / METRICS)
        self._window = _Window()
        self._begun, self._start_step, self._last_line = time.monotonic(), start_step, float("-inf")
        self._live: Live | None = None
        self._progress = Progress(
            TextColumn("[bold]step"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console,
        )  # fmt: skip
        self._task: TaskID = self._progress.add_task("train", total=total_steps, completed=start_step)
        self._shown: dict[str, Any] = {}

    def __enter__(self) -> Telemetry:
        if self.console.is_terminal and not self.console.quiet:
            self._live = Live(self._view(), console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._window.figures and exception[0] is None:
            self._log()
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._metrics is not None:
            self._metrics.close()

    def step(self, figures: StepFigures) -> None:
        """Takes in one step; every `logging_steps` and at the last one a line of metrics is written."""
        self._window.figures.append(figures)
        shown = _Window([figures]).summary()
        self._shown.update(shown)
        if figures.step % self.logging_steps == 0 or figures.step == self.total_steps:
            self._log()
        self._progress.update(self._task, completed=figures.step)
        self._show(figures.step)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Takes in an evaluation; it becomes a line of metrics of its own."""
        content = {"step": step, **values}
        self._record(content, "eval")
        self._shown.update({name: value for name, value in values.items() if isinstance(value, (int, float))})
        text = ", ".join(f"{name} {_short(value)}" for name, value in values.items() if isinstance(value, (int, float)))
        self.message(f"step {step}: {text}")

    def event(self, step: int, name: str, values: Mapping[str, Any], text: str) -> None:
        """Something out of the ordinary in a step: a line of metrics with `event` for its name, and a note."""
        self._record({"step": step, "event": name, **values}, name)
        self.message(f"step {step}: {text}")

    def message(self, text: str) -> None:
        """A line that stays above the live view."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warning(self, text: str) -> None:
        """The same for what should not be overlooked."""
        self.console.print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)

    def _log(self) -> None:
        self._record(self._window.summary(), "train")
        self._window = _Window()

    def _record(self, content: dict[str, Any], prefix: str) -> None:
        if self._metrics is not None:
            self._metrics.write(content)
        self.history.append(content)
        if self.track is not None:
            numbers = {f"{prefix}/{k.removeprefix('eval_')}": v for k, v in content.items() if k != "step" and isinstance(v, (int, float))}
            self.track(numbers, content["step"])

    def _show(self, step: int) -> None:
        if self._live is not None:
            self._live.update(self._view())
            return
        now = time.monotonic()
        if now - self._last_line < PLAIN_INTERVAL_S and step != self.total_steps:
            return
        self._last_line = now
        done = max(step - self._start_step, 1)
        left = (now - self._begun) / done * (self.total_steps - step)
        s = self._shown
        reward = f"reward {s['reward']:.3f}  " if "reward" in s else ""
        self.message(
            f"step {step}/{self.total_steps}  {reward}loss {s['loss']:.4f}  lr {s['learning_rate']:.2e}  {s['supervised_tokens_per_s']:,.0f} {self._targets} tokens/s  "
            f"{s['samples_per_s']:.1f} samples/s  {duration(left)} left"
        )

    def _view(self) -> Group:
        table = Table.grid(padding=(0, 2))
        s = self._shown
        rows = [
            ("loss", _short(s.get("loss")), f"{self._targets} tokens/s", _count(s.get("supervised_tokens_per_s"))),
            ("learning rate", _short(s.get("learning_rate")), "samples/s", _short(s.get("samples_per_s"))),
            ("gradient norm", _short(s.get("grad_norm")), "padding saved", _percent(s.get("padding_saved"))),
            (*self._held_out(), "sharing ratio", _short(s.get("sharing_ratio"))),
            ("epoch", _short(s.get("epoch")), "memory", f"{s['memory_gib']:.2f} GiB" if "memory_gib" in s else "–"),
            ("waiting for data", _percent(s.get("data_wait_share")), "features kept", _percent(s.get("feature_hit_rate"))),
            *self._reward_rows(),
        ]
        for row in rows:
            table.add_row(*row)
        return Group(table, self._progress)

    @property
    def _learns_from_rewards(self) -> bool:
        return not {"reward", "frac_reward_zero_std"}.isdisjoint(self._shown)  # of a step without any reward, the latter alone

    @property
    def _targets(self) -> str:
        """What the tokens are that have a loss."""
        return "completion" if self._learns_from_rewards else "supervised"

    def _held_out(self) -> tuple[str, str]:
        measured = "reward" if self._learns_from_rewards else "loss"
        return f"held-out {measured}", _short(self._shown.get(f"eval_{measured}"))

    def _reward_rows(self) -> list[tuple[str, str, str, str]]:
        """Of reinforcement: what completions earn, and how they are."""
        s = self._shown
        if "reward" not in s:
            return []
        return [
            ("reward", _short(s["reward"]), "constant groups", _percent(s.get("frac_reward_zero_std"))),
            ("completion tokens", _count(s.get("completions/mean_length")), "cut off", _percent(s.get("completions/clipped_ratio"))),
            ("entropy", _short(s.get("entropy")), "sampler off by", _short(s.get("sampling/sampling_logp_difference/mean"))),
        ]


def progress_bars(console: Console) -> Progress:
    """Bars with what is done, the time it took and the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


@contextmanager
def progress(console: Console | None, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left for a long step of preparation; plain lines where there is no terminal.

    Yields a function that takes how many more are done.
    """
    if console is None or console.quiet:
        yield lambda count: None
        return
    if console.is_terminal:
        with progress_bars(console) as bar:
            task = bar.add_task(description, total=total)
            yield lambda count: bar.advance(task, count)
        return
    begun = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL_S:
            last = now
            left = duration((now - begun) / done * (total - done))
            console.print(f"{description}: {done:,} of {total:,}, {left} left", markup=False, highlight=False, soft_wrap=True)

    yield advance
    console.print(
        f"{description}: {done:,} of {total:,} in {duration(time.monotonic() - begun)}", markup=False, highlight=False, soft_wrap=True
    )


def duration(seconds: float) -> str:
    """Seconds as people read them: 8.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _short(value: float | int | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
