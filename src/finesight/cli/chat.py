"""What `finesight chat` does: a conversation in the terminal, answers shown as they are drawn."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from finesight.cli.flags import in_flags
from finesight.data.conversation import Conversation, MediaRef, Part, RowSource, Turn
from finesight.data.encode import Encoder
from finesight.data.media_policy import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from finesight.data.pixels import visual_patches
from finesight.data_settings import DataSettings
from finesight.errors import DataError, FinesightError
from finesight.models.load import LoadedModel, load_model
from finesight.models.packed import PackedModel
from finesight.recipe import ModelSettings
from finesight.sampling.blocks import fitting_blocks
from finesight.sampling.engine import DecodingEngine, answering
from finesight.sampling.requests import EngineSize, Request, Token, blocks_for
from finesight.sampling.text import TextStream
from finesight.sampling.types import Completion, SamplingSettings
from finesight.wording import counted

HELP = "Name images and videos anywhere in a line, or drop them here. /clear begins anew, /quit ends (Ctrl-D too); Ctrl-C stops an answer."
_SOURCE = RowSource("chat", 0)
# A quoted piece, or characters up to a space that is not escaped: how terminals write what is dropped on them.
_WORD = re.compile(r"""'[^']*'|"[^"]*"|(?:\\.|[^\s'"\\])+""")


def parts_of(line: str) -> list[Part]:
    """The images and videos that a line names, and its text, in their order.

    Raises:
        DataError: a name that is plainly that of an image or video leads nowhere.
    """
    parts: list[Part] = []
    position = 0

    def text(piece: str) -> None:
        if piece.strip():
            parts.append(Part("text", text=piece.strip()))

    for word in _WORD.finditer(line):
        path = _media_path(word[0])
        if path is None:
            continue
        text(line[position : word.start()])
        kind: Any = "video" if path.suffix.lower() in VIDEO_SUFFIXES else "image"
        parts.append(Part(kind, media=MediaRef(path=str(path.resolve()))))
        position = word.end()
    text(line[position:])
    return parts


def _media_path(word: str) -> Path | None:
    quoted = word[:1] in ("'", '"')
    name = word[1:-1] if quoted else re.sub(r"\\(.)", r"\1", word)
    path = Path(name.removeprefix("file://")).expanduser()
    if path.suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        return None
    if path.is_file():
        return path
    if "/" in name:
        raise DataError(f"There is no file {name}.")
    return None  # somebody may well write about a.png


