"""Exports end to end: written, read back by transformers and peft alone, verified, refused where they are wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from finesight.data.groups import continued
from finesight.data.pixels import visual_patches
from finesight.errors import ExportError
from finesight.export import export as export_module
from finesight.export.export import ExportSettings, export
from finesight.export.verify import agreement, drawn_prompts, witness
from finesight.families import FAMILIES as TABLE
from finesight.models.adapter_files import quiet_peft
from finesight.models.load import load_model
from finesight.models.quantized_linear import FourBitLinear
from finesight.recipe import ModelSettings
from tiny import FAMILIES
from tiny_adapters import make_adapter


def settings_of(base: Path, adapter: Path | None) -> ModelSettings:
    return ModelSettings(name_or_path=str(base), adapter=None if adapter is None else str(adapter), dtype="float32")


def plain_logprobs(model, loaded, sample, answer) -> torch.Tensor:
    """Of an answer's tokens, through the forward of transformers alone."""
    whole = continued(sample, answer)
    ids = torch.from_numpy(whole.token_ids)[None]
    (item,) = whole.visual_items
    logits = model(
        input_ids=ids,
        mm_token_type_ids=(ids == loaded.processor.image_token_id).int(),
        pixel_values=torch.from_numpy(visual_patches(item, loaded.processor)),
        image_grid_thw=torch.tensor([list(item.grid)]),
        use_cache=False,
    ).logits[0]
    targets = torch.arange(len(sample), len(whole))
    return logits[targets - 1].log_softmax(-1)[torch.arange(len(targets)), ids[0, targets]]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_adapter_and_merged_in_float32(family: str, base_of, adapter_of, tmp_path) -> None:
    """Log-probabilities of plain peft, of our adapter and of the merged model in plain transformers: within 1e-4."""
    base, adapter = base_of(family), adapter_of(family)
    done = export(settings_of(base, adapter), tmp_path / "merged", ExportSettings("merged", "float32"), prompts=drawn_prompts(1))
    assert done.agreement.largest < 1e-4 and done.agreement.same_answers == done.agreement.num_answers == 1
    loaded = load_model(settings_of(base, adapter), device="cpu")
    said = witness(loaded, drawn_prompts(1), answer_tokens=8)
    kind = getattr(transformers, TABLE[family].model_class)
    with quiet_peft():
        by_peft = PeftModel.from_pretrained(kind.from_pretrained(base, dtype=torch.float32), str(adapter)).eval()
    merged = kind.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    untrained = plain_logprobs(kind.from_pretrained(base, dtype=torch.float32).eval(), loaded, said.samples[0], said.answers[0])
    assert (untrained - torch.tensor(said.logprobs[0])).abs().max() > 0.01  # the adapter changes what is compared
    for model in (by_peft, merged):
        found = plain_logprobs(model, loaded, said.samples[0], said.answers[0])
        assert torch.allclose(found, torch.tensor(said.logprobs[0]).float(), atol=1e-4, rtol=0)


def test_adapter_folder(base_of, adapter_of, tmp_path) -> None:
    done = export(
        settings_of(base_of("qwen3_vl"), adapter_of("qwen3_vl")), tmp_path / "out", ExportSettings("adapter"), prompts=drawn_prompts(1)
    )
    assert sorted(path.name for path in done.folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "finesight.json"]
    assert done.agreement.largest < 1e-4 and done.merged is None
    (note,) = done.notes
    assert "18 matrices of the vision tower" in note and "vLLM" in note and "llama.cpp" in note and "SGLang" in note


def test_language_adapter_has_no_tower_note(base_of, tmp_path) -> None:
    adapter = make_adapter(base_of("qwen3_vl"), tmp_path / "adapter", "qwen3_vl", tower=False)
    assert not export(
        settings_of(base_of("qwen3_vl"), adapter), tmp_path / "out", ExportSettings("adapter"), prompts=drawn_prompts(1)
    ).notes


