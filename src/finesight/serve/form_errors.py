"""What is said of a request whose form is wrong: pydantic's errors in a client's words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finesight.serve.errors import ApiError
from finesight.serve.schema import field_names


def form_error(problems: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """The error to answer with, 400.

    Args:
        problems: of pydantic, one at least.
        body: the request that they are about.
    """
    problem = max(problems, key=lambda each: _meant(each, body))
    if problem["type"] == "json_invalid":
        fault = problem.get("ctx", {}).get("error", problem["msg"])
        return ApiError(400, f"The body is not JSON: {fault} at character {problem['loc'][-1]}.", code="invalid_form")
    path = _path(problem, body)
    where = written_place(path)
    said = problem["msg"]
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(path[-1]), field_names(nested=len(path) > 1), n=1) if path else []
        said = f"This server knows no such field; {f'did you mean {near[0]}?' if near else 'leave it out.'}"
    return ApiError(400, f"{where or 'body'}: {said}", code="invalid_form", param=where or None)


def written_place(path: Iterable[str | int]) -> str:
    """A place in a request as programs write it: `messages[0].content[1].text`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def _meant(problem: Mapping[str, Any], body: Any) -> tuple[int, bool]:
    """Of a union the member that was meant: it goes deepest, and then it is of the right type."""
    return len(_path(problem, body)), not problem["type"].endswith("_type")


def _path(problem: Mapping[str, Any], body: Any) -> list[str | int]:
    return field_path(problem["loc"][1:], body, missing=problem["type"] == "missing")


def field_path(location: Sequence[str | int], body: Any, *, missing: bool) -> list[str | int]:
    """A field of a request as its client knows it: pydantic's location without the names of a union's members.

    Args:
        location: steps from the body down, such as `("response_format", "json_schema", "json_schema", "name")`.
        body: the request, which knows which of them are its own.
        missing: the last step is a field that the body lacks.
    """
    found: list[str | int] = []
    for place, step in enumerate(location):
        if step in body if isinstance(body, dict) else isinstance(body, list) and isinstance(step, int) and step < len(body):
            body = body[step]
        elif not (missing and place == len(location) - 1):
            continue
        found.append(step)
    return found
