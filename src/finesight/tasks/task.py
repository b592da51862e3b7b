"""A task is one object: what is asked, and how an answer is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finesight.data.conversation import Conversation
from finesight.data.formats import read_source
from finesight.data_settings import DataSettings
from finesight.errors import DataError, EvaluationError
from finesight.recipe import TaskSettings
from finesight.tasks.graders import get_grader
from finesight.tasks.grading import Grader


@dataclass(frozen=True)
class Task:
    """Conversations and the grader of their last answers."""

    name: str  # in tables and reports
    conversations: tuple[Conversation, ...]
    grader: Grader
    grader_name: str

    def prompts(self) -> list[Conversation]:
        """What a model is asked: each conversation up to its last answer."""
        return [conversation.prompt() for conversation in self.conversations]


def evenly_spread(conversations: Sequence[Conversation], count: int | None) -> tuple[Conversation, ...]:
    """At most `count` of them, at even distances, first one included."""
    total = len(conversations)
    if count is None or count >= total:
        return tuple(conversations)
    return tuple(conversations[i * total // count] for i in range(count))


def load_task(settings: TaskSettings, *, data: DataSettings, base_dir: Path, held_out: Sequence[Conversation] | None = None) -> Task:
    """The task of a recipe's `evaluation.tasks` entry.

    Args:
        data: how rows are read (media, bad rows), as for training.
        base_dir: folder that relative paths and the user's graders are looked up in.
        held_out: the rows that `data: eval_split` stands for.

    Raises:
        DataError: rows cannot be used and `data.on_bad_row` is stop.
        EvaluationError: there are no rows, a row has nothing to compare with, or the grader is unknown.
    """
    grader = get_grader(settings.grader, settings.grader_options, base_dir=base_dir)
    if settings.data == "eval_split":
        if not held_out:
            raise EvaluationError(
                f"Task {settings.name!r} judges the held-out rows, but there are none. Set data.eval_split, for example '5%', or give the task its own data."
            )
        conversations: Sequence[Conversation] = held_out
    else:
        read = read_source(settings.data, data=data, base_dir=base_dir, require_answer=False)
        if read.bad_rows and data.on_bad_row == "stop":
            shown = "\n  ".join(str(row) for row in read.bad_rows[:20])
            raise DataError(
                f"Task {settings.name!r}: {len(read.bad_rows)} row(s) cannot be used:\n  {shown}\nMend them, or set data.on_bad_row: skip.",
                read.bad_rows,
            )
        conversations = read.conversations
    chosen = evenly_spread(conversations, settings.max_samples)
    if not chosen:
        raise EvaluationError(f"Task {settings.name!r} has no rows to judge.")
    for conversation in chosen:
        grader.check(conversation)
    return Task(settings.name, chosen, grader, settings.grader)
