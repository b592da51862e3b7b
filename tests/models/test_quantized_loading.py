"""Quantised while loading: equal to quantising afterwards, in little memory; checkpoints of bitsandbytes as they are."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

import finesight
from finesight.errors import ModelError
from finesight.families import FAMILIES as TABLE
from finesight.models import quantized_linear
from finesight.models.adapters import apply_tuning
from finesight.models.experts import NF4Experts
from finesight.models.linear import AccumulatedLinear
from finesight.models.load import load_model
from finesight.models.packed import PackedModel
from finesight.models.quantize import Scheme, quantize
from finesight.models.quantized_linear import FourBitLinear, Int8Linear
from finesight.models.quantized_vocabulary import Int8Embedding, Int8Head
from finesight.recipe import ModelSettings, TuningSettings
from tiny import FAMILIES, tiny_checkpoint, tiny_config

CPU = torch.device("cpu")
ASKED = [
    {"load_in_4bit": True},
    {"load_in_8bit": True, "quantize_vocabulary": True},
    {"load_in_fp8": True, "quantize_tower": True},
    {"load_in_4bit": True, "quantize_tower": True, "quantize_vocabulary": True},
]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    raw = [{n: t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for n, t in state.items()} for state in (a, b)]
    return a.keys() == b.keys() and all(torch.equal(t, raw[1][n]) for n, t in raw[0].items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: "+".join(asked))
def test_equal_to_quantising_afterwards(family: str, asked: dict[str, bool], tmp_path) -> None:
    folder = str(tiny_checkpoint(tmp_path / "base", family))
    settings = ModelSettings(name_or_path=folder, dtype="bfloat16", **asked)
    loaded = load_model(settings, device=CPU)
    after = load_model(ModelSettings(name_or_path=folder, dtype="bfloat16"), device=CPU).model
    scheme = Scheme.of(settings)
    assert scheme is not None
    quantize(after, scheme)
    assert same(loaded.model.state_dict(), after.state_dict())
    assert not any(t.is_meta for t in [*loaded.model.parameters(), *loaded.model.buffers()])
    assert not getattr(loaded.model, "is_quantized", False) and not hasattr(loaded.model.config, "quantization_config")
    assert any("GiB" in note for note in loaded.notes)


def test_tied_vocabulary(tmp_path) -> None:
    folder = tiny_checkpoint(tmp_path / "base", "qwen3_vl")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = (folder / "config.json").read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    (folder / "config.json").write_text(text)
    model = load_model(ModelSettings(name_or_path=str(folder), load_in_8bit=True, quantize_vocabulary=True), device=CPU).model
    embedding, head = model.model.language_model.embed_tokens, model.lm_head
    assert type(embedding) is Int8Embedding and type(head) is Int8Head
    assert head.weight is embedding.weight and head.scale is embedding.scale and (head.out_features, head.in_features) == (320, 32)


PEAK = """
import gc, sys, threading, time
import torch
from finesight.models.load import load_model
from finesight.recipe import ModelSettings
import json

