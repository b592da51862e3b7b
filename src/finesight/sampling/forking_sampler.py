"""Answers from the project's own decoding, to prompts that are all known beforehand.

The decoding engine computes a prompt once and draws its answers side by side from it. Adapters are applied as they are, unmerged.

Image and video tokens are never drawn. Nothing is drawn from global random generators, so that answering in the middle
of training changes nothing about the training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from finesight.data.conversation import Conversation
from finesight.data.encode import Encoder
from finesight.data.processor import Processor
from finesight.data.sample import Sample
from finesight.errors import ModelError
from finesight.models.packed import PackedModel
from finesight.sampling.blocks import fitting_blocks
from finesight.sampling.engine import DecodingEngine, answering, drawing, stop_ids
from finesight.sampling.grammar import Grammar
from finesight.sampling.requests import EngineSize, Request, blocks_for
from finesight.sampling.types import Completion, Progress, SamplingSettings


class ForkingSampler:
    """Answers prompts with a Qwen-VL model, each prompt computed once for all of its answers.

    Args:
        model: on the device that it is to run on. It may be in the middle of training: its mode is put back.
        image_first: as in training; moves images of a leading user turn ahead of its text.
        grammar: that every answer follows.
        forbidden: further ids that are never drawn; with those that end an answer, every answer has its full length.
        compile_layers: compile what surrounds attention in a decoding step, and drawing.
        say: is told if that fails.
    """

    def __init__(
        self,
        model: PackedModel | PreTrainedModel | PeftModel,
        processor: Processor,
        *,
        image_first: bool = False,
        grammar: Grammar | None = None,
        forbidden: Collection[int] = (),
        compile_layers: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.packed = model if isinstance(model, PackedModel) else PackedModel(model)
        self.processor, self.grammar = processor, grammar
        self.compile_layers, self.say = compile_layers, say
        self.draw_tokens = drawing(compile_layers, say)
        self._encoder = Encoder(processor, image_first=image_first)
        self.stop_ids = stop_ids(processor)
        self.forbidden: tuple[int, ...] = (processor.image_token_id, processor.video_token_id, *forbidden)

    def generate(
        self,
        prompts: Sequence[Conversation],
        settings: SamplingSettings,
        on_progress: Progress | None = None,
        *,
        places: Sequence[int] | None = None,
    ) -> list[Completion]:
        """`num_generations` completions for each prompt, side by side, in the prompts' order.

        The answers to a prompt depend on its place and the seed, not on which others are there.

        Args:
            places: of the prompts in a longer list of which they are a part; None: this is the list.

        Raises:
            DataError, TemplateError: a prompt cannot be encoded or an image not opened.
            ModelError: the GPU has no memory for the keys and values of a single answer.
        """
        samples = [self._encoder.encode_prompt(prompt) for prompt in prompts]
        return self.generate_samples(samples, settings, on_progress, places=places)

    def refresh(self, step: int) -> None:
        """Nothing needs to be done: completions are drawn from the model in training itself."""

    def generate_samples(
        self,
        samples: Sequence[Sample],
        settings: SamplingSettings,
        on_progress: Progress | None = None,
        *,
        places: Sequence[int] | None = None,
    ) -> list[Completion]:
        """The same for prompts that are encoded already."""
        if not samples:
            return []
        try:
            with answering(self.packed):
                return _Run(self, samples, settings, places).complete(on_progress)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"The GPU is out of memory answering prompts of up to {max(map(len, samples)):,} tokens, {settings.batch_size} answers side by "
                "side. Lower evaluation.batch_size, evaluation.max_completion_length or data.max_pixels."
            ) from error


class _Run:
    """One call's prompts and the engine that answers them."""

    def __init__(
        self, sampler: ForkingSampler, samples: Sequence[Sample], settings: SamplingSettings, places: Sequence[int] | None = None
    ) -> None:
        self.places = range(len(samples)) if places is None else places
        self.samples, self.settings, self.grammar = samples, settings, sampler.grammar
        self.done: dict[tuple[int, int], Completion] = {}  # by (index of the prompt, number of the answer)
        self.num_answers = len(samples) * settings.num_generations
        rows = min(settings.batch_size, self.num_answers)
        length = max(len(sample) for sample in samples) + settings.max_completion_length
        blocks = self._blocks(sampler.packed, rows)
        self.engine = DecodingEngine(
            sampler.packed,
            sampler.processor,
            EngineSize(rows, length, settings.max_completion_length, blocks),
            forbidden=sampler.forbidden,
            compile_layers=sampler.compile_layers,
            draw_tokens=sampler.draw_tokens,
            say=sampler.say,
        )
        self.pool = self.engine.pool

    def _blocks(self, packed: PackedModel, rows: int) -> int:
        """For as many answers side by side as asked for, or as fit."""
        own = max(Request(sample, self.settings).own_blocks for sample in self.samples)
        per_prompt = max(blocks_for(len(sample)) for sample in self.samples)
        prompts_at_once = min(len(self.samples), -(-rows // self.settings.num_generations) + 1)
        return fitting_blocks(packed, 1 + rows * own + prompts_at_once * per_prompt, 1 + own + per_prompt)

    def complete(self, on_progress: Progress | None) -> list[Completion]:
        """Draws everything."""
        left = [self.settings.num_generations] * len(self.samples)
        told = 0

        def end(index: int, number: int, completion: Completion) -> None:
            self.done[index, number] = completion
            left[index] -= 1

        for index, (sample, place) in enumerate(zip(self.samples, self.places, strict=True)):
            place = self.settings.first_place + place
            self.engine.submit(Request(sample, self.settings, place=place, grammar=self.grammar, on_end=partial(end, index)))
        while len(self.done) < self.num_answers:
            self.engine.step()
            if on_progress is not None and (finished := left.count(0)) > told:
                told = finished
                on_progress(told, len(self.samples))
        self.engine.finish()  # nothing of this run is under way any more when its memory goes
        generations = range(self.settings.num_generations)
        return [self.done[index, number] for index in range(len(self.samples)) for number in generations]
