"""The registry, accepted answers, and graders of the user."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from finesight.data.conversation import Conversation, Part, RowSource, Turn
from finesight.errors import EvaluationError
from finesight.recipe import TaskSettings
from finesight.tasks.graders import GRADERS, check_graders, get_grader
from finesight.tasks.grading import accepted_answers


def row(answer: str | None = None, **extra) -> Conversation:
    turns = [Turn("user", (Part("text", "How many?"),))]
    if answer is not None:
        turns.append(Turn("assistant", (Part("text", answer),)))
    return Conversation(tuple(turns), RowSource("rows.jsonl", 7), extra=extra)


def test_accepted_answers_come_from_the_row():
    assert accepted_answers(row("three")) == ("three",)
    assert accepted_answers(row("three", ground_truth=3)) == ("3",)
    assert accepted_answers(row("three", answers=["3", "three"], ground_truth="x")) == ("3", "three")
    assert accepted_answers(row("three", answers=[])) == ("three",)
    assert accepted_answers(row(None, answers=np.array(["a", "b"]))) == ("a", "b")
    with pytest.raises(EvaluationError, match=r"rows\.jsonl, row 7"):
        accepted_answers(row(None))
    with pytest.raises(EvaluationError, match=r"rows\.jsonl, row 7: ground_truth is a mapping"):
        accepted_answers(row("x", ground_truth={"a": 1}))


# One right and one wrong answer for every grader: (right answer, wrong answer, row).
BOXES = "[0, 0, 10, 10]"
EXAMPLES = {
    "numeric": ("12", "11", row("x", answers=["7", "12"])),
    "math": (r"\boxed{\frac{1}{2}}", r"\boxed{3}", row("$0.5$")),
    "field_f1": ('{"a": 1}', "{}", row("x", ground_truth={"a": "1"})),
    "json_schema": ("{}", "[]", row("x", json_schema={"type": "object"})),
    "json": ("{}", "so", row("x")),
    "iou": (BOXES, "no", row(BOXES)),
    "matched_iou": (BOXES, "no", row(BOXES)),
    "box_f1": (BOXES, "no", row(BOXES)),
    "point_in_box": ("(5, 5)", "(50, 5)", row(BOXES)),
    "format": ("<think>\na\n</think>\n<answer>\nb\n</answer>", "b", row("x")),
    "length": ("two words", "", row("x")),
    "": ("B", "C", row("x", answers=["A", "B"])),
}


@pytest.mark.parametrize("name", GRADERS)
def test_every_grader_tells_right_from_wrong(name):
    library = {"math/math-verify": "math_verify", "json_schema": "jsonschema"}
    if name in library:
        pytest.importorskip(library[name])
    right, wrong, conversation = EXAMPLES.get(name.split("/")[0], EXAMPLES[""])
    grader = get_grader(name)
    grader.check(conversation)
    assert (grader(right, conversation), grader(wrong, conversation)) == (1.0, 0.0)
    assert all(isinstance(text, str) for text in grader.expected(conversation))
    assert GRADERS[name].description


def test_options():
    assert get_grader("anls", {"threshold": 0.9})("hallo", row("hello")) == pytest.approx(0.8)
    assert get_grader("numeric/1%", {"relative_tolerance": 0.5})("140", row("100")) == 1
    assert get_grader("exact_match", {"part": "final"})("<think>no</think><answer>yes</answer>", row("yes")) == 1
    assert get_grader("exact_match", {"column": "label"})("cat", row("dog", label="cat")) == 1
    assert get_grader("length", {"maximum": 3, "unit": "characters"})("four", row("x")) == 0
    schema = get_grader("json_schema", {"json_schema": {"type": "array"}})
    assert schema.expected(row("x")) == ('{"type": "array"}',)
    assert GRADERS["box_f1"].options() == {
        "part": "whole", "column": "", "boxes_in": "answer", "box_format": "xyxy", "threshold": 0.5, "labels": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("anls", {"treshold": 0.5}, "Did you mean 'threshold'"),
        ("anls", {"threshold": "high"}, "must be a number"),
        ("anls", {"threshold": True}, "must be a number"),
        ("box_f1", {"labels": 1}, "must be true or false"),
        ("iou", {"boxes_in": "pixels"}, "must be one of answer, thousandths"),
        ("length", {"maximum": 2.5}, "must be a whole number"),
        ("json_schema", {"json_schema": "x"}, "must be a mapping"),
        ("exact_match", {"zzz": 1}, "It has: part, column"),
        ("iou", {"threshold": 1.5}, "threshold is 1.5; it must be less than or equal to 1"),
        ("iou", {"threshold": -0.1}, "must be greater than or equal to 0"),
        ("box_f1", {"threshold": 0}, "must be greater than 0"),  # every box would count as found
        ("anls", {"threshold": 50}, "must be less than or equal to 1"),
        ("numeric", {"relative_tolerance": -1}, "must be greater than or equal to 0"),
        ("math", {"relative_tolerance": math.inf}, "must be a finite number"),
        ("numeric/5%", {"relative_tolerance": math.nan}, "must be"),
        ("length", {"minimum": -1}, "must be greater than or equal to 0"),
        ("length", {"minimum": 9, "maximum": 3}, "minimum 9 is above maximum 3"),
        ("length", {"maximum": 0}, "minimum 1 is above maximum 0"),
        ("format", {"tags": "think,,answer"}, "must be names of tags, parted by commas"),
        ("json_schema", {"json_schema": {"type": 5}}, "no JSON schema"),
    ],
)
def test_options_that_are_none(name, options, message):
    if name == "json_schema":
        pytest.importorskip("jsonschema")
    with pytest.raises(EvaluationError, match=message):
        get_grader(name, options)


def test_rows_that_a_grader_cannot_judge():
    for name, conversation, message in (
        ("field_f1", row("no json"), "no JSON to compare"),
        ("json_schema", row("x"), "no JSON schema"),
        ("exact_match", row("x", ground_truth={"a": 1}), "Take field_f1"),
        ("exact_match", row(None), "no answer to compare"),
    ):
        with pytest.raises(EvaluationError, match=rf"rows\.jsonl, row 7.*{message}"):
            get_grader(name).check(conversation)
    with pytest.raises(EvaluationError, match=r"nothing in column 'label'.*Its columns for graders: other"):
        get_grader("exact_match", {"column": "label"}).check(row("x", other=1))


def test_a_schema_of_a_row_that_is_none_is_refused_before_grading():
    pytest.importorskip("jsonschema")
    with pytest.raises(EvaluationError, match=r"^rows\.jsonl, row 7: This is no JSON schema"):
        get_grader("json_schema").check(row("x", json_schema={"type": 5}))


def test_a_missing_library_is_named_when_the_grader_is_named():
    """Not after the first task of an evaluation, nor in the middle of training."""
    absent = [name for name, grader in GRADERS.items() if any(find_spec(library) is None for library in grader.libraries)]
    for name in absent:
        with pytest.raises(EvaluationError, match=rf"{name}.*pip install 'finesight\[graders\]'"):
            get_grader(name)
    needing = replace(GRADERS["exact_match"], libraries=("json", "a_library_that_nobody_has"))
    with pytest.raises(EvaluationError, match="'mine' needs a_library_that_nobody_has, which"):
        needing.require_libraries("mine")
    GRADERS["exact_match"].require_libraries("exact_match")


def test_tasks_are_checked_together(tmp_path):
    tasks = [TaskSettings(name="a", data="x.jsonl"), TaskSettings(name="b", data="y.jsonl", grader="iou", grader_options={"threshold": 2})]
    check_graders(tasks[:1])
    with pytest.raises(EvaluationError, match="threshold is 2"):
        check_graders(tasks)


def test_an_unknown_grader_is_refused_with_the_nearest_name():
    with pytest.raises(EvaluationError, match="Did you mean 'exact_match'"):
        get_grader("exact_mach")


def test_graders_of_the_user(tmp_path):
    (tmp_path / "my_graders_xyz.py").write_text(
        "def same_length(answer, conversation):\n    return len(answer) == len(conversation.answer)\n"
        "def broken(answer, conversation):\n    raise KeyError('box')\n"
        "def large(answer, conversation):\n    return 3\nnumber = 4\n"
    )
    for name in ("my_graders_xyz:same_length", "my_graders_xyz.py:same_length"):
        grader = get_grader(name, base_dir=tmp_path)
        assert (grader("abc", row("xyz")), grader("a", row("xyz"))) == (1.0, 0.0)
    with pytest.raises(EvaluationError, match=r"failed on rows\.jsonl, row 7: KeyError"):
        get_grader("my_graders_xyz:broken", base_dir=tmp_path)("a", row("b"))
    with pytest.raises(
        EvaluationError, match=r"called as \(answer, conversation, unit=…\), which same_length\(answer, conversation\) does not"
    ):
        get_grader("my_graders_xyz:same_length", {"unit": "cm"}, base_dir=tmp_path)
    with pytest.raises(EvaluationError, match="gave 3"):
        get_grader("my_graders_xyz:large", base_dir=tmp_path)("a", row("b"))
    (tmp_path / "one_xyz.py").write_text("def _hidden(): pass\ndef longer(answer, conversation, by=1):\n    return len(answer) > by\n")
    assert get_grader("one_xyz.py", {"by": 3}, base_dir=tmp_path)("abc", row("x")) == 0
    with pytest.raises(EvaluationError, match="must have one public function, it has same_length, broken, large"):
        get_grader("my_graders_xyz.py", base_dir=tmp_path)
    for name in ("my_graders_xyz:missing", "my_graders_xyz:number", "no_such_module_xyz:f", "absent.py:f"):
        with pytest.raises(EvaluationError, match="Grader"):
            get_grader(name, base_dir=tmp_path)
