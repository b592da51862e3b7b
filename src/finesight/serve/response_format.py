"""`response_format` of a request -> the grammar that its answers follow."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from json import dumps
from typing import Any

from finesight.errors import GrammarError
from finesight.sampling.grammar import JSON_OBJECT, Grammar, GrammarCompiler
from finesight.serve.errors import ApiError
from finesight.serve.schema import JsonSchemaFormat, ResponseFormat, TextFormat

_MOST_SCHEMA_CHARACTERS = 2**16
_KEPT = 32  # grammars of the schemas used last: clients ask again and again with the same few


class ResponseGrammars:
    """Grammars for requests; from any thread.

    Args:
        make_compiler: called when the first grammar is asked for.
    """

    def __init__(self, make_compiler: Callable[[], GrammarCompiler]) -> None:
        self._make_compiler = make_compiler
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Grammar] = OrderedDict()

    def of(self, form: ResponseFormat | None) -> Grammar | None:
        """The grammar of a format; None for text.

        Raises:
            ApiError: 400, for a schema that answers cannot be held to, or without the library.
        """
        if form is None or isinstance(form, TextFormat):
            return None
        schema: Mapping[str, Any] = form.json_schema.definition if isinstance(form, JsonSchemaFormat) else JSON_OBJECT
        try:
            key = dumps(schema, ensure_ascii=False)  # as it stands: the order of properties is that of the answer
        except RecursionError:
            raise _refused("The JSON schema is nested too deeply") from None
        if len(key) > _MOST_SCHEMA_CHARACTERS:
            raise _refused(f"The JSON schema has {len(key):,} characters; {_MOST_SCHEMA_CHARACTERS:,} are taken")
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
            try:
                if self._compiler is None:
                    self._compiler = self._make_compiler()
            except GrammarError as error:
                raise ApiError(
                    400, f"response_format cannot be served. {error}", code="unsupported_parameter", param="response_format"
                ) from None
        try:
            grammar = self._compiler.compile(schema)
        except GrammarError as error:
            raise _refused(str(error)) from None
        with self._lock:
            self._kept[key] = grammar
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return grammar


def _refused(message: str) -> ApiError:
    return ApiError(400, f"{message.rstrip('.')}.", code="invalid_json_schema", param="response_format")
