"""Answers of random models that follow a schema all the same, asked for with the official client."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from serve.conftest import data_url
from serve.test_http import Listener

SCHEMAS: dict[str, dict[str, Any]] = {
    "invoice": {
        "type": "object",
        "properties": {
            "number": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            "year": {"type": "integer", "minimum": 1990, "maximum": 2026},
            "paid": {"type": "boolean"},
            "lines": {"type": "array", "items": {"enum": ["tea", "milk"]}, "minItems": 1, "maxItems": 2},
        },
        "required": ["number", "year", "paid", "lines"],
        "additionalProperties": False,
    },
    "nested": {
        "$defs": {"point": {"type": "object", "properties": {"x": {"enum": [0, 1]}}, "required": ["x"], "additionalProperties": False}},
        "type": "object",
        "properties": {"box": {"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]}, "date": {"type": "string", "format": "date"}},
        "required": ["box", "date"],
        "additionalProperties": False,
    },
    "choice": {"enum": ["yes", "no", 7]},
    "text": {"type": "string", "minLength": 2, "maxLength": 4},
}
HELLO: list[Any] = [{"role": "user", "content": "read the number"}]


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def form(name: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": SCHEMAS[name] if schema is None else schema, "strict": True}}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 1.5, "top_p": 0.9, "n": 3}, {"temperature": 1.0, "top_k": 1}], ids=str
)
def test_every_answer_is_valid(client, name, settings):
    found = client.chat.completions.create(
        model="charts", messages=HELLO, response_format=form(name), max_tokens=200, seed=4, extra_body=settings
    )
    assert len(found.choices) == settings.get("n", 1)
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        Draft202012Validator(SCHEMAS[name], format_checker=Draft202012Validator.FORMAT_CHECKER).validate(json.loads(choice.message.content))


def test_a_stream_is_the_whole_answer_in_pieces(client):
    picture = {"type": "image_url", "image_url": {"url": data_url()}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "what is it?"}]}]
    asked = dict(model="tiny", messages=messages, response_format=form("invoice"), seed=1, max_tokens=200, logprobs=True, top_logprobs=3)
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    Draft202012Validator(SCHEMAS["invoice"]).validate(json.loads(whole.choices[0].message.content))
    # Log-probabilities are those among what could follow: where one token alone could, it was certain.
    assert any(entry.logprob == 0 for entry in whole.choices[0].logprobs.content)
    assert all(entry.logprob > -9999 for entry in whole.choices[0].logprobs.content)


def test_models_of_pydantic(client):
    class Line(BaseModel):
        item: Literal["tea", "milk"]
        count: Literal[1, 2, 3]

    class Receipt(BaseModel):
        paid: bool
        line: Line | None

    parsed = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Receipt, max_tokens=100, seed=2)
    assert isinstance(parsed.choices[0].message.parsed, Receipt)


def test_any_object(client):
    """An object that ends is one; of one that is cut off there is the beginning."""
    ended = 0
    for seed in range(8):
        choice = client.chat.completions.create(
            model="tiny", messages=HELLO, response_format={"type": "json_object"}, max_tokens=60, seed=seed, temperature=2.0
        ).choices[0]
        assert choice.message.content.lstrip().startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
            ended += 1
    assert ended


def test_rows_with_and_without_a_schema_stand_side_by_side(client):
    def answer(number: int) -> str:
        asked: dict[str, Any] = {"response_format": form(list(SCHEMAS)[number % 4])} if number % 2 else {}
        return (
            client.chat.completions.create(model=("tiny", "charts")[number % 3 == 0], messages=HELLO, seed=number, max_tokens=30, **asked)
            .choices[0]
            .message.content
        )

    alone = [answer(number) for number in range(8)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(answer, range(8))) == alone
    plain = client.chat.completions.create(model="tiny", messages=HELLO, seed=2, max_tokens=30, response_format={"type": "text"})
    assert plain.choices[0].message.content == alone[2]


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"}, {"not": {"type": "string"}}, {"type": "array", "uniqueItems": True}, {"x-guidance": {"lenient": True}, "not": {}},
        {"type": "string", "pattern": "(("}, {"$ref": "#/$defs/none"}, {"$ref": "file:///etc/passwd"}, {"allOf": [{"type": "string"}, {"type": "null"}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, {"enum": []}, _nested(150), {"type": "object", "description": "x" * 70_000},
        {"type": "string", "format": "none"},
    ],
    ids=lambda schema: str(schema)[:40],
)  # fmt: skip
def test_schemas_that_answers_cannot_be_held_to(client, schema):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, response_format=form("a", schema), max_tokens=4)
    assert caught.value.param == "response_format" and caught.value.code == "invalid_json_schema" and "root:" not in str(caught.value)


def test_keys_that_nothing_can_be_held_to_are_to_be_removed(client):
    with pytest.raises(openai.BadRequestError, match=r"uniqueItems.*remove them"):
        client.chat.completions.create(
            model="tiny", messages=HELLO, response_format=form("a", {"type": "array", "uniqueItems": True}), max_tokens=4
        )


def test_a_schema_fetches_nothing(client):
    with Listener() as listener:
        for address in (f"http://127.0.0.1:{listener.port}/a.json", f"http://localhost:{listener.port}/#/x"):
            for schema in ({"$ref": address}, {"$id": address, "$ref": "a"}, {"$schema": address, "$ref": f"{address}#/a"}):
                with pytest.raises(openai.BadRequestError):
                    client.chat.completions.create(model="tiny", messages=HELLO, response_format=form("a", schema), max_tokens=4)
        assert listener.hits == 0


def test_without_the_library_the_extra_is_named(serving, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with serving() as server:
        own = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match=r"finesight\[schema\]") as caught:
            own.chat.completions.create(model="tiny", messages=HELLO, response_format={"type": "json_object"}, max_tokens=4)
        assert caught.value.param == "response_format" and caught.value.code == "unsupported_parameter"
        assert own.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2).choices


def test_an_answer_that_cannot_go_on_fails_alone(server, client, monkeypatch):
    """The library gives up within an answer where the schema asks too much of it."""
    from finesight.errors import GrammarError
    from finesight.sampling.grammar import Constraint

    take, taken = Constraint.take, []

    def give_up(self: Constraint, token: int) -> None:
        taken.append(token)
        if len(taken) == 5:
            raise GrammarError("No token can follow: too complex.")
        take(self, token)

    monkeypatch.setattr(Constraint, "take", give_up)
    with pytest.raises(openai.BadRequestError, match="too complex"):
        client.chat.completions.create(model="tiny", messages=HELLO, response_format=form("invoice"), max_tokens=100, n=2)
    assert server.service.held == 0
    assert client.chat.completions.create(model="tiny", messages=HELLO, response_format=form("choice"), max_tokens=30).choices
