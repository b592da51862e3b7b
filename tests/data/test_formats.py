"""Rows of every format become the same conversations; what cannot becomes a bad row with its reason."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finesight.data.conversation import Conversation
from finesight.data.formats import ReadResult, accept, read_source
from finesight.data.media import image_size, media_key
from finesight.data_settings import DataSettings, SourceSettings
from finesight.errors import BadRow, DataError


def png(seed: int = 0, width: int = 12, height: int = 8) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds images/a.png and images/b.png."""
    (tmp_path / "images").mkdir()
    for seed, name in enumerate("ab"):
        (tmp_path / "images" / f"{name}.png").write_bytes(png(seed))
    return tmp_path


def read(folder: Path, rows: list[Any], *, require_answer: bool = True, data: dict[str, Any] | None = None, **source: Any) -> ReadResult:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = DataSettings(train=[SourceSettings(path="rows.jsonl", **source)], **(data or {}))
    return read_source(settings.train[0], data=settings, base_dir=folder, require_answer=require_answer)


def one(folder: Path, row: dict[str, Any], **options: Any) -> Conversation:
    result = read(folder, [row], **options)
    assert not result.bad_rows, result.bad_rows
    return result.conversations[0]


def reason(folder: Path, row: dict[str, Any], **options: Any) -> str:
    result = read(folder, [row], **options)
    assert not result.conversations
    assert (result.bad_rows[0].file, result.bad_rows[0].row) == ("rows.jsonl", 0)
    return result.bad_rows[0].reason


def shape(conversation: Conversation) -> list[tuple[str, list[str]]]:
    """(role, parts): texts as they are, media as the name of their file."""
    return [
        (turn.role, [p.text if p.media is None else f"<{p.type} {Path(p.media.path or 'embedded').name}>" for p in turn.parts])
        for turn in conversation.turns
    ]


EXPECTED = [("user", ["<image a.png>", "What is it?"]), ("assistant", ["Noise."])]
ANSWER = {"role": "assistant", "content": "Noise."}
FILE_URL = "file://{folder}/images/a.png"
DATA_URL = "data:image/png;base64," + base64.b64encode(png()).decode()


