"""Answers from transformers' `generate`, over the project's own tokens, pixels and positions.

Positions are handed over rather than left to the library: its generation goes on after a Qwen2.5-VL video at another
position than its forward pass of the whole conversation does (with temporal positions counted in seconds, the largest
position of a prompt need not be its last one). Given positions of the prompt, `generate` counts on from the last one,
which is what the forward pass does.

Nothing is drawn from the global random generators, so that answering prompts in the middle of training changes
nothing about the training.

Shapes: B prompts, L tokens of the longest one, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from finesight.data.conversation import Conversation
from finesight.data.encode import Encoder
from finesight.data.pixels import visual_patches
from finesight.data.processor import Processor
from finesight.data.sample import Sample
from finesight.errors import ModelError
from finesight.sampling.types import Completion, Progress, SamplingSettings

_STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
_TOKEN_TYPES = {"image": 1, "video": 2}  # of transformers' mm_token_type_ids; text is 0


class TransformersSampler:
    """Answers prompts with a Qwen-VL model of transformers, plain or wrapped by peft (its active adapters count).

    Args:
        model: on the device that it is to run on. It may be in the middle of training: its mode is put back.
        image_first: as in training; moves images of a leading user turn ahead of its text.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, processor: Processor, *, image_first: bool = False) -> None:
        self.model = model
        self.processor = processor
        self._encoder = Encoder(processor, image_first=image_first)
        tokenizer = processor.tokenizer
        known = tokenizer.get_vocab()
        stops = {known[token] for token in _STOP_TOKENS if token in known} | {tokenizer.eos_token_id} - {None}
        self._stop_ids = frozenset(cast("set[int]", stops))
        if not self._stop_ids:
            raise ModelError(
                "The tokenizer has neither <|im_end|> nor an end token: answers could not end. Use the tokenizer of the checkpoint."
            )
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self._stop_ids)

    @property
    def _base(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model.get_base_model()) if isinstance(self.model, PeftModel) else self.model

    def generate(
        self, prompts: Sequence[Conversation], settings: SamplingSettings, on_progress: Progress | None = None
    ) -> list[Completion]:
        """One completion for each prompt, in their order.

        Prompts of like length are answered together; the answer to one does not depend on which others are there.
        Image and video tokens are never drawn.

        Raises:
            DataError, TemplateError: a prompt cannot be encoded or an image not opened.
            ModelError: the GPU is out of memory.
        """
        samples = [self._encoder.encode_prompt(prompt) for prompt in prompts]
        order = sorted(range(len(samples)), key=lambda index: -len(samples[index]))
        completions: dict[int, Completion] = {}
        with _answering(self.model, self._base):
            for start in range(0, len(order), settings.batch_size):
                batch = order[start : start + settings.batch_size]
                drawn = self._generate_batch([samples[index] for index in batch], batch, settings)
                completions.update(zip(batch, drawn, strict=True))
                if on_progress is not None:
                    on_progress(len(completions), len(prompts))
        return [completions[index] for index in range(len(prompts))]

    def _generate_batch(self, samples: Sequence[Sample], places: Sequence[int], settings: SamplingSettings) -> list[Completion]:
        device = next(self._base.parameters()).device
        inputs = {name: tensor.to(device) for name, tensor in self._inputs(samples).items()}
        config = GenerationConfig(
            max_new_tokens=settings.max_completion_length,
            do_sample=False,  # drawing, where asked for, is done by the last of the logits processors
            num_beams=1,
            use_cache=True,
            eos_token_id=sorted(self._stop_ids),
            pad_token_id=self._pad_id,
            suppress_tokens=[self.processor.image_token_id, self.processor.video_token_id],
        )
        self._base.generation_config = config
        try:
            output = self._base.generate(**cast(Any, inputs), generation_config=config, logits_processor=_draws(settings, places, device))
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"The GPU is out of memory answering {len(samples)} prompts of up to {inputs['input_ids'].shape[1]} tokens side by side. "
                "Lower evaluation.batch_size, evaluation.max_completion_length or data.max_pixels."
            ) from error
        rows = cast(torch.Tensor, output)[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._completion(row) for row in rows]

    def _inputs(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Left-padded tensors of a batch: ids, mask and token types (B, L), positions (4, B, L), pixels and grids.

        The first row of positions counts tokens, the others are the M-RoPE axes; padding stands at 0.
        """
        shape = (len(samples), max(len(sample) for sample in samples))
        ids = np.full(shape, self._pad_id, dtype=np.int64)
        mask, types = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        positions = np.zeros((4, *shape), dtype=np.int64)
        pixels: dict[str, list[np.ndarray]] = {"image": [], "video": []}
        grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}
        for row, sample in enumerate(samples):
            first = shape[1] - len(sample)
            ids[row, first:] = sample.token_ids
            mask[row, first:] = 1
            positions[0, row, first:] = np.arange(len(sample))
            positions[1:, row, first:] = sample.position_ids
            for item in sample.visual_items:
                for start, count in item.runs:
                    types[row, first + start : first + start + count] = _TOKEN_TYPES[item.kind]
                pixels[item.kind].append(visual_patches(item, self.processor))
                grids[item.kind].append((item.grid.t, item.grid.h, item.grid.w))
        arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        if pixels["image"] or pixels["video"]:
            arrays["mm_token_type_ids"] = types
        for kind, pixel_name, grid_name in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            if pixels[kind]:
                arrays[pixel_name] = np.concatenate(pixels[kind])
                arrays[grid_name] = np.asarray(grids[kind], dtype=np.int64)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _completion(self, row: Sequence[int]) -> Completion:
        end = next((place for place, token in enumerate(row) if token in self._stop_ids), None)
        kept = row if end is None else row[:end]
        text = self.processor.tokenizer.decode(list(kept), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Completion(
            text=cast(str, text),
            token_ids=tuple(row if end is None else row[: end + 1]),
            finish_reason="length" if end is None else "stop",
        )


class _GumbelDraws(LogitsProcessor):
    """Turns the largest score into a draw from their softmax, by adding Gumbel noise from one generator a row.

    argmax(log p + G) with G = -log E, E exponential, is distributed as p (Gumbel 1954; Maddison et al. 2014). A
    generator a row makes a draw independent of the rest of the batch.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # In float32 an exponential draw is 0 once in 2^24, that is every hundred steps of a large vocabulary, and would
        # decide the step by itself.
        noise = torch.empty_like(scores, dtype=torch.float64)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        noise.clamp_(min=torch.finfo(torch.float64).tiny)
        return cast(torch.FloatTensor, scores.double() - noise.log())


def _draws(settings: SamplingSettings, places: Sequence[int], device: torch.device) -> LogitsProcessorList:
    """What shapes the scores of a step: nothing for temperature 0, so that the most likely token is taken."""
    if settings.temperature == 0:
        return LogitsProcessorList()
    steps: list[LogitsProcessor] = [TemperatureLogitsWarper(settings.temperature)]
    if settings.top_k:
        steps.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        steps.append(TopPLogitsWarper(settings.top_p))
    generators = [torch.Generator(device=device).manual_seed(_row_seed(settings.seed, place)) for place in places]
    return LogitsProcessorList([*steps, _GumbelDraws(generators)])


def _row_seed(seed: int, place: int) -> int:
    """A seed of its own for each prompt, unrelated between neighbours."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def _answering(model: nn.Module, base: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; training mode, module by module, and generation defaults are put back."""
    training = [module for module in model.modules() if module.training]
    defaults = base.generation_config
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        base.generation_config = defaults
        for module in training:
            module.training = True
