"""Where one steady step spends its time: torch.profiler over a whole step of `bench.sft`. One line of JSON.

    python -m bench.profile_step --bpe qwen.tiktoken --compile

Kernels are grouped by what they do; gaps are the time in which nothing ran on the GPU. Kernels of several streams may overlap,
so that groups and gaps together can be more than the step. On a CPU, operators take the place of kernels.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench import assembly
from bench.rows import Row, emit, failed, significant
from bench.sft import settings_of

STEP = "measured step"
OTHER = "elementwise, norms and reductions"
# The first pattern that is found in a name says what a kernel or operator does.
GROUPS = (
    (OTHER, r"^triton_(poi|red|per)_"),  # written by the compiler; named after all that was fused into them
    ("float8 conversion", r"quantize|transpose_bytes"),
    ("attention", r"flash|fmha|attention|attn|sdpa|varlen"),
    (
        "matrix products",
        r"gemm|nvjet|cutlass|wgmma|cublas|xmma|splitk|adapted_product|float8_product|(^|::)_?(scaled_|add|b|ba)?mm_?\b|linear|matmul",
    ),
    ("optimizer", r"adam|multi_tensor|foreach"),
    ("copies", r"memcpy|memset|copy|(^|::)(cat|clone|index|gather|scatter|to|contiguous)|index|gather|scatter|CatArray|fill"),
)


@dataclass(frozen=True)
class Interval:
    """One kernel, or all calls of one operator."""

    name: str
    start_us: float
    us: float
    calls: int = 1


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def summary(intervals: Sequence[Interval], step_us: float, busy_us: float, most: int = 5) -> Row:
    """Times by group, gaps, and the `most` largest costs by name."""
    groups = _gathered(intervals, lambda interval: group_of(interval.name))
    names = _gathered(intervals, lambda interval: short_name(interval.name))
    return {
        "step_s": significant(step_us / 1e6),
        "gaps": {"seconds": significant((step_us - busy_us) / 1e6), "share": significant(1 - busy_us / step_us, 3)},
        "groups": {group: _cost(members, step_us) for group, members in groups},
        "largest": [{"name": name, "group": group_of(members[0].name), **_cost(members, step_us)} for name, members in names[:most]],
    }


def _gathered(intervals: Sequence[Interval], key: Callable[[Interval], str]) -> list[tuple[str, list[Interval]]]:
    """Intervals by a key, the costliest first."""
    found: dict[str, list[Interval]] = {}
    for interval in intervals:
        found.setdefault(key(interval), []).append(interval)
    return sorted(found.items(), key=lambda entry: -sum(interval.us for interval in entry[1]))


def _cost(members: Sequence[Interval], step_us: float) -> Row:
    us = sum(interval.us for interval in members)
    return {"seconds": significant(us / 1e6), "share": significant(us / step_us, 3), "calls": sum(interval.calls for interval in members)}


def short_name(name: str) -> str:
    """A kernel's name without its template arguments and parameters; of a general one, what it was made for is kept."""
    bare = re.sub(r"^void\s+", "", name)
    for opening, closing in ("<>", "()"):
        while (shorter := re.sub(rf"\{opening}[^\{opening}\{closing}]*\{closing}", "", bare)) != bare:
            bare = shorter
    bare = bare.strip()[:100] or name[:100]
    made_for = re.search(r"\w*(?:Functor\w*|_cuda)\b", name.removeprefix(bare)) if "elementwise" in bare or "reduce" in bare else None
    return f"{bare} ({made_for.group()})" if made_for else bare


def covered(intervals: Iterable[Interval]) -> float:
    """Microseconds in which at least one of them was at work."""
    total, end = 0.0, float("-inf")
    for interval in sorted(intervals, key=lambda i: i.start_us):
        stop = interval.start_us + interval.us
        total += max(0.0, stop - max(end, interval.start_us))
        end = max(end, stop)
    return total


def figures_of(recorded: profile, on_gpu: bool, most: int = 5) -> Row:
    """The summary of what was recorded within `record_function(STEP)`; the `most` largest costs are named."""
    return _kernels(recorded, most) if on_gpu else _operators(recorded, most)


def _kernels(recorded: profile, most: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if event.get("ph") == "X"]
    step = next(event for event in events if event["name"] == STEP and event.get("cat") == "user_annotation")
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    kernels = [Interval(event["name"], event["ts"], event["dur"]) for event in events if event.get("cat") in kinds]
    return {**summary(kernels, step["dur"], covered(kernels), most), "launches": len(kernels)}


def _operators(recorded: profile, most: int) -> Row:
    averages = [event for event in recorded.key_averages() if event.key != STEP]
    operators = [Interval(event.key, 0.0, event.self_cpu_time_total, event.count) for event in averages]
    whole = next(event for event in recorded.key_averages() if event.key == STEP).cpu_time_total
    launches = sum(event.count for event in averages)
    return {**summary(operators, whole, sum(operator.us for operator in operators), most), "launches": launches}


def profiled(run: Callable[[], object], device: str, most: int = 5) -> Row:
    """What one call spends its time on, by kernel (on a CPU by operator)."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities):  # the first start takes long
        run()
    with profile(activities=activities) as recorded, record_function(STEP):
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    return figures_of(recorded, device == "cuda", most)


class StepProfile:
    """Profiles one step: from `number` steps being done to one more."""

    def __init__(self, number: int, device: str) -> None:
        self.number, self.on_gpu = number, device.startswith("cuda")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self.profile = profile(activities=activities)
        self._mark: Any = None

    def on_done(self, done: int) -> None:
        """Told how many steps are done: see `assembly.Clock`."""
        if done == self.number - 1:
            with profile(activities=self.profile.activities):  # the first start takes long
                pass
        elif done == self.number:
            self._synchronize()
            self.profile.start()
            self._mark = record_function(STEP)
            self._mark.__enter__()
        elif done == self.number + 1:
            self._synchronize()
            self._mark.__exit__(None, None, None)
            self.profile.stop()

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def figures(self) -> Row:
        """The summary of the step.

        Raises:
            ValueError: the step never came.
        """
        if self._mark is None:
            raise ValueError(f"step {self.number} never began")
        return figures_of(self.profile, self.on_gpu)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    assembly.add_arguments(parser)
    parser.set_defaults(steps=6, warm=4)
    a = parser.parse_args(arguments)
    row = {**settings_of(a), "row": "profile"}
    try:
        recorder = StepProfile(a.warm, a.device)
        run = assembly.run(a, recorder.on_done)
        unprofiled = [seconds for number, seconds in enumerate(run.clock.step_s) if number >= a.warm and number != a.warm]
        emit({**row, **recorder.figures(), "unprofiled_step_s": [round(seconds, 4) for seconds in unprofiled]})
    except Exception as error:
        emit(failed(row, error))


if __name__ == "__main__":
    main()
