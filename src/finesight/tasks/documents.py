"""Documents extracted as JSON: finding it in an answer, its fields against the right ones, its schema."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from finesight.errors import EvaluationError

_FENCE = "```"
_TRIES = 8  # places in a text where JSON may begin
MISSING = object()  # no JSON was found; null is JSON


def find_json(text: str) -> Any:
    """The JSON value of an answer: the whole text, the last fenced block, or what begins at one of the first brackets.

    Returns:
        The value, or :data:`MISSING`.
    """
    if (value := _loads(text)) is not MISSING:
        return value
    parts = text.split(_FENCE)
    for block in reversed(parts[1::2][-_TRIES:]):
        if (value := _loads(block.partition("\n")[2] if block[:1] not in "{[" else block)) is not MISSING:
            return value
    decoder, place = json.JSONDecoder(), -1
    for _ in range(_TRIES):
        starts = [found for bracket in "{[" if (found := text.find(bracket, place + 1)) >= 0]
        if not starts:
            break
        place = min(starts)
        try:
            return decoder.raw_decode(text, place)[0]
        except (ValueError, RecursionError):
            continue
    return MISSING


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return MISSING


def fields(value: Any) -> list[tuple[str, str]]:
    """(dotted name, text) of every leaf; entries of a list have the name of the list, so their order does not matter.

    As `flatten` of Donut's evaluation has it. A leaf that is null or empty is no field.
    """
    found: list[tuple[str, str]] = []
    pending: list[tuple[str, Any]] = [("", value)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, Mapping):
            pending += [(f"{name}.{key}" if name else str(key), entry) for key, entry in value.items()]
        elif isinstance(value, (list, tuple)):
            pending += [(name, entry) for entry in value]
        elif value is not None and (text := _leaf(value)):
            found.append((name, text))
    return found


def _leaf(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)  # 12.0 and 12 are one number in JSON
    return str(value).strip()


def field_f1(answer: str, expected: Any) -> float:
    """F1 of the fields of one document: a field is right if its dotted name and its text are.

    F1 = TP / (TP + (FP + FN) / 2). Names and texts are compared without regard to letter case and runs of space; numbers
    and their texts are one (`12` and `"12"`). No JSON in the answer: 0. Both without fields: 1.
    """
    return _f1(answer, expected, lambda text: " ".join(text.casefold().split()))


def field_f1_donut(answer: str, expected: Any) -> float:
    """The same with texts compared as they are, surrounding space aside: `cal_f1` of Donut (Kim et al. 2022), of one document.

    Donut sums TP, FP and FN over all documents before it divides; the mean of this score over documents is not quite that.
    """
    return _f1(answer, expected, str)


def _f1(answer: str, expected: Any, normal: Any) -> float:
    given = find_json(answer)
    if given is MISSING:
        return 0.0
    left, right = (Counter((normal(name), normal(text)) for name, text in fields(value)) for value in (given, expected))
    total = left.total() + right.total()
    return 2 * (left & right).total() / total if total else 1.0


def is_json(answer: str) -> float:
    """1 if the whole answer is JSON, a fenced block around it aside."""
    text = answer.strip()
    if text.startswith(_FENCE) and text.endswith(_FENCE) and text.count(_FENCE) == 2:
        text = text[len(_FENCE) : -len(_FENCE)].removeprefix("json")
    return float(_loads(text) is not MISSING)


def schema_validator(schema: Any) -> Any:
    """The validator of the library jsonschema for this schema.

    Raises:
        EvaluationError: the library is not installed, or the schema is none.
    """
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
    except ImportError:
        raise EvaluationError("Grader json_schema needs the library jsonschema: pip install 'finesight[graders]'.") from None
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise EvaluationError(f"This is no JSON schema: {error.message} at {error.json_path}. Mend it.") from None
    # A registry of its own: the library's default one would fetch what a schema refers to.
    return kind(schema, registry=Registry())


def fits_schema(answer: str, schema: Any) -> float:
    """1 if the answer's JSON fits a JSON schema (draft 2020-12 unless `$schema` says otherwise). Nothing is fetched.

    Raises:
        EvaluationError: the library jsonschema is not installed, or the schema is none.
    """
    validator = schema_validator(schema)
    from referencing.exceptions import Unresolvable

    value = find_json(answer)
    try:
        return float(value is not MISSING and validator.is_valid(value))
    except Unresolvable as error:
        raise EvaluationError(
            f"The JSON schema refers to {error.ref!r}, which it does not hold; nothing is fetched. Put it under $defs."
        ) from None
    except RecursionError:  # an answer nested deeper than the library can follow
        return 0.0
