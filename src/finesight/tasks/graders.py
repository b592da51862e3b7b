"""Every grader of the library by name, and how graders are found. Where the field uses one name for several definitions, each
has a name of its own.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from finesight.errors import EvaluationError
from finesight.recipe import TaskSettings
from finesight.tasks import boxes, documents, form, maths, metrics, transcription
from finesight.tasks.frames import Frames
from finesight.tasks.grading import (
    BoxGrader,
    DocumentGrader,
    FormGrader,
    Grader,
    LibraryGrader,
    PointGrader,
    SchemaGrader,
    TextGrader,
    UserGrader,
)
from finesight.tasks.user_code import is_user_function, load_function

GRADERS: dict[str, LibraryGrader] = {
    "exact_match": TextGrader(metrics.exact_match, "equal to an accepted answer; case, surrounding space and a trailing period aside"),
    "exact_match/strict": TextGrader(metrics.exact_match_strict, "equal to an accepted answer, character by character"),
    "contains": TextGrader(metrics.contains, "an accepted answer stands in it as whole words"),
    "contains/ocrbench": TextGrader(metrics.contains_ocrbench, "an accepted answer is a part of it, as OCRBench and lmms-eval judge"),
    "multiple_choice": TextGrader(metrics.multiple_choice, "the chosen letter is right"),
    "math": TextGrader(maths.math, "the final answer equals an accepted one exactly: fractions, percent, units, lists, LaTeX"),
    "math/1%": TextGrader(partial(maths.math, relative_tolerance=0.01), "the same, numbers to 1%"),
    "math/math-verify": TextGrader(
        maths.math_verify,
        "the library math-verify finds them equal, as TRL's accuracy_reward asks it",
        libraries=("math_verify", "latex2sympy2_extended", "antlr4"),
    ),
    "numeric": TextGrader(metrics.numeric, "the number is right to 0.01%; thousands separators, %, currency understood"),
    "numeric/1%": TextGrader(partial(metrics.numeric, relative_tolerance=0.01), "the number is right to 1%"),
    "numeric/5%": TextGrader(partial(metrics.numeric, relative_tolerance=0.05), "the number is right to 5%"),
    "relaxed_accuracy": TextGrader(metrics.relaxed_accuracy, "ChartQA: numbers to 5%, other answers equal; both sides normalized"),
    "relaxed_accuracy/lmms-eval": TextGrader(
        metrics.relaxed_accuracy_lmms_eval, "ChartQA as pix2struct and lmms-eval compute it, nothing normalized"
    ),
    "anls": TextGrader(metrics.anls, "normalized Levenshtein similarity above 0.5 (Biten et al. 2019)"),
    "anls/docvqa": TextGrader(metrics.anls_docvqa, "the same as the evaluation script of DocVQA computes it"),
    "cer": TextGrader(transcription.character_accuracy, "1 - character error rate of a transcription, at least 0"),
    "wer": TextGrader(transcription.word_accuracy, "1 - word error rate of a transcription, at least 0"),
    "edit_similarity": TextGrader(transcription.edit_similarity, "1 - edit distance over the longer length (OmniDocBench)"),
    "field_f1": DocumentGrader(documents.field_f1, "F1 of the fields of its JSON; case and runs of space aside"),
    "field_f1/donut": DocumentGrader(documents.field_f1_donut, "the same with texts as they are, as Donut computes it for CORD"),
    "json": FormGrader(documents.is_json, "it is JSON and nothing else, a fence aside"),
    "json_schema": SchemaGrader(
        documents.fits_schema, "its JSON fits the schema of the option or of the row", libraries=("jsonschema", "referencing")
    ),
    "iou": BoxGrader(boxes.first_box_iou, "IoU of its first box with the nearest right one"),
    "iou/0.5": BoxGrader(partial(boxes.first_box_iou, threshold=0.5), "that IoU is at least 0.5 (RefCOCO's accuracy)"),
    "matched_iou": BoxGrader(boxes.matched_iou, "mean IoU of all boxes, matched one to one as well as can be"),
    "box_f1": BoxGrader(boxes.box_f1, "F1 of all boxes, found at an IoU of 0.5 or more"),
    "point_in_box": PointGrader(boxes.point_in_box, "its point, or the centre of its box, lies in a right box (ScreenSpot)"),
    "format": FormGrader(form.tagged_blocks, "<think>…</think><answer>…</answer> and nothing else"),
    "format/think-trl": FormGrader(form.think_format_trl, "begins with one <think> block, as TRL's think_format_reward asks"),
    "format/open-r1": FormGrader(form.think_answer_open_r1, "both blocks with line breaks, as open-r1 and the vision guides ask"),
    "length": FormGrader(form.length_within, "as long as the options allow, in words or characters"),
}


def get_grader(
    name: str, options: Mapping[str, Any] | None = None, *, base_dir: Path | None = None, frames: Frames | None = None
) -> Grader:
    """The grader of this name, or the user's function for `module:function` or `file.py:function`.

    Args:
        options: of the grader, by name; a user's function is given them as keywords.
        base_dir: folder that modules and files of the user are looked up in first; none: the current one.
        frames: how the model writes coordinates, where it is known.

    Raises:
        EvaluationError: there is no such grader, option, module or function, an option is out of range, or the grader's library
            is not installed.
    """
    if name in GRADERS:
        GRADERS[name].require_libraries(name)
        grader = GRADERS[name].with_options(options or {}, name=name)
        return grader if frames is None else grader.with_frames(frames)
    if is_user_function(name):
        function = load_function(name, kind="Grader", signature="(answer, conversation)", base_dir=base_dir or Path.cwd())
        _check_keywords(function, name, options or {})
        return UserGrader(name, partial(function, **options) if options else function)
    near = difflib.get_close_matches(name, GRADERS, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(GRADERS)}; or give module:function."
    raise EvaluationError(f"Grader {name!r} is not known. {hint}")


def check_graders(tasks: Sequence[TaskSettings], *, base_dir: Path | None = None) -> None:
    """Finds what is wrong with the graders that tasks name before anything is read or loaded.

    Raises:
        EvaluationError: as in :func:`get_grader`, for the first of them.
    """
    for task in tasks:
        get_grader(task.grader, task.grader_options, base_dir=base_dir)


def _check_keywords(function: Callable[..., Any], name: str, options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some functions written in C none can be read
        return
    try:
        signature.bind("", None, **options)
    except TypeError as error:
        given = f"(answer, conversation{''.join(f', {key}=…' for key in options)})"
        raise EvaluationError(
            f"Grader {name!r} is called as {given}, which {function.__name__}{signature} does not take: {error}."
        ) from None
