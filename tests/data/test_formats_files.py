"""Whatever holds the rows: JSON, JSONL, CSV, Parquet, Arrow, saved `datasets` folders, a hub name."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from finesight.data.conversation import Conversation
from finesight.data.formats import ReadResult, read_source
from finesight.data.media import image_size, open_image
from finesight.data_settings import DataSettings, SourceSettings
from finesight.errors import DataError

ROWS = [{"messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"A{i}"}], "id": i} for i in range(3)]


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8))


def png(seed: int = 0) -> bytes:
    out = io.BytesIO()
    picture(seed).save(out, "PNG")
    return out.getvalue()


def read(folder: Path, path: str, **source: Any) -> ReadResult:
    settings = DataSettings(train=[SourceSettings(path=path, **source)])
    return read_source(settings.train[0], data=settings, base_dir=folder)


def texts(result: ReadResult) -> list[tuple[str, str | None]]:
    return [(c.turns[0].text, c.answer) for c in result.conversations]


EXPECTED = [(f"Q{i}", f"A{i}") for i in range(3)]


class TestJson:
    @pytest.mark.parametrize("content", [ROWS, {"data": ROWS}, {"version": "1.0", "rows": ROWS}])
    def test_list_or_object_with_one_list(self, tmp_path: Path, content: Any) -> None:
        (tmp_path / "rows.json").write_text(json.dumps(content))
        assert texts(read(tmp_path, "rows.json")) == EXPECTED

    def test_a_single_row(self, tmp_path: Path) -> None:
        (tmp_path / "rows.json").write_text(json.dumps(ROWS[0]))
        assert texts(read(tmp_path, "rows.json")) == EXPECTED[:1]

    def test_lines_under_the_wrong_suffix(self, tmp_path: Path) -> None:
        (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, ROWS)))
        assert texts(read(tmp_path, "rows.json")) == EXPECTED

    def test_byte_order_mark_and_chinese(self, tmp_path: Path) -> None:
        row = {"messages": [{"role": "user", "content": "他们是谁？"}, {"role": "assistant", "content": "凯恩"}]}
        (tmp_path / "rows.json").write_text(json.dumps([row], ensure_ascii=False), encoding="utf-8-sig")
        (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8-sig")
        assert texts(read(tmp_path, "rows.json")) == texts(read(tmp_path, "rows.jsonl")) == [("他们是谁？", "凯恩")]

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ('[{"a": 1,}]', "line 1, column 10"),
            ("[]", "holds no rows"),
            ('"text"', "must hold a list"),
            ('{"a": [1], "b": [2]}', "object with one list; found an object with the keys a, b"),
            ("[" * 200_000, "nested too deeply|not valid JSON"),
        ],
    )
    def test_refused(self, tmp_path: Path, content: str, reason: str) -> None:
        (tmp_path / "rows.json").write_text(content)
        with pytest.raises(DataError, match=reason):
            read(tmp_path, "rows.json")

    def test_other_encoding(self, tmp_path: Path) -> None:
        (tmp_path / "rows.json").write_bytes('["é"]'.encode("latin-1"))
        with pytest.raises(DataError, match="not written in UTF-8"):
            read(tmp_path, "rows.json")


class TestJsonLines:
    def test_bad_lines_are_named(self, tmp_path: Path) -> None:
        good = json.dumps(ROWS[0])
        (tmp_path / "rows.jsonl").write_bytes(f"{good}\n\n{{'a'\n[1]\n{good}\n".encode() + b'{"a": "\xff"}\n')
        result = read(tmp_path, "rows.jsonl")
        assert [c.source.row for c in result.conversations] == [0, 3]
        assert [(bad.row, bad.reason.split(":")[0]) for bad in result.bad_rows] == [
            (1, "line 3 is not valid JSON"), (2, "line 4"), (4, "line 6 is not written in UTF-8 (byte 7)"),
        ]  # fmt: skip

    @pytest.mark.parametrize("end", ["\n", "\r\n", ""])
    def test_column_of_a_line_that_is_cut(self, tmp_path: Path, end: str) -> None:
        (tmp_path / "rows.jsonl").write_bytes(f'{json.dumps(ROWS[0])}\n{{"a": 1, "b": {end}'.encode())
        assert "line 2 is not valid JSON: Expecting value at column 15" in read(tmp_path, "rows.jsonl").bad_rows[0].reason

    def test_a_hundred_thousand_rows_take_seconds(self, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        for seed in range(10):
            (tmp_path / "images" / f"{seed}.png").write_bytes(png(seed))
        with (tmp_path / "rows.jsonl").open("w") as file:
            for i in range(100_000):
                turns = [{"from": "human", "value": f"<image>\nQuestion {i}?"}, {"from": "gpt", "value": str(i)}]
                file.write(json.dumps({"image": f"images/{i % 10}.png", "conversations": turns}) + "\n")
        started = time.process_time()  # of this process alone, whatever else the machine does
        result = read(tmp_path, "rows.jsonl")
        assert len(result.conversations) == 100_000
        assert time.process_time() - started < 15  # about 4 s on one slow core


class TestCsv:
    def test_rows(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(png())
        (tmp_path / "rows.csv").write_text(
            'file,q,a,w\na.png,"What, now?",007,0.5\n\na.png,"two\nlines",8,1\nshort,1\n', encoding="utf-8-sig"
        )
        columns = {"image": "file", "question": "q", "answer": "a", "weight": "w"}
        result = read(tmp_path, "rows.csv", columns=columns)
        assert texts(result) == [("What, now?", "007"), ("two\nlines", "8")]
        assert result.conversations[0].weight == 0.5
        assert "line 6 has 2 fields, the first line names 4 columns" in result.bad_rows[0].reason

    def test_tabs(self, tmp_path: Path) -> None:
        (tmp_path / "rows.tsv").write_text("q\ta\nx, y\tz\n")
        assert texts(read(tmp_path, "rows.tsv", columns={"question": "q", "answer": "a"})) == [("x, y", "z")]

    def test_double_header(self, tmp_path: Path) -> None:
        (tmp_path / "rows.csv").write_text("q,q\n1,2\n")
        with pytest.raises(DataError, match="must name each column once"):
            read(tmp_path, "rows.csv", columns={"question": "q", "answer": "q"})


def chart_rows() -> dict[str, Any]:
    """As ChartQA has it."""
    return {
        "image": [picture(0), picture(1)],
        "query": ["How many?", "Which?"],
        "label": [["14"], ["Peru", "peru"]],
        "human_or_machine": [0, 1],
    }


def chart_features() -> datasets.Features:
    return datasets.Features(
        image=datasets.Image(), query=datasets.Value("string"), label=datasets.List(datasets.Value("string")),
        human_or_machine=datasets.ClassLabel(names=["human", "machine"]),
    )  # fmt: skip


def chart_dataset() -> datasets.Dataset:
    return datasets.Dataset.from_dict(chart_rows(), features=chart_features())


CHART = {
    "columns": {"image": "image", "answer": "label", "extra": ["human_or_machine"]},
    "prompt": "{query}\nAnswer briefly.",
}


def check_charts(conversations: list[Conversation]) -> None:
    assert [(c.turns[0].text, c.answer) for c in conversations] == [
        ("How many?\nAnswer briefly.", "14"),
        ("Which?\nAnswer briefly.", "Peru"),
    ]
    assert [dict(c.extra) for c in conversations] == [
        {"answers": ["14"], "human_or_machine": "human"},
        {"answers": ["Peru", "peru"], "human_or_machine": "machine"},
    ]
    for seed, conversation in enumerate(conversations):
        (part,) = conversation.media
        assert part.media is not None
        assert part.media.data is not None  # still encoded
        assert conversation.turns[0].parts[0] is part
        assert np.array_equal(open_image(part.media), picture(seed))


class TestArrow:
    def test_parquet(self, tmp_path: Path) -> None:
        chart_dataset().to_parquet(str(tmp_path / "charts.parquet"))
        check_charts(read(tmp_path, "charts.parquet", **CHART).conversations)

    def test_parquet_without_metadata(self, tmp_path: Path) -> None:
        table = pa.table({"pic": [png()], "q": ["Q"], "a": [5]})
        pq.write_table(table, tmp_path / "rows.parquet")
        result = read(tmp_path, "rows.parquet", columns={"image": "pic", "question": "q", "answer": "a"})
        assert texts(result) == [("Q", "5")]

    @pytest.mark.parametrize("stream", [True, False])
    def test_arrow_files(self, tmp_path: Path, stream: bool) -> None:
        table = chart_dataset().with_format("arrow")[:]
        opened = pa.ipc.new_stream if stream else pa.ipc.new_file
        with opened(str(tmp_path / "charts.arrow"), table.schema) as writer:
            writer.write_table(table)
        check_charts(read(tmp_path, "charts.arrow", **CHART).conversations)

    def test_damaged(self, tmp_path: Path) -> None:
        for suffix in ("parquet", "arrow"):
            (tmp_path / f"rows.{suffix}").write_bytes(b"nothing of the kind")
            with pytest.raises(DataError, match=f"not a valid {suffix.capitalize()} file"):
                read(tmp_path, f"rows.{suffix}")

    def test_messages_with_image_columns(self, tmp_path: Path) -> None:
        """TRL's vision form: Arrow fills the keys that a part does not use with None."""
        content = [{"type": "image", "text": None}, {"type": "text", "text": "Q"}]
        rows = {
            "messages": [[{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]],
            "images": [[picture()]],
        }
        features = datasets.Features(
            messages=datasets.List(
                {"role": datasets.Value("string"), "content": datasets.List({k: datasets.Value("string") for k in ("type", "text")})}
            ),
            images=datasets.List(datasets.Image()),
        )
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
        result = read(tmp_path, "set")
        assert result.format == "messages"
        (part,) = result.conversations[0].media
        assert part.media is not None
        assert image_size(part.media) == (12, 8)


class TestSavedFolders:
    def test_dataset(self, tmp_path: Path) -> None:
        chart_dataset().save_to_disk(str(tmp_path / "charts"))
        check_charts(read(tmp_path, "charts", **CHART).conversations)

    def test_nothing_is_decoded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        chart_dataset().save_to_disk(str(tmp_path / "charts"))

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("decoded")

        monkeypatch.setattr(datasets.Image, "decode_example", refuse)
        assert len(read(tmp_path, "charts", **CHART).conversations) == 2

    def test_order_of_selected_rows(self, tmp_path: Path) -> None:
        chart_dataset().select([1, 0]).save_to_disk(str(tmp_path / "charts"))
        assert [c.answer for c in read(tmp_path, "charts", **CHART).conversations] == ["Peru", "14"]

    def test_splits(self, tmp_path: Path) -> None:
        datasets.DatasetDict(train=chart_dataset(), test=chart_dataset().select([1])).save_to_disk(str(tmp_path / "charts"))
        check_charts(read(tmp_path, "charts", **CHART).conversations)
        assert len(read(tmp_path, "charts", split="test", **CHART).conversations) == 1
        with pytest.raises(DataError, match="has no split 'val'; it has train, test"):
            read(tmp_path, "charts", split="val", **CHART)

    def test_settings_without_meaning(self, tmp_path: Path) -> None:
        chart_dataset().save_to_disk(str(tmp_path / "charts"))
        (tmp_path / "rows.json").write_text(json.dumps(ROWS))
        for path, setting in (
            ("charts", {"split": "test"}),
            ("charts", {"name": "x"}),
            ("rows.json", {"split": "test"}),
            ("rows.json", {"name": "x"}),
        ):
            with pytest.raises(DataError, match=f"`{next(iter(setting))}` means nothing"):
                read(tmp_path, path, **setting)

    def test_folder_of_parquet_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A copy of a hub data set, through the same `load_dataset` as a hub name."""
        (tmp_path / "copy" / "data").mkdir(parents=True)
        chart_dataset().to_parquet(str(tmp_path / "copy" / "data" / "train-00000-of-00001.parquet"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        check_charts(read(tmp_path, "copy", **CHART).conversations)

    def test_folder_of_images(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "set" / "train").mkdir(parents=True)
        (tmp_path / "set" / "train" / "a.png").write_bytes(png())
        (tmp_path / "set" / "train" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "q": "Q", "a": "A"}))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        result = read(tmp_path, "set", columns={"image": "image", "question": "q", "answer": "a"})
        assert texts(result) == [("Q", "A")]

    def test_folder_without_data(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "notes" / "more").mkdir(parents=True)
        (tmp_path / "notes" / "more" / "README.md").write_text("x")
        for path in ("empty", "notes"):
            with pytest.raises(DataError, match=rf"^{path} is a folder that holds no data file \(\.json, .*give the path of a file"):
                read(tmp_path, path)


class TestHubs:
    def test_huggingface_offline(self, tmp_path: Path) -> None:
        with pytest.raises(
            DataError,
            match=r"no file or folder somebody/some-charts here, and as a data set of the hub.*cannot be loaded: HF_HUB_OFFLINE.*HF_ENDPOINT",
        ):
            read(tmp_path, "somebody/some-charts")

    def test_modelscope_is_optional(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "modelscope", None)
        monkeypatch.setitem(sys.modules, "modelscope.msdatasets", None)
        with pytest.raises(DataError, match="pip install modelscope"):
            read(tmp_path, "somebody/some-charts", hub="modelscope")

    @pytest.mark.parametrize("path", ["gone.json", "a/b/c", "../gone.parquet"])
    def test_what_cannot_be_a_hub_name(self, tmp_path: Path, path: str) -> None:
        with pytest.raises(DataError, match="does not exist"):
            read(tmp_path, path)

    @pytest.mark.parametrize("path", ["gone.jsonl", "data/gone.parquet", "gone.txt", "data/gone.csv"])
    def test_missing_file_is_not_looked_up_on_a_hub(self, tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets, "load_dataset", lambda **_: pytest.fail("a hub was asked"))
        with pytest.raises(DataError, match=r"does not exist .*correct the path of the file \(data\.train\.0\.path"):
            read(tmp_path, path)

    def test_unknown_kind_of_file(self, tmp_path: Path) -> None:
        (tmp_path / "rows.txt").write_text("x")
        with pytest.raises(DataError, match=r"'\.txt' are not read; known: \.json"):
            read(tmp_path, "rows.txt")
