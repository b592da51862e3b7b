"""Boxes and points: reading, agreement, and the frames of the families, worked by hand."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from finesight.data.conversation import Conversation, MediaRef, Part, RowSource, Turn
from finesight.data.processor import load_processor
from finesight.data_settings import DataSettings
from finesight.errors import EvaluationError
from finesight.tasks.boxes import Box, box_f1, boxes_of, first_box_iou, iou, matched_iou, point_in_box, read_boxes, read_point
from finesight.tasks.frames import frames_of
from finesight.tasks.graders import get_grader
from finesight.tasks.grading import seeing
from tiny import tiny_checkpoint

A, B = Box(0, 0, 10, 10), Box(20, 20, 30, 30)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ('```json\n[\n\t{"bbox_2d": [10, 20, 30, 40], "label": "cat"}\n]\n```', [Box(10, 20, 30, 40, "cat")]),
        ('{"bbox_2d": [1, 2, 3, 4], "label": "a"}\n{"bbox_2d": [5, 6, 7, 8], "label": "b"}', [Box(1, 2, 3, 4), Box(5, 6, 7, 8)]),
        ("[10, 20, 30, 40]", [Box(10, 20, 30, 40)]),
        ("[1,2,3,4] and [5,6,7,8]", [Box(1, 2, 3, 4), Box(5, 6, 7, 8)]),
        ("<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>", [Box(1, 2, 3, 4)]),
        ("<box>1 2 3 4</box>", [Box(1, 2, 3, 4)]),
        ("It is at (0.1, 0.2, 0.3, 0.45).", [Box(0.1, 0.2, 0.3, 0.45)]),
        ("[-1, .5, 10%, 4.]", [Box(-1, 0.5, 0.1, 4)]),
        ("nothing", []), ("[1, 2, 3]", []), ("", []), ("[[1, 2], [3, 4]]", []), ("[1, 2, NaN, 4]", []), ("[1e400, 2, 3, 4]", []),
    ],
    ids=range(14),
)  # fmt: skip
def test_reading_boxes(text, boxes):
    assert read_boxes(text) == boxes


def test_boxes_of_data_files():
    assert (
        boxes_of([1, 2, 3, 4])
        == boxes_of([[1, 2, 3, 4]])
        == boxes_of({"bbox": [1, 2, 3, 4]})
        == boxes_of("[1, 2, 3, 4]")
        == [Box(1, 2, 3, 4)]
    )
    assert boxes_of([10, 20, 5, 6], "xywh") == [Box(10, 20, 15, 26)]
    assert boxes_of([{"box": [1, 2, 3, 4], "label": "a"}, {"box": [5, 6, 7, 8]}]) == [Box(1, 2, 3, 4, "a"), Box(5, 6, 7, 8)]
    assert boxes_of({"objects": [[1, 2, 3, 4], [5, 6, 7, 8]]}) == [Box(1, 2, 3, 4), Box(5, 6, 7, 8)]
    assert boxes_of([]) == boxes_of(None) == boxes_of([1, 2, 3]) == boxes_of([True, 2, 3, 4]) == []


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ('{"point_2d": [12, 34], "label": "button"}', (12, 34)), ('[{"point_2d": [1, 2]}]', (1, 2)), ("(12, 34)", (12, 34)), ("[12, 34]", (12, 34)),
        ("click(x=12, y=34)", (12, 34)), ('{"x": 5, "y": 6}', (5, 6)), ("<point>12 34</point>", (12, 34)), ("x: 0.5, y: 0.25", (0.5, 0.25)),
        ('{"bbox_2d": [0, 0, 10, 20]}', (5, 10)), ("[0, 0, 10, 20]", (5, 10)), ("pyautogui.click(100, 200)", (100, 200)),
        ('{"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [7, 8]}}', (7, 8)), ("none", None), ("", None), ("[1]", None),
    ],
    ids=range(15),
)  # fmt: skip
def test_reading_points(text, point):
    assert read_point(text) == point


def test_golden_iou():
    assert iou(A, A) == 1
    assert iou(A, B) == 0
    assert iou(A, Box(5, 0, 15, 10)) == pytest.approx(1 / 3)  # 50 / 150
    assert iou(A, Box(2, 2, 8, 8)) == pytest.approx(0.36)
    assert iou(A, Box(10, 0, 20, 10)) == 0  # edges touch
    assert iou(A, Box(10, 10, 0, 0)) == iou(Box(3, 3, 3, 3), Box(3, 3, 3, 3)) == 0  # no area


def test_golden_first_box():
    half = Box(0, 0, 10, 5)
    assert first_box_iou([half, A], [A]) == 0.5  # the first one counts
    assert first_box_iou([half], [B, A]) == 0.5  # the nearest right one
    assert [first_box_iou([half], [A], threshold=t) for t in (0.5, 0.51)] == [1, 0]
    assert first_box_iou([], [A]) == first_box_iou([A], []) == 0


def test_golden_matching():
    assert matched_iou([B, A], [A, B]) == box_f1([B, A], [A, B]) == 1
    assert matched_iou([A], [A, B]) == 0.5
    assert box_f1([A], [A, B]) == pytest.approx(2 / 3)
    assert matched_iou([A, A], [A]) == 0.5  # a copy finds nothing
    assert box_f1([A, A], [A]) == pytest.approx(2 / 3)
    assert matched_iou([Box(0, 0, 10, 5)], [A]) == 0.5
    assert [box_f1([Box(0, 0, 10, 5)], [A], threshold=t) for t in (0.5, 0.6)] == [1, 0]
    assert matched_iou([], []) == box_f1([], []) == 1
    assert matched_iou([A], []) == box_f1([], [A]) == 0


def test_the_best_matching_is_not_the_greedy_one():
    left, middle, right = Box(0, 0, 10, 10), Box(4, 0, 14, 10), Box(7, 0, 17, 10)
    # `middle` overlaps both; taken by the nearer one first, the other would be left with nothing.
    given, truth = [middle, left], [Box(5, 0, 15, 10), right]
    greedy = iou(middle, truth[0]) + iou(left, truth[1])
    assert 2 * matched_iou(given, truth) == pytest.approx(max(greedy, iou(middle, truth[1]) + iou(left, truth[0])))


def test_labels_where_they_matter():
    cat, dog = Box(0, 0, 10, 10, "Cat"), Box(0, 0, 10, 10, "dog")
    assert box_f1([cat], [dog]) == matched_iou([cat], [dog]) == 1
    assert box_f1([cat], [dog], labels=True) == matched_iou([cat], [dog], labels=True) == 0
    assert box_f1([cat], [Box(0, 0, 10, 10, " cat")], labels=True) == 1


def test_golden_points():
    assert [point_in_box(p, [A, B]) for p in ((5, 5), (25, 25), (15, 15), (10, 10), None)] == [1, 1, 0, 1, 0]


class TestFrames:
    """A picture of 200 × 100 pixels; the same thing on it, written in every frame."""

    @pytest.fixture
    def row(self, tmp_path):
        Image.new("RGB", (200, 100)).save(tmp_path / "a.png")

        def make(answer="", **extra):
            picture = Part("image", media=MediaRef(path=str(tmp_path / "a.png")), **extra.pop("part", {}))
            turns = (Turn("user", (picture, Part("text", "Where?"))), Turn("assistant", (Part("text", answer),)))
            return Conversation(turns, RowSource("rows.jsonl", 3), extra=extra)

        return make

    @pytest.fixture
    def grader_of(self, tmp_path):
        def make(name, family, **options):
            checkpoint = tiny_checkpoint(tmp_path / family, family)
            processor = load_processor(checkpoint, data=DataSettings(min_pixels=56 * 56, max_pixels=112 * 56))
            return seeing(get_grader(name, options), frames_of(processor)), processor

        return make

    def test_the_same_frame_needs_no_model(self, row):
        assert get_grader("iou")("[20, 10, 100, 50]", row("[20, 10, 100, 50]")) == 1

    def test_thousandths(self, row, grader_of):
        grader, _ = grader_of("iou", "qwen3_vl", boxes_in="image_pixels")
        truth = row(ground_truth=[20, 10, 100, 50])
        assert grader('[{"bbox_2d": [100, 100, 500, 500]}]', truth) == pytest.approx(1)
        assert grader('[{"bbox_2d": [20, 10, 100, 50]}]', truth) < 0.1  # pixels where thousandths are meant
        unit, _ = grader_of("iou", "qwen3_vl", boxes_in="unit")
        assert unit("[100, 100, 500, 500]", row(ground_truth=[0.1, 0.1, 0.5, 0.5])) == pytest.approx(1)

    def test_pixels_after_resizing(self, row, grader_of):
        grader, processor = grader_of("iou", "qwen2_5_vl", boxes_in="image_pixels")
        assert processor.family.coordinates == "resized_pixels"
        width, height = grader.frames.resized_size(row().media[0])
        assert (width, height) != (200, 100) and width * height <= 112 * 56
        answer = [0.1 * width, 0.1 * height, 0.5 * width, 0.5 * height]
        assert grader(json.dumps(answer), row(ground_truth=[20, 10, 100, 50])) == pytest.approx(1)
        thousandths, _ = grader_of("iou", "qwen2_5_vl", boxes_in="thousandths")
        assert thousandths(json.dumps(answer), row(ground_truth=[100, 100, 500, 500])) == pytest.approx(1)

    def test_a_size_that_the_row_asks_for(self, row, grader_of):
        grader, processor = grader_of("point_in_box", "qwen2_5_vl", boxes_in="image_pixels")
        side = 4 * processor.layout.factor
        truth = row(ground_truth=[100, 50, 200, 100], part={"resized_height": side, "resized_width": side})
        assert [grader(f"({x}, {x})", truth) for x in (side * 0.75, side * 0.25)] == [1, 0]

    def test_coco_boxes(self, row, grader_of):
        grader, _ = grader_of("box_f1", "qwen3_vl", boxes_in="image_pixels", box_format="xywh")
        assert grader("[100, 100, 500, 500]", row(ground_truth=[[20, 10, 80, 40]])) == 1

    def test_what_cannot_be_judged(self, row, grader_of):
        with pytest.raises(EvaluationError, match="only where the model is known"):
            get_grader("iou", {"boxes_in": "image_pixels"})("[1, 2, 3, 4]", row(ground_truth=[1, 2, 3, 4]))
        with pytest.raises(EvaluationError, match=r"rows\.jsonl, row 3.*no box"):
            get_grader("iou").check(row("a cat"))
        grader, _ = grader_of("iou", "qwen3_vl", boxes_in="image_pixels")
        blind = Conversation((Turn("user", (Part("text", "?"),)),), RowSource("rows.jsonl", 4), extra={"ground_truth": [1, 2, 3, 4]})
        with pytest.raises(EvaluationError, match=r"row 4.*no picture"):
            grader("[1, 2, 3, 4]", blind)

    def test_nothing_to_be_found(self, row):
        grader = get_grader("box_f1")
        grader.check(row(ground_truth=[]))
        assert [grader(answer, row(ground_truth=[])) for answer in ("none", "[]", "[1, 2, 3, 4]")] == [1, 1, 0]
