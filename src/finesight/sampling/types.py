"""What a sampler is asked and what it gives, whatever computes the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from finesight.data.conversation import Conversation
from finesight.data.sample import Sample
from finesight.errors import RecipeError

Progress = Callable[[int, int], None]  # (prompts done, prompts in all)


@dataclass(frozen=True)
class SamplingSettings:
    """How answers are drawn.

    Raises:
        RecipeError: a value is out of its range.
    """

    max_completion_length: int = 128  # tokens, the end-of-turn token included
    temperature: float = 0.0  # 0: the most likely token each time
    top_p: float = 1.0  # only the most likely tokens that together have this probability
    top_k: int = 0  # only this many most likely tokens; 0: all
    min_p: float = 0.0  # only tokens at least this share as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens of the prompt and of the answer so far become less likely
    stop: tuple[str, ...] = ()  # an answer ends before the first of these
    seed: int = 0  # of the draws; answers depend on it and on the place of the prompt, not on the batch
    batch_size: int = 8  # answers drawn side by side
    num_generations: int = 1  # answers to each prompt
    first_place: int = 0  # place of the first prompt, where the prompts are a part of more

    def __post_init__(self) -> None:
        ranges = {
            "max_completion_length": (self.max_completion_length >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (0 <= self.top_k < 2**63, "0 or more, and below 2^63"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 1e6, "between 0.01 and 1,000,000"),
            "stop": (all(self.stop), "texts that are not empty"),
            "num_generations": (self.num_generations >= 1, "at least 1"),
            "seed": (self.seed >= 0, "0 or more"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
        }
        for name, (right, wanted) in ranges.items():
            if not right:
                raise RecipeError(f"Sampling setting {name} is {getattr(self, name)}; it must be {wanted}.")


@dataclass(frozen=True)
class Completion:
    """One answer."""

    text: str  # without special tokens
    token_ids: tuple[int, ...]  # as drawn, with the end-of-turn token where one ended it
    finish_reason: Literal["stop", "length"]  # stop: the model ended its turn, or a stop text came; length: cut off
    logprobs: tuple[float, ...] = ()  # of the tokens as drawn, under temperature, penalty and forbidden tokens; where asked for


class Sampler(Protocol):
    """Answers prompts."""

    def generate(
        self, prompts: Sequence[Conversation], settings: SamplingSettings, on_progress: Progress | None = None
    ) -> list[Completion]:
        """`num_generations` completions for each prompt, side by side, in the prompts' order.

        A prompt ends with what is to be answered.
        """
        ...


class RolloutSampler(Protocol):
    """Answers prompts of a run of reinforcement with the weights in training."""

    forbidden: tuple[int, ...]  # ids that are never drawn

    def refresh(self, step: int) -> None:
        """Has the present weights used from now on, those after `step` optimizer steps."""
        ...

    def generate_samples(
        self, samples: Sequence[Sample], settings: SamplingSettings, on_progress: Progress | None = None
    ) -> list[Completion]:
        """`num_generations` completions for each encoded prompt, with their log-probabilities, in the prompts' order."""
        ...