class TestMessages:
    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image", "image": "images/a.png"},
            {"type": "image", "path": "images/a.png"},
            {"type": "image", "url": FILE_URL},
            {"type": "image_url", "image_url": {"url": "images/a.png", "detail": "high"}},
            {"type": "image_url", "image_url": FILE_URL},
            {"type": "image_url", "value": "images/a.png"},  # LLaMA-Factory's v1
            {"type": "input_image", "image_url": "images/a.png"},
            {"image": "images/a.png"},  # Qwen's short form
            {"type": "image", "image": {"path": "images/a.png", "bytes": None}, "text": None},  # as Arrow writes it
        ],
    )
    def test_image_parts(self, folder: Path, part: dict[str, Any]) -> None:
        part = json.loads(json.dumps(part).replace("{folder}", str(folder)))
        row = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}, ANSWER]}
        result = read(folder, [row])
        assert result.format == "messages"
        assert shape(result.conversations[0]) == EXPECTED

    @pytest.mark.parametrize(
        "part", [{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "image", "base64": DATA_URL.partition(",")[2]}]
    )
    def test_embedded_images(self, folder: Path, part: dict[str, Any]) -> None:
        conversation = one(folder, {"messages": [{"role": "user", "content": [part, "What is it?"]}, ANSWER]})
        (image,) = conversation.media
        assert image.media is not None
        assert image.media.data == png()
        assert image_size(image.media) == (12, 8)

    def test_urls_only_if_allowed(self, folder: Path) -> None:
        row = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://127.0.0.1:9/a.png"}]}, ANSWER]}
        assert "data.allow_urls: true" in reason(folder, row)
        assert "cannot be fetched" in reason(folder, row, data={"allow_urls": True})

    def test_outside_only_if_allowed(self, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        (elsewhere / "c.png").write_bytes(png(3))
        row = {"messages": [{"role": "user", "content": [{"type": "image", "image": str(elsewhere / "c.png")}]}, ANSWER]}
        assert "data.allowed_dirs" in reason(folder, row)
        assert "data.train.0.media_dir" in reason(folder, row)
        assert one(folder, row, data={"allowed_dirs": [str(elsewhere)]}).media

    def test_string_and_list_contents_are_equal(self, folder: Path) -> None:
        as_string = one(folder, {"messages": [{"role": "user", "content": "Hi"}, ANSWER]})
        as_list = one(
            folder, {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, ANSWER]}
        )
        assert as_string.turns == as_list.turns

    def test_placeholders_are_filled_in_order(self, folder: Path) -> None:
        content = [{"type": "image", "index": 0}, {"type": "text", "text": "or"}, {"type": "image", "text": None}]
        row = {"messages": [{"role": "user", "content": content}, ANSWER], "images": ["images/b.png", "images/a.png"]}
        assert shape(one(folder, row))[0] == ("user", ["<image b.png>", "or", "<image a.png>"])

    def test_trl_images_without_placeholders_come_first_in_the_first_user_turn(self, folder: Path) -> None:
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, ANSWER, {"role": "user", "content": "R"}, ANSWER]
        for column, value in (("images", ["images/a.png", "images/b.png"]), ("image", "images/a.png")):
            turns = shape(one(folder, {"messages": messages, column: value}))
            assert turns[1][1] == [f"<image {name}.png>" for name in ("ab" if column == "images" else "a")] + ["Q"]
            assert turns[3] == ("user", ["R"])

    def test_tags_in_typed_texts_are_text(self, folder: Path) -> None:
        content = [{"type": "image"}, {"type": "text", "text": "the <image> tag of HTML"}]
        assert (
            shape(one(folder, {"messages": [{"role": "user", "content": content}, ANSWER], "images": ["images/a.png"]}))[0][1][1]
            == content[1]["text"]
        )

    def test_roles(self, folder: Path) -> None:
        messages = [{"role": "developer", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "<call/>"}]
        messages += [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, ANSWER]
        assert [turn.role for turn in one(folder, {"messages": messages}).turns] == [
            "system",
            "user",
            "assistant",
            "tool",
            "tool",
            "assistant",
        ]

    @pytest.mark.parametrize(
        ("key", "value", "train"), [("weight", 0, False), ("weight", 1, True), ("train", False, False), ("loss_weight", 0.0, False)]
    )
    def test_messages_left_out_of_training(self, folder: Path, key: str, value: Any, train: bool) -> None:
        messages = [{"role": "user", "content": "Q"}, {**ANSWER, key: value}, {"role": "user", "content": "R"}, ANSWER]
        assert [turn.train for turn in one(folder, {"messages": messages}).turns] == [True, train, True, True]

    def test_item_settings(self, folder: Path) -> None:
        content = [
            {"type": "image", "image": "images/a.png", "resized_height": 56, "resized_width": 84},
            {"type": "image", "image": "images/b.png"},
        ]
        first, second = one(folder, {"messages": [{"role": "user", "content": content}, ANSWER], "max_pixels": 9000}).media
        assert (first.resized_height, first.resized_width, first.max_pixels) == (56, 84, 9000)
        assert (second.resized_height, second.max_pixels) == (None, 9000)

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"resized_height": 5}, "must be given together"),
            ({"min_pixels": 10, "max_pixels": 5}, "larger than max_pixels"),
            ({"max_pixels": 0}, "whole number of at least 1"),
            ({"max_pixels": "many"}, "finite number"),
            ({"video_start": 2}, "video_start is not supported"),
        ],
    )
    def test_item_settings_out_of_range(self, folder: Path, settings: dict[str, Any], expected: str) -> None:
        content = [{"type": "image", "image": "images/a.png", **settings}]
        assert expected in reason(folder, {"messages": [{"role": "user", "content": content}, ANSWER]})

    @pytest.mark.parametrize(
        ("messages", "expected"),
        [
            ([], "`messages` is empty"),
            ([ANSWER], "begins with an assistant turn"),
            ([{"role": "system", "content": "S"}], "no user turn"),
            ([{"role": "user", "content": "Q"}] * 2 + [ANSWER], "two user turns follow each other"),
            ([{"role": "user", "content": "Q"}, ANSWER, ANSWER], "two assistant turns follow each other"),
            ([{"role": "user", "content": "Q"}, ANSWER, {"role": "system", "content": "S"}], "only the first may be"),
            ([{"role": "user", "content": "Q"}, {"role": "tool", "content": "1"}, ANSWER], "tool turn follows a user turn"),
            ([{"role": "user", "content": "Q"}], "no answer to train on"),
            ([{"role": "user", "content": "Q"}, {"role": "assistant", "content": " \n"}], "empty answer"),
            ([{"role": "user", "content": "Q"}, {"role": "assistant", "content": None}], "empty answer"),
            ([{"role": "user", "content": ""}, ANSWER], "a user turn is empty"),
            ([{"role": "narrator", "content": "Q"}, ANSWER], "has the role 'narrator'"),
            (["Q", ANSWER], "must be an object"),
            ([{"role": "user", "content": 5}, ANSWER], "must be text or a list"),
            ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, ANSWER], "audio is not supported"),
            ([{"role": "user", "content": [{"type": "depth", "depth": "x"}]}, ANSWER], "of type 'depth'"),
            ([{"role": "user", "content": [{"data": "x"}]}, ANSWER], "has no type"),
            ([{"role": "user", "content": [{"type": "text"}]}, ANSWER], "holds no text"),
            ([{"role": "user", "content": [{"type": "image", "image": 7}]}, ANSWER], "is of type int"),
            ([{"role": "user", "content": [{"type": "image"}]}, ANSWER], "1 place(s) for images (<image> tags), the row has 0"),
            ([{"role": "user", "content": "<image>Q"}, ANSWER], "1 place(s) for images (<image> tags), the row has 0"),
            ([{"role": "user", "content": "Q"}, {**ANSWER, "tool_calls": [{}]}], "tool_calls"),
            ([{"role": "user", "content": "Q"}, {**ANSWER, "reasoning_content": "hm"}], "<think>"),
            ([{"role": "user", "content": "Q"}, {**ANSWER, "weight": 0.5}], "only 0 and 1"),
            (
                [{"role": "user", "content": "Q"}, {"role": "assistant", "content": [{"type": "image", "image": "images/a.png"}, "x"]}],
                "text only",
            ),
        ],
    )
    def test_bad_rows(self, folder: Path, messages: list[Any], expected: str) -> None:
        assert expected in reason(folder, {"messages": messages})

    def test_missing_and_undecodable_images(self, folder: Path) -> None:
        (folder / "images" / "bad.png").write_bytes(b"nothing")
        rows = [
            {"messages": [{"role": "user", "content": [{"type": "image", "image": f"images/{name}.png"}]}, ANSWER]}
            for name in ("a", "gone", "bad", "b", "bad")
        ]
        result = read(folder, rows)
        assert [c.source.row for c in result.conversations] == [0, 3]
        assert [bad.row for bad in result.bad_rows] == [1, 2, 4]
        assert "does not exist" in result.bad_rows[0].reason
        assert "no image of a known format" in result.bad_rows[1].reason
        assert result.num_rows == len(rows)

    def test_columns_for_graders(self, folder: Path) -> None:
        row = {
            "messages": [{"role": "user", "content": "Q"}, ANSWER],
            "ground_truth": {"box": [1, 2]},
            "image": "images/a.png",
            "id": 7,
            "note": None,
        }
        assert one(folder, row).extra == {"ground_truth": {"box": [1, 2]}, "id": 7}

    def test_tools_and_audio_columns_are_refused(self, folder: Path) -> None:
        messages = [{"role": "user", "content": "Q"}, ANSWER]
        assert "tool definitions" in reason(folder, {"messages": messages, "tools": [{}]})
        assert "audio" in reason(folder, {"messages": messages, "audios": ["a.wav"]})

    def test_system_prompt_of_the_recipe(self, folder: Path) -> None:
        row = {"messages": [{"role": "user", "content": "Q"}, ANSWER]}
        assert shape(one(folder, row, system="Be brief."))[0] == ("system", ["Be brief."])
        row["messages"].insert(0, {"role": "system", "content": "Own."})
        assert shape(one(folder, row, system="Be brief."))[0] == ("system", ["Own."])

    def test_users_v1_file(self, example_data: Path) -> None:
        source = SourceSettings(path="llamafactory_demo/v1_multimodal_demo.jsonl", media_dir="llamafactory_demo")
        result = read_source(source, data=DataSettings(train=[source]), base_dir=example_data)
        assert (result.format, len(result.conversations), result.bad_rows) == ("messages", 24, [])
        assert shape(result.conversations[0])[0] == ("user", ["<image 1.jpg>", "Who are they?"])
        assert "stands for the folder 'data'" in result.notes[0]


