"""One hierarchy of errors. Each message says what was wrong, where, and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class FinesightError(Exception):
    """Base of every error that Finesight raises on purpose.

    The command prints the message without a traceback and exits with status 2.
    """


class RecipeError(FinesightError):
    """A setting of the recipe is unknown, of the wrong type, or contradicts another."""


class DataError(FinesightError):
    """A data file, row, image or video cannot be used. Carries every :class:`BadRow` that was found."""

    def __init__(self, message: str, bad_rows: Sequence[BadRow] = ()) -> None:
        super().__init__(message)
        self.bad_rows = tuple(bad_rows)


class MediaError(DataError):
    """One image or video cannot be opened: missing, undecodable, too large, or outside what the user allowed."""


class TemplateError(FinesightError):
    """A chat template cannot be rendered, or its rendering cannot be divided into turns."""


class ModelError(FinesightError):
    """A model cannot be loaded, or is not of a supported family."""


class PlanError(FinesightError):
    """A run is planned to need more memory than the GPU has, or its memory cannot be planned."""


class CheckpointError(FinesightError):
    """A checkpoint is incomplete, damaged, or belongs to another recipe."""


class TrainingError(FinesightError):
    """Training cannot go on (for example, the loss is no longer finite)."""


class EngineError(FinesightError):
    """A server that samples for a run cannot be reached, refuses, or answers something else than it was asked."""


class EvaluationError(FinesightError):
    """An evaluation cannot be run, or a grader is unknown."""


class GrammarError(FinesightError):
    """A schema that answers are to follow cannot be used, or an answer cannot go on under it."""


class ExportError(FinesightError):
    """An export does not answer as what was trained, or cannot be written or handed over."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it stands and why."""

    file: str
    row: int  # counted from 0, in the order of the file
    reason: str  # what is wrong and what to change

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: {self.reason}"
