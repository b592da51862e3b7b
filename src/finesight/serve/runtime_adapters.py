"""Adapters that come and go while the server runs, in vLLM's spelling: `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`.

Closed unless the server's settings name folders that adapters may come from.
"""

# No `from __future__ import annotations`: FastAPI reads annotations.

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from finesight.errors import FinesightError
from finesight.serve.errors import ApiError
from finesight.serve.service import Service


class LoadAdapter(BaseModel):
    """A request for an adapter to be loaded."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1)


class UnloadAdapter(BaseModel):
    """A request for an adapter to be forgotten."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str = Field(min_length=1, max_length=256)


def add_routes(app: Any, service: Service) -> None:
    """Opens both paths of a FastAPI application, if the service's settings allow any folder."""
    if not service.settings.adapter_dirs:
        return
    from fastapi.responses import PlainTextResponse

    changing = asyncio.Lock()  # one after the other, so that no name is taken twice

    async def change(action: Any) -> None:
        if service.closing or not service.worker.alive:
            raise ApiError(503, "The server is shutting down.", code="shutting_down")
        try:  # shielded: what a client no longer waits for is carried out all the same
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(service.worker.change(action))), service.settings.timeout_s)
        except TimeoutError:
            raise ApiError(408, f"The answers under way did not end within {service.settings.timeout_s:g} s.", code="timeout") from None
        except FinesightError as error:
            raise ApiError(400, str(error), code="invalid_adapter", param="lora_path") from None

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(request: LoadAdapter) -> PlainTextResponse:
        async with changing:
            if request.lora_name in service.shelf.models:
                raise ApiError(400, f"There is a model {request.lora_name} already; unload it first.", code="name_taken", param="lora_name")
            folder = allowed_folder(request.lora_path, service.settings.adapter_dirs)
            await change(partial(service.shelf.add_adapter, request.lora_name, folder))
        return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(request: UnloadAdapter) -> PlainTextResponse:
        async with changing:
            model = service.model(request.lora_name)
            if model.adapter is None:
                raise ApiError(400, f"{request.lora_name} is the base.", param="lora_name")
            del service.shelf.models[request.lora_name]  # at once: requests that come from now on are refused
            await change(partial(service.shelf.remove_adapter, request.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")


def allowed_folder(path: str, folders: tuple[Path, ...]) -> Path:
    """The folder of an adapter, in one of those that are open.

    Raises:
        ApiError: 404. It does not say what lies elsewhere on the server's disks.
    """
    try:
        found = Path(path).resolve()
        if any(found.is_relative_to(folder.resolve()) for folder in folders) and (found / "adapter_config.json").is_file():
            return found
    except (OSError, ValueError):
        pass  # said below
    raise ApiError(
        404, "No adapter found there, in the folders that this server loads adapters from.", code="adapter_not_found", param="lora_path"
    )
