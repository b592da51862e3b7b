"""The report: one HTML file that opens anywhere, offline.

Whatever comes from data (questions, answers, names, paths) is escaped; pictures stand in the file as data URLs; the
page forbids itself scripts and anything from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from finesight.data.conversation import Conversation, MediaRef, Part
from finesight.evaluation.compare import Change, Comparison, TaskComparison, change_of, compare, pair_records
from finesight.evaluation.pictures import Picture, picture_of
from finesight.evaluation.plots import accuracy_plot, loss_plot, read_loss_curve
from finesight.evaluation.reinforcement import Reinforcement
from finesight.evaluation.results import EvaluationResult, Record, TaskSummary

if TYPE_CHECKING:
    from finesight.tasks.task import Task

_LONGEST_TEXT = 1200  # characters of a question or answer that are shown
_PICTURES = 4  # of one example
_CHANGE_TITLES: dict[Change, str] = {
    "fixed": "Fixed: wrong before, right after",
    "broken": "Broken: right before, wrong after",
    "both wrong": "Wrong before and after",
    "both right": "Right before and after",
}


@dataclass(frozen=True)
class _Example:
    before: Record | None
    after: Record
    pictures: tuple[Picture, ...]
    graded_binary: bool

    @property
    def source(self) -> str:
        return f"{self.after.file}, row {self.after.row}"


@dataclass(frozen=True)
class _Group:
    title: str
    css: str
    total: int
    shown: tuple[_Example, ...]


@dataclass(frozen=True)
class _Section:
    title: str
    groups: tuple[_Group, ...]


@dataclass(frozen=True)
class _Row:
    before: TaskSummary | None
    after: TaskSummary
    change: TaskComparison | None

    @property
    def verdict_class(self) -> str:
        if self.change is None or not self.change.beyond_noise:
            return ""
        return "better" if self.change.change > 0 else "worse"


def write_report(
    path: str | Path,
    after: EvaluationResult,
    *,
    before: EvaluationResult | None = None,
    tasks: Sequence[Task] = (),
    title: str = "Finesight report",
    recipe: str | None = None,
    metrics: str | Path | None = None,
    reinforcement: Reinforcement | None = None,
    notes: Sequence[str] = (),
    max_examples: int = 40,
) -> Path:
    """Writes one offline HTML file and returns its path.

    Args:
        after: the result to report; the only one where nothing was judged before.
        before: the same tasks before training.
        tasks: where the pictures come from; without a task, image paths of its records are opened.
        recipe: the resolved recipe as YAML.
        metrics: the `metrics.jsonl` of the run, for the loss curve.
        reinforcement: what a run of reinforcement told (:func:`finesight.evaluation.reinforcement.read_reinforcement`).
        notes: sentences under the title.
        max_examples: examples shown of each group (fixed, broken, …) of a task.

    Raises:
        EvaluationError: the results cannot be compared, or the metrics not be read.
    """
    comparison = None if before is None else compare(before, after)
    curve = None if metrics is None else read_loss_curve(metrics)
    context = dict(
        title=title,
        notes=list(notes),
        has_before=before is not None,
        rows=_rows(before, after, comparison),
        accuracy_svg=Markup(accuracy_plot(before.tasks if before else (), after.tasks)) if after.tasks else "",
        probe=after.probe,
        probe_before=before.probe if before else None,
        probe_change=comparison.probe if comparison else None,
        loss_svg=Markup(loss_plot(curve)) if curve else None,
        reinforcement=reinforcement,
        examples=_sections(before, after, tasks, max_examples),
        recipe=recipe,
        settings=after.settings,
        versions=after.versions,
    )
    return _render(path, "report.html.jinja", context)


def write_run_report(
    path: str | Path, reinforcement: Reinforcement, *, title: str, recipe: str | None = None, notes: Sequence[str] = ()
) -> Path:
    """Writes one offline HTML file about a run of reinforcement and returns its path.

    Args:
        recipe: the resolved recipe as YAML.
        notes: sentences under the title.
    """
    return _render(path, "run_report.html.jinja", dict(title=title, notes=list(notes), reinforcement=reinforcement, recipe=recipe))


def _render(path: str | Path, template: str, context: Mapping[str, Any]) -> Path:
    environment = Environment(
        loader=PackageLoader("finesight.evaluation", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=_percent, points=_points, short=_short, reward=_reward)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template(template).render(context), encoding="utf-8", errors="replace")
    return path


def _rows(before: EvaluationResult | None, after: EvaluationResult, comparison: Comparison | None) -> list[_Row]:
    earlier = {summary.task: summary for summary in before.tasks} if before else {}
    changes = {task.task: task for task in comparison.tasks} if comparison else {}
    return [_Row(earlier.get(summary.task), summary, changes.get(summary.task)) for summary in after.tasks]


def _sections(before: EvaluationResult | None, after: EvaluationResult, tasks: Sequence[Task], limit: int) -> list[_Section]:
    media = {(task.name, c.source.file, c.source.row): c for task in tasks for c in task.conversations}
    sections = []
    for summary in after.tasks:
        earlier = before.records_of(summary.task) if before else ()
        sections.append(_section(summary.task, earlier, after.records_of(summary.task), media, summary.binary, limit))
    if after.probe_records:
        earlier = before.probe_records if before else ()
        sections.append(_section("text-only probe", earlier, after.probe_records, {}, True, limit))
    return sections


def _section(
    title: str,
    before: Sequence[Record],
    after: Sequence[Record],
    media: Mapping[tuple[str, str, int], Conversation],
    binary: bool,
    limit: int,
) -> _Section:
    groups: dict[str, list[tuple[Record | None, Record]]] = {}
    if before:
        for old, new in pair_records(before, after):
            groups.setdefault(_CHANGE_TITLES[change_of(old, new)], []).append((old, new))
        order = list(_CHANGE_TITLES.values())
    else:
        order = ["Wrong", "Right"]
        for new in after:
            groups.setdefault("Right" if new.right else "Wrong", []).append((None, new))
    return _Section(
        title,
        tuple(
            _Group(
                name,
                name.split(":")[0].lower() if name.startswith(("Fixed", "Broken")) else "",
                len(groups[name]),
                tuple(_Example(old, new, _pictures(new, media.get(new.key)), binary) for old, new in groups[name][:limit]),
            )
            for name in order
            if name in groups
        ),
    )


def _pictures(record: Record, conversation: Conversation | None) -> tuple[Picture, ...]:
    if conversation is not None:
        parts = list(conversation.media)[:_PICTURES]
        return tuple(picture_of(part, label) for part, label in zip(parts, record.images, strict=False))
    found = [Path(reference) for reference in record.images[:_PICTURES]]
    return tuple(
        picture_of(Part("image", media=MediaRef(path=str(path))), path.name) if path.is_file() else Picture(None, str(path))
        for path in found
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _points(change: float) -> str:
    return f"{100 * change:+.1f}"


def _reward(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)"