class TestWeights:
    def test_column(self, folder: Path) -> None:
        rows = [{"messages": [{"role": "user", "content": "Q"}, ANSWER], "w": w} for w in (0, 2.5, -1, math.inf, None, True, "0.5")]
        result = read(folder, rows, weight_column="w")
        assert [c.weight for c in result.conversations] == [0.0, 2.5, 0.5]
        assert [bad.row for bad in result.bad_rows] == [2, 3, 4, 5]
        assert "negative" in result.bad_rows[0].reason
        assert "finite" in result.bad_rows[1].reason
        assert "no weight" in result.bad_rows[2].reason
        assert "w" not in result.conversations[0].extra


class TestPromptCompletion:
    def test_strings(self, folder: Path) -> None:
        row = {"prompt": "What is it?", "completion": "Noise.", "image": "images/a.png"}
        result = read(folder, [row])
        assert result.format == "prompt_completion"
        assert shape(result.conversations[0]) == EXPECTED

    def test_messages(self, folder: Path) -> None:
        prompt = [
            {"role": "user", "content": "A"},
            ANSWER,
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        ]
        conversation = one(folder, {"prompt": prompt, "completion": [ANSWER], "images": ["images/a.png"]})
        assert shape(conversation)[2:] == EXPECTED
        assert [turn.train for turn in conversation.turns if turn.role == "assistant"] == [False, True]

    def test_prompt_only_is_for_reinforcement(self, folder: Path) -> None:
        row = {"prompt": [{"role": "user", "content": "What is it?"}], "image": "images/a.png", "solution": "Noise."}
        conversation = one(folder, row, require_answer=False)
        assert conversation.answer is None
        assert conversation.extra == {"solution": "Noise."}
        assert "prompt-only rows are for reinforcement" in reason(folder, row)

    def test_answers_are_kept_for_reinforcement(self, folder: Path) -> None:
        assert one(folder, {"prompt": "Q", "completion": "A"}, require_answer=False).answer == "A"


