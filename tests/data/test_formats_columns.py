"""Plain tables through `columns:` and `prompt:`, and everything else through a formatter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finesight.data.formats import ReadResult, read_source
from finesight.data_settings import DataSettings, SourceSettings
from finesight.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (12, 8)).save(tmp_path / name)
    return tmp_path


def read(folder: Path, rows: list[Any], require_answer: bool = True, **source: Any) -> ReadResult:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = DataSettings(train=[SourceSettings(path="rows.jsonl", **source)])
    return read_source(settings.train[0], data=settings, base_dir=folder, require_answer=require_answer)


QA = {"question": "q", "answer": "a"}


class TestColumns:
    def test_everything(self, folder: Path) -> None:
        row = {
            "img": "a.png",
            "q": "How many?",
            "a": ["4", "four"],
            "gt": 4,
            "w": 2,
            "s": "Count.",
            "id": "x",
            "other": 1,
            "max_pixels": 900,
        }
        columns = {"image": "img", "question": "q", "answer": "a", "ground_truth": "gt", "weight": "w", "system": "s", "extra": ["id"]}
        result = read(folder, [row], columns=columns)
        assert result.format == "table"
        (conversation,) = result.conversations
        assert [(turn.role, turn.text) for turn in conversation.turns] == [("system", "Count."), ("user", "How many?"), ("assistant", "4")]
        assert [part.type for part in conversation.turns[1].parts] == ["image", "text"]
        assert conversation.media[0].max_pixels == 900
        assert conversation.weight == 2.0
        assert conversation.extra == {"answers": ["4", "four"], "ground_truth": 4, "id": "x"}

    def test_accepted_answers(self, folder: Path) -> None:
        (conversation,) = read(folder, [{"q": "Q", "a": "4", "all": ["4", 4.0]}], columns={**QA, "answers": "all"}).conversations
        assert (conversation.answer, conversation.extra["answers"]) == ("4", ["4", "4"])

    def test_several_images(self, folder: Path) -> None:
        rows = [{"x": "a.png", "y": ["b.png", "a.png"], "q": q, "a": "A"} for q in ("Q", "<image> and <image>, then <image>", "<image>")]
        result = read(folder, rows, columns={"image": ["x", "y"], **QA})
        assert [[part.type for part in c.turns[0].parts] for c in result.conversations] == [
            ["image", "image", "image", "text"], ["image", "text", "image", "text", "image"],
        ]  # fmt: skip
        assert "1 place(s)" in result.bad_rows[0].reason

    @pytest.mark.parametrize(("value", "text"), [(14, "14"), (2.5, "2.5"), (3.0, "3"), (True, "True"), ("x ", "x ")])
    def test_numbers_as_answers(self, folder: Path, value: Any, text: str) -> None:
        assert read(folder, [{"q": "Q", "a": value}], columns=QA).conversations[0].answer == text

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"q": "Q", "a": None, "i": "a.png"}, "empty answer"),
            ({"q": "Q", "a": "", "i": "a.png"}, "empty answer"),
            ({"q": "Q", "a": [], "i": "a.png"}, "empty answer"),
            ({"q": None, "a": "A", "i": "a.png"}, "column 'q' is empty"),
            ({"q": "Q", "a": {"x": 1}, "i": "a.png"}, "holds a dict where text is needed"),
            ({"q": "Q", "a": [None], "i": "a.png"}, "holds nothing where text is needed"),
            ({"q": "Q", "a": "A", "i": None}, "missing image: column 'i' is empty"),
            ({"q": "Q", "a": "A", "i": [None]}, "i[0] is empty"),
            ({"q": "Q", "a": "A", "i": "gone.png"}, "does not exist"),
        ],
    )
    def test_bad_rows(self, folder: Path, row: dict[str, Any], reason: str) -> None:
        result = read(folder, [row], columns={"image": "i", **QA})
        assert reason in result.bad_rows[0].reason

    def test_prompt_only(self, folder: Path) -> None:
        rows = [{"q": "Q", "a": None, "gt": "4"}]
        columns = {"question": "q", "ground_truth": "gt"}
        assert read(folder, rows, require_answer=False, columns=columns).conversations[0].extra == {"ground_truth": "4"}
        assert read(folder, rows, require_answer=False, columns={**columns, "answer": "a"}).conversations[0].answer is None
        with pytest.raises(DataError, match=r"data\.train\.0: columns\.answer is not set"):
            read(folder, rows, columns=columns)

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            (
                {"columns": {"question": "quest", "answer": "a"}},
                r"data\.train\.0\.columns\.question: there is no column 'quest'; did you mean 'question'\?.*question, a, i",
            ),
            ({"columns": {"question": "question", "answer": "a", "image": ["i", "z"]}}, r"columns\.image: there is no column 'z'"),
            ({"columns": {"answer": "a"}}, "needs columns.question, or a prompt"),
            ({"columns": {"answer": "a"}, "prompt": "{question} {nothing}"}, r"data\.train\.0\.prompt: there is no column 'nothing'"),
            ({"columns": {"question": "question", "answer": "a"}, "prompt": "Say."}, "prompt does not contain {question}"),
            ({"columns": {"answer": "a"}, "prompt": "{question"}, "write {{ and }}"),
            ({"columns": {"answer": "a"}, "prompt": "{question!r}"}, "column names alone"),
            ({"columns": {"answer": "a"}, "prompt": "{question.__class__}"}, "there is no column"),
            ({"prompt": "{question}"}, r"columns\.answer is not set"),
        ],
    )
    def test_settings_are_checked_before_rows(self, folder: Path, source: dict[str, Any], reason: str) -> None:
        with pytest.raises(DataError, match=reason):
            read(folder, [{"question": "Q", "a": "A", "i": "a.png"}], **source)

    def test_template(self, folder: Path) -> None:
        row = {"q": "{braces} stay", "n": 3, "a": "A"}
        result = read(folder, [row], columns={"answer": "a"}, prompt="{q} ({n}) {{as such}}")
        assert result.conversations[0].turns[0].text == "{braces} stay (3) {as such}"


class TestFormatter:
    @pytest.fixture(autouse=True)
    def module(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "my_rows.py").write_text(
            "def chat(row):\n"
            "    if row['q'] is None:\n        return None\n"
            "    return {'messages': [{'role': 'user', 'content': row['q']}, {'role': 'assistant', 'content': str(1 // row['a'])}], 'image': row.get('i')}\n"
        )
        (folder / "broken_rows.py").write_text("raise RuntimeError('no')\n")
        monkeypatch.chdir(folder)

    def test_rows(self, folder: Path) -> None:
        rows = [{"q": "Q", "a": 1, "i": "a.png"}, {"q": None, "a": 1}, {"q": "Q", "a": 0}]
        result = read(folder, rows, formatter="my_rows:chat")
        assert result.format == "messages"
        assert [c.source.row for c in result.conversations] == [0]
        assert len(result.conversations[0].media) == 1
        assert [bad.reason for bad in result.bad_rows] == [
            "formatter my_rows:chat returned None; it must return a dict",
            "formatter my_rows:chat raised ZeroDivisionError: integer division or modulo by zero",
        ]

    @pytest.mark.parametrize(
        ("formatter", "reason"),
        [
            ("my_rows", "not of the form module:function"),
            ("absent_rows:chat", "absent_rows cannot be imported"),
            ("broken_rows:chat", "RuntimeError: no"),
            ("my_rows:talk", "has no function 'talk'; it has chat"),
        ],
    )
    def test_refused(self, folder: Path, formatter: str, reason: str) -> None:
        with pytest.raises(DataError, match=reason):
            read(folder, [{"q": "Q"}], formatter=formatter)
