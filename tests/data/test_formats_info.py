"""LLaMA-Factory's dataset_info.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finesight.data.formats import ReadResult, read_source
from finesight.data_settings import DataSettings, SourceSettings
from finesight.errors import DataError

TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
CHAT = [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "Kane."}]
ENTRY = {"file_name": "sub/rows.json", "formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"}, "tags": TAGS}


def write(folder: Path, rows: list[Any], entry: dict[str, Any]) -> None:
    (folder / "sub").mkdir(exist_ok=True)
    Image.new("RGB", (12, 8)).save(folder / "a.png")
    (folder / "sub" / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry, "absent": {"file_name": "absent.json"}}))


def read(folder: Path, path: str = ".", name: str | None = "mine", **source: Any) -> ReadResult:
    settings = DataSettings(train=[SourceSettings(path=path, name=name, **source)])
    return read_source(settings.train[0], data=settings, base_dir=folder)


def shape(result: ReadResult) -> list[list[tuple[str, str]]]:
    return [
        [(turn.role, "".join(p.text if p.media is None else f"<{p.type}>" for p in turn.parts)) for turn in c.turns]
        for c in result.conversations
    ]


@pytest.mark.parametrize("path", [".", "dataset_info.json"])
def test_folder_or_file(tmp_path: Path, path: str) -> None:
    write(tmp_path, [{"messages": CHAT, "images": ["a.png"], "id": 5}], ENTRY)
    result = read(tmp_path, path)
    assert result.format == "llamafactory"
    assert result.file == "sub/rows.json"
    assert shape(result) == [[("user", "<image>Who?"), ("assistant", "Kane.")]]
    assert result.conversations[0].extra == {"id": 5}
    assert Path(result.conversations[0].media[0].media.path or "").name == "a.png"  # beside the dataset_info.json, as there


def test_own_columns_and_tags(tmp_path: Path) -> None:
    rows = [{
        "talk": [{"who": "Q", "what": "Hi"}, {"who": "T", "what": "call"}, {"who": "O", "what": "result"}, {"who": "A", "what": "Ho"}],
        "pics": [], "sys": "Be brief.", "tools": "",
    }]  # fmt: skip
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "Q", "assistant_tag": "A", "observation_tag": "O", "function_tag": "T"}
    columns = {"messages": "talk", "images": "pics", "system": "sys", "tools": "tools"}
    write(tmp_path, rows, {**ENTRY, "columns": columns, "tags": tags})
    assert shape(read(tmp_path)) == [
        [("system", "Be brief."), ("user", "Hi"), ("assistant", "call"), ("tool", "result"), ("assistant", "Ho")]
    ]


def test_sharegpt_defaults(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    write(
        tmp_path,
        [{"conversations": turns}, {"conversations": [{"from": "user", "value": "Q"}]}],
        {"file_name": "sub/rows.json", "formatting": "sharegpt"},
    )
    result = read(tmp_path)
    assert shape(result) == [[("user", "Q"), ("assistant", "A")]]
    assert "has the role 'user'; known: human, gpt" in result.bad_rows[0].reason


def test_alpaca(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "Ho", "history": [["A", "B"]], "system": "S"},
        {"instruction": "Hi", "output": ""},
        {"output": "3"},
    ]
    write(tmp_path, rows, {"file_name": "sub/rows.json"})
    result = read(tmp_path)
    assert shape(result) == [[("user", "Add.\n1 and 2"), ("assistant", "3")], [("user", "Hi"), ("assistant", "Ho")]]
    assert ["empty answer" in result.bad_rows[0].reason, "'instruction'" in result.bad_rows[1].reason] == [True, True]
    columns = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}
    write(tmp_path, rows[1:2], {"file_name": "sub/rows.json", "columns": columns})
    assert shape(read(tmp_path)) == [[("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "Hi"), ("assistant", "Ho")]]


def test_unsupported_rows(tmp_path: Path) -> None:
    columns = {"messages": "messages", "tools": "functions", "audios": "sound"}
    plain = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    write(
        tmp_path,
        [{"messages": plain, "functions": "[{}]"}, {"messages": plain, "sound": ["a.wav"]}, {"messages": "x"}],
        {**ENTRY, "columns": columns},
    )
    reasons = [bad.reason for bad in read(tmp_path).bad_rows]
    assert ["tool definitions" in reasons[0], "audio" in reasons[1], "must hold a list of messages" in reasons[2]] == [True] * 3


def test_number_of_samples(tmp_path: Path) -> None:
    write(tmp_path, [{"messages": CHAT, "images": ["a.png"]}] * 5, {**ENTRY, "num_samples": 2})
    result = read(tmp_path)
    assert len(result.conversations) == 2
    assert "limits 'mine' to 2 rows" in result.notes[0]


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        ({}, None, "has 2 entries; set `name`.*With their files here: mine"),
        ({}, "other", "has no entry 'other'"),
        ({}, "absent", "names absent.json, which is not in"),
        ({"ranking": True}, "mine", "preference pairs"),
        ({"columns": {"kto_tag": "label"}}, "mine", "kto_tag"),
        ({"formatting": "xml"}, "mine", "formatting 'xml'"),
        ({"file_name": None, "script_url": "load.py"}, "mine", "loading scripts and cloud files are not supported"),
        ({"folder": "python"}, "mine", "names a folder of a hub data set"),
        ({"file_name": None, "ms_hub_url": "a/b"}, "mine", "is not on huggingface, only on modelscope"),
    ],
)
def test_refused(tmp_path: Path, change: dict[str, Any], name: str | None, reason: str) -> None:
    write(tmp_path, [{"messages": CHAT, "images": ["a.png"]}], {**ENTRY, **change})
    with pytest.raises(DataError, match=reason):
        read(tmp_path, name=name)


def test_named_format_must_agree(tmp_path: Path) -> None:
    write(tmp_path, [{"messages": CHAT, "images": ["a.png"]}], ENTRY)
    with pytest.raises(DataError, match="read as llamafactory, not as messages"):
        read(tmp_path, format="messages")


@pytest.mark.parametrize(("name", "count", "kind"), [("mllm_demo", 6, "image"), ("mllm_video_demo", 3, "video")])
def test_users_folder(example_data: Path, name: str, count: int, kind: str) -> None:
    result = read(example_data, "llamafactory_demo", name)
    assert (result.format, len(result.conversations), result.bad_rows) == ("llamafactory", count, [])
    assert {part.type for c in result.conversations for part in c.media} == {kind}
    direct = read(example_data, f"llamafactory_demo/{name}.json", None)
    assert shape(direct) == shape(result)
