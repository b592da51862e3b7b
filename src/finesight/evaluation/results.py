"""What an evaluation found: one record an answer, a summary a task; written as JSONL and JSON and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from finesight.data.conversation import Conversation, Part
from finesight.data.media import describe
from finesight.errors import EvaluationError
from finesight.evaluation.statistics import is_binary, score_interval
from finesight.sampling.types import Completion

RECORDS = "records.jsonl"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Record:
    """One answer and its score."""

    task: str
    file: str  # where the row is
    row: int  # counted from 0
    prompt: str  # all turns asked, media left out
    images: tuple[str, ...]  # path, URL, or what kind of data it is where it has neither
    answer: str
    expected: tuple[str, ...]  # accepted answers
    score: float  # in [0, 1]
    finish_reason: str = "stop"
    num_tokens: int = 0  # of the answer

    @property
    def key(self) -> tuple[str, str, int]:
        """What pairs the same question before and after training."""
        return self.task, self.file, self.row

    @property
    def right(self) -> bool:
        """Whether the answer counts as right in tables of changes: a score of at least one half."""
        return self.score >= 0.5


@dataclass(frozen=True)
class TaskSummary:
    """One task in figures."""

    task: str
    grader: str
    num_samples: int
    accuracy: float  # mean score
    low: float  # 95% interval
    high: float
    binary: bool  # whether all scores are 0 or 1: then the interval is Wilson's, otherwise bootstrapped
    truncated: int  # answers cut at the length limit
    wall_s: float

    @staticmethod
    def of(task: str, grader: str, records: Sequence[Record], wall_s: float) -> TaskSummary:
        """The summary of a task's records (at least one)."""
        scores = [record.score for record in records]
        low, high = score_interval(scores)
        truncated = sum(record.finish_reason == "length" for record in records)
        return TaskSummary(task, grader, len(records), sum(scores) / len(scores), low, high, is_binary(scores), truncated, wall_s)


@dataclass(frozen=True)
class ProbeSummary:
    """The text-only probe in figures: writing, judged apart from seeing."""

    num_questions: int
    num_tokens: int  # of all reference answers
    loss: float  # mean over tokens of the reference answers, in nats
    accuracy: float  # exact match of the answers written
    low: float
    high: float
    wall_s: float


@dataclass(frozen=True)
class EvaluationResult:
    """Everything an evaluation found. `settings` says how answers were drawn, `versions` with what."""

    records: tuple[Record, ...]
    tasks: tuple[TaskSummary, ...]
    probe: ProbeSummary | None = None
    probe_records: tuple[Record, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def task(self, name: str) -> TaskSummary:
        """The summary of the task of this name.

        Raises:
            EvaluationError: there is none.
        """
        for summary in self.tasks:
            if summary.task == name:
                return summary
        raise EvaluationError(f"There is no task {name!r} in this result; there are: {', '.join(s.task for s in self.tasks)}.")

    def records_of(self, task: str) -> tuple[Record, ...]:
        """Records of one task, in the order of its rows."""
        return tuple(record for record in self.records if record.task == task)

    def summary(self) -> dict[str, Any]:
        """All figures, without the records, as plain values."""
        return {
            "tasks": [asdict(summary) for summary in self.tasks],
            "text_probe": None if self.probe is None else asdict(self.probe),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }

    def write(self, folder: str | Path) -> Path:
        """Writes `records.jsonl` (the probe's answers last) and `summary.json`; returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"probe": probe, **asdict(r)}, ensure_ascii=False)
            for probe, rs in ((False, self.records), (True, self.probe_records))
            for r in rs
        ]
        (folder / RECORDS).write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="replace")
        (folder / SUMMARY).write_text(json.dumps(self.summary(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return folder


def make_record(task: str, conversation: Conversation, completion: Completion, expected: tuple[str, ...], score: float) -> Record:
    """The record of one answer."""
    return Record(
        task=task,
        file=conversation.source.file,
        row=conversation.source.row,
        prompt=prompt_text(conversation),
        images=tuple(media_label(part) for part in conversation.media),
        answer=completion.text,
        expected=expected,
        score=float(score),
        finish_reason=completion.finish_reason,
        num_tokens=len(completion.token_ids),
    )


def prompt_text(conversation: Conversation) -> str:
    """What was asked, for people: a lone user turn as its text, otherwise each turn under its role."""
    turns = conversation.turns
    if turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if len(turns) == 1:
        return turns[0].text
    return "\n".join(f"{turn.role}: {turn.text}" for turn in turns)


def media_label(part: Part) -> str:
    """Where an image or video is, in words short enough for a table."""
    return part.type if part.media is None else describe(part.media)


def read_result(folder: str | Path) -> EvaluationResult:
    """What :meth:`EvaluationResult.write` wrote.

    Raises:
        EvaluationError: the folder holds no result, or a damaged one.
    """
    folder = Path(folder)
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (folder / RECORDS).read_text(encoding="utf-8").splitlines() if line.strip()]
        probe = summary["text_probe"]
        return EvaluationResult(
            records=tuple(_record(row) for row in rows if not row["probe"]),
            tasks=tuple(TaskSummary(**task) for task in summary["tasks"]),
            probe=None if probe is None else ProbeSummary(**probe),
            probe_records=tuple(_record(row) for row in rows if row["probe"]),
            settings=summary["settings"],
            versions=summary["versions"],
        )
    except OSError as error:
        raise EvaluationError(
            f"{folder} holds no evaluation result: {error.strerror or error}. Give a folder that `finesight eval` wrote."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"The evaluation result in {folder} is damaged ({type(error).__name__}: {error}). Run the evaluation again."
        ) from None


def _record(row: Mapping[str, Any]) -> Record:
    values = {f.name: row[f.name] for f in fields(Record)}
    return Record(**{**values, "images": tuple(values["images"]), "expected": tuple(values["expected"])})
