"""Metrics: pure functions of an answer and the accepted answers, each in [0, 1].

Where the field uses one name for several definitions, each has a function of its own with its source.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction

from finesight.tasks.distance import levenshtein
from finesight.tasks.final_answer import last_boxed, last_match
from finesight.tasks.option_ranges import PositiveShare, RelativeTolerance
from finesight.tasks.quantity import parse_quantity

Metric = Callable[..., float]  # (answer, accepted answers), and options by name

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: ord(" ")}  # to ASCII
_PERIODS = (".", "。")
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_WHOLE_NUMBER = re.compile(rf"[$€£¥]?\s*({_NUMBER})\s*(%)?")
_LAST_NUMBER = re.compile(rf"(?<![\w.])({_NUMBER})\s*(%)?")
# A choice said in so many words: "answer is (B)", "Answer: B", "option B", "答案是B", "选 B"; runs of space were joined before.
_SAID_CHOICE = re.compile(
    r"(?:(?i:answer|option|choice)(?: (?i:is|would be))?|答案(?:是|为)?|选项?) ?[:：]? ?[*(（\[]* ?([A-Z])(?![A-Za-z0-9'’])"
)
_LEADING_CHOICE = re.compile(r"[*(（\[\s]*([A-Za-z])(?:[*)）\]\s]*[.:：、)）\]]|[*)）\]\s]*$)")
_BRACKETED_CHOICE = re.compile(r"[(（\[]([A-Z])[)）\]]")


def normalize(text: str) -> str:
    """Surrounding space, letter case and one trailing period removed."""
    text = text.strip().casefold()
    if text.endswith(_PERIODS) and not text.endswith(("..", "。。")):
        text = text[:-1].rstrip()
    return text


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if the normalized answer equals a normalized accepted one, as :func:`normalize` has it."""
    return float(normalize(answer) in {normalize(expected) for expected in accepted})


