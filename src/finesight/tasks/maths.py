"""Mathematical answers: the final answer of a completion against the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from finesight.errors import EvaluationError
from finesight.tasks.final_answer import last_match, marked_answer, said_answer, without_reasoning
from finesight.tasks.option_ranges import RelativeTolerance
from finesight.tasks.quantity import MAX_VALUE_CHARACTERS, Quantity, parse_quantity, plain_latex

_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_ASSIGNMENT = re.compile(r"^[^=<>]*[^=<>!:]=\s*")
_NUMBER_IN_TEXT = re.compile(
    r"(?<![\w.,])[-+]?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:/\d+(?![\d/]))?(?: ?(?:\\?%|percent))?|(?<![\w.])[-+]?\.\d+"
)


def math(answer: str, accepted: Sequence[str], *, relative_tolerance: RelativeTolerance = 0.0) -> float:
    r"""1 if the final answer is mathematically the right one.

    The final answer is what stands in the last `<answer>` or `\boxed{}` (braces balanced); without either it is the whole
    text, or what follows "the answer is" or "####", or the last number. Numbers are compared as exact fractions: `0.5`,
    `1/2` and `\frac12` are equal, `0.33` and `1/3` are not unless a tolerance is set. `12%` is 0.12, and where only one
    side has the sign, 12 is accepted too. Units are passed over where one side alone names one, and must be the same where
    both do. Tuples and intervals are compared entry by entry, lists and sets in any order. Everything else must be equal as
    LaTeX, spacing and styling aside. Numeric and exact forms as in Hendrycks et al. 2021 (MATH) and math-verify, whose
    symbolic equality of expressions is `math/math-verify`.

    Args:
        relative_tolerance: largest difference over the right number that still counts (of zero: the difference itself).
    """
    forms = _forms(answer)
    return float(any(_equal(form, right, relative_tolerance) for expected in accepted for right in _forms(expected) for form in forms))


def math_verify(answer: str, accepted: Sequence[str]) -> float:
    """1 if the library math-verify finds the answer equal to an accepted one, read as TRL's `accuracy_reward` reads it.

    The answer must stand in LaTeX (`\\boxed{}` first); the accepted one may be LaTeX or a plain expression.

    Raises:
        EvaluationError: the library is not installed.
    """
    try:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError:
        raise EvaluationError("Grader math/math-verify needs the library math-verify: pip install 'finesight[graders]'.") from None
    form = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    # Its own time limit needs the main thread and takes the alarm that rewards are timed by, so it is off.
    given = parse(answer, extraction_config=[form], extraction_mode="first_match", parsing_timeout=None)
    for expected in accepted:
        right = parse(expected, parsing_timeout=None) or parse(f"${expected}$", parsing_timeout=None)
        if right and verify(right, given, timeout_seconds=None):
            return 1.0
    return 0.0


def _forms(text: str) -> list[str]:
    """What a text may mean as its answer: the first of these that can be read as a value, else all of them as expressions."""
    marked = marked_answer(text)
    if marked is not None:
        return [marked]
    text = without_reasoning(text).strip()
    said = said_answer(text)
    forms = [form for form in (text, said) if form and len(form) <= MAX_VALUE_CHARACTERS]
    for form in forms:
        if _quantity(form) is not None:
            return [form]
    if len(forms) == 1 and said is None and (" " not in text or text[0] in _BRACKETS):  # an expression, not a sentence
        return forms
    for scope in (said, text):
        found = last_match(_NUMBER_IN_TEXT, scope or "")
        if found is not None:
            return [*forms, found.group()]
    return forms


def _equal(given: str, right: str, tolerance: float) -> bool:
    if max(len(given), len(right)) > 10 * MAX_VALUE_CHARACTERS:
        return given == right
    a, b = _quantity(given), _quantity(right)
    if a is not None and b is not None:
        return _close(a, b, tolerance)
    given, right = _right_hand_side(plain_latex(given)), _right_hand_side(plain_latex(right))
    if _squeezed(given) == _squeezed(right):
        return bool(_squeezed(right))
    return _equal_lists(given, right, tolerance)


def _quantity(text: str) -> Quantity | None:
    return parse_quantity(text) or parse_quantity(_right_hand_side(text.strip().strip("$").strip()))


def _right_hand_side(text: str) -> str:
    """`x = 5` to `5`."""
    return text.rsplit("=", 1)[1].strip() if _ASSIGNMENT.match(text) else text


def _close(given: Quantity, right: Quantity, tolerance: float) -> bool:
    if given.unit and right.unit and given.unit != right.unit:
        return False
    pairs = [(given.value, right.value)]
    if given.percent != right.percent:
        pairs.append((given.value / (100 if given.percent else 1), right.value / (100 if right.percent else 1)))
    allowed = Fraction(tolerance)
    return any(abs(a - b) <= allowed * (abs(b) or 1) for a, b in pairs)


def _squeezed(text: str) -> str:
    return re.sub(r"[\s\ue000]+", "", text).casefold()


def _equal_lists(given: str, right: str, tolerance: float) -> bool:
    (opening, entries, closing), (right_opening, right_entries, right_closing) = _entries(given), _entries(right)
    if len(entries) != len(right_entries) or len(entries) < 2 or (opening, closing) != (right_opening, right_closing):
        return False

    def same(a: str, b: str) -> bool:
        x, y = _quantity(a), _quantity(b)
        return _close(x, y, tolerance) if x is not None and y is not None else _squeezed(a) == _squeezed(b)

    if opening in ("(", "["):
        return all(same(a, b) for a, b in zip(entries, right_entries, strict=True))
    left = list(right_entries)  # a set, or a list without brackets: in any order, each entry used once
    for entry in entries:
        partner = next((i for i, other in enumerate(left) if same(entry, other)), None)
        if partner is None:
            return False
        del left[partner]
    return True


def _entries(text: str) -> tuple[str, list[str], str]:
    r"""(opening bracket, entries at the top level, closing bracket); no brackets: empty texts. `[0, 1)` is an interval."""
    text = text.replace(r"\{", "{").replace(r"\}", "}").strip()
    opening, closing = text[:1], text[-1:]
    if opening in _BRACKETS and closing in _BRACKETS.values():
        text = text[1:-1]
    else:
        opening = closing = ""
    entries, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            entries.append(text[start:place].strip())
            start = place + 1
    return opening, [*entries, text[start:].strip()], closing
