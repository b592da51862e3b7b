"""Answers in a schema where steps are captured: what a row may draw changes between replays of one graph."""

from __future__ import annotations

import json

import pytest
import torch

from finesight.data.conversation import Conversation, Part, RowSource, Turn
from finesight.models.load import load
from finesight.sampling.forking_sampler import ForkingSampler
from finesight.sampling.types import SamplingSettings
from tiny import tiny_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["answer", "count"],
    "additionalProperties": False,
}


def test_captured_steps_follow_the_schema(tmp_path) -> None:
    pytest.importorskip("llguidance")
    from finesight.sampling.grammar import GrammarCompiler

    loaded = load(tiny_checkpoint(tmp_path / "tiny", "qwen3_vl"), device="cuda")
    compiler = GrammarCompiler(loaded.processor.tokenizer, loaded.base.config.text_config.vocab_size, [2, 0])
    sampler = ForkingSampler(loaded.base, loaded.processor, grammar=compiler.compile(SCHEMA))
    prompts = [Conversation((Turn("user", (Part("text", text=f"read {number}"),)),), RowSource("here", number)) for number in range(6)]
    texts = set()
    for completion in sampler.generate(prompts, SamplingSettings(120, 1.0, num_generations=3, batch_size=8)):
        assert completion.finish_reason == "stop"
        answer = json.loads(completion.text)
        assert answer["answer"] in ("yes", "no") and 0 <= answer["count"] <= 99 and len(answer) == 2
        texts.add(completion.text)
    assert len(texts) > 6
    free = ForkingSampler(loaded.base, loaded.processor).generate(prompts[:1], SamplingSettings(8, 0.0))
    assert free[0].token_ids  # a graph without a grammar beside
