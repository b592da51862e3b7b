"""Bytes of weights, adapters and optimizer state: worked by hand, and counted on real models, matrices and optimizers."""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from bench import models

from finesight.families import FAMILIES, QWEN3_VL_MOE
from finesight.models.adapters import apply_tuning
from finesight.models.parameters import is_adapter
from finesight.planner.catalogue import CATALOGUE, find_shape
from finesight.planner.shapes import Parameter, parameters, shape_of
from finesight.planner.weights import (
    _adapter_of,
    _bytes_in,
    _state_bytes,
    largest_dequantised_bytes,
    stored_bytes,
    trainables,
    training_bytes,
    weight_bytes,
)
from finesight.recipe import ModelSettings, Recipe, TuningSettings
from finesight.recipe_files import load_recipe
from tiny import FAMILIES as TINY
from tiny import tiny_model

EIGHT = CATALOGUE["Qwen3-VL-8B"]
SCOPES = [
    TuningSettings(),
    TuningSettings(finetune_mlp_modules=False, r=8),
    TuningSettings(finetune_vision_layers=True, finetune_merger=True),
    TuningSettings(finetune_language_layers=False, finetune_merger=True),
    TuningSettings(bias="all", finetune_vision_layers=True),
    TuningSettings(bias="lora_only", finetune_merger=True),
    TuningSettings(method="full"),
    TuningSettings(method="full", finetune_vision_layers=True, finetune_merger=True, finetune_attention_modules=False),
]


def settings(**values: Any) -> ModelSettings:
    return ModelSettings(name_or_path="x", **values)


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, ["model.name_or_path=x", *overrides])


class TestWeights:
    def test_bfloat16_by_hand(self) -> None:
        found = weight_bytes(EIGHT, settings(), "bfloat16")
        assert sum(found.values()) == 2 * 8_767_123_696  # 16.33 GiB
        assert found["lm_head"] == 2 * 151_936 * 4096

    def test_nf4_by_hand(self) -> None:
        """One MLP matrix of 8B, 12288 × 4096 = 50,331,648 numbers: half a byte each; a byte for each of 786,432 blocks of 64;
        4 bytes for each of 3,072 blocks of 256 of those; a code of 256 float32 and an offset."""
        by_hand = 25_165_824 + 786_432 + 4 * 3_072 + 1_028
        assert _bytes_in("4bit", (12288, 4096), 2) == by_hand == 25_965_572
        found = weight_bytes(EIGHT, settings(load_in_4bit=True), "bfloat16")
        # All 6,945,767,424 numbers of the matrices, and 309,248... of norms in bf16.
        matrices = 6_945_767_424
        assert found["language_model"] == matrices // 2 + matrices // 64 + 4 * matrices // 64 // 256 + 36 * 7 * 1028 + 2 * (
            36 * 2 * 4224 + 4096
        )
        assert found["embeddings"] == 2 * 151_936 * 4096
        assert found["tower"] == weight_bytes(EIGHT, settings(), "bfloat16")["tower"]

    def test_everything_small(self) -> None:
        found = weight_bytes(EIGHT, settings(load_in_4bit=True, quantize_vocabulary=True, quantize_tower=True), "bfloat16")
        assert found["embeddings"] == found["lm_head"] == 151_936 * 4096 + 4 * 151_936
        assert found["tower"] < 0.3 * weight_bytes(EIGHT, settings(), "bfloat16")["tower"]

    @pytest.mark.parametrize("form", ["fp8", "8bit"])
    def test_a_byte_and_scales_of_rows(self, form: str) -> None:
        assert _bytes_in(form, (1024, 4096), 2) == 1024 * 4096 + 4 * 1024

    def test_nf4_is_what_bitsandbytes_stores(self) -> None:
        weight = torch.randn(192, 320)
        packed, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4", blocksize=64)
        stored = [packed, state.absmax, state.state2.absmax, state.state2.code, state.offset]
        assert _bytes_in("4bit", (192, 320), 2) == sum(tensor.numel() * tensor.element_size() for tensor in stored)

    def test_experts(self) -> None:
        shape = CATALOGUE["Qwen3-VL-30B-A3B"]
        stack = next(p for p in parameters(shape) if p.name.endswith("gate_up_proj"))
        assert stack.shape == (128, 1536, 2048)
        # Dequantised: 128 × 1536 × 2048 numbers in bf16, and the float32 scales of their blocks.
        assert largest_dequantised_bytes(shape, settings(load_in_4bit=True), "bfloat16") == 2 * stack.numel + stack.numel // 16
        assert stored_bytes(stack, settings(load_in_8bit=True), "bfloat16") == 2 * stack.total  # experts are kept smaller in 4 bits only
        assert stored_bytes(stack, settings(load_in_4bit=True), "bfloat16") < 0.27 * 2 * stack.total


