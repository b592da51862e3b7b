"""What a trainer asks of a server beyond OpenAI's protocol, in vLLM's spelling: the tokens of prompts and answers.

`return_token_ids` adds `prompt_token_ids` to an answer and `token_ids` to each choice, and `logprobs` then has the token that
ended it too. `stop_token_ids` and `logit_bias` are taken as far as they ask for what this server does anyway.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from finesight.sampling.requests import Token
from finesight.sampling.types import Completion
from finesight.serve.answers import token_logprobs
from finesight.serve.errors import ApiError
from finesight.serve.schema import ChatRequest

NEVER = -100.0  # a token with this bias is not drawn


def check_token_fields(chat: ChatRequest, stop_ids: Collection[int], forbidden: Collection[int]) -> None:
    """Refuses what would change answers.

    Args:
        stop_ids: that end an answer; forbidden: that are never drawn.

    Raises:
        ApiError: 400, with the field.
    """
    never = {str(token) for token in forbidden}
    if any(token not in never or bias != NEVER for token, bias in (chat.logit_bias or {}).items()):
        raise ApiError(
            400,
            "logit_bias is not supported by this server with this value; leave it out.",
            code="unsupported_parameter",
            param="logit_bias",
        )
    if set(chat.stop_token_ids or ()) - set(stop_ids):
        raise ApiError(
            400,
            f"stop_token_ids may hold {', '.join(map(str, sorted(stop_ids)))}, which end every answer; use stop for texts.",
            code="unsupported_parameter",
            param="stop_token_ids",
        )
    if chat.return_token_ids and chat.stream:
        raise ApiError(400, "return_token_ids needs stream: false.", param="return_token_ids")


def add_token_ids(choice: dict[str, Any], completion: Completion, tokenizer: Any) -> None:
    """Completes one of `choices` with the tokens of its answer."""
    choice["token_ids"] = list(completion.token_ids)
    if choice["logprobs"] is not None:
        content = choice["logprobs"]["content"]
        for token, logprob in list(zip(completion.token_ids, completion.logprobs, strict=True))[len(content) :]:
            content.append(token_logprobs(tokenizer, Token(token, logprob)))
