"""The form of an answer, whatever it says: tags, length. Plain searches, so that no text makes them slow."""

from __future__ import annotations

from typing import Literal

from finesight.tasks.option_ranges import Count, TagNames


def tagged_blocks(answer: str, *, tags: TagNames = "think,answer") -> float:
    """1 if the answer consists of these blocks and of nothing else but space: `<think>…</think><answer>…</answer>`.

    Each tag stands once, in this order, and each block holds something.

    Args:
        tags: names, parted by commas.
    """
    rest = answer.strip()
    for tag in (name.strip() for name in tags.split(",")):
        opening, closing = f"<{tag}>", f"</{tag}>"
        if answer.count(opening) != 1 or answer.count(closing) != 1 or not rest.startswith(opening):
            return 0.0
        content, _, rest = rest[len(opening) :].partition(closing)
        if not content.strip():
            return 0.0
        rest = rest.lstrip()
    return float(not rest)


def think_format_trl(answer: str) -> float:
    """1 if the answer begins with `<think>`, which stands once, and is closed: TRL's `think_format_reward`."""
    return float(answer.startswith("<think>") and answer.count("<think>") == 1 and "</think>" in answer)


def think_answer_open_r1(answer: str) -> float:
    r"""1 for `<think>\n…\n</think>\n<answer>\n…\n</answer>` and the end of a line: `format_reward` of open-r1 and of the vision
    guides after it (`^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$`, with `.` and `$` for lines too), read without backtracking.
    """
    opening, middle, closing = "<think>\n", "\n</think>\n<answer>\n", "\n</answer>"
    if not answer.startswith(opening):
        return 0.0
    place = answer.find(middle, len(opening))
    return float(place >= 0 and (answer.endswith(closing, place + len(middle)) or answer.find(f"{closing}\n", place + len(middle)) >= 0))


def length_within(answer: str, *, minimum: Count = 1, maximum: Count = 1_000_000, unit: Literal["words", "characters"] = "words") -> float:
    """1 if the answer, surrounding space aside, is from `minimum` to `maximum` words (parted by space) or characters long."""
    text = answer.strip()
    return float(minimum <= (len(text.split()) if unit == "words" else len(text)) <= maximum)