def anonymous():  # bytes; files that are mapped do not count
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def measured(asked):
    load_model(ModelSettings(name_or_path=small, dtype="bfloat16", **asked), device="cpu")  # imports and first allocations
    gc.collect()
    before, peak, done = anonymous(), 0, False

    def watch():
        nonlocal peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    model = load_model(ModelSettings(name_or_path=folder, dtype="bfloat16", **asked), device="cpu").model
    done = True
    thread.join()
    size = sum(t.nbytes for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    return {"peak": peak - before, "size": size}

small, folder = sys.argv[1:3]
print(json.dumps({name: measured(asked) for name, asked in json.loads(sys.argv[3]).items()}))
"""
LARGE = {"4bit": {"load_in_4bit": True}, "fp8": {"load_in_fp8": True, "quantize_vocabulary": True}}


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny checkpoint, and one of the same files whose weights, of a few layers, come in several shards."""
    tmp_path = tmp_path_factory.mktemp("large")
    small = tiny_checkpoint(tmp_path / "small", "qwen3_vl")
    folder = shutil.copytree(small, tmp_path / "large")
    (folder / "model.safetensors").unlink()
    config = tiny_config("qwen3_vl")
    config.text_config.update({"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 10, "head_dim": 128})
    config.text_config.rope_parameters["mrope_section"] = [24, 20, 20]
    config.vision_config.out_hidden_size = 256
    with torch.device("meta"):
        model = transformers.Qwen3VLForConditionalGeneration(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    values = torch.randn(1 << 16).bfloat16()
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.copy_(values.repeat(-(-tensor.numel() // len(values)))[: tensor.numel()].view(tensor.shape))
    model.save_pretrained(folder, max_shard_size="12MB")
    return small, folder


@pytest.fixture(scope="module")
def peaks(large_checkpoint: tuple[Path, Path]) -> dict[str, dict[str, int]]:
    """Bytes while loading and afterwards, in one fresh process for all."""
    # Freed blocks go back to the system at once, so that what is resident is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK, *map(str, large_checkpoint), json.dumps(LARGE)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=100)
    found: dict[str, dict[str, int]] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the resident memory from /proc")
@pytest.mark.parametrize("kind", LARGE)
def test_peak_stays_under_the_final_size_and_one_shard(
    kind: str, large_checkpoint: tuple[Path, Path], peaks: dict[str, dict[str, int]]
) -> None:
    sizes = sorted(path.stat().st_size for path in large_checkpoint[1].glob("*.safetensors"))
    full, size, peak = sum(sizes), peaks[kind]["size"], peaks[kind]["peak"]
    print(f"full {full / 1e6:.0f} MB, final {size / 1e6:.0f}, peak {peak / 1e6:.0f}, shard {sizes[-1] / 1e6:.0f}")
    assert len(sizes) >= 4
    assert size < 0.6 * full
    assert size * 0.9 < peak < size + sizes[-1] < full


def prequantised(folder: Path, family: str, **config) -> tuple[Path, torch.nn.Module]:
    """A checkpoint as people put it on the hub, and transformers' own model of it."""
    base = tiny_checkpoint(folder / "base", family)
    model = getattr(transformers, TABLE[family].model_class).from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**config)
    )
    target = shutil.copytree(base, folder / "quantised")
    (target / "model.safetensors").unlink()
    model.save_pretrained(target)
    return target, model


NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)


class TestPrequantised:
    @pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
    def test_loads_as_it_is(self, family: str, tmp_path) -> None:
        skipped = ["lm_head", "model.visual", "model.language_model.layers.1.mlp"]
        folder, theirs = prequantised(tmp_path, family, **NF4, llm_int8_skip_modules=skipped)
        stored_names = load_file(folder / "model.safetensors")
        assert any(name.endswith("layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4") for name in stored_names)
        loaded = load_model(ModelSettings(name_or_path=str(folder), dtype="bfloat16"), device=CPU)
        ours = {n for n, m in loaded.model.named_modules() if type(m) is FourBitLinear}
        stored = {n: m for n, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
        assert ours == stored.keys() and len(ours) == 18
        for name, module in stored.items():
            state = copy.copy(module.weight.quant_state)
            state.shape = torch.Size((state.shape.numel(),))  # rows of 32 are dequantised wrongly by themselves (see `dequantize_weight`)
            exact = bitsandbytes.functional.dequantize_4bit(module.weight.data, state).view(-1)
            assert torch.equal(loaded.model.get_submodule(name).dequantized_weight().view(-1), exact)
        assert type(loaded.model.model.language_model.layers[1].mlp.up_proj) is torch.nn.Linear
        assert any("4-bit" in note for note in loaded.notes)
        with pytest.raises(ModelError, match="those of this model are quantised"):
            apply_tuning(loaded.model, TuningSettings(method="full"), TABLE[family], seed=0)
        tuned = apply_tuning(loaded.model, TuningSettings(r=2), TABLE[family], seed=0)
        PackedModel(tuned)
        assert sum(isinstance(m, AccumulatedLinear) for m in tuned.modules()) == 21

    def test_of_other_kinds(self, tmp_path) -> None:
        """Single quantisation, the tower quantised too, and 8 bits."""
        folder, _ = prequantised(tmp_path / "fp4", "qwen3_vl", load_in_4bit=True)
        model = load_model(ModelSettings(name_or_path=str(folder)), device=CPU).model
        assert {m.storage for m in model.modules() if isinstance(m, FourBitLinear)} == {"fp4/64"}
        assert type(model.model.visual.blocks[0].attn.qkv) is FourBitLinear
        folder, theirs = prequantised(tmp_path / "int8", "qwen3_vl", load_in_8bit=True)
        model = load_model(ModelSettings(name_or_path=str(folder)), device=CPU).model
        name = "model.language_model.layers.0.mlp.up_proj"
        expected = bitsandbytes.functional.int8_vectorwise_dequant(
            theirs.get_submodule(name).weight.data, theirs.get_submodule(name).weight.SCB
        )
        found = model.get_submodule(name)
        assert type(found) is Int8Linear and torch.allclose(found.dequantized_weight(), expected)

    def test_with_further_parts(self, tmp_path) -> None:
        folder, _ = prequantised(tmp_path, "qwen3_vl", **NF4, llm_int8_skip_modules=["lm_head", "model.visual"])
        settings = ModelSettings(name_or_path=str(folder), load_in_4bit=True, quantize_vocabulary=True, quantize_tower=True)
        model = load_model(settings, device=CPU).model
        assert type(model.lm_head) is Int8Head and type(model.model.visual.blocks[0].attn.qkv) is FourBitLinear

    @pytest.mark.parametrize("asked", [{}, {"load_in_4bit": True}, {"load_in_4bit": True, "quantize_vocabulary": True}])
    def test_a_mixture_of_experts(self, asked: dict[str, bool], tmp_path) -> None:
        """As transformers writes it, with experts in full precision; they come to 4 bits where that is asked for."""
        folder, theirs = prequantised(tmp_path, "qwen3_vl_moe", **NF4, llm_int8_skip_modules=["lm_head", "model.visual"])
        loaded = load_model(ModelSettings(name_or_path=str(folder), dtype="bfloat16", **asked), device=CPU)
        assert {n.rpartition(".")[2] for n, m in loaded.model.named_modules() if type(m) is FourBitLinear} == {
            "q_proj", "k_proj", "v_proj", "o_proj"
        }  # fmt: skip
        for number, layer in enumerate(loaded.model.model.language_model.layers):
            stored = theirs.model.language_model.layers[number].mlp
            assert torch.equal(layer.mlp.gate.weight, stored.gate.weight)
            if asked:
                expected = NF4Experts.of(copy.deepcopy(stored.experts))
                assert type(layer.mlp.experts) is NF4Experts and same(layer.mlp.experts.state_dict(), expected.state_dict())
            else:
                assert torch.equal(layer.mlp.experts.gate_up_proj, stored.experts.gate_up_proj)
                assert torch.equal(layer.mlp.experts.down_proj, stored.experts.down_proj)
        assert any("they stay in bfloat16" in note for note in loaded.notes) is not bool(asked)

    @pytest.mark.parametrize("form", ["fused", "single", "router"])
    def test_experts_that_are_quantised_already_are_refused(self, form: str, tmp_path) -> None:
        """As other software writes them: whole stacks or single matrices in NF4, or a router that was a linear layer."""
        folder, _ = prequantised(tmp_path, "qwen3_vl_moe", **NF4, llm_int8_skip_modules=["lm_head", "model.visual"])
        weights: dict[str, torch.Tensor] = {}

        def pack(name: str, tensor: torch.Tensor) -> None:
            packed, state = bitsandbytes.functional.quantize_4bit(tensor.contiguous(), quant_type="nf4", compress_statistics=True)
            weights.update({name: packed} | {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()})

        for name, tensor in load_file(folder / "model.safetensors").items():
            if ".mlp.experts." in name and form == "fused":
                pack(name, tensor)
            elif ".mlp.experts." in name and form == "single":
                for number, matrix in enumerate(tensor.transpose(1, 2)):
                    pack(name.replace("experts.", f"experts.{number}.") + ".weight", matrix)
            elif name.endswith(".mlp.gate.weight") and form == "router":
                pack(name, tensor)
            else:
                weights[name] = tensor
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"experts and router in full precision\. Use the checkpoint that this one was made from"):
            load_model(ModelSettings(name_or_path=str(folder)), device=CPU)

    def test_another_precision_is_refused(self, tmp_path) -> None:
        folder, _ = prequantised(tmp_path, "qwen3_vl", **NF4)
        with pytest.raises(ModelError, match=r"stored in 4bit already.*leave out model.load_in_8bit"):
            load_model(ModelSettings(name_or_path=str(folder), load_in_8bit=True), device=CPU)

    def test_another_method_is_refused(self, tmp_path) -> None:
        folder = tiny_checkpoint(tmp_path / "base", "qwen3_vl")
        text = (folder / "config.json").read_text().replace("{", '{"quantization_config": {"quant_method": "gptq", "bits": 4},', 1)
        (folder / "config.json").write_text(text)
        with pytest.raises(ModelError, match="quantised by gptq"):
            load_model(ModelSettings(name_or_path=str(folder)), device=CPU)


def test_missing_library(tmp_path, monkeypatch) -> None:
    folder = tiny_checkpoint(tmp_path / "base", "qwen3_vl")
    monkeypatch.setattr(quantized_linear.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"load_in_4bit needs bitsandbytes.*finesight\[gpu\]"):
        load_model(ModelSettings(name_or_path=str(folder), load_in_4bit=True), device=CPU)
    load_model(ModelSettings(name_or_path=str(folder), load_in_8bit=True), device=CPU)


def test_a_matrix_of_another_shape_is_an_error(tmp_path) -> None:
    folder = tiny_checkpoint(tmp_path / "base", "qwen3_vl")
    weights = load_file(folder / "model.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name][:-16].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.weight is of shape \(32, 32\), and \(48, 32\) is needed"):
        load_model(ModelSettings(name_or_path=str(folder), load_in_4bit=True), device=CPU)


def test_python_interface(tmp_path) -> None:
    folder = tiny_checkpoint(tmp_path / "base", "qwen3_vl")
    loaded = finesight.load(folder, load_in_8bit=True, quantize_vocabulary=True, device="cpu")
    assert type(loaded.base.lm_head) is Int8Head
