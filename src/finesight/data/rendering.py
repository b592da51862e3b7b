"""Renders a chat template and knows where each character came from: the user's data, or the template.

Every text of a conversation is given to the template between two private-use characters that occur nowhere in it.
Where they come out again, the text between them is the user's, and everything else is the template's own. So a word or
a marker inside somebody's message is never taken for the structure of the conversation.

The rendering that is used is the one of the conversation as it is; the marked one must equal it once the marks are
taken out. Marks stand inside surrounding white space and beside tags that the template itself names (`</think>`), so
that templates may strip and divide texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jinja2

from finesight.data.conversation import Turn
from finesight.data.processor import Processor
from finesight.errors import TemplateError

_MARKS = re.compile("[\U000f0000-\U0010fffd]")  # the private-use planes
_MARK_RANGE = range(0xF0000, 0x10FFFE)
# Tokens that mark objects and boxes: data may rightly hold them. All other special tokens in a text are only text.
_GROUNDING = re.compile(r"<\|(?:object_ref|box|quad)_(?:start|end)\|>")


@dataclass(frozen=True)
class TextSpan:
    """Characters [start, stop) of a rendering that come from a turn's text, from its character `offset` on."""

    turn: int
    text: str  # the whole text that it is a piece of
    offset: int
    start: int
    stop: int


