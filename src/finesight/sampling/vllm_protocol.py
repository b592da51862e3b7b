"""What is said to a vLLM server and heard from it: its OpenAI-compatible protocol as data. Nothing is sent here.

Images go as PNG of exactly the pixels that the trainer sees, already resized, so that the server has nothing left to resize.
The server renders the conversation itself; which tokens it made of it comes back and is compared with the trainer's.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from finesight.data.conversation import Turn
from finesight.data.media import describe
from finesight.data.processor import Processor
from finesight.data.sample import Sample
from finesight.errors import EngineError
from finesight.sampling.text import decode
from finesight.sampling.types import Completion, SamplingSettings

NEVER = -100.0  # the lowest bias of OpenAI's protocol: a token that has it is not drawn
_SHOWN_TOKENS = 12  # before the place where two prompts part


class _Answer(BaseModel):
    """Servers say more than is read here, and newer ones still more."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class ModelCard(_Answer):
    """One entry of `/v1/models`."""

    id: str
    root: str | None = None  # where it was loaded from
    parent: str | None = None  # of an adapter: its base
    max_model_len: int | None = None  # most tokens of a prompt and its answer


class ModelList(_Answer):
    """What `/v1/models` answers."""

    data: list[ModelCard]


class Alternative(_Answer):
    """A token that could have been drawn."""

    token: str
    logprob: float


class TokenLogprob(Alternative):
    """A token that was drawn."""

    top_logprobs: list[Alternative] = []


class Logprobs(_Answer):
    """Those of an answer's tokens, in their order."""

    content: list[TokenLogprob] | None = None


class Choice(_Answer):
    """One answer."""

    index: int
    finish_reason: str | None = None
    token_ids: list[int] | None = None  # with the token that ended it
    logprobs: Logprobs | None = None


class ChatAnswer(_Answer):
    """What `/v1/chat/completions` answers."""

    choices: list[Choice]
    prompt_token_ids: list[int] | None = None  # with a token for each visual token