def exact_match_strict(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer equals an accepted one character by character."""
    return float(answer in accepted)


def contains(answer: str, accepted: Sequence[str]) -> float:
    """1 if an accepted answer stands in the answer, in any case, as whole words ("3" does not stand in "13" or "3.5").

    Scripts written without spaces have no word borders, and none are asked for.
    """
    text = normalize(answer)
    return float(any(_stands_in(normalize(expected), text) for expected in accepted))


def contains_ocrbench(answer: str, accepted: Sequence[str]) -> float:
    """1 if an accepted answer is a part of the answer, as OCRBench judges (Liu et al. 2023), and lmms-eval after it.

    Letter case, surrounding space, line ends and full-width forms of ASCII do not matter; there are no word borders, so
    that "3" stands in "13".
    """

    def folded(text: str) -> str:
        return text.translate(_FULL_WIDTH).lower().strip().replace("\n", " ")

    return float(any(folded(expected) in folded(answer) for expected in accepted))


def multiple_choice(answer: str, accepted: Sequence[str]) -> float:
    """1 if the chosen letter is right.

    The letter is read from `\\boxed{B}`, from words such as "the answer is B" (the last such place), from the beginning
    ("B", "(B) Paris", "b. Paris") or from the only bracketed letter. Where the answer shows no letter, its text is
    compared with that of the accepted answer ("Paris" with "B. Paris").
    """
    chosen = _choice(answer)
    for expected in accepted:
        right = _choice(expected)
        if right is None or chosen is None:
            named = _LEADING_CHOICE.match(expected)
            text = expected[named.end() :] if named else expected
            if chosen is None and text.strip() and normalize(text) == normalize(answer):
                return 1.0
            if right is None and normalize(expected) == normalize(answer):
                return 1.0
        elif chosen == right:
            return 1.0
    return 0.0


def numeric(answer: str, accepted: Sequence[str], *, relative_tolerance: RelativeTolerance = 1e-4) -> float:
    """1 if the answer's number is within a relative tolerance of an accepted one (of zero: that far from it).

    The number is the whole answer, or else what stands in `\\boxed{}`, or else the last number in it. Thousands separators
    and currency signs are passed over. "12%" is 0.12; where only one side has the sign, 12 is accepted for it too.
    """
    given = _number(answer, anywhere=True)
    if given is None:
        return 0.0
    for expected in accepted:
        right = _number(expected, anywhere=True)
        if right is not None and _close(given, right, relative_tolerance):
            return 1.0
    return 0.0


def relaxed_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """1 if a number is within 5% of an accepted number, or other text equals an accepted one.

    Masry et al. 2022 (ChartQA), section 5.1, after Methani et al. 2020 (PlotQA). Both sides are normalized first: case,
    trailing period, thousands separators, currency; a percent sign on one side only is passed over. A target of zero
    must be met exactly.
    """
    given = _number(normalize(answer), anywhere=False)
    for expected in accepted:
        right = _number(normalize(expected), anywhere=False)
        if given is not None and right is not None:
            if _close(given, right, 0.05 if right[0] else 0.0):
                return 1.0
        elif normalize(answer) == normalize(expected):
            return 1.0
    return 0.0


def relaxed_accuracy_lmms_eval(answer: str, accepted: Sequence[str]) -> float:
    """Relaxed accuracy as pix2struct and lmms-eval compute it.

    Nothing is cleaned: "1,000" and "12." are text; "12%" is 0.12 and so not 12; a target of zero is compared as text.
    """

    def value(text: str) -> float | None:
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None

    def right(expected: str) -> bool:
        given, target = value(answer), value(expected)
        if given is not None and target:
            return abs(given - target) / abs(target) <= 0.05
        return answer.lower() == expected.lower()

    return float(any(right(expected) for expected in accepted))


def anls(answer: str, accepted: Sequence[str], *, threshold: PositiveShare = 0.5) -> float:
    """Average normalized Levenshtein similarity of one question: the best 1 - NL of those with NL < 0.5, else 0.

    Biten et al. 2019 (Scene Text VQA), equation 1; NL is the edit distance over the longer length. Case does not
    matter and runs of space count as one.

    Args:
        threshold: distances from here on count as a wrong answer: 0.5 in the definition.
    """
    best = 0.0
    for expected in accepted:
        a, b = _spaced(answer), _spaced(expected)
        length = max(len(a), len(b), 1)
        if abs(len(a) - len(b)) < threshold * length:  # the distance is at least that: a long answer costs nothing
            distance = levenshtein(a, b) / length
            best = max(best, 1 - distance if distance < threshold else 0.0)
    return best


def anls_docvqa(answer: str, accepted: Sequence[str]) -> float:
    """ANLS as the evaluation script of DocVQA and InfographicVQA computes it, and lmms-eval after it.

    It differs from the paper twice: a similarity of exactly 0.5 counts, and the lengths are those before runs of
    space are joined.
    """
    best = 0.0
    for expected in accepted:
        a, b, length = _spaced(answer), _spaced(expected), max(len(answer), len(expected))
        if 2 * abs(len(a) - len(b)) <= length:
            best = max(best, 1 - levenshtein(a, b) / length if length else 1.0)
    return best if best >= 0.5 else 0.0


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _is_wordlike(character: str) -> bool:
    """Whether a letter or digit is of a script that parts its words by spaces."""
    return character.isalnum() and not unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER"))


def _stands_in(needle: str, text: str) -> bool:
    if not needle:
        return False
    start = text.find(needle)
    while start >= 0:
        if not _joined(text, start) and not _joined(text, start + len(needle)):
            return True
        start = text.find(needle, start + 1)
    return False


def _joined(text: str, border: int) -> bool:
    """Whether what stands on both sides of a place belongs to one word, or to one number as in "3.5"."""
    left, right = text[max(0, border - 2) : border], text[border : border + 2]
    if not left or not right:
        return False
    if _is_wordlike(left[-1]) and _is_wordlike(right[0]):
        return True
    number_before = len(left) == 2 and left[0].isdigit() and left[1] in ".," and right[0].isdigit()
    number_after = len(right) == 2 and left[-1].isdigit() and right[0] in ".," and right[1].isdigit()
    return number_before or number_after


def _choice(text: str) -> str | None:
    """The letter that an answer chooses, in upper case, or None."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    if (boxed := last_boxed(text)) is not None:
        text = boxed.removeprefix(r"\text").strip("{} ")
    if said := _SAID_CHOICE.findall(text):
        return str(said[-1])
    if leading := _LEADING_CHOICE.match(text):
        return leading.group(1).upper()
    bracketed = set(_BRACKETED_CHOICE.findall(text))
    return bracketed.pop() if len(bracketed) == 1 else None


def _number(text: str, *, anywhere: bool) -> tuple[float, bool] | None:
    """(value as written, whether a percent sign follows) of a number."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-").strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1]
    found = _WHOLE_NUMBER.fullmatch(text)
    if found is None and anywhere:
        boxed = last_boxed(text)
        if boxed is not None and (quantity := parse_quantity(boxed)) is not None:  # a fraction, say
            return _finite(quantity.value, quantity.percent)
        found = last_match(_LAST_NUMBER, text if boxed is None else boxed)
    if found is None:
        return None
    return _finite(float(found.group(1).replace(",", "")), found.group(2) is not None)


def _finite(value: float | Fraction, percent: bool) -> tuple[float, bool] | None:
    try:
        number = float(value)
    except OverflowError:
        return None
    return (number, percent) if math.isfinite(number) else None


def _close(given: tuple[float, bool], right: tuple[float, bool], relative_tolerance: float) -> bool:
    (a, a_percent), (b, b_percent) = given, right
    pairs = [(a, b)]
    if a_percent != b_percent:
        pairs.append((a / 100 if a_percent else a, b / 100 if b_percent else b))
    return any(abs(x - y) <= relative_tolerance * (abs(y) if y else 1.0) for x, y in pairs)