def test_merged_folder_is_whole(base_of, adapter_of, tmp_path) -> None:
    """Everything beside the weights: the limits of training for every engine, the precision, and no trace of an adapter."""
    base = tmp_path / "base"
    shutil.copytree(base_of("qwen3_vl"), base)
    (base / "video_preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 1, "longest_edge": 2}}))
    (base / "LICENSE").write_text("text")
    (base / "README.md").write_text("of the base")
    done = export(settings_of(base, adapter_of("qwen3_vl")), tmp_path / "out", ExportSettings("merged"), prompts=drawn_prompts(1))
    assert {path.name for path in base.iterdir()} - {path.name for path in done.folder.iterdir()} == {"README.md"}
    assert json.loads((done.folder / "preprocessor_config.json").read_text())["size"] == {"shortest_edge": 1024, "longest_edge": 4096}
    assert json.loads((done.folder / "video_preprocessor_config.json").read_text())["size"]["longest_edge"] > 2
    config = json.loads((done.folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and {tensor.dtype for tensor in load_file(done.folder / "model.safetensors").values()} == {
        torch.bfloat16
    }
    loaded = load_model(ModelSettings(name_or_path=str(done.folder)), device="cpu")
    assert loaded.processor.image_limits.max_pixels == 4096 and not loaded.notes
    assert done.agreement.largest < 0.3 and done.merged is not None and done.merged.survived == pytest.approx(1, abs=1e-3)


def test_four_bits(base_of, adapter_of, tmp_path) -> None:
    """transformers loads the checkpoint by itself, to the values that ours has; the tower stays whole."""
    done = export(
        settings_of(base_of("qwen3_vl"), adapter_of("qwen3_vl")),
        tmp_path / "out",
        ExportSettings("merged-4bit", bound=4.0),
        prompts=drawn_prompts(1),
    )
    theirs = transformers.Qwen3VLForConditionalGeneration.from_pretrained(done.folder, device_map="cpu")
    import bitsandbytes

    four_bit = {name: module for name, module in theirs.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(four_bit) == 21 and all("language_model.layers" in name for name in four_bit)
    ours = load_model(ModelSettings(name_or_path=str(done.folder), dtype="bfloat16"), device="cpu").model
    for name, module in four_bit.items():
        layer = ours.get_submodule(name)
        assert type(layer) is FourBitLinear
        # As one row: on a CPU bitsandbytes gives wrong numbers for rows that are no multiple of 64 long.
        state = copy.copy(module.weight.quant_state)
        state.shape = torch.Size((1, layer.in_features * layer.out_features))
        exact = bitsandbytes.functional.dequantize_4bit(module.weight.data, state).view(layer.out_features, layer.in_features)
        assert torch.equal(layer.dequantized_weight(), exact.to(torch.bfloat16))
    assert done.agreement.bound == 4.0 and done.agreement.holds and ExportSettings("merged-4bit").agreed == 2.0


def test_adapter_trained_over_four_bits(base_of, tmp_path) -> None:
    """Merged into the values that it knew, the model is the one that was trained; into the checkpoint's, it is another."""
    base = base_of("qwen3_vl")
    adapter = make_adapter(base, tmp_path / "adapter", "qwen3_vl", model={"load_in_4bit": True})
    done = export(settings_of(base, adapter), tmp_path / "out", ExportSettings("merged", "float32"), prompts=drawn_prompts(1))
    assert done.agreement.largest < 1e-4 and any("merged into the values that these stand for" in note for note in done.notes)
    stored = export(
        settings_of(base, adapter), tmp_path / "stored", ExportSettings("merged", "float32", base="stored"), prompts=drawn_prompts(1)
    )
    assert stored.agreement.largest < 1e-4 and not any("these stand for" in note for note in stored.notes)
    weights = [load_file(folder / "model.safetensors") for folder in (done.folder, stored.folder)]
    assert not torch.equal(*(w["model.language_model.layers.0.mlp.up_proj.weight"] for w in weights))


def test_fully_tuned_model(base_of, tmp_path) -> None:
    done = export(settings_of(base_of("qwen3_vl"), None), tmp_path / "out", ExportSettings("merged", "float32"), prompts=drawn_prompts(1))
    assert done.agreement.largest < 1e-4 and done.merged is not None and not done.merged.updates
    with pytest.raises(ExportError, match="no adapter to export"):
        export(settings_of(base_of("qwen3_vl"), None), tmp_path / "adapter", ExportSettings("adapter"), prompts=drawn_prompts(1))


class TestVerification:
    def test_finds_a_model_that_answers_otherwise(self, base_of, adapter_of, tmp_path) -> None:
        base = base_of("qwen3_vl")
        said = witness(load_model(settings_of(base, adapter_of("qwen3_vl")), device="cpu"), drawn_prompts(2))
        found = agreement(load_model(settings_of(base, None), device="cpu"), said, 1e-4)
        assert not found.holds and found.largest > 1e-2 and found.num_answers == 2
        assert not dataclasses.replace(found, largest=0.0, widest_parting=1.0).holds

    def test_values_that_are_no_numbers(self, base_of, tmp_path) -> None:
        loaded = load_model(settings_of(base_of("qwen3_vl"), None), device="cpu")
        said = witness(loaded, drawn_prompts(1), answer_tokens=4)
        wrong = dataclasses.replace(said, logprobs=((float("nan"),) * 4,))
        assert not agreement(loaded, wrong, 1e-4).holds

    def test_continued_prompt_is_as_encoded_in_one_piece(self, base_of) -> None:
        from finesight.data.conversation import Part, Turn
        from finesight.data.encode import Encoder

        loaded = load_model(settings_of(base_of("qwen3_vl"), None), device="cpu")
        (prompt,) = drawn_prompts(1)
        answered = dataclasses.replace(prompt, turns=(*prompt.turns, Turn("assistant", (Part("text", text="yes 0"),))))
        encoder = Encoder(loaded.processor)
        whole, sample = encoder.encode(answered), encoder.encode_prompt(prompt)
        answer = whole.token_ids[len(sample) :]
        made = continued(sample, answer)
        assert (made.token_ids == whole.token_ids).all() and (made.position_ids == whole.position_ids).all()
        assert made.next_position == whole.next_position

    def test_a_wrong_tensor_is_named_and_nothing_left(self, base_of, adapter_of, tmp_path, monkeypatch) -> None:
        """A fault between writing and reading: the disk's, say."""
        wrong = "model.language_model.layers.2.mlp.down_proj.weight"
        write = export_module.write_merged

        def damaged(merger, folder, *args):
            merged = write(merger, folder, *args)
            weights = load_file(folder / "model.safetensors")
            weights[wrong][0] = 3
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            return merged

        monkeypatch.setattr(export_module, "write_merged", damaged)
        with pytest.raises(ExportError, match=f"{wrong} of the export differs from base and adapter by"):
            export(
                settings_of(base_of("qwen3_vl"), adapter_of("qwen3_vl")),
                tmp_path / "out",
                ExportSettings("merged"),
                prompts=drawn_prompts(1),
            )
        assert not list(tmp_path.iterdir())

    def test_a_bound_that_is_not_met(self, base_of, adapter_of, tmp_path) -> None:
        with pytest.raises(ExportError, match=r"does not answer as what was trained: .*bound 1e-09.*tensors that differ most.*--bound"):
            export(
                settings_of(base_of("qwen3_vl"), adapter_of("qwen3_vl")),
                tmp_path / "out",
                ExportSettings("merged", bound=1e-9),
                prompts=drawn_prompts(1),
            )
        assert not list(tmp_path.iterdir())

    def test_a_folder_with_something_in_it(self, base_of, adapter_of, tmp_path) -> None:
        (tmp_path / "mine").write_text("")
        with pytest.raises(ExportError, match="exists already"):
            export(settings_of(base_of("qwen3_vl"), adapter_of("qwen3_vl")), tmp_path, ExportSettings("merged"), prompts=drawn_prompts(1))


@pytest.mark.parametrize(
    "given", [{"to": "onnx"}, {"to": "merged", "dtype": "int8"}, {"to": "merged", "dtype": "float32", "rounding": "stochastic"}]
)
def test_settings_that_do_not_go(given: dict) -> None:
    with pytest.raises(ExportError):
        ExportSettings(**given)
