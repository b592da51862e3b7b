"""What trains, how much of it, and whether it survives the disk."""

from __future__ import annotations

import json
import logging
import re

import peft
import pytest
import torch
import transformers

from finesight.data_settings import DataSettings
from finesight.errors import ModelError
from finesight.families import FAMILIES as TABLE
from finesight.models.adapter_files import adapter_weights
from finesight.models.adapters import (
    AdapterMetadata,
    apply_tuning,
    count_parameters,
    load_adapter,
    part_of,
    read_metadata,
    restore_data_settings,
    save_adapter,
    target_modules,
)
from finesight.recipe import TuningSettings
from tiny import FAMILIES, tiny_model

_IDS = dict(image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653)


def _qwen3_vl_8b():
    """The published dimensions, on the meta device: no memory, no weights."""
    text = dict(
        hidden_size=4096, num_hidden_layers=36, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        vocab_size=151936, rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
    )  # fmt: skip
    vision = dict(
        depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, patch_size=16, out_hidden_size=4096,
        deepstack_visual_indexes=[8, 16, 24], num_position_embeddings=2304,
    )  # fmt: skip
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **_IDS)
    with torch.device("meta"):
        return transformers.Qwen3VLForConditionalGeneration(config)


def _qwen2_5_vl_7b():
    text = dict(
        hidden_size=3584, num_hidden_layers=28, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )  # fmt: skip
    vision = dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, out_hidden_size=3584, window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
    )  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **_IDS)
    with torch.device("meta"):
        return transformers.Qwen2_5_VLForConditionalGeneration(config)


def test_known_count_of_a_lora_on_qwen3_vl_8b():
    model = apply_tuning(_qwen3_vl_8b(), TuningSettings(r=16), TABLE["qwen3_vl"], seed=0)
    counts = count_parameters(model)
    assert counts.trainable == 43_646_976
    assert counts.total == 8_810_770_672
    assert counts.parts["adapters"].trainable == 43_646_976
    assert sum(part.total for part in counts.parts.values()) == counts.total
    assert "43,646,976 of 8,810,770,672" in str(counts)


def test_known_count_of_full_tuning_with_a_frozen_tower_on_qwen2_5_vl_7b():
    model = apply_tuning(_qwen2_5_vl_7b(), TuningSettings(method="full"), TABLE["qwen2_5_vl"], seed=0)
    counts = count_parameters(model)
    assert (counts.trainable, counts.total) == (7_615_616_512, 8_292_166_656)
    assert counts.parts["tower"].total + counts.parts["merger"].total == 676_550_144
    assert counts.parts["tower"].trainable == counts.parts["merger"].trainable == 0
    assert counts.parts["lm_head"].trainable == counts.parts["embeddings"].trainable == 3584 * 152064


def test_a_tied_matrix_counts_once():
    config = transformers.Qwen3VLConfig(
        text_config=dict(hidden_size=32, num_hidden_layers=1, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
                         head_dim=8, vocab_size=64, tie_word_embeddings=True,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}),
        vision_config=dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=32, num_position_embeddings=36),
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Qwen3VLForConditionalGeneration(config)
    counts = count_parameters(model)
    assert counts.parts["embeddings"].total == 64 * 32
    assert counts.parts["lm_head"].total == 0


