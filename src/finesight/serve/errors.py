"""Errors as OpenAI's clients understand them: a status code and an object that says what was wrong."""

from __future__ import annotations

from typing import Any

from finesight.errors import FinesightError


class ApiError(FinesightError):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what was wrong, and what to change.
        code: for programs; param: the field of the request that it is about.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        # JSON can hold halves of surrogate pairs, which no text can.
        super().__init__(message.encode(errors="replace").decode())
        self.status, self.code = status, code
        self.param = None if param is None else param.encode(errors="replace").decode()

    @property
    def kind(self) -> str:
        """OpenAI's word for the class of error."""
        kinds = {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """That go with it."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}