@dataclass(eq=False)
class ChatSession:
    """A conversation with a model, from turn to turn.

    Args:
        system: prompt that the conversation begins with.
        max_length_tokens: of conversation and next answer together.
    """

    loaded: LoadedModel
    settings: SamplingSettings
    max_length_tokens: int
    image_first: bool = False
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.packed = PackedModel(self.loaded.model)
        self.encoder = Encoder(self.loaded.processor, image_first=self.image_first)
        needed = 2 + 2 * blocks_for(self.max_length_tokens)
        size = EngineSize(1, self.max_length_tokens, self.settings.max_completion_length, fitting_blocks(self.packed, needed, needed))
        self.engine = DecodingEngine(self.packed, self.loaded.processor, size)
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self.turns = [Turn("system", (Part("text", text=self.system),))] if self.system else []

    def ask(self, parts: list[Part], show: Callable[[str], None]) -> Reply:
        """Answers one more turn of the user, which is forgotten again if that fails.

        Args:
            show: is handed the pieces of the answer as they are drawn. Ctrl-C stops the answer; what there is of it counts.

        Raises:
            DataError, TemplateError, ModelError: the turn cannot be used, or is too long.
        """
        turns = [*self.turns, Turn("user", tuple(parts))]
        sample = self.encoder.encode_prompt(Conversation(tuple(turns), _SOURCE))
        for item in sample.visual_items:
            visual_patches(item, self.loaded.processor)  # a damaged image must not come to light within a step
        stream, pieces = TextStream(self.loaded.processor.tokenizer), []
        times: list[float] = []
        ended: list[Completion] = []

        def hear(number: int, token: Token) -> None:
            times.append(time.monotonic())
            if token.token_id not in self.engine.stop_ids:
                pieces.append(stream.add(token.token_id))

        request = Request(sample, self.settings, on_token=hear, on_end=lambda number, completion: ended.append(completion))
        self.engine.submit(request)
        started, shown = time.monotonic(), 0
        with answering(self.packed), _interrupts() as interrupts:
            while self.engine.busy:
                if interrupts:
                    self.engine.cancel(request)
                self.engine.step()
                show("".join(pieces[shown:]))
                shown = len(pieces)
        rest = stream.finish()
        show(rest)
        text = "".join(pieces) + rest
        # An assistant's turn cannot be empty in a conversation that goes on.
        self.turns = [*turns, Turn("assistant", (Part("text", text=text),))] if text.strip() else self.turns
        image_tokens = sum(count for item in sample.visual_items for _, count in item.runs)
        return Reply(text, len(sample), image_tokens, len(times), started, times, bool(ended))


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects Ctrl-C instead of raising it, so that it never tears a step."""
    found: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: found.append(number))
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class Reply:
    """An answer and what it took."""

    text: str
    prompt_tokens: int  # of the whole conversation, image tokens included
    image_tokens: int
    tokens: int
    started: float  # of time.monotonic
    times: list[float]  # at which tokens came
    whole: bool  # not stopped by the user

    def __str__(self) -> str:
        """One line for people."""
        facts = [f"{self.prompt_tokens:,} tokens in ({self.image_tokens:,} of images)", f"{self.tokens:,} out"]
        if self.times:
            facts.append(f"first after {self.times[0] - self.started:.2f} s")
        if len(self.times) > 1 and self.times[-1] > self.times[0]:
            facts.append(f"{(len(self.times) - 1) / (self.times[-1] - self.times[0]):.1f} tokens/s")
        return ", ".join(facts) + ("" if self.whole else ", stopped")


def chat_with(
    model: ModelSettings,
    settings: SamplingSettings,
    *,
    data: DataSettings,
    system: str | None,
    max_length_tokens: int,
    console: Console,
) -> None:
    """Reads lines and answers them until there are no more.

    Args:
        data: what goes before the pixel limits and frame sampling that an adapter was trained with.
        system: none: the one that the adapter was trained with.

    Raises:
        ModelError, RecipeError: from loading.
    """
    loaded = load_model(model, data=data)
    trained = loaded.metadata
    session = ChatSession(
        loaded,
        settings,
        max_length_tokens,
        image_first=data.image_first if trained is None else trained.image_first,
        system=system or (None if trained is None else trained.system),
    )
    _tell(console, f"{model.name_or_path}{f' with {model.adapter}' if model.adapter else ''}. {HELP}", style="dim")
    pending: list[Part] = []  # images that came without a question
    while True:
        try:
            line = console.input("[bold]> [/bold]") if console.is_terminal else input()
        except (EOFError, KeyboardInterrupt):
            return
        command = line.strip()
        if command == "/quit":
            return
        if command == "/clear":
            session.clear()
            pending = []
        elif command.startswith("/") and re.fullmatch(r"/[a-z]+", command):
            _tell(console, f"There is no command {command}. {HELP}", style="dim")
        elif command:
            pending = _answer(session, pending, line, console)


def _answer(session: ChatSession, pending: list[Part], line: str, console: Console) -> list[Part]:
    """Answers a line; returns the images that wait for a question."""
    try:
        parts = [*pending, *parts_of(line)]
        if all(part.type != "text" for part in parts):
            _tell(console, f"{counted(len(parts), 'file')}; what about {'it' if len(parts) == 1 else 'them'}?", style="dim")
            return parts
        reply = session.ask(parts, lambda text: console.print(text, end="", markup=False, highlight=False, soft_wrap=True))
    except FinesightError as error:
        _tell(console, in_flags(str(error).removeprefix(f"{_SOURCE}: ")), style="red")
        return []
    console.print()
    _tell(console, f"[{reply}]", style="dim")
    return []


def _tell(console: Console, text: str, style: str) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
