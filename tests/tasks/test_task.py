"""Tasks from recipes: rows, held-out rows, and what is refused."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from finesight.data.conversation import Conversation, Part, RowSource, Turn
from finesight.data_settings import DataSettings
from finesight.errors import DataError, EvaluationError
from finesight.recipe import TaskSettings
from finesight.tasks.task import evenly_spread, load_task


def _row(number: int, answer: str | None = "7") -> Conversation:
    turns = [Turn("user", (Part("text", f"Question {number}"),))]
    if answer is not None:
        turns.append(Turn("assistant", (Part("text", answer),)))
    return Conversation(tuple(turns), RowSource("held_out.jsonl", number))


def _file(tmp_path, answers=("3", "5")):
    Image.new("RGB", (48, 48), "white").save(tmp_path / "digit.png")
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>Read the number."}, {"role": "assistant", "content": answer}],
            "images": ["digit.png"],
        }
        for answer in answers
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path / "rows.jsonl"


def test_a_task_of_a_file(tmp_path):
    _file(tmp_path)
    task = load_task(TaskSettings(name="reading", data="rows.jsonl"), data=DataSettings(), base_dir=tmp_path)
    assert (task.name, task.grader_name, len(task.conversations)) == ("reading", "exact_match", 2)
    assert [turn.role for prompt in task.prompts() for turn in prompt.turns] == ["user", "user"]
    assert [task.grader("5.", conversation) for conversation in task.conversations] == [0.0, 1.0]


def test_a_task_of_the_held_out_rows(tmp_path):
    held_out = [_row(number) for number in range(10)]
    task = load_task(TaskSettings(name="held out", max_samples=4), data=DataSettings(), base_dir=tmp_path, held_out=held_out)
    assert [c.source.row for c in task.conversations] == [0, 2, 5, 7]
    with pytest.raises(EvaluationError, match=r"Set data\.eval_split"):
        load_task(TaskSettings(name="held out"), data=DataSettings(), base_dir=tmp_path)


def test_rows_that_cannot_be_judged_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match=r"held_out\.jsonl, row 3 has no answer"):
        load_task(TaskSettings(name="t"), data=DataSettings(), base_dir=tmp_path, held_out=[_row(1), _row(3, None)])
    with pytest.raises(EvaluationError, match="Did you mean 'anls'"):
        load_task(TaskSettings(name="t", grader="anlz"), data=DataSettings(), base_dir=tmp_path, held_out=[_row(1)])
    (tmp_path / "my_task_graders.py").write_text("def polite(answer, conversation):\n    return 'please' in answer\n")
    own = TaskSettings(name="t", grader="my_task_graders:polite")
    task = load_task(own, data=DataSettings(), base_dir=tmp_path, held_out=[_row(3, None)])  # its function needs no answer
    assert task.grader("please", task.conversations[0]) == 1.0


def test_bad_rows_stop_or_are_skipped(tmp_path):
    path = _file(tmp_path)
    path.write_text(
        path.read_text() + "\n" + json.dumps({"messages": [{"role": "user", "content": "<image>?"}], "images": ["missing.png"]})
    )
    settings = TaskSettings(name="reading", data=str(path))
    with pytest.raises(DataError, match="row 2"):
        load_task(settings, data=DataSettings(), base_dir=tmp_path)
    assert len(load_task(settings, data=DataSettings(on_bad_row="skip"), base_dir=tmp_path).conversations) == 2


def test_prompts_end_with_what_is_to_be_answered():
    talk = [Turn("user", (Part("text", "a"),)), Turn("assistant", (Part("text", "b"),)), Turn("user", (Part("text", "c"),))]
    open_end = Conversation(tuple(talk), RowSource("x", 0))
    assert open_end.prompt() is open_end
    answered = Conversation((*talk, Turn("assistant", (Part("text", "d"),))), RowSource("x", 0))
    assert answered.prompt().turns == open_end.turns


def test_rows_are_picked_at_even_distances():
    rows = [_row(number) for number in range(7)]
    assert [c.source.row for c in evenly_spread(rows, 3)] == [0, 2, 4]
    assert len(evenly_spread(rows, None)) == len(evenly_spread(rows, 99)) == 7


def test_options_of_a_grader_and_its_own_check(tmp_path):
    rows = [Conversation((Turn("user", (Part("text", "?"),)),), RowSource("held_out.jsonl", 4), extra={"ground_truth": {"total": "7"}})]
    task = load_task(TaskSettings(name="t", grader="field_f1"), data=DataSettings(), base_dir=tmp_path, held_out=rows)
    assert task.grader('{"total": 7}', rows[0]) == 1
    assert task.grader.expected(rows[0]) == ('{"total": "7"}',)
    with pytest.raises(EvaluationError, match="no option 'treshold'"):
        load_task(
            TaskSettings(name="t", grader="anls", grader_options={"treshold": 1}),
            data=DataSettings(),
            base_dir=tmp_path,
            held_out=[_row(1)],
        )
