"""What a run of reinforcement left in its folder, for people: curves of its figures, and some of its completions.

Read from `metrics.jsonl` and the Parquet files of completions alone, so that a run can be looked at while it goes on, and
from a copy of its folder without the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
from markupsafe import Markup
from pyarrow import parquet

from finesight.errors import EvaluationError
from finesight.evaluation.pictures import Picture, data_url
from finesight.evaluation.plots import Series, read_lines, series_of, series_plot

# Groups of a rollout whose pictures are kept with its completions: those that a report shows.
PICTURED_GROUPS = 4
_STAGES = 4  # rollouts shown, from the first to the last
_COMPLETIONS = 8  # shown of one group
_REWARD = "reward_"  # what columns of single rewards begin with
_EVERY_STEP = "frac_reward_zero_std"  # the figure of rewards that a step has even where none was given


@dataclass(frozen=True)
class Plot:
    """One drawing."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class ShownCompletion:
    """One completion and what it earned; None where a reward was not given."""

    text: str
    rewards: Mapping[str, float | None]
    reward: float | None
    advantage: float
    tokens: int
    cut_off: bool  # by the length limit
    failures: str | None = None  # rewards that failed, and why


@dataclass(frozen=True)
class ShownGroup:
    """One prompt and the first of its completions, out of `total`."""

    prompt: str
    source: str
    pictures: tuple[Picture, ...]
    completions: tuple[ShownCompletion, ...]
    total: int


@dataclass(frozen=True)
class Stage:
    """Some groups of one rollout, out of `total`."""

    step: int  # its first optimizer step
    groups: tuple[ShownGroup, ...]
    total: int
    mean_reward: float | None


@dataclass(frozen=True)
class Reinforcement:
    """What a report shows of a run of reinforcement."""

    plots: tuple[Plot, ...]
    rewards: tuple[str, ...]  # names of the single rewards; empty where there is one alone
    stages: tuple[Stage, ...]
    failed_rewards: int
    any_reward: bool  # whether a reward was given in any step


def gave_no_reward(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether lines of metrics have steps of reinforcement, and no reward in any of them."""
    steps = [line for line in lines if _EVERY_STEP in line]
    return bool(steps) and not any("reward" in line for line in steps)


def read_reinforcement(metrics: Path, completions: Path) -> Reinforcement | None:
    """What a run tells of its reinforcement; None if it was none, or has not begun.

    Args:
        metrics: its `metrics.jsonl`; completions: its folder of Parquet files. Either may be missing.

    Raises:
        EvaluationError: metrics or completions are damaged.
    """
    lines = read_lines(metrics) if metrics.is_file() else []
    series = series_of(lines)
    if not {"reward", _EVERY_STEP} & series.keys():
        return None
    last_step = max(step for name in ("reward", _EVERY_STEP) if name in series for step in series[name].steps)
    names = tuple(name.removeprefix("rewards/").removesuffix("/mean") for name in series if _is_mean(name))
    return Reinforcement(
        plots=tuple(_plots(series, names)),
        rewards=names if len(names) > 1 else (),
        stages=tuple(_stages(completions, last_step=last_step)),
        failed_rewards=sum(line.get("count", 0) for line in lines if line.get("event") == "reward_failed"),
        any_reward="reward" in series,
    )


def _is_mean(name: str) -> bool:
    return name.startswith("rewards/") and name.endswith("/mean")


def _plots(series: Mapping[str, Series], names: Sequence[str]) -> Iterator[Plot]:
    def some(labels: Mapping[str, str]) -> list[Series]:
        return [replace(series[name], label=label) for name, label in labels.items() if name in series]

    def plot(title: str, labels: Mapping[str, str], unit: str, note: str = "", **more: Any) -> Iterator[Plot]:
        if found := some(labels):
            yield Plot(title, Markup(series_plot(found, unit, **more)), note)

    held_out = some({"eval_reward": "held-out prompts"})
    yield from plot("Reward", {"reward": "completions in training"}, "mean reward", held_out=held_out[0] if held_out else None)
    if len(names) > 1:
        yield from plot("Single rewards", {f"rewards/{name}/mean": name for name in names}, "mean", "before weights")
    ablation = {"image_ablation/reward/with_image": "with images", "image_ablation/reward/without_image": "images blanked"}
    yield from plot("Image ablation", ablation, "mean reward", "what is earned with images blanked is earned without looking")
    shares = {
        "frac_reward_zero_std": "groups without variance",
        "completions/clipped_ratio": "completions cut off",
        "clip_ratio/region_mean": "tokens clipped",
    }
    yield from plot("Shares", shares, "share", "a group without variance teaches nothing", share=True)
    saturation = {f"rewards/{name}/saturation": name for name in names}
    yield from plot("Saturation", saturation, "share", "values at the largest reward possible, or met so far", share=True)
    lengths = {"completions/mean_length": "mean", "completions/min_length": "shortest", "completions/max_length": "longest"}
    yield from plot("Length of completions", lengths, "tokens")
    yield from plot("Entropy", {"entropy": "entropy"}, "nats a token")
    yield from plot("KL from the base", {"kl": "KL"}, "nats a token", "estimate k3")
    difference = {"sampling/sampling_logp_difference/mean": "mean", "sampling/sampling_logp_difference/max": "largest"}
    yield from plot("Sampler against trainer", difference, "nats", "difference of log-probabilities under the same weights")


def _stages(folder: Path, last_step: int) -> Iterator[Stage]:
    """Some of the rollouts, evenly spread, the first and the last among them.

    Files of later steps than the metrics know come from before a run was resumed.
    """
    files = [file for file in sorted(folder.glob("step-*.parquet")) if int(file.stem.removeprefix("step-")) <= last_step]
    count = min(_STAGES, len(files))
    for number in range(count):
        yield _stage(files[number * (len(files) - 1) // max(count - 1, 1)])


def _stage(file: Path) -> Stage:
    try:
        rows = parquet.read_table(file).to_pylist()
        return _stage_of(rows)
    except (OSError, pyarrow.ArrowException, KeyError) as error:
        raise EvaluationError(
            f"{file} holds no completions of a run ({type(error).__name__}: {error}). Delete it to have a report of the others."
        ) from None


def _stage_of(rows: Sequence[Mapping[str, Any]]) -> Stage:
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    known = [row["reward"] for row in rows if row["reward"] is not None]
    shown = tuple(_group(members) for members in list(groups.values())[:PICTURED_GROUPS])
    return Stage(rows[0]["step"], shown, len(groups), math.fsum(known) / len(known) if known else None)


def _group(members: Sequence[Mapping[str, Any]]) -> ShownGroup:
    first = members[0]
    thumbnails = first.get("thumbnails") or [None] * len(first["images"])
    pictures = [Picture(data_url(encoded) if encoded else None, label) for label, encoded in zip(first["images"], thumbnails, strict=False)]
    return ShownGroup(
        prompt=first["prompt"],
        source=f"{first['file']}, row {first['row']}",
        pictures=tuple(pictures),
        completions=tuple(_completion(row) for row in members[:_COMPLETIONS]),
        total=len(members),
    )


def _completion(row: Mapping[str, Any]) -> ShownCompletion:
    return ShownCompletion(
        text=row["completion"],
        rewards={name.removeprefix(_REWARD): value for name, value in row.items() if name.startswith(_REWARD)},
        reward=row["reward"],
        advantage=row["advantage"],
        tokens=row["tokens"],
        cut_off=row["finish_reason"] == "length",
        failures=row.get("failures"),
    )