def _adapted(model) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("family", FAMILIES)
def test_scopes_reach_exactly_the_projections_that_they_name(family):
    language = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    mlp = set() if TABLE[family].moe else {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    tower_mlp = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"} if family == "qwen2_5_vl" else {"mlp.linear_fc1", "mlp.linear_fc2"}

    def inside(prefix, names):
        return {f"{prefix}.{layer}.{name}" for layer in range(3) for name in names}

    text, vision = "model.language_model.layers", "model.visual.blocks"
    if family == "qwen2_5_vl":
        merger = {"model.visual.merger.mlp.0", "model.visual.merger.mlp.2"}
    else:
        places = ["merger", "deepstack_merger_list.0", "deepstack_merger_list.1"]
        merger = {f"model.visual.{place}.linear_fc{n}" for place in places for n in (1, 2)}
    cases = [
        ({}, inside(text, language | mlp)),
        (dict(finetune_mlp_modules=False), inside(text, language)),
        (dict(finetune_vision_layers=True), inside(text, language | mlp) | inside(vision, {"attn.qkv", "attn.proj"} | tower_mlp)),
        (
            dict(finetune_vision_layers=True, finetune_language_layers=False, finetune_mlp_modules=False),
            inside(vision, {"attn.qkv", "attn.proj"}),
        ),
        (dict(finetune_language_layers=False, finetune_merger=True), merger),
    ]
    for settings, expected in cases:
        model = apply_tuning(tiny_model(family), TuningSettings(**settings), TABLE[family], seed=0)
        assert _adapted(model) == expected, settings
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {
            n for n, _ in model.named_parameters() if ".lora_" in n
        }


def test_experts_get_no_adapter_and_that_is_said(caplog):
    with caplog.at_level(logging.INFO, logger="finesight"):
        model = apply_tuning(tiny_model("qwen3_vl_moe"), TuningSettings(), TABLE["qwen3_vl_moe"], seed=0)
    assert [record.levelname for record in caplog.records if "experts are fused" in record.message] == ["INFO"]
    assert not any("lora_" in name and ".mlp." in name for name, _ in model.named_parameters())
    with pytest.raises(ModelError, match="finetune_attention_modules"):
        apply_tuning(tiny_model("qwen3_vl_moe"), TuningSettings(finetune_attention_modules=False), TABLE["qwen3_vl_moe"], seed=0)


def test_nothing_to_adapt_is_refused():
    with pytest.raises(ModelError, match="No module is left"):
        target_modules(TuningSettings(finetune_attention_modules=False, finetune_mlp_modules=False))
    with pytest.raises(ModelError, match="Nothing trains"):
        apply_tuning(tiny_model("qwen3_vl"), TuningSettings(method="full", finetune_language_layers=False), TABLE["qwen3_vl"], seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_tuning_trains_parts_as_asked(family):
    model = apply_tuning(
        tiny_model(family), TuningSettings(method="full", finetune_vision_layers=True, finetune_merger=True), TABLE[family], seed=0
    )
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all(name.endswith(".mlp.gate.weight") for name in frozen) and bool(frozen) == TABLE[family].moe
    model = apply_tuning(
        tiny_model(family), TuningSettings(method="full", finetune_merger=True, finetune_language_layers=False), TABLE[family], seed=0
    )
    assert {part_of(name) for name, p in model.named_parameters() if p.requires_grad} == {"merger"}
    model = apply_tuning(tiny_model(family), TuningSettings(method="full", finetune_mlp_modules=False), TABLE[family], seed=0)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".mlp." in name)
    assert model.model.language_model.embed_tokens.weight.requires_grad and model.lm_head.weight.requires_grad


def test_adapter_weights_depend_on_the_seed_alone():
    def drawn(seed, global_seed):
        model = tiny_model("qwen3_vl", dtype=torch.bfloat16)
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        model = apply_tuning(model, TuningSettings(), TABLE["qwen3_vl"], seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)  # the run's own generator is left alone
        return {name: p for name, p in model.named_parameters() if ".lora_" in name}

    first, again, other = drawn(1, 5), drawn(1, 6), drawn(2, 5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if ".lora_A." in name)
    assert all(p.dtype == torch.float32 for p in first.values())
    assert all(not p.any() for name, p in first.items() if ".lora_B." in name)
    bound = (1 / 32) ** 0.5  # Kaiming uniform with a = sqrt 5 over 32 inputs
    a = first["base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    assert 0.9 * bound < a.abs().max() <= bound


def test_settings_reach_peft():
    settings = TuningSettings(r=4, lora_alpha=6, lora_dropout=0.25, use_rslora=True, bias="lora_only")
    model = apply_tuning(tiny_model("qwen2_5_vl"), settings, TABLE["qwen2_5_vl"], seed=0)
    layer = model.get_submodule("base_model.model.model.language_model.layers.0.self_attn.q_proj")
    assert layer.scaling["default"] == 3.0 and layer.lora_dropout["default"].p == 0.25
    biases = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert biases and all(re.search(r"\.(q|k|v)_proj\.base_layer\.bias$", name) for name in biases)


def test_all_biases_means_those_of_the_parts_that_train():
    model = apply_tuning(tiny_model("qwen2_5_vl"), TuningSettings(bias="all"), TABLE["qwen2_5_vl"], seed=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained and all("language_model" in name for name in trained)


def _metadata(family="qwen3_vl", **changes) -> AdapterMetadata:
    values = dict(
        base="Qwen/Example",
        family=family,
        min_pixels=1024,
        max_pixels=65536,
        video_min_pixels=4096,
        video_max_pixels=131072,
        fps=2.0,
        max_frames=64,
    )
    return AdapterMetadata(**{**values, **changes})


def _perturbed(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def _logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(20, 40).unsqueeze(0)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_survives_the_disk_and_loads_in_plain_peft(family, tmp_path):
    settings = TuningSettings(r=4, finetune_vision_layers=True, finetune_merger=True, bias="all")
    model = _perturbed(apply_tuning(tiny_model(family), settings, TABLE[family], seed=0)).eval()
    folder = save_adapter(model, tmp_path / "adapter", _metadata(family))
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "finesight.json"]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "Qwen/Example"
    expected = _logits(model)
    assert not torch.allclose(expected, _logits(tiny_model(family)))
    plain = peft.PeftModel.from_pretrained(tiny_model(family), str(folder)).eval()
    torch.testing.assert_close(_logits(plain), expected, rtol=0, atol=0)
    ours = load_adapter(tiny_model(family), folder).eval()
    torch.testing.assert_close(_logits(ours), expected, rtol=0, atol=0)
    assert not any(p.requires_grad for p in ours.parameters())


def test_going_on_from_an_adapter_keeps_its_settings(tmp_path):
    model = _perturbed(apply_tuning(tiny_model("qwen3_vl"), TuningSettings(r=4, lora_alpha=12), TABLE["qwen3_vl"], seed=0))
    folder = save_adapter(model, tmp_path / "adapter", _metadata())
    wrapped = load_adapter(tiny_model("qwen3_vl"), folder, is_trainable=True)
    again = apply_tuning(wrapped, TuningSettings(r=64), TABLE["qwen3_vl"], seed=1)
    assert again is wrapped and again.peft_config["default"].r == 4
    stored, loaded = dict(model.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(stored[name], loaded[name]) and loaded[name].requires_grad for name in stored if ".lora_" in name)
    assert count_parameters(again).trainable == count_parameters(model).trainable


def test_an_adapter_on_a_base_of_another_size_names_both(tmp_path):
    """Before anything of it is put onto the base."""
    model = apply_tuning(tiny_model("qwen3_vl"), TuningSettings(r=4), TABLE["qwen3_vl"], seed=0)
    weights = {name: torch.cat([tensor, tensor], -1) if ".lora_A." in name else tensor for name, tensor in adapter_weights(model).items()}
    folder = save_adapter(model, tmp_path / "adapter", _metadata(), weights)
    base = tiny_model("qwen3_vl")
    base.name_or_path = "Qwen/Other"
    with pytest.raises(ModelError, match=r"in_features here and .* names the base Qwen/Example; the one given is Qwen/Other\. Give"):
        load_adapter(base, folder)
    assert not any(".lora_" in name for name, _ in base.named_parameters())


def test_a_truncated_adapter_is_damaged(tmp_path):
    model = apply_tuning(tiny_model("qwen3_vl"), TuningSettings(r=4), TABLE["qwen3_vl"], seed=0)
    file = save_adapter(model, tmp_path / "adapter", _metadata()) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is damaged"):
        load_adapter(tiny_model("qwen3_vl"), file.parent)


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    model = apply_tuning(tiny_model("qwen3_vl"), TuningSettings(r=4), TABLE["qwen3_vl"], seed=0)
    folder = save_adapter(model, tmp_path / "adapter", _metadata())
    with pytest.raises(ModelError, match="was trained on Qwen3-VL"):
        load_adapter(tiny_model("qwen2_5_vl"), folder)
    with pytest.raises(ModelError, match="does not exist"):
        load_adapter(tiny_model("qwen3_vl"), tmp_path / "nowhere")
    (folder / "finesight.json").unlink()
    with pytest.raises(ModelError, match=r"does not fit|not those of its adapter"):
        load_adapter(tiny_model("qwen3_vl_moe"), folder)  # no MLP projections there
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(ModelError, match="does not fit this model: size mismatch"):
        load_adapter(tiny_model("qwen3_vl"), folder)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(ModelError, match="without a place"):
        load_adapter(tiny_model("qwen3_vl"), folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="only safetensors"):
        load_adapter(tiny_model("qwen3_vl"), folder)
    with pytest.raises(ModelError, match="carries no adapter"):
        save_adapter(tiny_model("qwen3_vl"), folder, _metadata())


def test_pixel_limits_come_back_and_overriding_them_is_warned_about(tmp_path):
    model = apply_tuning(tiny_model("qwen3_vl"), TuningSettings(r=2), TABLE["qwen3_vl"], seed=0)
    folder = save_adapter(model, tmp_path / "adapter", _metadata(image_first=True, system="Be brief."))
    assert read_metadata(folder) == _metadata(image_first=True, system="Be brief.")
    settings, notes = restore_data_settings(folder)
    assert (settings.min_pixels, settings.max_pixels, settings.video_max_pixels) == (1024, 65536, 131072)
    assert settings.image_first and settings.max_frames == 64 and not notes
    settings, notes = restore_data_settings(folder, DataSettings(max_pixels=4096, min_pixels=1024, too_long="drop_turns"))
    assert (settings.max_pixels, settings.min_pixels, settings.too_long) == (4096, 1024, "drop_turns")
    assert len(notes) == 1 and "data.max_pixels is 4096" in notes[0] and "65536" in notes[0]
    (folder / "finesight.json").unlink()
    settings, notes = restore_data_settings(folder)
    assert settings.max_pixels is None and "not known" in notes[0]
    (folder / "finesight.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ModelError, match="format 99"):
        read_metadata(folder)
    (folder / "finesight.json").write_text(json.dumps({"format": 1, "base": "x"}))
    with pytest.raises(ModelError, match="incomplete"):
        read_metadata(folder)
