"""The scenes of the demo: real scans, divided before anything is composed, written as a user's data would be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finesight.data.formats import read_source
from finesight.data.media import open_image
from finesight.data_settings import DataSettings, SourceSettings
from finesight.demo.scenes import (
    FIRST_PARITY,
    FIRST_PLUS_ONE,
    LAST_PARITY,
    LAST_PLUS_ONE,
    NEW_QUESTIONS,
    OLD_QUESTIONS,
    READ,
    READING_TURNS,
    Question,
    Scans,
    compose,
    divide_scans,
    load_scans,
    rows_file,
    write_rows,
    write_scenes,
)
from finesight.demo.settings import SceneSettings
from finesight.errors import DataError

SETTINGS = SceneSettings()


@pytest.fixture(scope="module")
def scans() -> Scans:
    return load_scans()


class TestDivision:
    def test_no_scan_on_both_sides_and_none_lost(self, scans: Scans) -> None:
        train, held_out = divide_scans(scans, 360, seed=0)
        assert (len(train), len(held_out)) == (1437, 360)
        assert sorted([*train.numbers, *held_out.numbers]) == list(range(1797))

    def test_a_seed_always_divides_alike(self, scans: Scans) -> None:
        one, same, other = (divide_scans(scans, 360, seed)[1].numbers for seed in (1, 1, 2))
        assert np.array_equal(one, same) and not np.array_equal(one, other)

    @pytest.mark.parametrize("held_out", [0, 1, 1796, 1797, 5000])
    def test_a_side_without_every_digit_is_refused(self, scans: Scans, held_out: int) -> None:
        with pytest.raises(DataError, match="not every digit is on both sides"):
            divide_scans(scans, held_out, seed=0)


class TestScenes:
    def test_shows_the_scans_that_it_names(self, scans: Scans) -> None:
        for scene in compose(scans, 50, SETTINGS, (0, 1)):
            assert scene.image.size == (64, 32) and scene.image.mode == "L"
            assert tuple(scans.digits[list(scene.scans)]) == scene.digits

    def test_each_half_holds_its_own_digit(self, scans: Scans) -> None:
        """Blanking one half of a scene leaves the other digit whole: nothing reaches over the middle."""
        for scene in compose(scans, 50, SETTINGS, (0, 1)):
            left, right = np.hsplit(np.asarray(scene.image), 2)
            assert left.max() > 100 and right.max() > 100

    def test_only_scans_of_the_side_given(self, scans: Scans) -> None:
        train, held_out = divide_scans(scans, 360, seed=0)
        shown = {scan for scene in compose(held_out, 200, SETTINGS, (0, 1)) for scan in scene.scans}
        assert shown <= set(held_out.numbers.tolist()) and not shown & set(train.numbers.tolist())

    def test_a_stream_gives_the_same_scenes(self, scans: Scans) -> None:
        first, again, other = ([scene.image.tobytes() for scene in compose(scans, 5, SETTINGS, (0, stream))] for stream in (1, 1, 2))
        assert first == again != other

    def test_no_answer_is_more_frequent(self, scans: Scans) -> None:
        scenes = list(compose(scans, 3000, SETTINGS, (0, 1)))
        for question in NEW_QUESTIONS:
            counts = Counter(question.answer(scene.digits) for scene in scenes)
            assert len(counts) == question.num_answers
            # Five standard deviations of a binomial share.
            assert max(counts.values()) / 3000 < question.chance + 5 * (question.chance * (1 - question.chance) / 3000) ** 0.5

    def test_a_digit_larger_than_its_half_is_made_to_fit(self, scans: Scans) -> None:
        wide = replace(SETTINGS, image_width=40, min_digit_side=20, max_digit_side=30)
        assert all(scene.image.size == (40, 32) for scene in compose(scans, 5, wide, (0, 1)))


@pytest.mark.parametrize(
    ("question", "digits", "answer"),
    [
        (READ, (4, 7), "47"),
        (READ, (0, 5), "05"),
        (FIRST_PLUS_ONE, (4, 7), "5"),
        (FIRST_PARITY, (4, 7), "even"),
        (LAST_PLUS_ONE, (4, 7), "8"),
        (LAST_PLUS_ONE, (4, 9), "10"),
        (LAST_PARITY, (4, 7), "odd"),
        (LAST_PARITY, (7, 0), "even"),
    ],
)
def test_answers(question: Question, digits: tuple[int, int], answer: str) -> None:
    assert question.answer(digits) == answer


class TestRows:
    def test_rows_are_read_as_a_users_would_be(self, scans: Scans, tmp_path: Path) -> None:
        scenes = write_scenes(tmp_path, compose(scans, 6, SETTINGS, (0, 1)), 6)
        write_rows(tmp_path, scenes, NEW_QUESTIONS)
        for question in NEW_QUESTIONS:
            read = read_source(SourceSettings(path=str(rows_file(tmp_path, question))), data=DataSettings(), base_dir=tmp_path)
            assert read.format == "messages" and not read.bad_rows
            for conversation, scene in zip(read.conversations, scenes, strict=True):
                assert conversation.turns[0].text == question.text
                assert conversation.answer == question.answer(scene.digits)
                (image,) = conversation.media
                assert np.array_equal(np.asarray(open_image(image.media))[..., 0], np.asarray(scene.image))

    def test_turns_ask_one_question_about_each_scene(self, scans: Scans, tmp_path: Path) -> None:
        scenes = write_scenes(tmp_path, compose(scans, 8, SETTINGS, (0, 1)), 8)
        write_rows(tmp_path, scenes, OLD_QUESTIONS, READING_TURNS)
        counts = {question: len(rows_file(tmp_path, question).read_text().splitlines()) for question in OLD_QUESTIONS}
        assert counts == {READ: 4, FIRST_PLUS_ONE: 2, FIRST_PARITY: 2}

    def test_a_folder_that_cannot_be_written(self, scans: Scans, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(DataError, match="Choose another --output"):
            write_scenes(tmp_path / "file" / "scenes", compose(scans, 1, SETTINGS, (0, 1)), 1)
