"""Requests drawn from the server's own OpenAPI schema: right ones, nearly right ones and wrong ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hypothesis import strategies as st

_CHAT = "/v1/chat/completions"


def _seldom(one_in: int, this: st.SearchStrategy[Any], that: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """This one time in so many. Hypothesis likes the ends of a range, so the number that decides lies in its middle."""
    return st.integers(0, one_in).flatmap(lambda number: this if number == one_in // 2 else that)


def texts(min_size: int, max_size: int) -> st.SearchStrategy[str]:
    """Of Unicode, and now and then with half of a surrogate pair, which JSON can hold and Unicode cannot."""
    broken = st.sampled_from(["\ud800", "a\udfff", "\udc80b"])
    return _seldom(60, broken, st.text(min_size=min_size, max_size=max_size))


# Values that stand where others are expected.
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | texts(0, 20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_KEYWORDS = st.sampled_from(
    ["type", "properties", "items", "required", "enum", "const", "anyOf", "oneOf", "allOf", "not", "$ref", "$defs", "pattern", "format",
     "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "additionalProperties", "x-guidance", "uniqueItems", "$id"]
)  # fmt: skip
_PLAIN_SCHEMAS = st.sampled_from(
    [
        {"type": "string"}, {"type": "integer"}, {"type": "number", "minimum": 0, "maximum": 1}, {"type": "boolean"}, {"type": "null"}, {"enum": ["a", 1]},
        {"type": "string", "pattern": "^[a-z]{2,5}$"}, {"type": "string", "format": "date-time"}, {"$ref": "#"}, {"$ref": "#/$defs/a"}, True, False, {},
        {"$ref": "file:///etc/passwd"}, {"type": "string", "pattern": "(a|aa)*b{1,3000}"}, {"type": "array", "minItems": 10**6, "items": {}},
    ]
)  # fmt: skip
JSON_SCHEMAS = st.recursive(
    _PLAIN_SCHEMAS,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"type": st.just("array"), "items": inner, "maxItems": st.integers(0, 3)}),
        st.builds(
            lambda properties: {"type": "object", "properties": properties, "required": sorted(properties), "additionalProperties": False},
            st.dictionaries(st.text(max_size=4), inner, max_size=3),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, max_size=3)),
        st.dictionaries(_KEYWORDS, inner | ANY_JSON, max_size=3),
    ),
    max_leaves=6,
)


@dataclass(frozen=True)
class Bodies:
    """Strategies for the bodies of an OpenAPI document.

    Args:
        models: names to ask for; urls: what images and videos are named by; folders: what adapters are loaded from.
        wrong: every so many values another one stands in the place of one that the schema asks for.
    """

    document: dict[str, Any]
    models: Sequence[str]
    urls: st.SearchStrategy[str]
    folders: st.SearchStrategy[str]
    wrong: int = 150
    _known: dict[str, st.SearchStrategy[Any]] = field(default_factory=dict)

    def of(self, path: str) -> st.SearchStrategy[Any]:
        """Bodies of POST requests to a path."""
        content = self.document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        return self._value(content["schema"])

    def _value(self, schema: dict[str, Any], name: str = "") -> st.SearchStrategy[Any]:
        special = self._special(name)
        right = self._right(schema) if special is None else special
        return _seldom(self.wrong, ANY_JSON, right)

    def _special(self, name: str) -> st.SearchStrategy[Any] | None:
        """What a schema cannot say."""
        special = {
            "model": st.sampled_from(list(self.models)),
            "url": self.urls,
            "video": st.lists(self.urls, max_size=3),
            "max_tokens": st.none() | st.integers(-1, 12),
            "max_completion_tokens": st.none() | st.integers(0, 12),
            "n": st.none() | st.integers(0, 4),
            "schema": JSON_SCHEMAS,
            "text": texts(1, 30),
            "lora_name": _seldom(12, texts(1, 8), st.sampled_from(["one", "two", self.models[0]])),
            "lora_path": self.folders,
            "role": st.sampled_from(["user", "user", "user", "assistant", "system"]),
            "seed": st.none() | st.integers(-(2**63), 2**63),
            "presence_penalty": st.sampled_from([0, 0.0, None, 0.5]),
            "frequency_penalty": st.sampled_from([0, 0.0, None, 0.5]),
            "logit_bias": st.sampled_from([{}, None, {"1": 2.0}]),
            "tools": st.sampled_from([[], None, [{}]]),
            "tool_choice": st.sampled_from(["none", "auto", None, "required"]),
            "functions": st.sampled_from([[], None, [{}]]),
            "function_call": st.sampled_from(["none", "auto", None]),
            "modalities": st.sampled_from([["text"], None, ["audio"]]),
            "logprobs": st.sampled_from([True, True, None, False]),
            "stream": st.sampled_from([True, True, None, False]),
        }
        if name == "messages":
            message = self._right({"$ref": "#/components/schemas/Message"})
            return _seldom(15, st.lists(message, max_size=3), self._conversation())
        return special.get(name)

    def _conversation(self) -> st.SearchStrategy[list[Any]]:
        """Turns in an order that can be answered."""
        text = texts(0, 20).map(lambda rest: f"read{rest}")
        parts = self._right({"$ref": "#/components/schemas/Message"}).map(
            lambda m: m["content"] if isinstance(m.get("content"), list) else []
        )
        asked = st.one_of(text, st.builds(lambda parts, text: [*parts, {"type": "text", "text": text}], parts, text))
        user = st.builds(lambda content: {"role": "user", "content": content}, asked)
        answered = st.builds(lambda user, text: [user, {"role": "assistant", "content": text}], user, text)
        system = st.sampled_from([[], [], [{"role": "system", "content": "be brief"}]])
        return st.builds(
            lambda *turns: [turn for some in turns for turn in some], system, st.just([]) | answered, user.map(lambda turn: [turn])
        )

    def _right(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            if name not in self._known:
                self._known[name] = st.deferred(lambda: self._right(self.document["components"]["schemas"][name]))
            return self._known[name]
        for union in ("anyOf", "oneOf"):
            if union in schema:
                return st.one_of([self._value(option) for option in schema[union]])
        if "const" in schema or "enum" in schema:
            return st.sampled_from(schema.get("enum", [schema.get("const")]))
        kind = schema.get("type")
        if kind == "object" and "properties" in schema:
            return self._object(schema)
        if kind == "array":
            most = min(schema.get("maxItems", 3) + 1, 4)
            return st.lists(self._value(schema.get("items", {})), min_size=min(schema.get("minItems", 0), 1), max_size=most)
        low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum", schema.get("exclusiveMaximum"))
        plain: dict[Any, st.SearchStrategy[Any]] = {
            "string": texts(0, min(schema.get("maxLength", 12), 12) + 1),
            "integer": _within(st.integers, low, high, 1),
            "number": _within(partial(st.floats, allow_nan=False, allow_infinity=False), low, high, 0.5),
            "boolean": st.booleans(),
            "null": st.none(),
            "object": st.dictionaries(st.text(max_size=5), self._right(schema["additionalProperties"]), max_size=2)
            if isinstance(schema.get("additionalProperties"), dict)
            else ANY_JSON,
        }
        return plain.get(kind, ANY_JSON)

    def _object(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        """The required properties and a few of the others; now and then one too many, or one missing."""
        properties = {name: self._value(value, name) for name, value in schema["properties"].items()}
        if schema.get("title") == "Message":  # what clients send back with an answer is null or empty
            properties |= {name: st.sampled_from([None, []]) for name in ("annotations", "tool_calls")} | {"function_call": st.none()}
        required = [name for name in properties if name in schema.get("required", ())]
        others = [name for name in properties if name not in required]
        chosen = st.lists(st.sampled_from(others), max_size=4, unique=True).map(_with_partners) if others else st.just([])

        def built(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
            return st.fixed_dictionaries({name: properties[name] for name in (*required, *names)})

        right = chosen.flatmap(built)
        extra = st.builds(lambda body, name, value: {**body, name: value}, right, st.text(max_size=8), ANY_JSON)
        return _seldom(self.wrong, extra, right)


def _within(numbers: Any, low: float | None, high: float | None, beyond: float) -> st.SearchStrategy[Any]:
    """Numbers between bounds, now and then a little beyond them."""
    inside = numbers(low, high)
    outside = numbers(None if low is None else low - beyond, None if high is None else high + beyond)
    return _seldom(9, outside, inside)


def _with_partners(names: list[str]) -> list[str]:
    """Mostly with the fields that others are refused without; answers are kept short."""
    partners = {"top_logprobs": "logprobs", "stream_options": "stream", "seed": "max_tokens", "response_format": "max_tokens"}
    return [*names, *{partner for name, partner in partners.items() if name in names and partner not in names}]


@dataclass(frozen=True)
class Call:
    """One request as it is sent."""

    method: str
    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


_HEADERS = st.lists(
    st.tuples(
        st.sampled_from(["content-type", "accept", "authorization", "x-request-id", "origin", "cookie"]),
        st.sampled_from(
            ["application/json", "text/plain", "multipart/form-data; boundary=x", "Bearer x", "*/*", "http://evil.example", "\x7f", ""]
        ),
    ),
    max_size=2,
)


def calls(
    document: dict[str, Any], models: Sequence[str], urls: st.SearchStrategy[str], folders: st.SearchStrategy[str]
) -> st.SearchStrategy[Call]:
    """Mostly bodies of the schema, to the paths that take them; beside them broken bodies, other methods and other paths."""
    bodies = Bodies(document, models, urls, folders)
    posts = [path for path, methods in document["paths"].items() if "requestBody" in methods.get("post", {})]
    paths = [path.replace("{name}", "tiny") for path in document["paths"]]

    def sent(path: str) -> st.SearchStrategy[Call]:
        return st.builds(lambda body: Call("POST", path, json.dumps(body).encode()), bodies.of(path))

    right = _seldom(10, st.one_of([sent(path) for path in posts if path != _CHAT]), sent(_CHAT))
    cut = st.builds(lambda call, share: Call(call.method, call.path, call.body[: int(share * len(call.body))]), right, st.floats(0, 1))
    raw = st.builds(Call, st.just("POST"), st.sampled_from(posts), st.binary(max_size=60), _HEADERS.map(tuple))
    other = st.builds(
        Call,
        st.sampled_from(["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "POST"]),
        st.sampled_from(
            [*paths, "/", "/v1", "/v1/models/..%2f..%2fetc%2fpasswd", "/docs", "/openapi.json", "//etc/passwd", "/v1/models/%00"]
        ),
        st.binary(max_size=10),
        _HEADERS.map(tuple),
    )
    return _seldom(6, st.one_of(cut, raw, other), right)
