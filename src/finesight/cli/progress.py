"""Progress of the commands that answer prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import TaskID

from finesight.training.telemetry import progress_bars

Report = Callable[[str, int, int], None]  # (task, done, total)


@contextmanager
def task_progress(console: Console) -> Iterator[Report]:
    """A bar for each task with the time left; where there is no terminal, a line once a task is done."""
    if not console.is_terminal:
        yield (
            lambda task, done, total: (
                console.print(f"{task}: {done:,} of {total:,}", markup=False, highlight=False) if done == total else None
            )
        )
        return
    with progress_bars(console) as bars:
        started: dict[str, TaskID] = {}

        def report(task: str, done: int, total: int) -> None:
            if task not in started:
                started[task] = bars.add_task(task, total=total)
            bars.update(started[task], completed=done, total=total)

        yield report
