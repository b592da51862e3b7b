"""Answers that follow a JSON schema: from bits of tokens to texts that are valid."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator

from finesight.data.conversation import Conversation, Part, RowSource, Turn
from finesight.errors import GrammarError
from finesight.models.load import load
from finesight.sampling.drawing import unpacked
from finesight.sampling.forking_sampler import ForkingSampler
from finesight.sampling.grammar import GrammarCompiler, read_schema
from finesight.sampling.rows import Rows, StepKind
from finesight.sampling.types import SamplingSettings
from tiny import FAMILIES, tiny_checkpoint, tiny_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["answer", "count"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("count", [1, 31, 32, 33, 320])
def test_bits_are_unpacked_from_the_lowest(count):
    wanted = np.random.default_rng(count).random((3, count)) < 0.5
    padded = np.zeros((3, -(-count // 32) * 32), dtype=bool)
    padded[:, :count] = wanted
    bits = np.packbits(padded, axis=1, bitorder="little").view(np.int32)
    assert unpacked(torch.from_numpy(bits), count).tolist() == wanted.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("truncates", [False, True])
def test_only_allowed_tokens_are_drawn(temperature, truncates):
    """And the log-probabilities are those of the distribution over them; rows without a grammar beside draw as they would alone."""
    count, vocabulary, forbidden = 200, 150, torch.tensor([3])
    logits = torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(0))
    uniform = np.random.default_rng(1).random((count, 1))
    bits = np.zeros(-(-vocabulary // 32), dtype=np.int32)
    bits[0], bits[4] = 0b1011, 1 << 5

    def drawn(grammars: range, **kind: bool) -> Rows:
        rows = Rows(count, 1, 1, vocabulary, torch.device("cpu"), forbidden)
        for row in range(count):
            rows.fill(row, np.arange(3), 3, [1], SamplingSettings(1, temperature, 0.8 if truncates else 1.0), uniform[row])
            rows.allow(row, bits if row in grammars else None)
        rows.draw_first(list(range(count)), logits.clone(), StepKind(truncates=truncates, alternatives=True, **kind))
        return rows

    rows, free = drawn(range(0, count, 2), constrained=True), drawn(range(0))
    allowed = [0, 1, 4 * 32 + 5]  # 3 is allowed by the grammar and forbidden otherwise
    assert set(rows.tokens[::2].tolist()) == set(allowed)
    expected = torch.full((count, vocabulary), -torch.inf)
    expected[:, allowed] = torch.log_softmax(logits[:, allowed], dim=-1)
    torch.testing.assert_close(rows.logprobs[::2], expected.gather(1, rows.tokens[:, None]).squeeze(1)[::2])
    torch.testing.assert_close(rows.top_logprobs[::2], expected.topk(rows.top).values[::2])
    for name in ("tokens", "logprobs", "top_tokens", "top_logprobs"):
        assert torch.equal(getattr(rows, name)[1::2], getattr(free, name)[1::2])


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_answer_in_the_schema(tmp_path, family):
    loaded = load(tiny_checkpoint(tmp_path / "tiny", family), device="cpu")
    grammar = GrammarCompiler(loaded.processor.tokenizer, loaded.base.config.text_config.vocab_size, [2, 0]).compile(SCHEMA)
    sampler = ForkingSampler(loaded.base, loaded.processor, grammar=grammar)
    asked = [Conversation((Turn("user", (Part("text", text=f"read {number}"),)),), RowSource("here", number)) for number in range(3)]
    texts = []
    for temperature in (0.0, 1.0):
        for completion in sampler.generate(asked, SamplingSettings(120, temperature, num_generations=2, batch_size=4)):
            assert completion.finish_reason == "stop" and completion.token_ids[-1] in (0, 2)
            Draft202012Validator(SCHEMA).validate(json.loads(completion.text))
            texts.append(completion.text)
    assert len(set(texts)) > 3


def test_a_wider_vocabulary_than_that_of_the_tokenizer():
    tokenizer = tiny_tokenizer()
    grammar = GrammarCompiler(tokenizer, len(tokenizer) + 50, [2]).compile(SCHEMA)
    allowed = unpacked(torch.from_numpy(grammar.begin().allowed())[None], len(tokenizer) + 50)[0]
    assert [tokenizer.decode([token]) for token in allowed.nonzero().flatten().tolist()] == ["{"]


def test_answers_begin_anew_each():
    grammar = GrammarCompiler(tiny_tokenizer(), 320, [2]).compile({"const": 12})
    first, second = grammar.begin(), grammar.begin()
    one, two = (tiny_tokenizer().convert_tokens_to_ids(digit) for digit in "12")
    first.take(one)
    before = second.allowed().copy()
    first.take(two)
    assert (second.allowed() == before).all() and (first.allowed() != before).any()
    with pytest.raises(GrammarError, match="cannot follow"):
        second.take(two)


def test_what_is_wrong_is_said(monkeypatch):
    compiler = GrammarCompiler(tiny_tokenizer(), 320, [2])
    with pytest.raises(GrammarError, match="not"):
        compiler.compile({"not": {"type": "string"}})
    with pytest.raises(GrammarError, match="No token can follow"):
        compiler.compile({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})
    with pytest.raises(GrammarError, match=r"a\.json is not JSON"):
        read_schema("{", "a.json")
    with pytest.raises(GrammarError, match="holds no JSON object"):
        read_schema("[1]", "a.json")
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(GrammarError, match=r"finesight\[schema\]"):
        GrammarCompiler(tiny_tokenizer(), 320, [2])