class TestConversations:
    @pytest.mark.parametrize(("value", "parts"), [("<image>\nQ", ["<image a.png>", "Q"]), ("Q\n<image>", ["Q", "<image a.png>"])])
    def test_both_orders(self, folder: Path, value: str, parts: list[str]) -> None:
        result = read(
            folder, [{"image": "images/a.png", "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "A"}]}]
        )
        assert result.format == "conversations"
        assert shape(result.conversations[0]) == [("user", parts), ("assistant", ["A"])]

    def test_several_images_and_a_system_turn(self, folder: Path) -> None:
        turns = [{"from": "system", "value": "S"}, {"from": "human", "value": "Is <image> like <image>?"}, {"from": "gpt", "value": "No"}]
        turns += [{"from": "human", "value": "And <image>"}, {"from": "gpt", "value": "Yes"}]
        row = {"images": ["images/a.png", "images/b.png", "images/a.png"], "conversations": turns}
        assert shape(one(folder, row))[1] == ("user", ["Is", "<image a.png>", "like", "<image b.png>", "?"])

    def test_text_without_tags_is_left_alone(self, folder: Path) -> None:
        assert one(folder, {"conversations": [{"from": "human", "value": " Q\n"}, {"from": "gpt", "value": "A "}]}).turns[0].text == " Q\n"

    @pytest.mark.parametrize(
        "row", [{"image": "images/a.png"}, {"image": ["images/a.png"] * 3}, {"video": "v.mp4", "image": ["images/a.png"] * 2}]
    )
    def test_mismatch(self, folder: Path, row: dict[str, Any]) -> None:
        value = "Q" if row == {"image": "images/a.png"} else "<image><image>Q"
        found = reason(folder, {**row, "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "A"}]})
        assert "place(s) for images" in found or "does not exist" in found

    def test_both_columns(self, folder: Path) -> None:
        row = {
            "image": "images/a.png",
            "images": ["images/b.png"],
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A"}],
        }
        assert "both images and image" in reason(folder, row)

    def test_audio_tag(self, folder: Path) -> None:
        assert "<audio>" in reason(folder, {"conversations": [{"from": "human", "value": "<audio>Q"}, {"from": "gpt", "value": "A"}]})

    def test_users_images(self, example_data: Path) -> None:
        source = SourceSettings(path="qwen_finetune_demo/single_images.json", media_dir="qwen_finetune_demo")
        result = read_source(source, data=DataSettings(train=[source]), base_dir=example_data)
        assert (result.format, len(result.conversations), result.bad_rows) == ("conversations", 3, [])
        assert shape(result.conversations[0])[0] == ("user", ["Is the value of Favorable 38 in 2015?", "<image 10095.png>"])
        first, second = (c.media[0].media for c in result.conversations[:2])
        assert first is second  # one reference for one path

    def test_users_images_say_what_to_set(self, example_data: Path) -> None:
        source = SourceSettings(path="qwen_finetune_demo/single_images.json")
        result = read_source(source, data=DataSettings(train=[source]), base_dir=example_data)
        assert len(result.bad_rows) == 3
        assert f"data.train.0.media_dir: {example_data / 'qwen_finetune_demo'} would make it resolve" in result.bad_rows[0].reason

    def test_users_videos(self, example_data: Path) -> None:
        source = SourceSettings(path="qwen_finetune_demo/video.json", media_dir="qwen_finetune_demo/videos")
        result = read_source(source, data=DataSettings(train=[source]), base_dir=example_data)
        assert [c.source.row for c in result.conversations] == [1, 2]
        assert "v_7bUu05RIksU.mp4" in result.bad_rows[0].reason
        assert shape(result.conversations[0])[0][1][0] == "<video v_TpB_zMG3XBA.mp4>"


class TestVideoSettings:
    @pytest.mark.parametrize(
        ("on_part", "on_row", "expected"),
        [
            ({"fps": 1.5}, {}, (1.5, None)),
            ({"nframes": 8}, {}, (None, 8)),
            ({}, {"fps": 3}, (3.0, None)),
            ({}, {"num_frames": 6}, (None, 6)),
            ({"nframes": 8}, {"fps": 3}, (None, 8)),
        ],
    )
    def test_rates(self, folder: Path, on_part: dict[str, Any], on_row: dict[str, Any], expected: tuple[Any, Any]) -> None:
        frames = ["images/a.png", "images/b.png"]
        row = {"messages": [{"role": "user", "content": [{"type": "video", "video": frames, **on_part}]}, ANSWER], **on_row}
        (video,) = one(folder, row).media
        assert (video.fps, video.num_frames) == expected
        assert video.media is not None
        assert len(video.media.frames or ()) == 2

    def test_both_rates(self, folder: Path) -> None:
        row = {"messages": [{"role": "user", "content": [{"type": "video", "video": ["images/a.png"], "fps": 1, "nframes": 2}]}, ANSWER]}
        assert "exclude each other" in reason(folder, row)

    def test_an_image_has_no_rate(self, folder: Path) -> None:
        row = {"messages": [{"role": "user", "content": [{"type": "image", "image": "images/a.png"}]}, ANSWER], "fps": 2}
        assert one(folder, row).media[0].fps is None


class TestTaggedMessages:
    """LLaMA-Factory's form."""

    def test_tags(self, folder: Path) -> None:
        messages = [{"role": "user", "content": "<image>Who?"}, ANSWER, {"role": "user", "content": "What?\n<image>"}, ANSWER]
        result = read(folder, [{"messages": messages, "images": ["images/a.png", "images/b.png"]}])
        assert result.format == "llamafactory"
        assert shape(result.conversations[0])[0] == ("user", ["<image a.png>", "Who?"])
        assert shape(result.conversations[0])[2] == ("user", ["What?\n", "<image b.png>"])

    def test_images_must_have_tags(self, folder: Path) -> None:
        rows = [
            {"messages": [{"role": "user", "content": text}, ANSWER], "images": ["images/a.png"]}
            for text in ("<image>Q", "Q", "<image><image>")
        ]
        result = read(folder, rows)
        assert [bad.row for bad in result.bad_rows] == [1, 2]
        assert "0 place(s) for images (<image> tags), the row has 1 image(s)" in result.bad_rows[0].reason

    def test_users_files(self, example_data: Path) -> None:
        for path, count, first in (("mllm_demo.json", 6, "<image 1.jpg>"), ("mllm_video_demo.json", 3, "<video 1.mp4>")):
            source = SourceSettings(path=str(example_data / "llamafactory_demo" / path))
            result = read_source(source, data=DataSettings(train=[source]), base_dir=Path.cwd())
            assert (result.format, len(result.conversations), result.bad_rows) == ("llamafactory", count, [])
            assert shape(result.conversations[0])[0][1][0] == first


class TestInline:
    def test_paths_in_the_text(self, folder: Path) -> None:
        """The form of widely read Qwen2-VL tutorials."""
        turns = [
            {"from": "user", "value": "COCO Yes: <|vision_start|>./images/a.png<|vision_end|>"},
            {"from": "assistant", "value": "A photo."},
        ]
        result = read(folder, [{"id": "identity_1", "conversations": turns}])
        assert result.format == "qwen_inline"
        assert shape(result.conversations[0]) == [("user", ["COCO Yes:", "<image a.png>"]), ("assistant", ["A photo."])]

    def test_several_and_placeholders(self, folder: Path) -> None:
        value = "<|vision_start|>images/b.png<|vision_end|> or <|vision_start|><|image_pad|><|vision_end|>?"
        row = {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "A"}], "image": "images/a.png"}
        assert shape(one(folder, row))[0] == ("user", ["<image b.png>", "or", "<image a.png>", "?"])

    def test_nothing_inside(self, folder: Path) -> None:
        row = {"conversations": [{"from": "human", "value": "<|vision_start|><|vision_end|>"}, {"from": "gpt", "value": "A"}]}
        assert "no path between" in reason(folder, row)


class TestTelling:
    def test_named_format_is_taken(self, folder: Path) -> None:
        row = {"messages": [{"role": "user", "content": "Q"}, ANSWER], "prompt": "P", "completion": "C"}
        assert shape(one(folder, row, format="prompt_completion"))[0] == ("user", ["P"])

    def test_rows_of_another_form_are_bad(self, folder: Path) -> None:
        rows = [{"messages": [{"role": "user", "content": "Q"}, ANSWER]}] * 2 + [{"text": "x"}]
        assert "`messages` must be a list of messages, not missing" in read(folder, rows).bad_rows[0].reason

    def test_unknown_table_shows_columns_and_an_example(self, folder: Path) -> None:
        with pytest.raises(DataError) as caught:
            read(folder, [{"query": "How many?", "image": {"bytes": "x"}, "label": ["14"], "human_or_machine": 0}])
        message = str(caught.value)
        for expected in (
            "query: 'How many?'",
            "label: a list of 1",
            "image: image",
            "question: query",
            "answer: label",
            "data.train.0",
            "formatter",
        ):
            assert expected in message

    def test_preference_pairs(self, folder: Path) -> None:
        with pytest.raises(DataError, match="preference pairs"):
            read(folder, [{"question": "Q", "chosen": "a", "rejected": "b"}])

    def test_nothing_readable(self, folder: Path) -> None:
        (folder / "broken.jsonl").write_text("{\n{\n")
        source = SourceSettings(path="broken.jsonl")
        with pytest.raises(DataError, match="line 1 is not valid JSON"):
            read_source(source, data=DataSettings(train=[source]), base_dir=folder)

    def test_columns_contradict_another_format(self, folder: Path) -> None:
        with pytest.raises(DataError, match=r"data\.train\.0\.prompt is for format table"):
            read(folder, [{"messages": []}], format="messages", prompt="{q}")


class TestAccept:
    def results(self, folder: Path) -> list[ReadResult]:
        good = {"messages": [{"role": "user", "content": "Q"}, ANSWER]}
        return [read(folder, [good, {"messages": []}, good]), read(folder, [{"messages": []}] * 30 + [good])]

    def test_stop_lists_them_all(self, folder: Path) -> None:
        with pytest.raises(DataError) as caught:
            accept(self.results(folder), "stop", shown=5, report_path=folder / "out" / "bad_rows.jsonl")
        message = str(caught.value)
        assert message.startswith("31 of 34 rows cannot be used:\n  rows.jsonl, row 1: `messages` is empty")
        assert "… and 26 more; all of them are in" in message
        assert "data.on_bad_row: skip" in message
        assert len(caught.value.bad_rows) == 31
        lines = (folder / "out" / "bad_rows.jsonl").read_text().splitlines()
        assert len(lines) == 31
        assert json.loads(lines[0]) == {"file": "rows.jsonl", "row": 1, "reason": "`messages` is empty"}

    def test_skip_counts_and_lists_them(self, folder: Path) -> None:
        said: list[str] = []
        conversations = accept(self.results(folder), "skip", shown=1, say=said.append)
        assert [c.source.row for c in conversations] == [0, 2, 30]
        assert said[0].startswith("Skipping 31 of 34 rows:\n  rows.jsonl, row 1: ")
        assert "… and 30 more" in said[0]

    def test_skip_is_never_silent(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        accept(self.results(folder), "skip")
        assert "Skipping 31 of 34 rows" in caplog.text

    def test_nothing_left(self) -> None:
        with pytest.raises(DataError, match="None of the 1 rows"):
            accept(ReadResult([], [BadRow("f", 0, "x")], "messages"), "skip")

    def test_all_good(self, folder: Path) -> None:
        result = read(folder, [{"messages": [{"role": "user", "content": "Q"}, ANSWER]}])
        assert accept(result, "stop") == result.conversations


def test_one_reference_for_one_file(folder: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": [{"type": "image", "image": "images/a.png"}]}, ANSWER]}] * 3
    media = [part.media for c in read(folder, rows).conversations for part in c.media]
    assert media[0] is media[1] is media[2]
    assert media[0] is not None
    assert len(media_key(media[0])) == 32