def messages_of(turns: Sequence[Turn], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """A prompt as messages; content is a string where it is text alone, else a list of parts, as templates are given it.

    Args:
        images: of all turns in their order, resized.
    """
    left = iter(images)
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if all(part.type == "text" for part in turn.parts):
            messages.append({"role": turn.role, "content": turn.text})
            continue
        content = [
            {"type": "text", "text": part.text}
            if part.type == "text"
            else {"type": "image_url", "image_url": {"url": data_url(next(left))}}
            for part in turn.parts
        ]
        messages.append({"role": turn.role, "content": content})
    return messages


def data_url(image: Image.Image) -> str:
    """An image as a PNG in a data URL; nothing of its pixels is lost."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)  # the way is short, and the processor is wanted elsewhere
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def chat_request(
    model: str,
    messages: list[dict[str, Any]],
    settings: SamplingSettings,
    *,
    seed: int,
    stop_ids: Collection[int],
    forbidden: Collection[int],
) -> dict[str, Any]:
    """The body of a request for `num_generations` completions, with all their tokens and log-probabilities.

    Everything that narrows or shifts what is drawn is said, defaults too: what a request leaves open, vLLM takes from the
    checkpoint's generation_config.json.
    """
    return {
        "model": model,
        "messages": messages,
        "n": settings.num_generations,
        "seed": seed,
        "max_tokens": settings.max_completion_length,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": settings.min_p,
        "repetition_penalty": settings.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": sorted(stop_ids),
        "logit_bias": {str(token): NEVER for token in sorted(forbidden)},
        "logprobs": True,
        "top_logprobs": 0,
        "return_token_ids": True,
    }


def check_prompt(sample: Sample, returned: Sequence[int] | None, processor: Processor) -> None:
    """Compares the tokens that a server made of a prompt with the trainer's.

    Raises:
        EngineError: they differ, or the server did not tell.
    """
    if returned is None:
        raise EngineError(
            f"{sample.source}: the server did not return the prompt's token ids (return_token_ids), so that it is not known what it "
            "answered. Use a newer vLLM."
        )
    ours, theirs = sample.token_ids, np.asarray(returned, dtype=np.int64)
    if np.array_equal(ours, theirs):
        return
    counts = [len(list(run)) for token, run in groupby(theirs.tolist()) if token == processor.image_token_id]
    if len(counts) == len(sample.visual_items):
        for number, (item, count) in enumerate(zip(sample.visual_items, counts, strict=True)):
            expected = sum(length for _, length in item.runs)
            if count != expected and item.part.media is not None:
                pixels = item.resized_height * item.resized_width
                raise EngineError(
                    f"{sample.source}: image {number} ({describe(item.part.media)}) has {expected} visual tokens in training, at "
                    f"{item.resized_width} × {item.resized_height} pixels, and {count} at the server, which resized it again: its pixel limits "
                    f"are others. Start it with limits that have room for {pixels:,} pixels (vllm serve … --mm-processor-kwargs "
                    '\'{"min_pixels": …, "max_pixels": …}\'), or set data.min_pixels and data.max_pixels to its own.'
                )
    shared = min(len(ours), len(theirs))
    apart = np.flatnonzero(ours[:shared] != theirs[:shared])
    place = int(apart[0]) if len(apart) else shared

    def shown(ids: np.ndarray) -> str:
        return f"{int(ids[place])} ({processor.tokenizer.decode([int(ids[place])])!r})" if place < len(ids) else "nothing"

    before = processor.tokenizer.decode(ours[max(0, place - _SHOWN_TOKENS) : place].tolist())
    raise EngineError(
        f"{sample.source}: the prompt is not the same at the server: token {place} is {shown(theirs)} there and {shown(ours)} in training, "
        f"after {before!r} ({len(theirs)} and {len(ours)} tokens in all). Serve the checkpoint that is trained, with its own chat template."
    )


def completion_of(
    choice: Choice, processor: Processor, *, stop_ids: Collection[int], forbidden: Collection[int], source: object
) -> Completion:
    """An answer with its tokens as drawn and their log-probabilities.

    Raises:
        EngineError: tokens or log-probabilities are missing, or are none; the answer was broken off.
    """
    tokens, logprobs = choice.token_ids, choice.logprobs.content if choice.logprobs is not None else None
    if tokens is None or logprobs is None or len(tokens) != len(logprobs) or not tokens:
        missing = "token ids" if tokens is None else "log-probabilities" if logprobs is None else "one log-probability for each token"
        raise EngineError(f"{source}: the server's answer {choice.index} has not {missing} (return_token_ids, logprobs). Use a newer vLLM.")
    if any(one.logprob > 1e-3 for one in logprobs):
        raise EngineError(
            f"{source}: what the server returns are no log-probabilities ({max(one.logprob for one in logprobs):.3g} is above 0). "
            "Start it with --logprobs-mode processed_logprobs."
        )
    if drawn := set(tokens) & set(forbidden):
        names = ", ".join(processor.tokenizer.convert_ids_to_tokens(sorted(drawn)))
        raise EngineError(f"{source}: the server drew {names} although logit_bias forbids it; training cannot go on from such an answer.")
    if choice.finish_reason not in ("stop", "length"):
        raise EngineError(f"{source}: the server broke off answer {choice.index} (finish_reason: {choice.finish_reason}).")
    reason: Literal["stop", "length"] = "stop" if choice.finish_reason == "stop" else "length"
    text = decode(processor.tokenizer, tokens[:-1] if tokens[-1] in stop_ids else tokens)
    return Completion(text, tuple(tokens), reason, tuple(one.logprob for one in logprobs))


def base_card(cards: Sequence[ModelCard], name_or_path: str, model: str | None) -> ModelCard:
    """The base that a run trains, among what a server offers.

    Args:
        name_or_path: of the run's model.
        model: its name at the server; None: as it was loaded there, or by the last part of its path.

    Raises:
        EngineError: it is not there.
    """
    bases = [card for card in cards if card.parent is None]
    own_names = {name_or_path, name_or_path.rstrip("/").rpartition("/")[2]}
    for card in bases:
        if (card.id == model) if model is not None else ({card.id, card.root} & own_names):
            return card
    offered = ", ".join(card.id + (f" ({card.root})" if card.root not in (None, card.id) else "") for card in bases) or "nothing"
    if model is not None:
        raise EngineError(f"The engine's server has no model {model} (rollout.model); it serves {offered}.")
    raise EngineError(
        f"The run trains {name_or_path}, the engine's server serves {offered}. Serve the checkpoint that is trained, or, where it is the same "
        "under another name, set rollout.model to that name."
    )


def ignores_temperature(under: ChatAnswer, plain: ChatAnswer, temperature: float) -> bool:
    """Whether log-probabilities of a first token are those of temperature 1 although it was drawn under another.

    Under temperature T two alternatives are 1/T times as far apart as under 1, whatever the distribution; which of the two was
    returned shows even through the noise of a low precision.

    Args:
        under: an answer under the temperature; plain: one to the same prompt under 1; both with alternatives.
    """
    first, second = _alternatives(under), _alternatives(plain)
    shared = sorted(first.keys() & second.keys(), key=lambda token: second[token])
    if len(shared) < 2:
        return False
    far, near = (table[shared[-1]] - table[shared[0]] for table in (first, second))
    return far > 0 and near > 0 and abs(math.log(far / near)) < abs(math.log(temperature)) / 2


def _alternatives(answer: ChatAnswer) -> dict[str, float]:
    """Log-probabilities of the likeliest first tokens."""
    logprobs = answer.choices[0].logprobs if answer.choices else None
    content = logprobs.content if logprobs is not None else None
    return {each.token: each.logprob for each in content[0].top_logprobs} if content else {}
