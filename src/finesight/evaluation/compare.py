"""Before against after, on the same rows: what changed, and whether it is more than noise."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from finesight.errors import EvaluationError
from finesight.evaluation.results import EvaluationResult, Record
from finesight.evaluation.statistics import is_binary, mcnemar_exact, paired_bootstrap

_LEVEL = 0.05  # of the tests

Change = Literal["fixed", "broken", "both right", "both wrong"]


@dataclass(frozen=True)
class TaskComparison:
    """One task before and after. Rows are paired; rows that only one side has are left out and counted."""

    task: str
    num_pairs: int
    unpaired: int
    before: float  # mean score of the pairs
    after: float
    low: float  # 95% interval of the change, paired bootstrap
    high: float
    fixed: int  # wrong before, right after
    broken: int  # right before, wrong after
    p_value: float
    test: Literal["exact McNemar", "paired bootstrap"]

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def beyond_noise(self) -> bool:
        """Whether a change like this would come about by chance less often than once in twenty times."""
        return self.p_value < _LEVEL

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        if not self.beyond_noise:
            return f"no change beyond noise ({self.test}, p = {_shown(self.p_value)})"
        return f"{'better' if self.change > 0 else 'worse'}, beyond noise ({self.test}, p = {_shown(self.p_value)})"


@dataclass(frozen=True)
class ProbeComparison:
    """The text-only probe before and after."""

    loss_before: float
    loss_after: float
    exact: TaskComparison


@dataclass(frozen=True)
class Comparison:
    """Every task that both results have, and the probe if both have it."""

    tasks: tuple[TaskComparison, ...]
    probe: ProbeComparison | None = None

    def task(self, name: str) -> TaskComparison:
        """The comparison of the task of this name.

        Raises:
            EvaluationError: not both results have it.
        """
        for task in self.tasks:
            if task.task == name:
                return task
        raise EvaluationError(f"Task {name!r} is not in both results; compared are: {', '.join(t.task for t in self.tasks)}.")


def compare(before: EvaluationResult, after: EvaluationResult) -> Comparison:
    """Compares two evaluations row by row.

    Raises:
        EvaluationError: the two have no task in common, or no row of a common task.
    """
    earlier = {summary.task: summary for summary in before.tasks}
    names = [summary.task for summary in after.tasks if summary.task in earlier]
    for summary in after.tasks:
        if summary.task in earlier and earlier[summary.task].grader != summary.grader:
            raise EvaluationError(
                f"Task {summary.task!r} was graded by {earlier[summary.task].grader} before and by {summary.grader} after; grade both alike."
            )
    probe = None
    if before.probe is not None and after.probe is not None:
        exact = compare_records("text probe", before.probe_records, after.probe_records)
        probe = ProbeComparison(before.probe.loss, after.probe.loss, exact)
    if not names and probe is None:
        raise EvaluationError("The two results have no task in common; evaluate the same tasks before and after.")
    return Comparison(tuple(compare_records(name, before.records_of(name), after.records_of(name)) for name in names), probe)


def compare_records(task: str, before: tuple[Record, ...], after: tuple[Record, ...]) -> TaskComparison:
    """Compares records of one task, paired by row.

    Raises:
        EvaluationError: no row is in both.
    """
    pairs = pair_records(before, after)
    if not pairs:
        raise EvaluationError(f"Task {task!r} has no row in both results; evaluate the same rows before and after.")
    old, new = [a.score for a, _ in pairs], [b.score for _, b in pairs]
    changes = [change_of(a, b) for a, b in pairs]
    fixed, broken = changes.count("fixed"), changes.count("broken")
    low, high, p = paired_bootstrap(old, new)
    binary = is_binary(old) and is_binary(new)
    return TaskComparison(
        task=task,
        num_pairs=len(pairs),
        unpaired=len(before) + len(after) - 2 * len(pairs),
        before=sum(old) / len(old),
        after=sum(new) / len(new),
        low=low,
        high=high,
        fixed=fixed,
        broken=broken,
        p_value=mcnemar_exact(fixed, broken) if binary else p,
        test="exact McNemar" if binary else "paired bootstrap",
    )


def pair_records(before: Sequence[Record], after: Sequence[Record]) -> list[tuple[Record, Record]]:
    """(before, after) of every row that both have, in the order of `after`; rows given several times pair in order."""
    earlier: dict[tuple[str, str, int], deque[Record]] = {}
    for record in before:
        earlier.setdefault(record.key, deque()).append(record)
    return [(earlier[record.key].popleft(), record) for record in after if earlier.get(record.key)]


def change_of(before: Record, after: Record) -> Change:
    """What became of one row."""
    if before.right:
        return "both right" if after.right else "broken"
    return "fixed" if after.right else "both wrong"


def _shown(p_value: float) -> str:
    return f"{p_value:.3f}" if p_value >= 0.001 else f"{p_value:.1e}"
