"""Which matrices a scheme reaches, and models exchanged in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from finesight.errors import ModelError
from finesight.families import FAMILIES as TABLE
from finesight.models.adapters import apply_tuning
from finesight.models.experts import hold_in_4bit
from finesight.models.features import tower_fingerprint
from finesight.models.float8 import Float8Linear
from finesight.models.packed import PackedModel
from finesight.models.parameters import count_parameters
from finesight.models.quantize import Precision, Scheme, dequantize, quantization_notes, quantize
from finesight.models.quantized_linear import FourBitLinear, Int8Linear
from finesight.models.quantized_vocabulary import Int8Embedding, Int8Head
from finesight.recipe import ModelSettings, TuningSettings
from parity.reference import Builder, packed_loss
from parity.test_packed_parity import mixed
from tiny import FAMILIES, tiny_config, tiny_model

KINDS = {"4bit": FourBitLinear, "8bit": Int8Linear, "fp8": Float8Linear}


def tied_model() -> nn.Module:
    model = tiny_model("qwen3_vl")
    config = copy.deepcopy(tiny_config("qwen3_vl"))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    tied = type(model)(config)
    tied.load_state_dict(model.state_dict(), strict=False)
    tied.tie_weights()
    assert tied.lm_head.weight is tied.model.language_model.embed_tokens.weight
    return tied.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", list(KINDS))
def test_which_matrices(family: str, precision: Precision) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    linear = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    language = {n for n in linear if ".language_model.layers." in n and n.endswith("_proj")}
    tower = {n for n in linear if ".visual." in n}
    assert len(language) == (12 if TABLE[family].moe else 21) and len(tower) >= 14
    router = {n for n, p in model.named_parameters() if ".mlp.gate.weight" in n or ".experts." in n}
    assert quantize(model, Scheme(precision)) == len(language)
    assert {n for n, m in model.named_modules() if isinstance(m, KINDS[precision])} == language
    assert type(model.lm_head) is nn.Linear and model.dtype == torch.bfloat16 and not model.training
    assert quantize(model, Scheme(None, vocabulary=True, tower=precision)) == len(tower) + 2
    assert {n for n, m in model.named_modules() if type(m) is KINDS[precision]} == language | tower
    assert type(model.lm_head) is Int8Head and type(model.model.language_model.embed_tokens) is Int8Embedding
    assert all(model.get_parameter(n).dtype == torch.bfloat16 for n in router)
    assert dequantize(model) == len(language | tower) + 2
    assert {n for n, m in model.named_modules() if type(m) is nn.Linear} == linear


def test_sides_that_float8_does_not_take() -> None:
    """The MLP of Qwen2.5-VL's tower is 3,420 wide: 8-bit integers there, which take as little."""
    model = tiny_model("qwen2_5_vl")
    model.model.visual.blocks[0].mlp.up_proj = nn.Linear(32, 57)
    quantize(model, Scheme("fp8", tower="fp8"))
    assert type(model.model.visual.blocks[0].mlp.up_proj) is Int8Linear
    assert type(model.model.visual.blocks[1].mlp.up_proj) is Float8Linear


def test_tied_vocabulary_stays_one() -> None:
    model = tied_model()
    builder = Builder(model)
    samples = mixed(builder)[:3]
    assert quantize(model, Scheme("8bit", vocabulary=True)) == 22
    embedding, head = model.model.language_model.embed_tokens, model.lm_head
    assert type(embedding) is Int8Embedding and type(head) is Int8Head
    for moved in (model, model.to(torch.bfloat16), model.to(torch.float32)):
        assert moved.lm_head.weight is moved.model.language_model.embed_tokens.weight and head.weight.dtype == torch.int8
    with torch.no_grad():
        loss = packed_loss(PackedModel(model), builder, samples, token_budget=256, share=True)
        dequantize(model)
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
        assert torch.allclose(loss, packed_loss(PackedModel(model), builder, samples, token_budget=256, share=True), rtol=1e-6)


def test_before_or_after_peft() -> None:
    losses = []
    for order in ("before", "after"):
        model = tiny_model("qwen3_vl")
        builder = Builder(model)
        samples = mixed(builder)[:2]
        scheme = Scheme("4bit", vocabulary=True, tower="4bit")
        if order == "before":
            quantize(model, scheme)
        model = apply_tuning(model, TuningSettings(r=4), TABLE["qwen3_vl"], seed=0)
        if order == "after":
            quantize(model, scheme)
        losses.append(packed_loss(PackedModel(model), builder, samples, token_budget=256, share=True))
    assert torch.equal(*losses)


def test_generate_over_everything_quantised() -> None:
    model = tiny_model("qwen3_vl")
    builder = Builder(model)
    inputs = builder.inputs(mixed(builder)[0])
    quantize(model, Scheme("4bit", vocabulary=True, tower="8bit"))
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    dequantize(model)
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=4, do_sample=False))


def test_experts_are_handed_over() -> None:
    model = tiny_model("qwen3_vl_moe")
    seen: list[tuple[str, torch.Size]] = []

    def halve(owner: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
        assert owner is model
        seen.append((name, value.shape))
        return value.half()

    quantize(model, Scheme("4bit", experts=halve))
    assert len(seen) == 6 and all(len(shape) == 3 for _, shape in seen)
    experts = model.model.language_model.layers[0].mlp.experts
    assert experts.gate_up_proj.dtype == experts.down_proj.dtype == torch.float16 and not experts.down_proj.requires_grad


def test_notes_say_what_is_in_which_precision() -> None:
    model = tiny_model("qwen3_vl_moe", dtype=torch.bfloat16)
    assert quantization_notes(model) == []
    quantize(model, Scheme("4bit", vocabulary=True))
    first, second = quantization_notes(model)
    for part in ("GiB 4-bit", "embeddings", "lm_head", "GiB 8-bit", "tower", "GiB bfloat16"):
        assert part in first
    assert "Experts" in second and "only model.load_in_4bit" in second and "stay in bfloat16" in second and "%" in second


def test_features_of_a_quantised_tower_are_told_apart() -> None:
    model = tiny_model("qwen3_vl")
    prints = [tower_fingerprint(model.model.visual)]
    for precision in ("8bit", "4bit"):
        other = copy.deepcopy(model)
        quantize(other, Scheme(None, tower=precision))
        prints.append(tower_fingerprint(other.model.visual))
    assert len(set(prints)) == 3


def test_of_settings() -> None:
    assert Scheme.of(ModelSettings(name_or_path="x")) is None
    settings = ModelSettings(name_or_path="x", load_in_4bit=True, quantize_tower=True)
    assert Scheme.of(settings) == Scheme("4bit", vocabulary=False, tower="4bit", experts=hold_in_4bit)


def test_nothing_to_quantise() -> None:
    with pytest.raises(ModelError, match="No matrix"):
        quantize(nn.Sequential(nn.Linear(16, 16)), Scheme("8bit"))


def test_parameters_are_counted_as_numbers_not_bytes() -> None:
    model = tiny_model("qwen3_vl")
    before = count_parameters(model)
    quantize(model, Scheme("4bit"))
    assert count_parameters(model).total == before.total
