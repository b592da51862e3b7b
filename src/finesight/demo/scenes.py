"""Scenes of real handwritten digits, written as a user's data would be: PNG files and rows in JSONL.

The scans are the 8 x 8 digits of the UCI repository that scikit-learn carries (E. Alpaydin and C. Kaynak, Optical
Recognition of Handwritten Digits, 1998). A scene holds two of them side by side. Scans are divided into two sets
before any scene is composed: no scan stands on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from finesight.demo.settings import SceneSettings
from finesight.errors import DataError
from finesight.training.telemetry import progress

DIGITS_IN_A_SCENE = 2
IMAGES = "images"
_SCAN_LEVELS = 16  # of grey in a scan


@dataclass(frozen=True)
class Question:
    """A question that can be asked about any scene."""

    name: str  # in tables
    text: str
    answer: Callable[[Sequence[int]], str]  # from the digits, left to right
    num_answers: int  # possible ones, all equally frequent

    @property
    def chance(self) -> float:
        """Accuracy that can be had without looking, by one and the same answer to every scene."""
        return 1 / self.num_answers


def _plus_one(place: int) -> Callable[[Sequence[int]], str]:
    return lambda digits: str(digits[place] + 1)


def _parity(place: int) -> Callable[[Sequence[int]], str]:
    return lambda digits: "odd" if digits[place] % 2 else "even"


READ = Question("read the number", "Read the number.", lambda digits: "".join(map(str, digits)), 10**DIGITS_IN_A_SCENE)
FIRST_PLUS_ONE = Question("first plus one", "What is the first digit plus one?", _plus_one(0), 10)
FIRST_PARITY = Question("first odd or even", "Is the first digit odd or even?", _parity(0), 2)
LAST_PLUS_ONE = Question("last plus one", "What is the last digit plus one?", _plus_one(-1), 10)
LAST_PARITY = Question("last odd or even", "Is the last digit odd or even?", _parity(-1), 2)

OLD_QUESTIONS = (READ, FIRST_PLUS_ONE, FIRST_PARITY)
NEW_QUESTIONS = (LAST_PLUS_ONE, LAST_PARITY)
QUESTIONS = (*NEW_QUESTIONS, *OLD_QUESTIONS)
# What stage 1 asks about each scene, in turn: reading is the harder part.
READING_TURNS = (READ, FIRST_PLUS_ONE, READ, FIRST_PARITY)


@dataclass(frozen=True, eq=False)
class Scans:
    """Scans of digits: all of them, or those of one side of the division."""

    images: np.ndarray  # (N, 8, 8) float, 0 to 16
    digits: np.ndarray  # (N,) int
    numbers: np.ndarray  # (N,) int: the place of each in the whole data set

    def __len__(self) -> int:
        return len(self.digits)

    def take(self, places: np.ndarray) -> Scans:
        return Scans(self.images[places], self.digits[places], self.numbers[places])


@dataclass(frozen=True, eq=False)
class Scene:
    """One image and what it shows."""

    image: Image.Image  # grey
    digits: tuple[int, ...]  # left to right
    scans: tuple[int, ...]  # which scans of the data set it shows


def load_scans() -> Scans:
    """The 1,797 scans that scikit-learn carries.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            'The demo takes its scans from scikit-learn, which is not installed. Run `pip install "finesight[demo]"`.'
        ) from None
    content = load_digits()
    return Scans(content.images, content.target, np.arange(len(content.target)))


def divide_scans(scans: Scans, held_out: int, seed: int) -> tuple[Scans, Scans]:
    """(to train on, held out), drawn at random.

    Raises:
        DataError: a digit would be missing on one side.
    """
    order = np.random.default_rng([seed, 0]).permutation(len(scans))
    sides = scans.take(order[held_out:]), scans.take(order[:held_out])
    if any(len(set(side.digits.tolist())) < 10 for side in sides):
        raise DataError(f"With {held_out} of {len(scans)} scans held out not every digit is on both sides; hold out about a fifth")
    return sides


def compose(scans: Scans, count: int, settings: SceneSettings, stream: Sequence[int]) -> Iterator[Scene]:
    """Scenes of two scans each: enlarged, turned a little, and put at random into the halves of a dark image.

    Each digit is drawn first and a scan of it then, so that all answers are equally frequent.

    Args:
        stream: seeds of the draws; equal ones give equal scenes.
    """
    random = np.random.default_rng(list(stream))
    half = settings.image_width // DIGITS_IN_A_SCENE
    largest = min(settings.max_digit_side, half, settings.image_height)
    places_of = [np.flatnonzero(scans.digits == digit) for digit in range(10)]
    for _ in range(count):
        chosen = np.array([random.choice(places_of[digit]) for digit in random.integers(10, size=DIGITS_IN_A_SCENE)])
        canvas = np.zeros((settings.image_height, settings.image_width), np.uint8)
        for place, scan in enumerate(chosen):
            side = int(random.integers(settings.min_digit_side, largest + 1))
            angle = random.uniform(-settings.max_rotation, settings.max_rotation)
            drawn = _enlarged(scans.images[scan], side, angle)
            x = place * half + int(random.integers(half - side + 1))
            y = int(random.integers(settings.image_height - side + 1))
            canvas[y : y + side, x : x + side] = drawn
        digits, numbers = scans.digits[chosen], scans.numbers[chosen]
        yield Scene(Image.fromarray(canvas), tuple(map(int, digits)), tuple(map(int, numbers)))


def _enlarged(scan: np.ndarray, side: int, angle: float) -> np.ndarray:
    image = Image.fromarray((scan * 255 / _SCAN_LEVELS).astype(np.uint8))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC).rotate(angle, Image.Resampling.BICUBIC))


def write_scenes(folder: Path, scenes: Iterator[Scene], count: int, *, console: Console | None = None) -> list[Scene]:
    """Writes `images/00000.png` and so on; returns the scenes.

    Raises:
        DataError: the folder cannot be written.
    """
    written: list[Scene] = []
    with _writing(folder), progress(console, f"Scenes into {folder}", count) as advance:
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        for scene in scenes:
            scene.image.save(folder / image_name(len(written)), compress_level=1)
            written.append(scene)
            advance(1)
    return written


def write_rows(folder: Path, scenes: Sequence[Scene], questions: Sequence[Question], turns: Sequence[Question] | None = None) -> None:
    """Writes one file of rows for each question, as a user would: `messages` with the path of the image.

    Beside the messages a row says which digits its scene shows and which scans of the data set these are.

    Args:
        turns: scene i is asked turns[i % len(turns)] alone; None: every question.

    Raises:
        DataError: the folder cannot be written.
    """
    with _writing(folder):
        for question in questions:
            asked = [(place, scene) for place, scene in enumerate(scenes) if turns is None or turns[place % len(turns)] is question]
            lines = (json.dumps(_row(image_name(place), scene, question)) for place, scene in asked)
            rows_file(folder, question).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"Scenes cannot be written to {folder}: {error.strerror or error}. Choose another --output.") from error


def image_name(place: int) -> str:
    """The file of a scene, from its folder."""
    return f"{IMAGES}/{place:05d}.png"


def rows_file(folder: Path, question: Question) -> Path:
    """Where the rows of a question lie."""
    return folder / f"{question.name.replace(' ', '_')}.jsonl"


def _row(image: str, scene: Scene, question: Question) -> dict[str, object]:
    asked = [{"type": "image", "image": image}, {"type": "text", "text": question.text}]
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": question.answer(scene.digits)}],
        "digits": list(scene.digits),
        "scans": list(scene.scans),
    }
