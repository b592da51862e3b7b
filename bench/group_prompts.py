"""Prompts of reinforcement with a fixed number of tokens: one image and a text of digits, each of which is one token."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.workload import picture
from finesight.data.conversation import Conversation, MediaRef, Part, RowSource, Turn
from finesight.data.encode import Encoder
from finesight.data.groups import continued
from finesight.data.processor import Processor
from finesight.data.sample import Sample


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
TINY = GroupSetting(visual_tokens=16, text_tokens=60, completion_tokens=8, generations=2)


def conversations(processor: Processor, setting: GroupSetting, count: int, seed: int = 0) -> list[Conversation]:
    """Prompts with an image of their own each, as long as the setting says.

    Raises:
        ValueError: the image does not get so many tokens, or the text is shorter than the chat template alone.
    """
    rng = random.Random(seed)
    side = math.isqrt(setting.visual_tokens) * processor.family.patch_size * processor.layout.merge_size
    images = [picture((side, side), rng) for _ in range(count)]
    encoder = Encoder(processor)
    digits = setting.prompt_tokens - len(encoder.encode_prompt(_conversation(images[0], "0", 0))) + 1
    if digits < 1:
        raise ValueError(f"text_tokens is {setting.text_tokens}, fewer than the chat template takes")
    made = [_conversation(image, "".join(rng.choice("0123456789") for _ in range(digits)), n) for n, image in enumerate(images)]
    first = encoder.encode_prompt(made[0])
    visual = sum(count for item in first.visual_items for _, count in item.runs)
    if (len(first), visual) != (setting.prompt_tokens, setting.visual_tokens):
        raise ValueError(
            f"a prompt has {len(first)} tokens, {visual} of them of its image; {setting.prompt_tokens} and {setting.visual_tokens} are asked for"
        )
    return made


def _conversation(image: object, text: str, number: int) -> Conversation:
    turn = Turn("user", (Part("image", media=MediaRef(image=image)), Part("text", text)))  # type: ignore[arg-type]
    return Conversation((turn,), RowSource("prompts", number))


def encoded(processor: Processor, prompts: Sequence[Conversation]) -> list[Sample]:
    """The prompts as tokens."""
    encoder = Encoder(processor)
    return [encoder.encode_prompt(prompt) for prompt in prompts]


def completions(setting: GroupSetting, prompt: Sample, seed: int) -> list[Sample]:
    """A group: completions of random digits, the same for the same seed; every token of them is a target."""
    digits = np.random.default_rng(seed)
    # Ids of the digits: 15 and following in the vocabularies of Qwen, 48 and following among the single bytes; any small id will do.
    return [continued(prompt, digits.integers(16, 256, setting.completion_tokens)) for _ in range(setting.generations)]
