"""Conversation -> Sample: token ids, M-RoPE positions, which tokens are trained, and where images and videos stand.

What is trained is known from rendering the chat template (`rendering.py`), never from searching for token ids. The
rendered string is cut only where the template wrote a special token, where a tokenizer starts anew anyway; so token ids
are those of the string encoded whole, except that special tokens inside somebody's text stay text.

- The tokens of an answer and its end-of-turn token are trained; the header before it and the line feed after it are not.
- A prompt is an exact prefix of the encoded conversation. It cannot be where an answer begins with white space (its
  first token then also holds the header's line feed, and is not trained), nor where the template puts something between the
  generation prompt and the answer (an empty think block, say), nor where `too_long` changed the two differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from finesight import geometry
from finesight.data.conversation import Conversation, RowSource, Turn
from finesight.data.processor import Processor
from finesight.data.rendering import Rendering, TemplateRenderer
from finesight.data.sample import Sample
from finesight.data.visual import Measured, measure
from finesight.errors import BadRow, DataError, TemplateError
from finesight.geometry import Grid
from finesight.recipe import Recipe
from finesight.wording import counted

TooLong = Literal["refuse", "shrink_pixels", "drop_turns"]


class Encoder:
    """Encodes conversations for one processor.

    Args:
        train_on: "all" or only the "last" assistant turn. A turn with `train=False` is never trained.
        image_first: the images and videos of a leading user turn go ahead of its text, in their order.
        max_length_tokens: longest sample; None: any.
        too_long: what happens to a longer one. "refuse": a DataError. "shrink_pixels": its images and videos get a common
            upper limit of visual tokens, the largest one that fits; lower pixel limits and sizes that the row asks for
            hold. "drop_turns": turns are dropped from the end, down to one answered question. What cannot be made to fit
            is refused.
    """

    def __init__(
        self,
        processor: Processor,
        *,
        train_on: Literal["all", "last"] = "all",
        image_first: bool = False,
        max_length_tokens: int | None = None,
        too_long: TooLong = "refuse",
    ) -> None:
        self.processor = processor
        self._train_on = train_on
        self._image_first = image_first
        self._max_length = max_length_tokens
        self._too_long = too_long
        self._renderer = TemplateRenderer(processor)

    def encode(self, conversation: Conversation) -> Sample:
        """A conversation to train on.

        Raises:
            DataError: nothing is trained, an answer is empty, an image cannot be used, or the sample is too long.
            TemplateError: the chat template cannot be rendered, or does not show where an answer stands.
        """
        turns, source = self._arranged(conversation.turns), conversation.source
        trained = self._trained_turns(turns)
        if not trained:
            raise _refusal(source, "no assistant turn to train on; prompt-only rows are for reinforcement, give an answer to train on")
        for index in trained:
            if not turns[index].text.strip():
                raise _refusal(source, f"the assistant's turn {index} is empty; fill in the answer, or remove the row")
        media = self._measured(turns, source)
        sample = self._encode(turns, media, conversation)
        if self._fits(sample):
            return sample
        if self._too_long == "shrink_pixels":
            return self._shrunk(turns, media, conversation, sample)
        if self._too_long == "drop_turns":
            return self._shortened(turns, conversation, sample)
        raise self._too_long_refusal(sample)

    def encode_prompt(self, conversation: Conversation) -> Sample:
        """A conversation up to and with the generation prompt, nothing trained; assistant turns at its end are left out.

        Too long a prompt is refused, or its pixels are shrunk where `too_long` says so; no turns are dropped.

        Raises:
            DataError, TemplateError: as in :meth:`encode`; also where no question is left.
        """
        turns = self.prompt_turns(conversation)
        media = self._measured(turns, conversation.source)
        sample = self._encode(turns, media, conversation, prompt=True)
        if self._fits(sample):
            return sample
        if self._too_long == "shrink_pixels":
            return self._shrunk(turns, media, conversation, sample, prompt=True)
        raise self._too_long_refusal(sample)

    def prompt_turns(self, conversation: Conversation) -> list[Turn]:
        """The turns of a prompt as :meth:`encode_prompt` encodes them: media arranged, without the answers at the end.

        Raises:
            DataError: no question is left.
        """
        turns = list(self._arranged(conversation.turns))
        while turns and turns[-1].role == "assistant":
            turns.pop()
        if not any(turn.role == "user" for turn in turns):
            raise _refusal(conversation.source, "no user turn to answer")
        return turns

    def _arranged(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """The turns with the media of a leading user turn ahead of its text, if so asked."""
        lead = 1 if turns and turns[0].role == "system" else 0
        if not self._image_first or lead >= len(turns) or turns[lead].role != "user":
            return turns
        parts = sorted(turns[lead].parts, key=lambda part: part.type == "text")  # stable
        return (*turns[:lead], Turn("user", tuple(parts), turns[lead].train), *turns[lead + 1 :])

    def _trained_turns(self, turns: Sequence[Turn]) -> list[int]:
        assistant = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        if self._train_on == "last":
            assistant = assistant[-1:]
        return [index for index in assistant if turns[index].train]

    def _measured(self, turns: Sequence[Turn], source: RowSource) -> list[Measured]:
        """Every image and video of the turns, its size known to be usable."""
        media = []
        for part in (part for turn in turns for part in turn.parts if part.type != "text"):
            try:
                media.append(measure(part, self.processor))
                media[-1].size()
            except DataError as error:
                raise _refusal(source, str(error), type(error)) from error
        return media

    def _encode(
        self, turns: Sequence[Turn], media: Sequence[Measured], conversation: Conversation, *,
        prompt: bool = False, cap_tokens: int | None = None,
    ) -> Sample:  # fmt: skip
        try:
            if prompt and not self._renderer.generation_prompt:
                raise TemplateError("the chat template writes no generation prompt; use the template of the model's Instruct version")
            rendering = self._renderer.render(turns, add_generation_prompt=prompt)
            lost = sorted(index for index in rendering.dropped if turns[index].role != "assistant")
            if lost:
                raise TemplateError(f"the chat template leaves out text of turn {lost[0]} ({turns[lost[0]].role}); move it to another turn")
            answers = [] if prompt else [self._renderer.answer_span(rendering, index) for index in self._trained_turns(turns)]
            pieces = _divide(rendering, answers, media, self.processor)
        except TemplateError as error:
            raise TemplateError(f"{conversation.source}: {error}") from error
        builder = _SampleBuilder(self.processor, cap_tokens)
        builder.add(pieces)
        return builder.finish(conversation)

    def _fits(self, sample: Sample) -> bool:
        return self._max_length is None or len(sample) <= self._max_length

    def _shrunk(
        self, turns: Sequence[Turn], media: Sequence[Measured], conversation: Conversation, sample: Sample, *, prompt: bool = False
    ) -> Sample:
        """The sample with the largest common limit of visual tokens that fits; text and times keep their tokens."""
        tokens = [item.num_tokens() for item in media]
        room = (self._max_length or 0) - (len(sample) - sum(tokens))
        for cap in range(min(max(tokens, default=0) - 1, room), 0, -1):
            if sum(item.num_tokens(cap) for item in media) <= room:
                return self._encode(turns, media, conversation, prompt=prompt, cap_tokens=cap)
        raise self._too_long_refusal(sample, "even with its images at their lower pixel limit")

    def _shortened(self, turns: Sequence[Turn], conversation: Conversation, sample: Sample) -> Sample:
        """The longest beginning of the conversation that fits and ends with an answer that is trained."""
        for end in range(len(turns) - 1, 1, -1):
            kept = turns[:end]
            if end - 1 not in self._trained_turns(kept) or not any(turn.role == "user" for turn in kept):
                continue
            sample = self._encode(kept, self._measured(kept, conversation.source), conversation)
            if self._fits(sample):
                return sample
        raise self._too_long_refusal(sample, "even as one answered question")

    def _too_long_refusal(self, sample: Sample, although: str = "") -> DataError:
        visual = sum(count for item in sample.visual_items for _, count in item.runs)
        changes = ["raise data.max_length_tokens (and training.token_budget)"]
        if visual:
            changes.append("lower data.max_pixels")
        if self._too_long == "refuse":
            changes.append("set data.too_long: shrink_pixels or drop_turns")
        return _refusal(
            sample.source,
            f"{counted(len(sample), 'token')}{' ' + although if although else ''}, {visual:,} of them of images and videos, "
            f"are more than the {self._max_length} allowed; {', or '.join(changes)}",
        )


class PromptEncoder(Encoder):
    """Encodes the prompts of conversations, for reinforcement."""

    def encode(self, conversation: Conversation) -> Sample:
        """As :meth:`Encoder.encode_prompt`."""
        return self.encode_prompt(conversation)


def recipe_encoder(recipe: Recipe, processor: Processor, *, any_length: bool = False) -> Encoder:
    """The encoder of a recipe's rows: of conversations to train on, or of prompts, which leave room for their completions.

    Args:
        any_length: take samples of any length.
    """
    data, budget = recipe.data, recipe.training.token_budget
    most = data.max_length_tokens or budget
    if recipe.rollout is not None:
        most = min(most, budget - recipe.rollout.max_completion_length)
    return (Encoder if recipe.grpo is None else PromptEncoder)(
        processor,
        train_on=data.train_on,
        image_first=data.image_first,
        max_length_tokens=None if any_length else most,
        too_long=data.too_long,
    )


@dataclass(frozen=True)
class _Text:
    """Characters that are encoded as ordinary text; trained from `trained_from` to `trained_to`."""

    text: str
    trained_from: int = 0
    trained_to: int = 0


@dataclass(frozen=True)
class _Special:
    token_id: int
    trained: bool = False


@dataclass(frozen=True, eq=False)
class _Visual:
    """One run of visual tokens: the whole item, or the given time step of it."""

    item: Measured
    step: int | None = None


_Piece = _Text | _Special | _Visual


def _divide(rendering: Rendering, answers: Sequence[tuple[int, int]], media: Sequence[Measured], processor: Processor) -> list[_Piece]:
    """The rendering as text, special tokens and runs of visual tokens.

    Raises:
        TemplateError: the template did not write one place for each image and video, in their order.
    """
    visual_ids = {processor.image_token_id: "image", processor.video_token_id: "video"}
    places = [visual_ids[token.token_id] for token in rendering.specials if token.token_id in visual_ids]
    kinds = [item.part.type for item in media]
    if places != kinds:
        raise TemplateError(
            f"the chat template writes {_counted(places)} where the row has {_counted(kinds)}; "
            "some templates leave out images outside of user turns, move them there"
        )
    unplaced = iter(media)
    pieces: list[_Piece] = []
    position = 0
    for token in rendering.specials:
        pieces += _texts(rendering.text, position, token.start, answers)
        position = token.stop
        if token.token_id in visual_ids:
            pieces += _expanded(next(unplaced), processor)
        else:
            framing = token.token_id in (processor.vision_start_token_id, processor.vision_end_token_id)
            pieces.append(_Special(token.token_id, not framing and any(start <= token.start < stop for start, stop in answers)))
    pieces += _texts(rendering.text, position, len(rendering.text), answers)
    return pieces


def _texts(text: str, start: int, stop: int, answers: Sequence[tuple[int, int]]) -> list[_Piece]:
    if start == stop:
        return []
    # At most one answer reaches into it: special tokens lie between turns.
    begin, end = next(((a, b) for a, b in answers if a < stop and b > start), (stop, stop))
    return [_Text(text[start:stop], max(begin - start, 0), min(end, stop) - start)]


def _expanded(item: Measured, processor: Processor) -> list[_Piece]:
    """What stands in place of `<|image_pad|>` or `<|video_pad|>`.

    The template's own `<|vision_start|>` and `<|vision_end|>` stay around it, also around the times and steps of a
    Qwen3-VL video, each of which has a pair of its own: so transformers writes it from 5.0 on.
    """
    if not (item.is_video and processor.family.video_timestamps):
        return [_Visual(item)]
    pieces: list[_Piece] = []
    for step, timestamp in enumerate(item.timestamps):
        pieces += [
            _Text(timestamp),
            _Special(processor.vision_start_token_id),
            _Visual(item, step),
            _Special(processor.vision_end_token_id),
        ]
    return pieces


@dataclass(eq=False)
class _SampleBuilder:
    """Collects tokens, positions and runs of visual tokens."""

    processor: Processor
    cap_tokens: int | None
    _ids: list[np.ndarray] = field(default_factory=list)
    _trained: list[np.ndarray] = field(default_factory=list)
    _positions: list[np.ndarray] = field(default_factory=list)
    _runs: dict[Measured, list[tuple[int, int]]] = field(default_factory=dict)
    _length: int = 0
    _position: int = 0

    def add(self, pieces: Sequence[_Piece]) -> None:
        texts = iter(_tokenize(self.processor, [piece for piece in pieces if isinstance(piece, _Text)]))
        for piece in pieces:
            if isinstance(piece, _Text):
                self._add_text(*next(texts))
            elif isinstance(piece, _Special):
                self._add_text(np.array([piece.token_id]), np.array([piece.trained]))
            else:
                self._add_visual(piece)

    def _add_text(self, ids: np.ndarray, trained: np.ndarray) -> None:
        self._append(ids, trained, geometry.text_positions(self._position, len(ids)))
        self._position += len(ids)

    def _add_visual(self, run: _Visual) -> None:
        item, layout = run.item, self.processor.layout
        grid = item.grid(self.cap_tokens)
        if run.step is not None:
            grid = Grid(1, grid.h, grid.w)
        count = layout.visual_tokens(grid)
        self._runs.setdefault(item, []).append((self._length, count))
        token_id = self.processor.video_token_id if item.is_video else self.processor.image_token_id
        positions = geometry.visual_positions(self._position, grid, layout, item.time_interval)
        self._append(np.full(count, token_id), np.zeros(count, dtype=bool), positions)
        self._position += geometry.positions_passed(grid, layout)

    def _append(self, ids: np.ndarray, trained: np.ndarray, positions: np.ndarray) -> None:
        self._ids.append(ids)
        self._trained.append(trained)
        self._positions.append(positions)
        self._length += len(ids)

    def finish(self, conversation: Conversation) -> Sample:
        return Sample(
            token_ids=np.concatenate(self._ids).astype(np.int64, copy=False),
            position_ids=np.concatenate(self._positions, axis=1),
            trained=np.concatenate(self._trained).astype(bool, copy=False),
            visual_items=tuple(item.item(tuple(runs), self.cap_tokens) for item, runs in self._runs.items()),
            next_position=self._position,
            source=conversation.source,
            weight=conversation.weight,
        )


def _tokenize(processor: Processor, texts: Sequence[_Text]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(token ids, trained) of each text; special tokens in it are taken as text.

    A token is trained if it begins inside the trained characters: one that also holds the end of the header is not.
    """
    if not texts:
        return []
    encoded = processor.tokenizer(
        [piece.text for piece in texts], add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True,
        return_attention_mask=False, return_token_type_ids=False, verbose=False,
    )  # fmt: skip
    found = []
    for piece, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        spans = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        # The end counts too: where a tokenizer trims a blank from its offsets, the header's last one has none left.
        trained = (spans[:, 0] >= piece.trained_from) & (spans[:, 1] > piece.trained_from) & (spans[:, 0] < piece.trained_to)
        found.append((np.array(ids, dtype=np.int64), trained))
    return found


def _counted(kinds: Sequence[str]) -> str:
    return f"{counted(kinds.count('image'), 'image')} and {counted(kinds.count('video'), 'video')}"


def _refusal(source: RowSource, reason: str, error_class: type[DataError] = DataError) -> DataError:
    return error_class(f"{source}: {reason}", (BadRow(source.file, source.row, reason),))
