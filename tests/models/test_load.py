"""Checkpoint folders to models: right classes, whole weights, clear refusals."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from finesight.data_settings import DataSettings
from finesight.errors import ModelError, RecipeError
from finesight.families import FAMILIES as TABLE
from finesight.models.adapters import AdapterMetadata, apply_tuning, save_adapter
from finesight.models.load import choose_device, choose_dtype, load, load_model
from finesight.recipe import ModelSettings, TuningSettings
from tiny import FAMILIES, tiny_checkpoint, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_loads_as_the_real_class(family, tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", family)
    loaded = load_model(ModelSettings(name_or_path=str(folder)), device="cpu")
    assert type(loaded.model) is getattr(transformers, TABLE[family].model_class)
    assert loaded.family is TABLE[family] and loaded.processor.family is TABLE[family]
    assert (loaded.dtype, loaded.device) == (torch.float32, torch.device("cpu"))
    assert loaded.model.config._attn_implementation == "sdpa" and not loaded.model.training
    expected = dict(tiny_model(family).named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in loaded.model.named_parameters())
    assert not loaded.notes and loaded.base is loaded.model


def test_precision_is_as_asked(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", "qwen3_vl")
    loaded = load(folder, dtype="bfloat16", device="cpu")
    assert loaded.dtype == torch.bfloat16 and {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_automatic_precision():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_dtype("auto", cpu) == (torch.float32, None)
    assert choose_dtype("bfloat16", cpu) == (torch.bfloat16, None)
    assert choose_dtype("auto", gpu, gpu_has_bf16=True) == (torch.bfloat16, None)
    dtype, note = choose_dtype("auto", gpu, gpu_has_bf16=False)
    assert dtype == torch.float16 and "does not compute in bfloat16" in note
    dtype, note = choose_dtype("bfloat16", gpu, gpu_has_bf16=False)
    assert dtype == torch.bfloat16 and "model.dtype: float16" in note
    assert choose_dtype("float32", gpu, gpu_has_bf16=False) == (torch.float32, None)
    with pytest.raises(ModelError, match="Precision 'int8'"):
        choose_dtype("int8", cpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_a_gpu_that_is_not_there_is_refused():
    assert choose_device() == torch.device("cpu")
    with pytest.raises(ModelError, match="sees no GPU"):
        choose_device("cuda")


def test_tied_weights_stay_tied(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", "qwen3_vl")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder, device="cpu").model
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_weights_that_are_not_whole_are_refused(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", "qwen3_vl")
    weights = load_file(folder / "model.safetensors")
    removed = "model.language_model.norm.weight"

    def stored(changed):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})

    stored({name: tensor for name, tensor in weights.items() if name != removed})
    with pytest.raises(ModelError, match=rf"1 missing \(such as {removed}\)"):
        load(folder, device="cpu")
    stored({**weights, "extra.weight": torch.zeros(2)})
    with pytest.raises(ModelError, match="1 that the model has no place for"):
        load(folder, device="cpu")
    stored({**weights, removed: torch.zeros(7)})
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder, device="cpu")
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 damaged")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder, device="cpu")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        load(folder, device="cpu")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load(folder, device="cpu")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="lacks 2 of 2 weight files"):
        load(folder, device="cpu")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="dtype: Input should be 'auto'"):
        load(tmp_path, dtype="int3")
    with pytest.raises(ModelError, match="does not exist"):
        load(tmp_path / "nowhere", device="cpu")
    with pytest.raises(ModelError, match=r"config\.json"):
        load(tmp_path, device="cpu")
    with pytest.raises(ModelError, match="some-owner/some-model"):  # not in the cache, and no network in tests
        load("some-owner/some-model", device="cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="'llama' is not supported"):
        load(tmp_path, device="cpu")


def _saved_adapter(folder, family="qwen3_vl", **changes):
    model = apply_tuning(tiny_model(family), TuningSettings(r=4), TABLE[family], seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.02)
    limits = dict(min_pixels=1024, max_pixels=16384, video_min_pixels=4096, video_max_pixels=65536, fps=1.0, max_frames=8)
    return model.eval(), save_adapter(model, folder, AdapterMetadata(**{"base": "Qwen/Example", "family": family, **limits, **changes}))


def test_a_base_with_its_adapter(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", "qwen3_vl")
    trained, adapter = _saved_adapter(tmp_path / "adapter", system="Be brief.")
    ids = torch.arange(30, 50).unsqueeze(0)
    loaded = load(folder, adapter, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, trained(input_ids=ids).logits, rtol=0, atol=0)
    limits = loaded.processor.image_limits
    assert (limits.min_pixels, limits.max_pixels, loaded.processor.fps, loaded.processor.max_frames) == (1024, 16384, 1.0, 8)
    assert loaded.metadata.system == "Be brief." and not loaded.notes
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    overridden = load(folder, adapter, device="cpu", data=DataSettings(max_pixels=4096))
    assert overridden.processor.image_limits.max_pixels == 4096 and "was trained with 16384" in overridden.notes[0]
    again = load_model(ModelSettings(name_or_path=str(folder), adapter=str(adapter)), device="cpu", train_adapter=True)
    assert {name for name, p in again.model.named_parameters() if p.requires_grad} == {
        n for n, _ in again.model.named_parameters() if ".lora_" in n
    }


def test_a_model_tuned_as_a_whole_brings_its_limits(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", "qwen3_vl")
    _, adapter = _saved_adapter(tmp_path / "adapter")
    (adapter / "finesight.json").rename(folder / "finesight.json")
    loaded = load(folder, device="cpu")
    assert loaded.processor.image_limits.max_pixels == 16384 and loaded.metadata.max_pixels == 16384 and not loaded.notes
    assert "was trained with 16384" in load(folder, device="cpu", data=DataSettings(max_pixels=2048)).notes[0]


def test_an_adapter_in_the_place_of_a_model_is_refused(tmp_path):
    _, adapter = _saved_adapter(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"holds an adapter, not a model.*Qwen/Example"):
        load(adapter, device="cpu")


def test_an_adapter_of_another_family_is_refused(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", "qwen2_5_vl")
    _, adapter = _saved_adapter(tmp_path / "adapter")
    with pytest.raises(ModelError, match="was trained on Qwen3-VL"):
        load(folder, adapter, device="cpu")


def test_float8_base_is_converted_while_loading(tmp_path):
    from finesight.models.float8 import Float8Linear

    folder = tiny_checkpoint(tmp_path / "model", "qwen3_vl")
    loaded = load_model(ModelSettings(name_or_path=str(folder), load_in_fp8=True), device=torch.device("cpu"))
    kinds = {name: type(m) for name, m in loaded.model.named_modules() if name.endswith(("q_proj", "down_proj", "qkv", "lm_head"))}
    assert all((kind is Float8Linear) == ("language_model" in name) for name, kind in kinds.items())
    assert "slow" in loaded.notes[0] and "float8" in loaded.notes[1]


@pytest.mark.parametrize(
    ("asked", "levels"),
    [({"load_in_8bit": True}, ["INFO", "INFO"]), ({"load_in_4bit": True}, ["INFO"]), ({"load_in_fp8": True}, ["WARNING", "INFO", "INFO"])],
)
def test_what_is_no_warning_is_not_logged_as_one(tmp_path, caplog, asked, levels):
    """What is in which precision is a fact; float8 on a CPU is slow, which may not be meant."""
    if "load_in_4bit" in asked:
        pytest.importorskip("bitsandbytes")
    folder = tiny_checkpoint(tmp_path / "model", "qwen3_vl_moe")
    with caplog.at_level(logging.INFO, logger="finesight"):
        loaded = load(folder, device="cpu", **asked)
    assert [record.levelname for record in caplog.records if record.name.startswith("finesight")] == levels
    assert tuple(record.getMessage() for record in caplog.records if record.name.startswith("finesight")) == loaded.notes
    stays = [note for note in loaded.notes if note.startswith("Experts are fused tensors, which only model.load_in_4bit quantises")]
    assert len(stays) == (0 if "load_in_4bit" in asked else 1)
    assert loaded.settings is not None and loaded.settings.quantization == next(iter(asked)).removeprefix("load_in_")
