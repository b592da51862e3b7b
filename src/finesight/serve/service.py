"""What happens to a request between its form and its answer; nothing here knows of HTTP frameworks."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from finesight.data.pixels import visual_patches
from finesight.data.sample import Sample
from finesight.errors import DataError, TemplateError
from finesight.sampling.requests import Token
from finesight.sampling.text import TextStream
from finesight.sampling.types import Completion, SamplingSettings
from finesight.serve.answers import Choice, Envelope, choice_object, event, usage_object
from finesight.serve.errors import ApiError
from finesight.serve.messages import SOURCE, MediaAccess, to_conversation
from finesight.serve.metrics import Metrics
from finesight.serve.models import ModelShelf, ServedModel
from finesight.serve.response_format import ResponseGrammars
from finesight.serve.schema import ChatRequest
from finesight.serve.settings import ServeSettings
from finesight.serve.token_ids import add_token_ids, check_token_fields
from finesight.serve.worker import Job, Worker

_AT_ONCE = 2  # requests whose images are decoded at the same time
_LOOK_S = 1.0  # how often it is looked whether a client that waits is still there
_CHARACTERS_A_TOKEN = 128  # beyond so many for each token that there is room for, a text is not even tokenised


@dataclass(eq=False)
class Accepted:
    """A request that is being answered."""

    chat: ChatRequest
    model: ServedModel
    started: float  # of time.monotonic
    job: Job | None = None
    completion_tokens: int = 0
    open: bool = True  # counts among those that are held


class Service:
    """Answers requests with the models of a shelf.

    Raises:
        ModelError: the engine cannot be made.
    """

    def __init__(self, shelf: ModelShelf, settings: ServeSettings) -> None:
        self.shelf, self.settings = shelf, settings
        self.worker = Worker(shelf.packed, partial(shelf.engine, settings))
        self.metrics = Metrics(lambda: self.worker.running, lambda: self.worker.waiting)
        self.closing = False
        self.held = 0
        self._access = MediaAccess(settings.allow_urls, settings.allowed_dirs, settings.max_body_bytes, settings.timeout_s)
        self._grammars = ResponseGrammars(shelf.grammar_compiler)
        self._decoding = asyncio.Semaphore(_AT_ONCE)

    def model(self, name: str) -> ServedModel:
        """The model of that name.

        Raises:
            ApiError: 404.
        """
        model = self.shelf.models.get(name)
        if model is None:
            offered = ", ".join(self.shelf.models)
            raise ApiError(404, f"The model {name[:100]!r} is not served here; there are {offered}.", code="model_not_found", param="model")
        return model

    async def accept(self, chat: ChatRequest) -> Accepted:
        """Takes a request in and has it begun; whoever calls must hand the result to :meth:`leave` in the end.

        Raises:
            ApiError: it is not taken: 400, 404, 408, 429, 503.
        """
        if self.closing or not self.worker.alive:
            raise ApiError(503, "The server is shutting down.", code="shutting_down")
        model = self.model(chat.model)
        chat.check()
        check_token_fields(chat, self.shelf.stop_ids, (model.processor.image_token_id, model.processor.video_token_id))
        if (chat.n or 1) > self.settings.batch_size:
            raise ApiError(400, f"n is {chat.n}; this server draws {self.settings.batch_size} answers side by side.", param="n")
        if self.held >= self.settings.batch_size + self.settings.queue_size:
            raise ApiError(429, "The server has as many requests as it holds; try again in a while.", code="queue_full")
        accepted = Accepted(chat, model, time.monotonic())
        self.held += 1
        self.metrics.held.inc()
        try:
            accepted.job = await asyncio.wait_for(self._begin(accepted), self.settings.timeout_s)
        except BaseException as error:
            self.leave(accepted, error.status if isinstance(error, ApiError) else 408 if isinstance(error, TimeoutError) else 500)
            if isinstance(error, TimeoutError):
                raise self._late() from None
            raise
        return accepted

    async def _begin(self, accepted: Accepted) -> Job:
        async with self._decoding:
            try:
                grammar = await asyncio.to_thread(self._grammars.of, accepted.chat.response_format)
                sample = await asyncio.to_thread(self._encoded, accepted.chat, accepted.model)
            except UnicodeEncodeError:  # JSON can hold it
                raise ApiError(400, "The request holds half of a surrogate pair, which is no text.", code="invalid_text") from None
        chat, settings = accepted.chat, self._sampling(accepted.chat, len(sample))
        job = Job(
            sample,
            settings,
            accepted.model.adapter,
            tokens=bool(chat.stream or chat.logprobs),
            top_logprobs=chat.top_logprobs or 0,
            grammar=grammar,
            loop=asyncio.get_running_loop(),
        )
        self.model(accepted.model.name)  # it may have been unloaded meanwhile
        self.worker.submit(job)
        self.metrics.prompt_tokens.inc(len(sample))
        return job

    def leave(self, accepted: Accepted, status: int) -> None:
        """Counts a request that is over, however it ended, and stops what is still computed for it; once."""
        if not accepted.open:
            return
        accepted.open = False
        self.held -= 1
        self.metrics.held.dec()
        if accepted.job is not None and not accepted.job.ended:
            self.worker.cancel(accepted.job)
        self.metrics.ended(accepted.model.name, status, time.monotonic() - accepted.started, accepted.completion_tokens)

    def _encoded(self, chat: ChatRequest, model: ServedModel) -> Sample:
        """The prompt in tokens; every image and video known to be usable."""
        characters = sum(
            len(m.content) if isinstance(m.content, str) else sum(len(getattr(p, "text", "")) for p in m.content) for m in chat.messages
        )
        if characters > _CHARACTERS_A_TOKEN * self.settings.max_length_tokens:
            raise self._too_long(f"The text has {characters:,} characters")
        for message in chat.messages:  # raises UnicodeEncodeError, where tokenizers have errors of many kinds
            texts = [message.content] if isinstance(message.content, str) else [getattr(part, "text", "") for part in message.content]
            "".join(texts).encode()
        conversation = to_conversation(chat.messages, self._access, model.system)
        try:
            sample = model.encoder.encode_prompt(conversation)
            if len(sample) >= self.settings.max_length_tokens:
                raise self._too_long(f"The prompt has {len(sample):,} tokens")
            for item in sample.visual_items:
                if item.kind == "video":  # images have been decoded
                    visual_patches(item, model.processor)
        except (DataError, TemplateError) as error:
            raise ApiError(400, str(error).removeprefix(f"{SOURCE}: "), code="invalid_messages", param="messages") from None
        return sample

    def _sampling(self, chat: ChatRequest, prompt_tokens: int) -> SamplingSettings:
        room = self.settings.max_length_tokens - prompt_tokens
        asked = chat.max_completion_tokens or chat.max_tokens
        if asked is not None and asked > room:
            raise self._too_long(f"The prompt has {prompt_tokens:,} tokens, and an answer of up to {asked:,} is asked for")
        return SamplingSettings(
            max_completion_length=asked or min(self.settings.max_completion_length, room),
            temperature=1.0 if chat.temperature is None else chat.temperature,  # OpenAI's default
            top_p=chat.top_p or 1.0,
            top_k=chat.top_k or 0,
            min_p=chat.min_p or 0.0,
            repetition_penalty=chat.repetition_penalty or 1.0,
            stop=chat.stop_texts,
            seed=secrets.randbits(63) if chat.seed is None else chat.seed % 2**64,
            num_generations=chat.n or 1,
        )

    def _too_long(self, what: str) -> ApiError:
        most = self.settings.max_length_tokens
        room = f"there is room for {most:,} tokens together (the server was started with --max-length-tokens {most})"
        return ApiError(400, f"{what}; {room}.", code="context_length_exceeded", param="messages")

    def _late(self) -> ApiError:
        return ApiError(408, f"The request was not answered within {self.settings.timeout_s:g} s.", code="timeout")

    async def _events(self, accepted: Accepted, gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[tuple[int, Token | Completion]]:
        """What is heard of a request until all of its answers have ended, or nobody waits for them any more."""
        job = accepted.job
        if job is None:
            raise ApiError(500, "The request was never begun.")
        deadline = accepted.started + self.settings.timeout_s
        left = accepted.chat.n or 1
        while left:
            wait = min(_LOOK_S, deadline - time.monotonic())
            try:
                heard = await asyncio.wait_for(job.events.get(), max(wait, 0.001))
            except TimeoutError:
                if time.monotonic() >= deadline:
                    raise self._late() from None
                if await gone():
                    raise ApiError(499, "The client has gone.") from None
                continue
            if isinstance(heard, Exception):
                raise heard
            if isinstance(heard[1], Completion):
                left -= 1
                accepted.completion_tokens += len(heard[1].token_ids)
            yield heard

    def _choices(self, accepted: Accepted) -> list[Choice]:
        tokenizer, chat = accepted.model.processor.tokenizer, accepted.chat
        stops = self.shelf.stop_ids
        return [Choice(tokenizer, stops, TextStream(tokenizer, chat.stop_texts), bool(chat.logprobs)) for _ in range(chat.n or 1)]

    async def whole(self, accepted: Accepted, gone: Callable[[], Awaitable[bool]]) -> dict[str, Any]:
        """The answers once all have ended.

        Args:
            gone: whether the client has left.

        Raises:
            ApiError: 408 or 500.
        """
        choices = self._choices(accepted)
        ended: dict[int, Completion] = {}
        async for number, new in self._events(accepted, gone):
            if isinstance(new, Completion):
                ended[number] = new
            else:
                choices[number].add(new)
        logprobs = accepted.chat.logprobs
        objects = [choice_object(number, ended[number], choice.content if logprobs else None) for number, choice in enumerate(choices)]
        answer = Envelope(accepted.model.name).whole(objects, self._usage(accepted))
        if accepted.chat.return_token_ids and accepted.job is not None:
            answer["prompt_token_ids"] = accepted.job.request.sample.token_ids.tolist()
            for number, choice in enumerate(objects):
                add_token_ids(choice, ended[number], accepted.model.processor.tokenizer)
        return answer

    async def pieces(self, accepted: Accepted, gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[str]:
        """The answers as server-sent events; an error that comes in between is an event too, and the last one."""
        envelope, choices = Envelope(accepted.model.name), self._choices(accepted)
        include_usage = accepted.chat.stream_options is not None and accepted.chat.stream_options.include_usage
        more: dict[str, Any] = {"usage": None} if include_usage else {}

        def piece(number: int, delta: dict[str, str], logprobs: dict[str, Any] | None = None, reason: str | None = None) -> str:
            return envelope.piece([{"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}], **more)

        for number in range(len(choices)):
            yield piece(number, {"role": "assistant", "content": ""})
        held = ""  # events that go out together: a client that reads slower than tokens come is sent several at once
        try:
            async for number, new in self._events(accepted, gone):
                choice = choices[number]
                if isinstance(new, Token):
                    if text := choice.add(new):
                        held += piece(number, {"content": text}, choice.take_pending())
                else:
                    if (rest := choice.rest(new)) or choice.pending:
                        held += piece(number, {"content": rest}, choice.take_pending())
                    held += piece(number, {}, reason=new.finish_reason)
                if held and (accepted.job is None or accepted.job.events.empty()):
                    yield held
                    held = ""
        except ApiError as error:
            self.leave(accepted, error.status)
            yield held + event(error.body())
            return
        if held:
            yield held
        if include_usage:
            yield envelope.piece([], usage=self._usage(accepted))
        yield "data: [DONE]\n\n"

    def _usage(self, accepted: Accepted) -> dict[str, int]:
        prompt = 0 if accepted.job is None else len(accepted.job.request.sample)
        return usage_object(prompt, accepted.completion_tokens)
