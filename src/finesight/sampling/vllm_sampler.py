"""Completions from a vLLM server, which is given each new adapter."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

from finesight.data.conversation import Conversation
from finesight.data.encode import Encoder
from finesight.data.pixels import resized_frames
from finesight.data.processor import Processor
from finesight.data.sample import Sample
from finesight.errors import DataError, EngineError
from finesight.grpo_settings import RolloutSettings
from finesight.sampling.engine import stop_ids
from finesight.sampling.types import Completion, Progress, SamplingSettings
from finesight.sampling.vllm_protocol import (
    ChatAnswer,
    ModelCard,
    base_card,
    chat_request,
    check_prompt,
    completion_of,
    ignores_temperature,
    messages_of,
)
from finesight.sampling.vllm_server import VllmServer


class VllmSampler:
    """Samples for a run at a vLLM server.

    The server renders and encodes prompts itself. What it made of each is compared with the trainer's tokens: where they
    differ, an answer to another prompt would be trained on.

    Args:
        server: that samples.
        processor, conversations, image_first: as the run encodes its prompts; samples are looked up by their row.
        folder: where adapters are written for the server; made when the first one is.
        save: writes the adapter in training into a folder that does not exist yet.
        run: tells adapters of this run from those of others at the server.
        publishes: whether this process hands adapters over, rather than one beside it.
        wait: for all processes.
    """

    def __init__(
        self,
        server: VllmServer,
        processor: Processor,
        conversations: Sequence[Conversation],
        *,
        folder: Path,
        save: Callable[[Path], None],
        run: str,
        image_first: bool = False,
        publishes: bool = True,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.server, self.processor = server, processor
        self.stop_ids = stop_ids(processor)
        self.forbidden: tuple[int, ...] = (processor.image_token_id, processor.video_token_id)
        self._conversations = {conversation.source: conversation for conversation in conversations}
        self._encoder = Encoder(processor, image_first=image_first)
        self._folder, self._save, self._run, self._publishes, self._wait = folder.resolve(), save, run, publishes, wait
        self._published = 0
        self._adapter: str | None = None  # at the server, as it is called there

    def check(self, name_or_path: str, rollout: RolloutSettings, samples: Sequence[Sample]) -> ModelCard:
        """Whether the server can sample for the run; before anything is loaded.

        Raises:
            EngineError: it cannot be reached, serves another model, has no room for the longest prompt, or its log-probabilities are
                those of another temperature.
            DataError: a prompt has a video.
        """
        for sample in samples:
            if any(item.kind == "video" for item in sample.visual_items):
                raise DataError(
                    f"{sample.source}: videos cannot be sent to rollout.engine: vllm, which would take other frames of them. Remove rows with "
                    "videos, or set rollout.engine: builtin."
                )
        card = base_card(self.server.models(), name_or_path, rollout.model)
        longest = max((len(sample) for sample in samples), default=0) + rollout.max_completion_length
        if card.max_model_len is not None and longest > card.max_model_len:
            raise EngineError(
                f"The longest prompt and its completion have {longest:,} tokens, more than the {card.max_model_len:,} that the server at "
                f"{self.server.url} has room for. Start it with --max-model-len {longest}, or lower rollout.max_completion_length or "
                "data.max_pixels."
            )
        if rollout.temperature != 1:
            self._check_temperature(card.id, rollout.temperature)
        return card

    def _check_temperature(self, model: str, temperature: float) -> None:
        """vLLM returns the log-probabilities of temperature 1, whatever it draws under, unless it is told otherwise."""

        def answer(temperature: float) -> ChatAnswer:
            settings = SamplingSettings(max_completion_length=1, temperature=temperature)
            messages = [{"role": "user", "content": "?"}]
            body = chat_request(model, messages, settings, seed=0, stop_ids=self.stop_ids, forbidden=self.forbidden)
            return self.server.chat({**body, "top_logprobs": 5})

        if ignores_temperature(answer(temperature), answer(1.0), temperature):
            raise EngineError(
                f"The server at {self.server.url} returns log-probabilities of temperature 1, and rollout.temperature is {temperature:g}. "
                "Start it with --logprobs-mode processed_logprobs, or set rollout.temperature: 1."
            )

    def refresh(self, step: int) -> None:
        """Hands the present adapter to the server, in place of the one before.

        Each has a name of its own: the server keeps keys and values of prompts by the adapter's name, and those of the adapter
        before are no longer right.

        Args:
            step: optimizer steps made so far.

        Raises:
            EngineError: the server cannot load it.
        """
        self._published += 1
        name = f"finesight-{self._run}-{self._published}-step-{step}"
        if self._publishes:
            before = self._adapter
            self._save(self._folder / name)
            if before is not None:  # first, since the server may have room for a single one
                self.server.unload_adapter(before)
                shutil.rmtree(self._folder / before, ignore_errors=True)
            self.server.load_adapter(name, self._folder / name)
        self._adapter = name
        self._wait()

    def close(self) -> None:
        """Has the adapter forgotten and its files removed; whatever goes wrong with that is no error of the run."""
        if self._publishes and self._adapter is not None:
            with suppress(EngineError):
                self.server.unload_adapter(self._adapter)
            shutil.rmtree(self._folder, ignore_errors=True)
        self._adapter = None
        self.server.close()

    def generate_samples(
        self, samples: Sequence[Sample], settings: SamplingSettings, on_progress: Progress | None = None
    ) -> list[Completion]:
        """`num_generations` completions for each prompt, in the prompts' order; `batch_size` of them are asked for at a time.

        Raises:
            EngineError: no adapter has been handed over; the server fails, or answers another prompt than it was asked.
            MediaError: an image cannot be opened.
        """
        if settings.stop:
            raise EngineError("Stop texts are not sent to rollout.engine: vllm.")
        workers = max(1, settings.batch_size // settings.num_generations)
        with ThreadPoolExecutor(workers, thread_name_prefix="finesight-vllm") as pool:
            futures = [pool.submit(self._answers, sample, settings, settings.first_place + place) for place, sample in enumerate(samples)]
            try:
                for done, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    if on_progress is not None:
                        on_progress(done, len(samples))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [completion for future in futures for completion in future.result()]

    def _answers(self, sample: Sample, settings: SamplingSettings, place: int) -> list[Completion]:
        if self._adapter is None:
            raise EngineError("The server has been given no adapter yet.")
        conversation = self._conversations.get(sample.source)
        if conversation is None:
            raise EngineError(f"{sample.source} is not a row of the run.")
        images = [frame for item in sample.visual_items for frame in resized_frames(item, self.processor)]
        body = chat_request(
            self._adapter,
            messages_of(self._encoder.prompt_turns(conversation), images),
            settings,
            seed=prompt_seed(settings.seed, place),
            stop_ids=self.stop_ids,
            forbidden=self.forbidden,
        )
        answer = self.server.chat(body)
        check_prompt(sample, answer.prompt_token_ids, self.processor)
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        if len(choices) != settings.num_generations:
            raise EngineError(f"{sample.source}: {settings.num_generations} completions were asked for, the server gave {len(choices)}.")
        return [
            completion_of(choice, self.processor, stop_ids=self.stop_ids, forbidden=self.forbidden, source=sample.source)
            for choice in choices
        ]


def prompt_seed(seed: int, place: int) -> int:
    """What decides the completions of one prompt of a rollout, below 2⁶³: vLLM draws from nothing but the seed of a request."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest(), "big") >> 1
