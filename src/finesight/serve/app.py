"""The paths of the server, on FastAPI, and the process around them, on uvicorn. Both are of the extra `serve`."""

# No `from __future__ import annotations`: FastAPI reads annotations, and what they name is imported inside functions.

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from finesight import __version__
from finesight.errors import FinesightError, ModelError
from finesight.serve.errors import ApiError
from finesight.serve.form_errors import form_error
from finesight.serve.guard import Guard
from finesight.serve.models import ModelShelf
from finesight.serve.runtime_adapters import add_routes
from finesight.serve.schema import ChatRequest
from finesight.serve.service import Accepted, Service
from finesight.serve.settings import ServeSettings

_KEEP_ALIVE_S = 5


def create_app(service: Service) -> Any:
    """The FastAPI application of a service, without its guard.

    Raises:
        FinesightError: FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse, Response
    except ImportError as error:
        raise FinesightError(
            f"The server needs the extra `serve` ({error.name} is missing). Run `pip install 'finesight[serve]'`."
        ) from None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.closing = True
        await asyncio.to_thread(service.worker.stop)

    event_stream = _event_stream_of(service)
    app = FastAPI(title="Finesight", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)

    _answer_errors(app)

    @app.get("/health")
    async def health() -> JSONResponse:
        well = service.worker.alive and not service.closing
        return JSONResponse({"status": "ok" if well else "unavailable"}, status_code=200 if well else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        content, kind = service.metrics.text()
        return Response(content, headers={"Content-Type": kind})

    def model_object(name: str) -> dict[str, Any]:
        model = service.model(name)
        parent = None if model.adapter is None else service.shelf.base_name
        most = service.settings.max_length_tokens
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "finesight",
            "parent": parent,
            "max_model_len": most,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_object(name) for name in service.shelf.models]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return model_object(name)

    @app.post("/v1/chat/completions")
    async def chat_completions(chat: ChatRequest, request: Request) -> Response:
        accepted = await service.accept(chat)
        if chat.stream:
            return event_stream(accepted, request.is_disconnected)
        status = 500
        try:
            answer = await service.whole(accepted, request.is_disconnected)
            status = 200
        except ApiError as error:
            status = error.status
            raise
        finally:
            service.leave(accepted, status)
        return JSONResponse(answer)

    add_routes(app, service)
    return app


def _event_stream_of(service: Service) -> Any:
    """The response that streams an answer of a service, for (the accepted request, what tells that its client has gone)."""
    from fastapi.responses import StreamingResponse

    class EventStream(StreamingResponse):
        """Lets the service know when it is over, also where the client went before its first piece."""

        def __init__(self, accepted: Accepted, gone: Callable[[], Any]) -> None:
            super().__init__(service.pieces(accepted, gone), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            self._accepted = accepted

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            status = 499
            try:
                await super().__call__(scope, receive, send)
                status = 200 if self._accepted.job is not None and self._accepted.job.ended else 499
            finally:
                service.leave(self._accepted, status)

    return EventStream


def _answer_errors(app: Any) -> None:
    """Whatever goes wrong is answered with OpenAI's error object and its status."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.exceptions import StarletteHTTPException as HTTPException  # of which FastAPI's own is a kind
    from fastapi.responses import JSONResponse

    def refusal(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers())

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def on_wrong_form(request: Request, error: RequestValidationError) -> JSONResponse:
        return refusal(form_error(error.errors(), error.body))

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def on_wrong_path(request: Request, error: HTTPException) -> JSONResponse:
        return refusal(ApiError(error.status_code, f"There is no {request.method} {request.url.path[:100]} here.", code="unknown_url"))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        return refusal(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def on_failure(request: Request, error: Exception) -> JSONResponse:
        return refusal(ApiError(500, "The server failed.", code="internal_error"))


def serve(shelf: ModelShelf, settings: ServeSettings, on_ready: Callable[[str], None] = lambda address: None) -> None:
    """Serves until SIGINT or SIGTERM; then takes no more requests and answers those that it holds.

    A second signal ends it at once.

    Args:
        on_ready: is told the address once it listens.

    Raises:
        FinesightError: the extra `serve` is not installed, or the address cannot be listened on.
    """
    asyncio.run(serve_async(shelf, settings, on_ready))


async def serve_async(shelf: ModelShelf, settings: ServeSettings, on_ready: Callable[[str], None] = lambda address: None) -> None:
    """As :func:`serve`, within a running event loop."""
    service = Service(shelf, settings)
    app = create_app(service)
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            service.closing = True  # what still comes on open connections is refused
            super().handle_exit(sig, frame)

    listener = _listen(settings)
    config = uvicorn.Config(
        Guard(app, settings),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.timeout_s) + 1,
    )
    host, port = listener.getsockname()[:2]
    on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    await Server(config).serve(sockets=[listener])


def check_address(settings: ServeSettings) -> None:
    """Tells before anything is loaded that an address is taken.

    Raises:
        ModelError: it cannot be listened on.
    """
    _listen(settings).close()


def _listen(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise ModelError(f"The address {settings.host}:{settings.port} cannot be listened on: {error.strerror or error}.") from None
    return listener
