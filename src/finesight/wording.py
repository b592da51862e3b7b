"""Numbers in messages."""

from __future__ import annotations


def counted(number: float, what: str) -> str:
    """A number of things: 1 step, 2 steps, 2.5 epochs."""
    text = f"{number:,}" if isinstance(number, int) else f"{number:,.4g}"
    return f"{text} {what}{'' if text == '1' else 's'}"
