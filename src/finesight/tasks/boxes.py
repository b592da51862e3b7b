"""Boxes and points in answers: reading them, and how well they agree. Pure functions of coordinates in one frame.

A box is [left, top, right, bottom], its edges continuous: no pixel is added to its sides.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from finesight.tasks.distance import best_assignment
from finesight.tasks.documents import MISSING, find_json
from finesight.tasks.option_ranges import PositiveShare, Share

BoxFormat = Literal["xyxy", "xywh"]

_NUMBER = r"-?(?:\d{1,12}(?:\.\d{0,12})?|\.\d{1,12})%?"
_GAP = r"\s{0,8}[,\s]\s{0,8}"  # bounded, so that a run of spaces is not tried over and over
_FOUR = re.compile(rf"(?<![\w.])({_NUMBER}){_GAP}({_NUMBER}){_GAP}({_NUMBER}){_GAP}({_NUMBER})(?![\d.])")
_CORNERS = re.compile(
    rf"\(\s{{0,8}}({_NUMBER}){_GAP}({_NUMBER})\s{{0,8}}\)\s{{0,8}},?\s{{0,8}}\(\s{{0,8}}({_NUMBER}){_GAP}({_NUMBER})\s{{0,8}}\)"
)
_TWO = re.compile(
    rf"[\[(]\s{{0,8}}({_NUMBER}){_GAP}({_NUMBER})\s{{0,8}}[\])]|<point>\s{{0,8}}({_NUMBER}){_GAP}({_NUMBER})\s{{0,8}}</point>"
)
_NAMED = re.compile(
    rf"\bx1?[\"']?\s{{0,8}}[:=]\s{{0,8}}[\"']?({_NUMBER})[\"']?[,;\s]{{1,8}}[\"']?y1?[\"']?\s{{0,8}}[:=]\s{{0,8}}[\"']?({_NUMBER})"
)
_BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box")
_POINT_KEYS = ("point_2d", "point", "coordinate", "coordinates", "click")
_LABEL_KEYS = ("label", "name", "category", "text_content")


@dataclass(frozen=True)
class Box:
    """A box in some frame; with a label where it was given one."""

    left: float
    top: float
    right: float
    bottom: float
    label: str = ""

    def scaled(self, width: float, height: float) -> Box:
        """Coordinates over the sides of their frame."""
        return Box(self.left / width, self.top / height, self.right / width, self.bottom / height, self.label)

    @property
    def center(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


def read_boxes(text: str) -> list[Box]:
    """Every box of an answer, in order: Qwen's JSON (`[{"bbox_2d": [x1, y1, x2, y2], "label": …}]`), else pairs of
    corners (`(x1,y1),(x2,y2)` of Qwen2-VL), else every four numbers in a row (`[x1, y1, x2, y2]`, `<box>x1 y1 x2 y2</box>`).
    """
    value = find_json(text)
    boxes = boxes_of(value) if value is not MISSING else []
    # JSON may be only a part of the answer, for example one list a line; what reads more boxes is right.
    for pattern in (_CORNERS, _FOUR):
        found = [_box(match.groups()) for match in pattern.finditer(text)]
        boxes = found if len(found) > len(boxes) else boxes
    return boxes


def boxes_of(value: Any, box_format: BoxFormat = "xyxy") -> list[Box]:
    """Boxes of a value as data files hold them: one box, a list of boxes, or objects with a box and perhaps a label."""
    if isinstance(value, str):
        return [_formatted(box, box_format) for box in read_boxes(value)]
    if hasattr(value, "tolist"):
        value = value.tolist()
    found: list[Box] = []
    pending: list[tuple[Any, str]] = [(value, "")]
    while pending:
        entry, label = pending.pop()
        if isinstance(entry, Mapping):
            label = next((str(entry[key]) for key in _LABEL_KEYS if isinstance(entry.get(key), str)), label)
            boxed = [entry[key] for key in _BOX_KEYS if key in entry]
            pending += [(inner, label) for inner in reversed(boxed or list(entry.values()))]
        elif isinstance(entry, (list, tuple)):
            if len(entry) == 4 and all(_is_number(number) for number in entry):
                left, top, right, bottom = (float(number) for number in entry)
                found.append(_formatted(Box(left, top, right, bottom, label), box_format))
            else:
                pending += [(inner, label) for inner in reversed(entry)]
    return found


def read_point(text: str) -> tuple[float, float] | None:
    """The point of an answer: Qwen's JSON (`{"point_2d": [x, y]}`), `(x, y)`, `[x, y]`, `<point>x y</point>`, `x=…, y=…`; of a
    box its centre, as ScreenSpot takes it. None if there is none.
    """
    pending = deque([find_json(text)])
    while pending:
        entry = pending.popleft()
        if isinstance(entry, Mapping):
            for key in _POINT_KEYS:
                pair = entry.get(key)
                if isinstance(pair, list) and len(pair) == 2 and all(_is_number(number) for number in pair):
                    return float(pair[0]), float(pair[1])
            if _is_number(entry.get("x")) and _is_number(entry.get("y")):
                return float(entry["x"]), float(entry["y"])
            pending += list(entry.values())
        elif isinstance(entry, list):
            if len(entry) == 2 and all(_is_number(number) for number in entry):
                return float(entry[0]), float(entry[1])
            pending += entry
    if boxes := read_boxes(text):
        return boxes[0].center
    found = _TWO.search(text) or _NAMED.search(text)
    if found is None:
        return None
    x, y = (group for group in found.groups() if group is not None)
    return _number(x), _number(y)


def iou(a: Box, b: Box) -> float:
    """Area of the intersection over that of the union, of boxes with continuous edges; 0 where a box has no area."""
    return float(_ious([a], [b])[0, 0])


def first_box_iou(given: Sequence[Box], right: Sequence[Box], *, threshold: Share = 0.0) -> float:
    """IoU of the first box of the answer with the nearest right one; with a threshold 1 from there on, else 0.

    Acc@0.5 of referring expressions (Kazemzadeh et al. 2014; Mao et al. 2016) has the threshold 0.5; lmms-eval takes the
    first four numbers of an answer too.
    """
    if not given or not right:
        return 0.0
    best = float(_ious(given[:1], right).max())
    return float(best >= threshold) if threshold > 0 else best


def matched_iou(given: Sequence[Box], right: Sequence[Box], *, labels: bool = False) -> float:
    """Mean IoU of the best one-to-one matching; boxes without a partner count 0, on both sides: Σ IoU / max(given, right).

    Args:
        labels: boxes match only where their labels are equal, letter case aside.
    """
    if not given or not right:
        return float(not given and not right)
    gain = _gains(given, right, labels)
    return min(1.0, float(sum(gain[i, j] for i, j in best_assignment(gain)) / max(len(given), len(right))))


def box_f1(given: Sequence[Box], right: Sequence[Box], *, threshold: PositiveShare = 0.5, labels: bool = False) -> float:
    """F1 of the boxes: found if they are matched one to one with an IoU of at least `threshold`; no box on either side: 1."""
    if not given or not right:
        return float(not given and not right)
    hits = (_gains(given, right, labels) >= threshold).astype(np.float64)
    found = sum(hits[i, j] for i, j in best_assignment(hits))
    return float(2 * found / (len(given) + len(right)))


def point_in_box(point: tuple[float, float] | None, right: Sequence[Box]) -> float:
    """1 if the point lies in one of the boxes, edges included (ScreenSpot, Cheng et al. 2024)."""
    if point is None:
        return 0.0
    return float(any(box.left <= point[0] <= box.right and box.top <= point[1] <= box.bottom for box in right))


def _gains(given: Sequence[Box], right: Sequence[Box], labels: bool) -> np.ndarray:
    """(given, right) IoU, 0 where labels differ and matter."""
    gain = _ious(given, right)
    if labels:
        names = [np.array([" ".join(box.label.casefold().split()) for box in boxes], dtype=object) for boxes in (given, right)]
        gain = np.where(names[0][:, None] == names[1], gain, 0.0)
    return gain


def _ious(given: Sequence[Box], right: Sequence[Box]) -> np.ndarray:
    """(given, right) IoU."""
    a, b = (np.array([(box.left, box.top, box.right, box.bottom) for box in boxes], dtype=np.float64) for boxes in (given, right))
    a_area, b_area = (np.prod(np.clip(box[:, 2:] - box[:, :2], 0, None), axis=1) for box in (a, b))
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    shared = np.prod(np.clip(sides, 0, None), axis=2) * ((a_area[:, None] > 0) & (b_area > 0))
    union = a_area[:, None] + b_area - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _formatted(box: Box, box_format: BoxFormat) -> Box:
    """COCO's [left, top, width, height] as corners."""
    return box if box_format == "xyxy" else Box(box.left, box.top, box.left + box.right, box.top + box.bottom, box.label)


def _box(numbers: Sequence[str]) -> Box:
    left, top, right, bottom = (_number(text) for text in numbers)
    return Box(left, top, right, bottom)


def _number(text: str) -> float:
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _is_number(value: Any) -> bool:
    """A number that coordinates can be: JSON also has whole numbers of thousands of digits, and NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e12 < value < 1e12 and not math.isnan(value)
