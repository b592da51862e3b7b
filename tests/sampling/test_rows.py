"""Rows of a decoding step: which of them grow."""

from __future__ import annotations

import numpy as np
import torch
import transformers

from finesight.models.decoding import BLOCK_TOKENS, Decoder, KeyValuePool
from finesight.models.packed import PackedModel
from finesight.sampling.engine import answering
from finesight.sampling.rows import Rows, StepKind
from finesight.sampling.types import SamplingSettings
from tiny import tiny_config


def test_only_rows_in_use_grow_and_no_further_than_their_blocks():
    config = tiny_config("qwen3_vl")
    packed = PackedModel(transformers.Qwen3VLForConditionalGeneration(config))
    device = torch.device("cpu")
    decoder = Decoder(packed, KeyValuePool(config.text_config, 4, torch.float32, device))
    rows = Rows(3, 1, 8, config.text_config.vocab_size, device, torch.tensor([0]))

    def steps(count: int) -> list[int]:
        for _ in range(count):
            rows.step(decoder, 3, StepKind())
        return rows.lengths.tolist()

    with answering(packed):
        rows.fill(1, np.arange(5), 5, [1], SamplingSettings(), np.full(8, 0.5))
        assert steps(3) == [0, 8, 0]
        rows.clear(1)
        rows.fill(2, np.arange(BLOCK_TOKENS - 2), 40, [2], SamplingSettings(), np.full(8, 0.5))
        assert steps(4) == [0, 0, BLOCK_TOKENS - 1]
