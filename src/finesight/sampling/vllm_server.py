"""A vLLM server over HTTP: the one address that the user gave, and nothing else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from finesight.errors import EngineError
from finesight.sampling.vllm_protocol import ChatAnswer, ModelCard, ModelList

_CONNECT_S = 10.0
# Below the 5 s after which uvicorn closes a connection that is not used: one that it is closing must not be chosen.
_KEEP_ALIVE_S = 2.0
_BUSY = (429, 503)
_TRIES = 6  # while it is busy, twice as long between them each time
TOWER_OPTION = "--enable-tower-connector-lora"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes

_Form = TypeVar("_Form", bound=BaseModel)


def start_command(name_or_path: str, rank: int, *, tower: bool = False) -> str:
    """How a server is started that can sample for a run.

    Args:
        rank: of the adapter.
        tower: whether the adapter reaches into tower or merger.
    """
    most = next((size for size in _RANKS if size >= rank), rank)
    return (
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve {name_or_path} --enable-lora --max-lora-rank {most} "
        f"{TOWER_OPTION + ' ' if tower else ''}--logprobs-mode processed_logprobs"
    )


class VllmServer:
    """Speaks to one server. May be used from several threads.

    Args:
        url: of the server, with or without `/v1`.
        start: how one is started, for messages (:func:`start_command`).
        api_key: sent as a bearer token; None: none.
        timeout_s: for one answer.
    """

    def __init__(self, url: str, *, start: str, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self.url, self._start = url.rstrip("/").removesuffix("/v1"), start
        # No proxies, no .netrc, no redirects: only this address is to be contacted.
        self._client = httpx.Client(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_S),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S),
            trust_env=False,
            follow_redirects=False,
        )

    def close(self) -> None:
        """Closes all connections."""
        self._client.close()

    def models(self) -> list[ModelCard]:
        """What it serves.

        Raises:
            EngineError: it cannot be reached, or refuses.
        """
        return self._read(self._ask("GET", "/v1/models"), ModelList).data

    def chat(self, body: dict[str, Any]) -> ChatAnswer:
        """Answers to a prompt.

        Raises:
            EngineError: it cannot be reached, or refuses.
        """
        return self._read(self._ask("POST", "/v1/chat/completions", body), ChatAnswer)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Loads an adapter from a folder that the server sees too.

        Raises:
            EngineError: it takes no adapters at run time, does not see the folder, or cannot use the adapter.
        """
        response = self._send("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if response.is_success:
            return
        reason = _reason(response)
        if response.status_code in (404, 405) and "No adapter found" not in reason:
            raise EngineError(f"The server at {self.url} takes no adapters at run time. Start it with: {self._start}")
        hints = {
            "max_lora_rank": f"Start it with: {self._start}",
            "not enabled": f"Start it with: {self._start}",
            "No adapter found": "The server must see the folder of the run under the same path (a shared disk, or a mount of its container).",
            "target modules": f"vLLM adapts the language model alone unless it is started with {TOWER_OPTION}.",
        }
        hint = next((text for sign, text in hints.items() if sign in reason), "")
        raise EngineError(f"The server at {self.url} cannot load the adapter {folder} ({response.status_code}: {reason}). {hint}".rstrip())

    def unload_adapter(self, name: str) -> None:
        """Has an adapter forgotten; one that the server does not know, since it was started anew, is no error.

        Raises:
            EngineError: it cannot be reached, or refuses.
        """
        response = self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if not response.is_success and response.status_code != 404:
            raise self._refusal(response, "/v1/unload_lora_adapter")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        response = self._send(method, path, body)
        if not response.is_success:
            raise self._refusal(response, path)
        return response

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """Sends, and again while the server has too much to do."""
        try:
            for attempt in range(_TRIES):
                response = self._client.request(method, self.url + path, json=body)
                if response.status_code not in _BUSY or attempt + 1 == _TRIES:
                    break
                time.sleep(2**attempt / 2)
        except httpx.TimeoutException as error:
            what = "be reached" if isinstance(error, httpx.ConnectTimeout) else f"answer {path} within rollout.timeout_s"
            raise EngineError(f"The server at {self.url} did not {what}.") from None
        except httpx.HTTPError as error:
            raise EngineError(
                f"The server at {self.url} (rollout.url) cannot be reached: {error}. Start it, for example with: {self._start}"
            ) from None
        return response

    def _refusal(self, response: httpx.Response, path: str) -> EngineError:
        if response.status_code in (401, 403):
            return EngineError(
                f"The server at {self.url} wants an API key ({response.status_code}: {_reason(response)}). Set the environment variable that "
                "rollout.api_key_env names."
            )
        return EngineError(f"The server at {self.url} refuses {path} ({response.status_code}): {_reason(response)}")

    def _read(self, response: httpx.Response, form: type[_Form]) -> _Form:
        try:
            return form.model_validate_json(response.content)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(step) for step in problem["loc"]) or "the body"
            raise EngineError(
                f"The server at {self.url} does not speak vLLM's protocol: {where} of its answer to {response.url.path}: {problem['msg']}."
            ) from None


def _reason(response: httpx.Response) -> str:
    """What an error's body says, in any of the forms that servers give it."""
    try:
        content = response.json()
    except ValueError:
        return response.text.strip()[:300] or response.reason_phrase
    if isinstance(content, dict):
        error = content.get("error", content)
        content = (error.get("message") or error.get("detail") or content) if isinstance(error, dict) else error
    return str(content)[:500]
