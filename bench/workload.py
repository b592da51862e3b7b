"""Image-question-answer samples, a pure function of their arguments: every system measured gets the same ones.

chart: sizes as in ChartQA (309 × 351 to 850 × 600 pixels), one short answer: about 1% of the tokens are supervised.
llava: 640 × 480 photos, one answer of about 200 words: more than a third of the tokens are supervised.

Images are drawn, their sizes and the lengths of texts are what matters. What is drawn from the generator, and in which order,
must never change: results of different dates are compared.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image, ImageDraw

Kind = Literal["chart", "llava"]
KINDS: tuple[Kind, ...] = get_args(Kind)

CHART_SIZES = [(850, 600), (800, 557), (422, 489), (309, 351), (310, 420), (648, 400), (800, 557), (850, 600)]  # (width, height)
PHOTO_SIZES = [(640, 480), (480, 640), (640, 427)]
WORDS = (  # noqa: SIM905 - a list of literals reads worse
    "the value of share in year percent total average highest lowest difference between blue red line bar chart "
    "people country growth rate number which what how many sum ratio colour segment label axis legend survey"
).split()
CHART_PROMPT = (
    "You are a precise chart analyst. Read the chart and answer the question.\n"
    "Keep the final answer concise (numbers/text only).\nQuestion: "
)


@dataclass(frozen=True)
class GroupSetting:
    """Tokens of a prompt, and of the completions that go on from it."""

    visual_tokens: int = 1024  # of its image; a square
    text_tokens: int = 100  # everything else of the prompt, the chat template's tokens included
    completion_tokens: int = 256
    generations: int = 8  # completions of a prompt

    @property
    def prompt_tokens(self) -> int:
        return self.visual_tokens + self.text_tokens

    @property
    def group_tokens(self) -> int:
        """Of a prompt and all of its completions, the prompt once."""
        return self.prompt_tokens + self.generations * self.completion_tokens


# What tiny models can be tried with: their images have at most 24 visual tokens.
TINY_GROUP = GroupSetting(visual_tokens=16, text_tokens=60, completion_tokens=8, generations=2)


@dataclass(frozen=True, eq=False)
class Row:
    """One question about one image. Rows about the same image hold the same image object."""

    image: Image.Image
    question: str
    answer: str


def rows(kind: Kind, count: int, *, seed: int = 0, per_image: int = 1) -> list[Row]:
    """The first `count` rows of a workload, `per_image` questions for each image."""
    rng = random.Random(seed)
    made: list[Row] = []
    while len(made) < count:
        image = picture(rng.choice(CHART_SIZES if kind == "chart" else PHOTO_SIZES), rng)
        for _ in range(per_image):
            question = _words(rng, 12, 24) + "?"
            if kind == "chart":
                made.append(Row(image, CHART_PROMPT + question, str(rng.randint(1, 99))))
            else:
                made.append(Row(image, question, _words(rng, 150, 250)))
    return made[:count]


def in_batches_of_like_length(made: list[Row], batch: int) -> list[Row]:
    """The rows in batches whose lengths are close, the batches in random order: the least padding a user could arrange."""
    ordered = sorted(made, key=lambda row: (row.image.width * row.image.height, len(row.answer)))
    batches = [ordered[start : start + batch] for start in range(0, len(ordered), batch)]
    random.Random(0).shuffle(batches)
    return [row for part in batches for row in part]


def _words(rng: random.Random, fewest: int, most: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(fewest, most)))


def picture(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """A drawn bar chart of (width, height) pixels."""
    image = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(image)
    width, height = size
    for bar in range(rng.randint(4, 9)):
        left = width * (bar + 1) // 11
        top = rng.randint(height // 6, height - 20)
        canvas.rectangle([left, top, left + width // 16, height - 15], fill=tuple(rng.randrange(256) for _ in range(3)))
        canvas.text((left, max(0, top - 12)), str(rng.randint(1, 99)), fill="black")
    return image
