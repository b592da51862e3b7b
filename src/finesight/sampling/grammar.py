"""Answers that follow a JSON schema: before each token, which ones can still lead to a text that is valid.

The grammars are llguidance's (extra `schema`): it turns a schema into a parser over bytes and tells, for the whole vocabulary, what
the parser takes next. What it cannot hold an answer to it refuses, so that no part of a schema is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from finesight.errors import GrammarError

# Between the parts of a JSON text: nothing, one space, or a new line with its indentation. Without a bound a model can go on writing
# spaces for ever, since they are always allowed.
_WHITESPACE = r" ?|\n {0,32}"
_MOST_LEXER_STATES = 50_000  # 1 to 2 kB each; llguidance's own bound would let one schema take half a gigabyte
_BITS = 32
_MISSING = "Answers in a JSON schema need the library llguidance: pip install 'finesight[schema]'."

JSON_OBJECT: Mapping[str, Any] = {"type": "object"}


class Constraint:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros((1, words), dtype=np.int32)

    def allowed(self) -> np.ndarray:
        """Tokens that may come next, a bit each: (ceil(V / 32),) int32, the lowest bit first. The next call writes over it.

        Raises:
            GrammarError: finding them out takes more than the library allows itself.
        """
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bits)
        if self._matcher.is_error() or not self._bits.any():
            raise GrammarError(f"No token can follow: {_first_line(self._matcher.get_error()) or 'nothing is valid here'}.")
        return self._bits[0]

    def take(self, token: int) -> None:
        """Goes on by a token that was drawn.

        Raises:
            GrammarError: it was not allowed.
        """
        if not self._matcher.consume_token(token):
            raise GrammarError(f"Token {token} cannot follow: {_first_line(self._matcher.get_error())}.")


class Grammar:
    """What texts are valid. Made by a :class:`GrammarCompiler`; may be used by several answers and from several threads."""

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher, self._words = matcher, words

    def begin(self) -> Constraint:
        """For one answer, from its first token on."""
        return Constraint(self._matcher.deep_copy(), self._words)


class GrammarCompiler:
    """Makes grammars over one vocabulary. Making it takes about a second with a vocabulary of 150,000 tokens.

    Args:
        tokenizer: a fast one of transformers.
        vocabulary: V, width of the model's logits, which may be more than the tokens that there are.
        stop_ids: tokens that end an answer; allowed where a text is whole.

    Raises:
        GrammarError: llguidance is not installed, or does not know such a tokenizer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, stop_ids: Collection[int]) -> None:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise GrammarError(_MISSING) from None
        try:
            self._tokenizer = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(stop_ids))
        except ValueError as error:
            raise GrammarError(f"The tokenizer cannot be used for answers in a JSON schema: {_first_line(str(error))}.") from None
        self._words = -(-vocabulary // _BITS)

    def compile(self, schema: Mapping[str, Any]) -> Grammar:
        """The grammar of a JSON schema (draft 2020-12).

        Raises:
            GrammarError: the schema is none, nothing is valid under it, or it says what answers cannot be held to (`not`,
                `uniqueItems`, addresses in `$ref`, …).
        """
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=_MOST_LEXER_STATES, verbose_errors=False)
        try:
            matcher = LLMatcher(self._tokenizer, _library_grammar(schema), log_level=0, limits=limits)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"The JSON schema cannot be used: {_first_line(str(error))}.") from None
        if matcher.is_error():
            raise GrammarError(_unusable(matcher.get_error()))
        made = Grammar(matcher, self._words)
        made.begin().allowed()  # a schema that nothing satisfies comes to light here
        return made


def check_schema(schema: Mapping[str, Any]) -> None:
    """Refuses early what :meth:`GrammarCompiler.compile` would, as far as no tokenizer is needed to see it.

    Raises:
        GrammarError: the schema says what answers cannot be held to, or llguidance is not installed.
    """
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise GrammarError(_MISSING) from None
    try:
        fault = LLMatcher.validate_grammar(_library_grammar(schema), None)
    except (ValueError, RecursionError) as error:
        fault = str(error)
    if fault:
        raise GrammarError(_unusable(fault))


def _unusable(fault: str) -> str:
    line = _first_line(fault)
    return (
        f"The JSON schema cannot be used: {line}{'; answers cannot be held to these, remove them' if 'Unimplemented keys' in line else ''}."
    )


def _library_grammar(schema: Mapping[str, Any]) -> str:
    """A schema as llguidance takes it. One can carry options of the library; these here go before them."""
    from llguidance import LLMatcher

    options: Any = {
        "item_separator": ",",
        "key_separator": ":",
        "whitespace_flexible": True,
        "whitespace_pattern": _WHITESPACE,
        "coerce_one_of": False,
        "lenient": False,
    }
    return LLMatcher.grammar_from_json_schema(dict(schema), overrides=options)


def read_schema(text: str, name: str) -> dict[str, Any]:
    """A schema from the text of a file.

    Args:
        name: of the file, for messages.

    Raises:
        GrammarError: it is no JSON object.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"{name} is not JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise GrammarError(f"{name} holds no JSON object; a schema is one, such as {json.dumps(dict(JSON_OBJECT))}.")
    return schema


def _first_line(message: str) -> str:
    """The library's message without the lines that point into its own texts."""
    return message.strip().partition("\n")[0].rstrip(".")
