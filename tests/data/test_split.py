"""Held-out rows share no image with the others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finesight.data.conversation import Conversation, MediaRef, Part, RowSource, Turn
from finesight.data.split import held_out_source, hold_out, image_groups, is_share
from finesight.data_settings import DataSettings
from finesight.errors import DataError


def image(number: int) -> Image.Image:
    return Image.fromarray(np.full((2, 2), number, np.uint8))


def rows(*images_of_rows: tuple[int, ...]) -> list[Conversation]:
    """A conversation for each tuple of image numbers; every image is an object of its own."""
    return [
        Conversation(
            (Turn("user", (*(Part("image", media=MediaRef(image=image(i))) for i in numbers), Part("text", text="Q"))),),
            RowSource("f", row),
        )
        for row, numbers in enumerate(images_of_rows)
    ]


def numbers(conversations: list[Conversation]) -> list[int]:
    return [conversation.source.row for conversation in conversations]


def test_groups_through_others() -> None:
    assert image_groups(rows((1,), (2,), (1, 3), (), (3, 2), (), (4,))) == [[0, 1, 2, 4], [3], [5], [6]]


def test_last_rows_take_along_what_shares_their_images() -> None:
    train, held_out = hold_out(rows((1,), (2,), (3,), (1,), (4,)), "last 2", seed=0)
    assert (numbers(train), numbers(held_out)) == ([1, 2], [0, 3, 4])


def test_last_of_text_rows() -> None:
    train, held_out = hold_out(rows((), (), (), (), ()), "last 2", seed=0)
    assert (numbers(train), numbers(held_out)) == ([0, 1, 2], [3, 4])


def test_share_is_met_exactly_where_groups_allow() -> None:
    data = rows(*[(i,) for i in range(100)])
    train, held_out = hold_out(data, "5%", seed=1)
    assert (len(train), len(held_out)) == (95, 5)
    assert numbers(train) == sorted(numbers(train))
    assert numbers(hold_out(data, "5%", seed=1)[1]) == numbers(held_out)
    assert numbers(hold_out(data, "5%", seed=2)[1]) != numbers(held_out)


def test_content_under_two_names_is_one_image(tmp_path) -> None:
    for name in ("a.png", "b.png"):
        image(7).save(tmp_path / name)
    refs = [MediaRef(path=str(tmp_path / name)) for name in ("a.png", "b.png")]
    data = [Conversation((Turn("user", (Part("image", media=ref),)),), RowSource("f", i)) for i, ref in enumerate(refs)]
    assert image_groups(data) == [[0, 1]]


def test_too_few_rows_still_hold_one_group_out() -> None:
    train, held_out = hold_out(rows((1,), (1,), (2,)), "1%", seed=0)
    assert numbers(held_out) == [2]
    assert numbers(train) == [0, 1]


@pytest.mark.parametrize(
    ("data", "split"), [(rows((1,), (1,)), "50%"), (rows((1,)), "5%"), (rows((1,), (2,)), "last 2"), (rows((1,), (2,), (1, 2)), "last 1")]
)
def test_a_side_that_would_be_empty(data: list[Conversation], split: str) -> None:
    with pytest.raises(DataError, match="leaves no row left to train on"):
        hold_out(data, split, seed=0)


def test_no_rows() -> None:
    with pytest.raises(DataError, match="leaves no row held out"):
        hold_out([], "5%", seed=0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 12), max_size=3).map(tuple), min_size=2, max_size=30),
    st.sampled_from(["5%", "30%", "last 3"]),
    st.integers(0, 3),
)
def test_no_image_stands_on_both_sides(images: list[tuple[int, ...]], split: str, seed: int) -> None:
    data = rows(*images)
    try:
        train, held_out = hold_out(data, split, seed)
    except DataError:
        return
    assert sorted(numbers(train) + numbers(held_out)) == list(range(len(data)))
    assert train
    assert held_out
    left, right = ({i for c in side for i in images[c.source.row]} for side in (train, held_out))
    assert not left & right


def test_paths_are_read_as_the_training_source_is() -> None:
    assert [is_share(text) for text in ("5%", "last 4", "eval.json", "data/test")] == [True, True, False, False]
    columns = {"image": "image", "question": "query", "answer": "label"}
    data = DataSettings(
        train=[{"path": "train", "columns": columns, "split": "train", "name": "big", "media_dir": "m"}], eval_split="eval.jsonl"
    )
    source = held_out_source(data)
    assert source is not None
    assert (source.path, source.split, source.name, source.media_dir, source.columns) == (
        "eval.jsonl",
        "train",
        None,
        "m",
        data.train[0].columns,
    )
    assert held_out_source(data.model_copy(update={"eval_split": "5%"})) is None
    assert held_out_source(data.model_copy(update={"eval_split": None})) is None
    with pytest.raises(DataError, match="is a path"):
        hold_out(rows((1,), (2,)), "eval.jsonl", seed=0)


@pytest.mark.parametrize("text", ["none", "None", "NULL", " none "])
def test_none_holds_nothing_out(text: str) -> None:
    data = DataSettings().model_copy(update={"eval_split": text})
    assert held_out_source(data) is None
    assert not is_share(text)
    with pytest.raises(DataError, match="holds no rows out"):
        hold_out(rows((1,), (2,)), text, seed=0)


@pytest.mark.parametrize("text", ["5", "0.05", ".1", "-3", "1e-2", " 7 "])
def test_a_bare_number_is_no_path(text: str) -> None:
    data = DataSettings().model_copy(update={"eval_split": text})
    with pytest.raises(DataError, match="write '5%' or 'last 5'"):
        held_out_source(data)
    with pytest.raises(DataError, match="write '5%' or 'last 5'"):
        hold_out(rows((1,), (2,)), text, seed=0)
