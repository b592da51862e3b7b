"""Prompts of reinforcement with a fixed number of tokens: one image and a text of digits, each of which is one token."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image

from bench.workload import GroupSetting, picture
from finesight.data.conversation import Conversation, MediaRef, Part, RowSource, Turn
from finesight.data.encode import Encoder
from finesight.data.groups import continued
from finesight.data.processor import Processor
from finesight.data.sample import Sample


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


def _conversation(image: Image.Image, text: str, number: int) -> Conversation:
    turn = Turn("user", (Part("image", media=MediaRef(image=image)), Part("text", text)))
    return Conversation((turn,), RowSource("prompts", number))


def encoded(processor: Processor, prompts: Sequence[Conversation]) -> list[Sample]:
    """The prompts as tokens."""
    encoder = Encoder(processor)
    return [encoder.encode_prompt(prompt) for prompt in prompts]


def completions(setting: GroupSetting, prompt: Sample, seed: int) -> list[Sample]:
    """A group: completions of random tokens, the same for the same seed; every token of them is a target."""
    random = np.random.default_rng(seed)
    return [continued(prompt, random.integers(0, 256, setting.completion_tokens).tolist()) for _ in range(setting.generations)]


def first_token_is_even(completion_ids: Sequence[Sequence[int]]) -> list[float]:
    """A reward that random answers earn half of the time, so that hardly any group is without variance."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]
