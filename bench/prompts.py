"""Prompts of reinforcement and of serving: one image of so many visual tokens and a text of so many tokens, to the token.

A pure function of its arguments and of the vocabulary, so that every system measured is asked the same.
"""

from __future__ import annotations

import base64
import io
import math
import random
from pathlib import Path

from bench.encoding import conversations
from bench.workload import WORDS, Row, picture
from finesight.data.conversation import Conversation
from finesight.data.encode import Encoder
from finesight.data.processor import Processor, load_processor
from finesight.errors import DataError


def prompts(count: int, checkpoint: Path, *, image_tokens: int, text_tokens: int, seed: int = 0) -> list[Row]:
    """Rows without answers. All of a prompt that is no visual token counts as text: the question and what the template writes.

    Args:
        checkpoint: folder with the processor's files.

    Raises:
        ValueError: no square image has so many tokens within the checkpoint's pixel limits, or the text has no room for a question.
    """
    processor = load_processor(checkpoint)
    side = image_side(image_tokens, processor)
    encoder, rng = Encoder(processor), random.Random(seed)
    made = []
    for _ in range(count):
        image = picture((side, side), rng)
        room = image_tokens + text_tokens - len(encoder.encode_prompt(as_conversation(Row(image, "", ""))))
        row = Row(image, _question(room, processor, rng), "")
        _check(row, encoder, image_tokens, text_tokens)
        made.append(row)
    return made


def image_side(image_tokens: int, processor: Processor) -> int:
    """Pixels of the side of a square image of so many visual tokens.

    Raises:
        ValueError: they make no square.
    """
    side = math.isqrt(image_tokens)
    if side**2 != image_tokens:
        raise ValueError(f"{image_tokens} visual tokens make no square image; take a square number")
    return side * processor.layout.factor


def as_conversation(row: Row) -> Conversation:
    """A row as a conversation that waits for its answer: image, question."""
    (conversation,) = conversations([row], "prompts")
    return Conversation(conversation.turns[:1], conversation.source)


def data_url(row: Row) -> str:
    """The image as a PNG in a data URL."""
    content = io.BytesIO()
    row.image.save(content, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def special_ids(processor: Processor) -> tuple[int, ...]:
    """All tokens that mean something besides text."""
    return tuple(sorted(processor.tokenizer.added_tokens_decoder))


def _question(tokens: int, processor: Processor, rng: random.Random) -> str:
    """Words, and digits to fill up: in the vocabularies of Qwen a digit is a token of its own, whatever stands beside it."""
    if tokens < 1:
        raise ValueError(f"the template leaves {tokens} tokens for the question; allow more tokens of text")
    words: list[str] = []
    while _length(" ".join(longer := [*words, rng.choice(WORDS)]), processor) <= tokens:
        words = longer
    text = " ".join(words)
    return text + "".join(str(rng.randrange(10)) for _ in range(tokens - _length(text, processor)))


def _length(text: str, processor: Processor) -> int:
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def _check(row: Row, encoder: Encoder, image_tokens: int, text_tokens: int) -> None:
    try:
        sample = encoder.encode_prompt(as_conversation(row))
    except DataError as error:
        raise ValueError(f"the prompt cannot be encoded: {error}") from error
    visual = sum(count for item in sample.visual_items for _, count in item.runs)
    if (visual, len(sample) - visual) != (image_tokens, text_tokens):
        raise ValueError(
            f"a prompt has {visual} visual tokens and {len(sample) - visual} of text in place of {image_tokens} and {text_tokens}: "
            "the checkpoint's pixel limits or its vocabulary do not allow them"
        )
