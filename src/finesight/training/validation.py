"""What is measured on held-out rows while training: the loss, and a few answers with their images."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from PIL import Image

from finesight.data.conversation import Conversation, Part
from finesight.data.feed import Feed, Step
from finesight.data.media import open_image, read_frames
from finesight.errors import MediaError
from finesight.models.memory import first_sentence, is_out_of_memory, release_memory
from finesight.models.packed import PackedModel
from finesight.models.sharding import is_sharded, release_gathered
from finesight.sampling.types import Sampler, SamplingSettings
from finesight.training.ahead import StepsAhead
from finesight.training.kept_features import KeptFeatures
from finesight.training.losses import sft_loss
from finesight.training.out_of_memory import DidNotFit, several_processes_error, single_sample_error, smaller_budget
from finesight.training.telemetry import Telemetry

SAMPLES = "samples"
THUMBNAIL_PIXELS = 256  # longest side


class HeldOutValidation:
    """Held-out loss in packed form, and sample answers.

    Args:
        model: the module that trains, not wrapped for several processes.
        feed: held-out samples, not shuffled.
        conversations: held-out rows to answer at each measurement; empty: none.
        sampler: answers them.
        sampling: how.
        kept: features of images that need not be computed; None: all are computed.
        output_dir: answers go to `samples/step-N.jsonl` in it, thumbnails beside them.
        telemetry: is told of packs that did not fit in memory.
    """

    criterion: Literal["eval_loss", "eval_reward"] = "eval_loss"

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        model: PackedModel,
        feed: Feed,
        conversations: Sequence[Conversation] = (),
        sampler: Sampler | None = None,
        sampling: SamplingSettings | None = None,
        kept: KeptFeatures | None = None,
        output_dir: Path,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.accelerator, self.model, self.feed, self.telemetry = accelerator, model, feed, telemetry
        self.conversations, self.sampler, self.sampling = conversations, sampler, sampling or SamplingSettings()
        self.kept, self.output_dir = kept, output_dir

    def measure(self, step: int) -> dict[str, float]:
        """Loss (mean over supervised tokens, weighted as in training) and what it was measured on.

        Draws nothing from the generators that training uses.

        Raises:
            TrainingError: a single sample does not fit in memory.
            DataError: an image cannot be loaded.
        """
        begun = time.perf_counter()
        values = {"eval_loss": self.loss(step), "eval_samples": len(self.feed.samples)}
        if self.conversations and self.sampler is not None and self.accelerator.is_main_process:
            self.write_answers(step, self.sampler)
        self.accelerator.wait_for_everyone()
        return {**values, "eval_seconds": time.perf_counter() - begun}

    @torch.no_grad()
    def loss(self, at: int) -> float:
        """Mean negative log-likelihood of the held-out targets.

        Args:
            at: the optimizer step after which it is measured.
        """
        device = self.accelerator.device
        training = self.model.training
        self.model.eval()
        total = torch.zeros((), dtype=torch.float32, device=device)
        weight = 0.0
        ahead = StepsAhead(self.feed.steps(0), device, self.kept)
        for step in ahead:
            weight += step.target_weight
            done = 0
            while done < len(step.packs):
                done, failed = self._add_packs(total, step, ahead, done)
                if failed is not None:
                    step = self._divide(step, failed, at)
        self.model.train(training)
        release_gathered(self.model)
        return float(self.accelerator.reduce(total, reduction="sum")) / weight

    def _add_packs(self, total: torch.Tensor, step: Step, ahead: StepsAhead, done: int) -> tuple[int, DidNotFit | None]:
        """Adds the losses of the packs from `done` on to `total`; returns how many are done, and which did not fit."""
        try:
            for batch in ahead.packs(step, done):
                total += sft_loss(self.model(batch), batch.weight, 1.0)
                done += 1
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return done, DidNotFit(done, first_sentence(error))
        return done, None

    def _divide(self, step: Step, failed: DidNotFit, at: int) -> Step:
        """The step with the pack that did not fit in two; the packs of later steps are smaller from the start."""
        release_memory(self.accelerator.device)
        if is_sharded(self.model):  # others wait for this process to gather weights with them
            raise several_processes_error(step, failed, self.accelerator.process_index)
        divided = self.feed.divide(step, failed.pack)
        if divided is None:
            raise single_sample_error(step, failed)
        tokens, budget = step.packs[failed.pack].num_tokens, smaller_budget(step, failed)
        self.feed.limit_tokens(budget)
        if self.telemetry is not None:
            text = f"out of memory measuring the held-out loss in a pack of {tokens:,} tokens ({failed.reason}); its packs now hold at most {budget:,}."
            self.telemetry.event(at, "out_of_memory_in_evaluation", {"pack_tokens": tokens, "token_limit": budget}, text)
        return divided

    def write_answers(self, step: int, sampler: Sampler) -> Path:
        """Answers the sample rows and writes them with what was expected; returns the file."""
        completions = sampler.generate([conversation.prompt() for conversation in self.conversations], self.sampling)
        folder = self.output_dir / SAMPLES
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for number, (conversation, completion) in enumerate(zip(self.conversations, completions, strict=True)):
                record = {
                    "step": step,
                    "row": str(conversation.source),
                    "prompt": [{"role": turn.role, "text": turn.text} for turn in conversation.prompt().turns],
                    "images": self._thumbnails(folder, number, conversation),
                    "answer": completion.text,
                    "expected": conversation.answer,
                    "finish_reason": completion.finish_reason,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        return path

    def _thumbnails(self, folder: Path, number: int, conversation: Conversation) -> list[str]:
        """Names of small PNG files of the prompt's images (of a video: its first frame), written once."""
        names = []
        for place, part in enumerate(conversation.prompt().media):
            name = f"sample-{number}-{place}.png"
            if not (folder / name).exists():
                image = _first_picture(part)
                image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
                image.save(folder / name)
            names.append(name)
        return names


def _first_picture(part: Part) -> Image.Image:
    media: Any = part.media
    if media is None:
        raise MediaError(f"A part of type {part.type} names no file. Check the row's images.")
    picture = open_image(media) if part.type == "image" else read_frames(media, [0])[0]
    return picture.copy()
