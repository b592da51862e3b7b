"""Requests to `/v1/chat/completions`, as far as their form goes.

Unknown fields are refused, and so are fields that would change answers in ways that this server does not know: nothing
of a request is passed over in silence. Fields that only help OpenAI's own accounting are taken and do nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from finesight.sampling.rows import MOST_TOP_LOGPROBS
from finesight.serve.errors import ApiError

_MOST_STOPS = 4  # as OpenAI has it
_StopText = Annotated[str, Field(min_length=1, max_length=256)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Address(_Form):
    """Where an image or video is: a data URL, or what the server allows beside."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None  # sizes are those that the model was trained with, whatever it says


class TextPart(_Form):
    type: Literal["text"]
    text: str


class ImagePart(_Form):
    type: Literal["image_url"]
    image_url: Address


class VideoPart(_Form):
    type: Literal["video_url"]
    video_url: Address
    fps: float | None = Field(None, gt=0, le=120)  # frames taken of a second
    num_frames: int | None = Field(None, ge=1, le=4096)


class FramesPart(_Form):
    """The frames of a video, one by one."""

    type: Literal["video"]
    video: list[str] = Field(min_length=1, max_length=4096)
    fps: float | None = Field(None, gt=0, le=120)  # at which they were taken


ContentPart = Annotated[TextPart | ImagePart | VideoPart | FramesPart, Field(discriminator="type")]


class Message(_Form):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = None
    # What clients send back with an answer that they were given.
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    function_call: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)


class StreamOptions(_Form):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(_Form):
    """What OpenAI has under `json_schema`. Answers follow the schema whether `strict` is set or not."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")
    definition: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextFormat(_Form):
    type: Literal["text"]


class JsonObjectFormat(_Form):
    type: Literal["json_object"]


class JsonSchemaFormat(_Form):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(_Form):
    """A request for one or more answers to a conversation."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=1024)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**63)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: _StopText | Annotated[list[_StopText], Field(max_length=_MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None  # this and the two below: see `token_ids.py`
    stop_token_ids: list[int] | None = Field(None, max_length=64)
    return_token_ids: bool | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    modalities: list[str] | None = None
    # They change no answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def check(self) -> None:
        """Refuses what would need more than the form can say.

        Raises:
            ApiError: 400, with the field.
        """
        unsupported = {
            "presence_penalty": self.presence_penalty not in (None, 0),
            "frequency_penalty": self.frequency_penalty not in (None, 0),
            "tools": bool(self.tools),
            "tool_choice": self.tool_choice not in (None, "none", "auto"),
            "functions": bool(self.functions),
            "function_call": self.function_call not in (None, "none", "auto"),
            "modalities": self.modalities not in (None, ["text"]),
        }
        instead = {
            "presence_penalty": "use repetition_penalty",
            "frequency_penalty": "use repetition_penalty",
        }
        for param, found in unsupported.items():
            if found:
                advice = f"leave it out, or {instead[param]}" if param in instead else "leave it out"
                raise ApiError(
                    400, f"{param} is not supported by this server with this value; {advice}.", code="unsupported_parameter", param=param
                )
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them.", param="max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true.", param="stream_options")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """As a tuple, whatever the form."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def field_names(*, nested: bool) -> list[str]:
    """What fields of a request are called, or of the objects within it."""
    forms = [form for form in _Form.__subclasses__() if form is not ChatRequest] if nested else [ChatRequest]
    return sorted({field.alias or name for form in forms for name, field in form.model_fields.items()})