class TestTrainables:
    def test_adapters_by_hand(self) -> None:
        """r (I + O) of each projection, r=16: q and o 2 × 16 × 8192, k and v 2 × 16 × 5120, three of 16 × 16384, in 36 layers."""
        found = trainables(EIGHT, TuningSettings(), "bfloat16")
        assert sum(tensor.total for tensor in found) == 36 * 16 * (2 * 8192 + 2 * 5120 + 3 * 16384) == 43_646_976
        assert all(tensor.width == 4 for tensor in found)

    @pytest.mark.parametrize("tuning", SCOPES, ids=str)
    @pytest.mark.parametrize("family", TINY)
    def test_are_those_of_the_real_model(self, family: str, tuning: TuningSettings) -> None:
        model = tiny_model(family)
        shape = shape_of(model.config.to_dict(), name=family)
        real = apply_tuning(model, tuning, FAMILIES[family], 0)
        expected = sorted((is_adapter(name), parameter.numel()) for name, parameter in real.named_parameters() if parameter.requires_grad)
        found = trainables(shape, tuning, "float32")
        assert sorted((tensor.adapter, tensor.numel) for tensor in found for _ in range(tensor.count)) == expected

    def test_published_dimensions(self) -> None:
        name = "qwen2.5-vl-7b"
        model = apply_tuning(models.outline(name), TuningSettings(finetune_vision_layers=True), FAMILIES["qwen2_5_vl"], 0)
        expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
        shape = find_shape("Qwen/Qwen2.5-VL-7B-Instruct")
        assert sum(t.total for t in trainables(shape, TuningSettings(finetune_vision_layers=True), "bfloat16")) == expected

    def test_experts_get_a_pair_each(self) -> None:
        stack = Parameter("mlp.experts.down_proj", "language_model", (128, 2048, 768), 48, "experts")
        assert sum(tensor.numel for tensor in _adapter_of(stack, 4)) == 128 * 4 * (2048 + 768)
        shape = CATALOGUE["Qwen3-VL-30B-A3B"]
        assert shape.family is QWEN3_VL_MOE
        with_experts, without = (
            sum(t.total for t in trainables(shape, TuningSettings(finetune_experts=experts), "bfloat16")) for experts in (True, False)
        )
        assert with_experts - without == 48 * 128 * 16 * ((2048 + 1536) + (768 + 2048))


class TestOptimizer:
    def test_adam_by_hand(self) -> None:
        found = training_bytes(EIGHT, recipe(), "bfloat16")
        assert found.adapters == found.gradients == 4 * 43_646_976
        assert found.state == 8 * 43_646_976
        assert found.masters == found.collected == 0

    def test_full_tuning_by_hand(self) -> None:
        numbers = 6_946_075_648 + 2 * 151_936 * 4096  # language model, embedding, lm_head
        masters = training_bytes(EIGHT, recipe("tuning.method=full"), "bfloat16")
        assert (masters.masters, masters.state, masters.gradients, masters.collected) == (
            4 * numbers,
            8 * numbers,
            2 * numbers,
            4 * numbers,
        )
        rounding = training_bytes(EIGHT, recipe("tuning.method=full", "tuning.bf16_updates=stochastic_rounding"), "bfloat16")
        assert (rounding.masters, rounding.gradients) == (0, 2 * numbers)
        # The vocabulary matrix is brought to float32 with its gradient; it is rounded slice by slice.
        assert rounding.step == 2 * 4 * 151_936 * 4096

    @pytest.mark.parametrize("numbers", [64, 4095, 4096, 5000, 100_001])
    def test_8_bit_state_is_what_bitsandbytes_keeps(self, numbers: int) -> None:
        weight = torch.nn.Parameter(torch.randn(numbers))
        weight.grad = torch.randn(numbers)
        optimizer = bitsandbytes.optim.AdamW8bit([weight])
        optimizer.step()
        state = optimizer.state[weight]
        kept = [state[name] for name in ("state1", "state2", "absmax1", "absmax2") if name in state]
        tensor = trainables(EIGHT, TuningSettings(), "bfloat16")[0]
        planned = _state_bytes(type(tensor)("x", "language_model", (numbers,), 1, 4), "adamw_8bit")
        assert planned == sum(t.numel() * t.element_size() for t in kept)

    def test_paged_state_leaves_its_scales(self) -> None:
        tensor = trainables(EIGHT, TuningSettings(method="full"), "bfloat16")[0]
        assert _state_bytes(tensor, "paged_adamw_8bit") == 8 * math.ceil(tensor.numel / 256)

    def test_muon_keeps_one_moment_of_matrices(self) -> None:
        found = training_bytes(EIGHT, recipe("tuning.method=full", "training.optim=muon"), "bfloat16")
        adam = 2 * 151_936 * 4096 + 36 * 2 * 4224 + 4096  # vocabulary and norms
        assert found.state == 4 * 6_945_767_424 + 8 * adam


def test_class_names_are_those_of_transformers() -> None:
    assert all(hasattr(transformers, shape.family.model_class) for shape in CATALOGUE.values())
