"""Plots of a report, as SVG that stands in the page itself."""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finesight.errors import EvaluationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from finesight.evaluation.results import TaskSummary

_BEFORE, _AFTER, _HELD_OUT = "#9aa5b1", "#1f6feb", "#d1495b"
_COLORS = (_AFTER, "#8250df", "#1a7f37", "#bf8700", "#0a7ea4", "#6e7781")
_SMOOTHING_POINTS = 200  # a curve with more points than this gets a running mean
_FEW_POINTS = 12  # a curve of so few points has marks


@dataclass(frozen=True)
class LossCurve:
    """Losses of a run by step."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    eval_steps: tuple[int, ...] = ()
    eval_losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Series:
    """One figure of a run by step."""

    label: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last one that a crash cut off is passed over.

    Raises:
        EvaluationError: the file cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"Metrics {path} cannot be read: {error}.") from None
    entries = []
    for number, line in enumerate(lines):
        try:
            entries.append(json.loads(line))
        except ValueError:
            if number == len(lines) - 1:
                break
            raise EvaluationError(f"Metrics {path}, line {number + 1} is not JSON.") from None
    return [entry for entry in entries if isinstance(entry, dict)]


def series_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Every figure in lines of metrics by its name, in the order of their appearance; events are left out.

    A run that was resumed may have written a step twice: the later line counts. Numbers that are not finite are left out.
    """
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        if not isinstance(line.get("step"), int) or "event" in line:
            continue
        for name, value in line.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                found.setdefault(name, {})[line["step"]] = float(value)
    return {name: Series(name, *zip(*sorted(values.items()), strict=True)) for name, values in found.items()}


def read_loss_curve(path: str | Path) -> LossCurve | None:
    """The losses in a `metrics.jsonl` (`loss` and `eval_loss`); None if it has none.

    Raises:
        EvaluationError: the file cannot be read.
    """
    found = series_of(read_lines(path))
    if not {"loss", "eval_loss"} & found.keys():
        return None
    loss, held_out = (found.get(name, Series(name, (), ())) for name in ("loss", "eval_loss"))
    return LossCurve(loss.steps, loss.values, held_out.steps, held_out.values)


def accuracy_plot(before: Sequence[TaskSummary], after: Sequence[TaskSummary]) -> str:
    """Accuracies of every task with their 95% intervals, side by side, as SVG. `before` may be empty."""
    figure, axes = _figure(7.2, 0.9 + 0.62 * len(after))
    earlier = {summary.task: summary for summary in before}
    for place, summary in enumerate(reversed(after)):
        bars = [(summary, _AFTER, 0.0 if not earlier else -0.17)]
        if summary.task in earlier:
            bars.append((earlier[summary.task], _BEFORE, 0.17))
        for shown, color, offset in bars:
            error = [[shown.accuracy - shown.low], [shown.high - shown.accuracy]]
            spread = [[max(0.0, error[0][0])], [max(0.0, error[1][0])]]
            axes.barh(place + offset, shown.accuracy, 0.3, color=color, xerr=spread, error_kw={"ecolor": "#24292f", "capsize": 3, "lw": 1})
    if earlier:
        keys = [axes.barh(0, 0, color=color, label=label) for color, label in ((_BEFORE, "before"), (_AFTER, "after"))]
        figure.legend(handles=keys, loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    axes.set_yticks(range(len(after)))
    # Names are the user's: a dollar sign is no formula.
    axes.set_yticklabels([summary.task for summary in reversed(after)], parse_math=False)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    return _svg(figure)


def loss_plot(curve: LossCurve) -> str:
    """Training loss and held-out loss by step, as SVG."""
    figure, axes = _figure(7.2, 2.9)
    long = len(curve.losses) > _SMOOTHING_POINTS
    if curve.losses:
        axes.plot(curve.steps, curve.losses, color=_BEFORE if long else _AFTER, lw=0.7 if long else 1.4, label="training loss")
    if long:
        axes.plot(curve.steps, _running_mean(curve.losses), color=_AFTER, lw=1.6, label="running mean")
    if curve.eval_losses:
        axes.plot(curve.eval_steps, curve.eval_losses, color=_HELD_OUT, lw=1.4, marker="o", ms=3, label="held-out loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def series_plot(series: Sequence[Series], unit: str, *, held_out: Series | None = None, share: bool = False) -> str:
    """Figures of a run by step as SVG; of a long one its running mean before the figure itself.

    Args:
        unit: of the values, for the axis.
        held_out: drawn with marks, since it is measured now and then.
        share: values lie between 0 and 1.
    """
    figure, axes = _figure(4.8, 2.6)
    for number, one in enumerate(series):
        color = _COLORS[number % len(_COLORS)]
        seldom = len(one.values) <= _FEW_POINTS
        if len(one.values) > _SMOOTHING_POINTS:
            axes.plot(one.steps, one.values, color=color, lw=0.6, alpha=0.3)
            axes.plot(one.steps, _running_mean(one.values), color=color, lw=1.5, label=_plain(one.label))
        else:
            axes.plot(one.steps, one.values, color=color, lw=1.4, marker="o" if seldom else None, ms=3, label=_plain(one.label))
    if held_out is not None:
        axes.plot(held_out.steps, held_out.values, color=_HELD_OUT, lw=1.4, marker="o", ms=3, label=_plain(held_out.label))
    if share:
        axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    if len(series) + (held_out is not None) > 1:
        axes.legend(frameon=False, fontsize=7)
    return _svg(figure)


def _plain(label: str) -> str:
    """A name of the user's for a legend, where a dollar sign would be a formula and a leading underscore would hide it."""
    return label.lstrip("_").replace("$", r"\$")


def _running_mean(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a twentieth of the curve, corrected for its beginning."""
    keep = 1 - 20 / len(values)
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure) -> str:
    """SVG for an HTML page: text as text (so that the browser has the font), and no reference to anywhere else."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "finesight"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # only measured with it, not drawn
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    return re.sub(r'\sxmlns(?::\w+)?="[^"]*"', "", drawing)
