"""The registry, accepted answers, and graders of the user."""

from __future__ import annotations

import numpy as np
import pytest

from finesight.data.conversation import Conversation, Part, RowSource, Turn
from finesight.errors import EvaluationError
from finesight.tasks.graders import GRADERS, accepted_answers, get_grader


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


@pytest.mark.parametrize("name", GRADERS)
def test_every_grader_takes_several_answers(name):
    grader = get_grader(name)
    assert grader("B", row("B")) == (0 if name.startswith("numeric") else 1)
    assert grader("12", row("x", answers=["7", "12"])) == 1
    assert GRADERS[name].description


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
    with pytest.raises(EvaluationError, match="gave 3"):
        get_grader("my_graders_xyz:large", base_dir=tmp_path)("a", row("b"))
    for name in ("my_graders_xyz:missing", "my_graders_xyz:number", "no_such_module_xyz:f", "absent.py:f"):
        with pytest.raises(EvaluationError, match="Grader"):
            get_grader(name, base_dir=tmp_path)