@dataclass(frozen=True)
class SpecialToken:
    """Characters [start, stop) of a rendering that are one special token, written by the template or allowed in data."""

    start: int
    stop: int
    token_id: int


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation."""

    text: str
    spans: tuple[TextSpan, ...]  # in order; everything outside of them is the template's
    specials: tuple[SpecialToken, ...]  # in order
    dropped: frozenset[int]  # turns of which the template left out text


class TemplateRenderer:
    """The chat template of one processor."""

    def __init__(self, processor: Processor) -> None:
        self._tokenizer = processor.tokenizer
        self._template = processor.chat_template
        self._visual_ids = frozenset(
            (processor.image_token_id, processor.video_token_id, processor.vision_start_token_id, processor.vision_end_token_id)
        )
        self._special_ids = {token.content: token_id for token_id, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        self._specials = _alternatives(self._special_ids)
        tags = set(re.findall(r"<[^<>\s|]+>", self._template)) - self._special_ids.keys()
        self._tags = re.compile(f"({_alternatives(tags).pattern})") if tags else None

    def render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> Rendering:
        """The conversation as the template writes it.

        Raises:
            TemplateError: the template fails, or changes texts so that they cannot be followed.
        """
        plain = self._apply([_message(turn, str) for turn in turns], add_generation_prompt)
        if _MARKS.search(self._template):
            raise TemplateError("the chat template itself holds private-use characters, which mark texts here; remove them")
        used = set(_MARKS.findall("".join(part.text for turn in turns for part in turn.parts)))
        marks = (chr(code) for code in _MARK_RANGE if chr(code) not in used)
        pieces: dict[str, tuple[TextSpan, str]] = {}  # opening mark -> piece (still without place), closing mark
        messages = [_message(turn, partial(self._mark, turn=number, marks=marks, pieces=pieces)) for number, turn in enumerate(turns)]
        marked = self._apply(messages, add_generation_prompt)
        spans, seen = _unmark(marked, pieces, plain)
        dropped = frozenset(piece.turn for mark, (piece, _) in pieces.items() if mark not in seen)
        return Rendering(plain, spans, tuple(self._special_tokens(plain, spans)), dropped)

    @cached_property
    def generation_prompt(self) -> str:
        """What the template writes last when it asks for an answer; empty if nothing.

        Raises:
            TemplateError: the template fails.
        """
        question = [{"role": "user", "content": "?"}]
        without = self._apply(question, False)
        prompt = self._apply(question, True)
        return prompt[len(without) :] if prompt.startswith(without) else ""

    def answer_span(self, rendering: Rendering, turn: int) -> tuple[int, int]:
        """Characters [start, stop) that an assistant turn is trained on: its text, and on to the end of its end-of-turn token.

        The text does not begin before the end of the generation prompt, even where both hold the same (`<think>`).

        Raises:
            TemplateError: text of the turn was left out, or no end-of-turn token follows it.
        """
        spans = [span for span in rendering.spans if span.turn == turn]
        if turn in rendering.dropped or not spans:
            raise TemplateError(
                f"the chat template leaves out text of turn {turn} (some templates drop the reasoning of earlier answers), so it cannot "
                "be trained on; set data.train_on: last, or make each such answer the last one of a row of its own"
            )
        first, last = spans[0], spans[-1]
        before = max((span.stop for span in rendering.spans if span.stop <= first.start), default=0)
        after = min((span.start for span in rendering.spans if span.start >= last.stop), default=len(rendering.text))
        for token in rendering.specials:
            if last.stop <= token.start < after and token.token_id not in self._visual_ids:
                return self._answer_start(rendering.text, first, before), token.stop
        raise TemplateError(
            f"the chat template writes no end-of-turn token behind the assistant's turn {turn}, so the end of an answer could not be "
            "learned; use the template of the model's Instruct version"
        )

    def _answer_start(self, text: str, first: TextSpan, before: int) -> int:
        """Where a turn's text begins: at its first marked piece, or before it if what stands there is its own."""
        lead = first.text[: first.offset]
        header = text.rfind(self.generation_prompt, before, first.start) if self.generation_prompt else -1
        floor = header + len(self.generation_prompt) if header >= 0 else before
        own = 0
        while own < min(len(lead), first.start - floor) and lead[-own - 1] == text[first.start - own - 1]:
            own += 1
        if header < 0:
            # Without the header's end, white space may be the template's: only from a tag on is it surely the text's.
            tag = self._tags.search(lead, len(lead) - own) if self._tags else None
            own = len(lead) - tag.start() if tag else 0
        return first.start - own

    def _apply(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (jinja2.exceptions.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise TemplateError(f"the chat template cannot be rendered: {error}") from error

    def _mark(self, text: str, turn: int, marks: Iterator[str], pieces: dict[str, tuple[TextSpan, str]]) -> str:
        out, offset = [], 0
        for number, piece in enumerate(self._tags.split(text) if self._tags else [text]):
            core = piece.strip()
            if core and number % 2 == 0:  # odd ones are tags
                begin = piece.index(core)
                opening, closing = next(marks, ""), next(marks, "")
                if not closing:
                    raise TemplateError(f"turn {turn} is divided by too many tags such as {piece[:20]!r}; shorten it")
                pieces[opening] = TextSpan(turn, text, offset + begin, 0, 0), closing
                out.append(f"{piece[:begin]}{opening}{core}{closing}{piece[begin + len(core) :]}")
            else:
                out.append(piece)
            offset += len(piece)
        return "".join(out)

    def _special_tokens(self, text: str, spans: Sequence[TextSpan]) -> Iterator[SpecialToken]:
        """Special tokens in what the template wrote, and those that data may hold."""
        position = 0
        for start, stop in (*((span.start, span.stop) for span in spans), (len(text), len(text))):
            for match in self._specials.finditer(text, position, start):
                yield SpecialToken(*match.span(), self._special_ids[match[0]])
            for match in _GROUNDING.finditer(text, start, stop):
                if match[0] in self._special_ids:
                    yield SpecialToken(*match.span(), self._special_ids[match[0]])
            position = stop


def _message(turn: Turn, text_of: Callable[[str], str]) -> dict[str, Any]:
    """A turn as templates take it: content as a string where it is text alone, else as a list of parts."""
    if all(part.type == "text" for part in turn.parts):
        return {"role": turn.role, "content": text_of(turn.text)}
    content = [{"type": "text", "text": text_of(part.text)} if part.type == "text" else {"type": part.type} for part in turn.parts]
    return {"role": turn.role, "content": content}


def _unmark(marked: str, pieces: dict[str, tuple[TextSpan, str]], plain: str) -> tuple[tuple[TextSpan, ...], set[str]]:
    """Places of the marked pieces in the plain rendering, and the opening marks of those that are there."""
    closings = {closing for _, closing in pieces.values()}
    spans: list[TextSpan] = []
    out: list[str] = []
    length = position = 0
    opened: tuple[TextSpan, str, int] | None = None
    seen: set[str] = set()
    for match in _MARKS.finditer(marked):
        mark = match[0]
        if mark not in pieces and mark not in closings:
            continue  # a private-use character of the user's own
        out.append(marked[position : match.start()])
        length += match.start() - position
        position = match.end()
        if mark in pieces and opened is None and mark not in seen:
            opened = (*pieces[mark], length)
            seen.add(mark)
        elif opened is not None and mark == opened[1]:
            piece, _, start = opened
            spans.append(TextSpan(piece.turn, piece.text, piece.offset, start, length))
            opened = None
        else:
            raise TemplateError("the chat template writes a text twice, or a part of it; use the template of the model's Instruct version")
    out.append(marked[position:])
    if opened is not None or "".join(out) != plain:
        raise TemplateError(
            "the chat template changes texts in a way that cannot be followed, so it is not known which characters are an answer's; "
            "use the template of the model's Instruct version"
        )
    return tuple(spans), seen


def _alternatives(words: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the words, longer ones first."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")
