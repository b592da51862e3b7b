"""Whether an exported model is the model that was trained: greedy answers, and their log-probabilities, on a few prompts.

The trained model answers first. Both models then give the log-probability of every token of those answers, and the exported
one answers by itself. They agree if no log-probability differs by more than a bound, and if the answers are the same, or
part where the exported model finds its own token and the trained one's equally likely within twice the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from finesight.data.conversation import Conversation, MediaRef, Part, RowSource, Turn
from finesight.data.encode import Encoder
from finesight.data.groups import continued
from finesight.data.pack import pack_step
from finesight.data.pixels import visual_patches
from finesight.data.sample import Sample
from finesight.models.load import LoadedModel
from finesight.models.packed import PackedModel
from finesight.sampling.forking_sampler import ForkingSampler
from finesight.sampling.types import Completion, SamplingSettings

# Largest difference of a token's log-probability, in nats, by what the export is written in. float32 leaves the order of
# sums; 16 bits round every weight and every activation; 4 bits are another model within that.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.3, "float16": 0.3, "4bit": 2.0}
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Witness:
    """What the trained model said."""

    samples: tuple[Sample, ...]  # the prompts
    answers: tuple[tuple[int, ...], ...]  # greedy, as token ids
    logprobs: tuple[tuple[float, ...], ...]  # of each of their tokens


@dataclass(frozen=True)
class Agreement:
    """How far two models agree."""

    bound: float
    largest: float  # difference of a log-probability, in nats
    mean: float  # absolute difference
    num_tokens: int
    num_answers: int
    same_answers: int
    widest_parting: float  # where answers part: by how much the exported model prefers its own token; 0 where none do

    @property
    def holds(self) -> bool:
        return self.largest <= self.bound and self.widest_parting <= 2 * self.bound

    def __str__(self) -> str:
        parting = ""
        if self.same_answers < self.num_answers:
            parting = (
                f"; where the others part, the exported model prefers its own token to the trained one's by at most "
                f"{self.widest_parting:.2g} nats (bound {2 * self.bound:g})"
            )
        return (
            f"log-probabilities of {self.num_tokens} tokens differ by at most {self.largest:.2g} nats (mean {self.mean:.2g}, bound {self.bound:g}); "
            f"{self.same_answers} of {self.num_answers} greedy answers are the same{parting}"
        )


def drawn_prompts(count: int = 3) -> list[Conversation]:
    """Questions about drawn images, for where no data is at hand: coloured shapes, the same each time."""
    random = np.random.default_rng(0)
    prompts = []
    for number in range(count):
        image = Image.new("RGB", (224 + 32 * number, 192), "white")
        canvas = ImageDraw.Draw(image)
        for _ in range(4 + number):
            x, y = int(random.integers(0, 160)), int(random.integers(0, 128))
            colour = tuple(int(value) for value in random.integers(0, 256, 3))
            draw = canvas.ellipse if random.integers(2) else canvas.rectangle
            draw((x, y, x + int(random.integers(16, 64)), y + int(random.integers(16, 64))), fill=colour)
        parts = (Part("image", media=MediaRef(image=image)), Part("text", text="What is in this image?"))
        prompts.append(Conversation((Turn("user", parts),), RowSource("drawn", number)))
    return prompts


def witness(
    loaded: LoadedModel, prompts: Sequence[Conversation], *, image_first: bool = False, answer_tokens: int = ANSWER_TOKENS
) -> Witness:
    """Lets the trained model answer.

    Raises:
        DataError: a prompt cannot be encoded, or an image not be opened.
    """
    encoder = Encoder(loaded.processor, image_first=image_first)
    samples = tuple(encoder.encode_prompt(prompt.prompt()) for prompt in prompts)
    packed = PackedModel(loaded.model)
    answers = tuple(completion.token_ids for completion in _greedy(loaded, packed, samples, answer_tokens))
    return Witness(samples, answers, _logprobs(loaded, packed, samples, answers))


def agreement(loaded: LoadedModel, said: Witness, bound: float) -> Agreement:
    """Compares an exported model with what the trained one said. It is given the very tokens and pixels that the trained one saw."""
    packed = PackedModel(loaded.model)
    here = _logprobs(loaded, packed, said.samples, said.answers)
    own = [completion.token_ids for completion in _greedy(loaded, packed, said.samples, max(map(len, said.answers)))]
    partings = [(place, pair) for pair in enumerate(zip(said.answers, own, strict=True)) if (place := _parting(*pair[1])) is not None]
    widest = 0.0
    if partings:
        samples = [said.samples[number] for _, (number, _) in partings]
        of_own = _logprobs(loaded, packed, samples, [answer for _, (_, (_, answer)) in partings])
        widest = max(preferred[place] - here[number][place] for preferred, (place, (number, _)) in zip(of_own, partings, strict=True))
    differences = np.array(
        [abs(a - b) for mine, theirs in zip(here, said.logprobs, strict=True) for a, b in zip(mine, theirs, strict=True)]
    )
    return Agreement(
        bound=bound,
        largest=float(differences.max()) if np.isfinite(differences).all() else float("inf"),
        mean=float(differences.mean()),
        num_tokens=len(differences),
        num_answers=len(own),
        same_answers=len(own) - len(partings),
        widest_parting=widest,
    )


def _parting(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two answers part; None: one is the other or its beginning."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


def _greedy(loaded: LoadedModel, packed: PackedModel, samples: Sequence[Sample], answer_tokens: int) -> list[Completion]:
    settings = SamplingSettings(max_completion_length=answer_tokens, temperature=0.0, batch_size=len(samples))
    return ForkingSampler(packed, loaded.processor).generate_samples(samples, settings)


@torch.no_grad()
def _logprobs(
    loaded: LoadedModel, packed: PackedModel, samples: Sequence[Sample], answers: Sequence[Sequence[int]]
) -> tuple[tuple[float, ...], ...]:
    """Of each answer's tokens after its prompt, each conversation by itself."""
    packed.eval()
    found = []
    for sample, answer in zip(samples, answers, strict=True):
        whole = continued(sample, answer)
        (plan,) = pack_step([whole], token_budget=len(whole), share=False)
        batch = plan.build(lambda item: visual_patches(item, loaded.processor), loaded.processor.layout.merge_size)
        found.append(tuple(packed(batch.to(loaded.device)).double().tolist()))
    return tuple(found)
