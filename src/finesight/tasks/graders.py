"""Graders by name. A grader judges one answer to one conversation; it is a metric and, later, a reward alike."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from finesight.data.conversation import Conversation
from finesight.errors import EvaluationError
from finesight.tasks import metrics


class Grader(Protocol):
    """Judges one answer: a score in [0, 1], 1 for right."""

    def __call__(self, answer: str, conversation: Conversation) -> float: ...


@dataclass(frozen=True)
class MetricGrader:
    """A grader that compares the answer with the accepted ones of the conversation."""

    metric: metrics.Metric
    description: str

    def __call__(self, answer: str, conversation: Conversation) -> float:
        return self.metric(answer, accepted_answers(conversation))


@dataclass(frozen=True)
class UserGrader:
    """A user's function `(answer, conversation) -> number in [0, 1]` (or true and false)."""

    name: str
    function: Any
    description: str = "a function of the recipe"

    def __call__(self, answer: str, conversation: Conversation) -> float:
        try:
            score = self.function(answer, conversation)
        except Exception as error:
            raise EvaluationError(f"Grader {self.name} failed on {conversation.source}: {type(error).__name__}: {error}") from error
        try:
            value = float(score)
        except (TypeError, ValueError):
            value = math.nan
        if not 0 <= value <= 1:
            raise EvaluationError(f"Grader {self.name} gave {score!r} for {conversation.source}; it must give a number from 0 to 1.")
        return value


GRADERS: dict[str, MetricGrader] = {
    "exact_match": MetricGrader(metrics.exact_match, "equal to an accepted answer; case, surrounding space and a trailing period aside"),
    "exact_match/strict": MetricGrader(metrics.exact_match_strict, "equal to an accepted answer, character by character"),
    "contains": MetricGrader(metrics.contains, "an accepted answer stands in it as whole words"),
    "multiple_choice": MetricGrader(metrics.multiple_choice, "the chosen letter is right"),
    "numeric": MetricGrader(metrics.numeric, "the number is right to 0.01%; thousands separators, %, currency understood"),
    "numeric/1%": MetricGrader(functools.partial(metrics.numeric, relative_tolerance=0.01), "the number is right to 1%"),
    "numeric/5%": MetricGrader(functools.partial(metrics.numeric, relative_tolerance=0.05), "the number is right to 5%"),
    "relaxed_accuracy": MetricGrader(metrics.relaxed_accuracy, "ChartQA: numbers to 5%, other answers equal; both sides normalized"),
    "relaxed_accuracy/lmms-eval": MetricGrader(
        metrics.relaxed_accuracy_lmms_eval, "ChartQA as pix2struct and lmms-eval compute it, nothing normalized"
    ),
    "anls": MetricGrader(metrics.anls, "normalized Levenshtein similarity above 0.5 (Biten et al. 2019)"),
    "anls/docvqa": MetricGrader(metrics.anls_docvqa, "the same as the evaluation script of DocVQA computes it"),
}


def get_grader(name: str, *, base_dir: Path | None = None) -> Grader:
    """The grader of this name, or the user's function for `module:function` or `file.py:function`.

    Args:
        base_dir: folder that modules and files of the user are looked up in first; none: the current one.

    Raises:
        EvaluationError: there is no such grader, module or function.
    """
    if name in GRADERS:
        return GRADERS[name]
    module, colon, function = name.rpartition(":")
    if colon:
        found = getattr(_import_module(module, name, base_dir or Path.cwd()), function, None)
        if not callable(found):
            raise EvaluationError(f"Grader {name!r}: {module} has no function {function!r}. Define it as {function}(answer, conversation).")
        return UserGrader(name, found)
    near = difflib.get_close_matches(name, GRADERS, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(GRADERS)}; or give module:function."
    raise EvaluationError(f"Grader {name!r} is not known. {hint}")


def _import_module(module: str, grader: str, base_dir: Path) -> ModuleType:
    try:
        if module.endswith(".py"):
            path = base_dir / module
            spec = importlib.util.spec_from_file_location(f"finesight_grader_{path.stem}", path)
            if spec is None or spec.loader is None or not path.is_file():
                raise EvaluationError(f"Grader {grader!r}: file {path} does not exist.")
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
            return loaded
        sys.path.insert(0, str(base_dir))
        try:
            return importlib.import_module(module)
        finally:
            sys.path.remove(str(base_dir))
    except EvaluationError:
        raise
    except Exception as error:
        raise EvaluationError(f"Grader {grader!r}: {module} cannot be imported: {type(error).__name__}: {error}") from error


def accepted_answers(conversation: Conversation) -> tuple[str, ...]:
    """Every answer that counts as right: the `answers` of the row, else its `ground_truth`, else its own answer.

    Raises:
        EvaluationError: the row has none of these.
    """
    for name in ("answers", "ground_truth"):
        value = conversation.extra.get(name)
        if isinstance(value, Mapping):
            raise EvaluationError(
                f"{conversation.source}: {name} is a mapping; graders by name compare texts. Give a module:function grader for it."
            )
        if accepted := _as_texts(value):
            return accepted
    if conversation.answer is not None:
        return (conversation.answer,)
    raise EvaluationError(f"{conversation.source} has no answer to compare with. Give an answer, `answers` or `ground_truth`.")


def _as_texts(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if hasattr(value, "tolist"):  # a numpy array or number, as Parquet readers give
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(text for entry in value for text in _as_texts(entry))
    return (str(value),)
