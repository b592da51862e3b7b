"""Whole runs: what is left on the disk, going on from an adapter, the Python API."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from finesight.errors import CheckpointError, DataError, ModelError, RecipeError
from finesight.models.adapter_metadata import read_metadata
from finesight.models.adapters import apply_tuning
from finesight.models.load import load
from finesight.recipe import TuningSettings
from finesight.recipe_files import load_recipe
from finesight.training.checkpoint import verify_checkpoint
from finesight.training.run import train
from finesight.training.telemetry import read_metrics
from finesight.training.trainers import SFTTrainer
from tiny import tiny_checkpoint
from tiny_runs import MAX_PIXELS, MIN_PIXELS, tiny_recipe, write_rows


@pytest.fixture(scope="module")
def finished(checkpoint, rows, tmp_path_factory):
    """A run of an adapter, and what it printed."""
    out = io.StringIO()
    output_dir = tmp_path_factory.mktemp("runs") / "lora"
    recipe = tiny_recipe(checkpoint, rows, output_dir, training={"num_train_epochs": 2, "logging_steps": 2})
    return recipe, train(recipe, console=Console(file=out, width=300)), out.getvalue()


def test_what_a_run_leaves(finished):
    recipe, result, _ = finished
    assert result.adapter_dir == result.weights_dir == Path(recipe.training.output_dir) / "adapter"
    verify_checkpoint(result.adapter_dir)
    assert {p.name for p in result.adapter_dir.iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "finesight.json",
        "recipe.yaml",
    }
    metadata = read_metadata(result.adapter_dir)
    assert (metadata.min_pixels, metadata.max_pixels, metadata.family) == (MIN_PIXELS, MAX_PIXELS, "qwen3_vl")
    assert load_recipe(result.output_dir / "recipe.yaml") == recipe
    run = json.loads((result.output_dir / "run.json").read_text())
    assert run["stop_reason"] == "finished" and torch.__version__.startswith(run["versions"]["torch"]) and run["state"]["step"] == 6
    assert (
        [line["step"] for line in read_metrics(result.output_dir / "metrics.jsonl")]
        == [2, 4, 6]
        == [line["step"] for line in result.history]
    )


def test_what_a_run_prints(finished):
    _, result, printed = finished
    assert "5,568 of 184,704 parameters train" in printed
    assert "6 steps of 4 samples (2 epochs of 3 steps)" in printed and "sharing ratio" in printed
    assert f"saved {result.output_dir / 'checkpoint-6'}" in printed and f"weights: {result.adapter_dir}" in printed


def test_the_adapter_loads_and_answers_like_the_model_in_memory(finished, checkpoint):
    _, result, _ = finished
    loaded = load(checkpoint, result.adapter_dir)
    assert loaded.processor.image_limits.max_pixels == MAX_PIXELS
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids).logits, result.model(input_ids=ids).logits)


def test_going_on_from_an_adapter(finished, checkpoint, rows, tmp_path):
    _, first, _ = finished
    recipe = tiny_recipe(
        checkpoint,
        rows,
        tmp_path / "more",
        model={"adapter": str(first.adapter_dir)},
        tuning={"r": 99},
        training={"max_steps": 1, "learning_rate": 1e-3},
    )
    second = train(recipe)
    a, b = (load_file(result.adapter_dir / "adapter_model.safetensors") for result in (first, second))
    assert a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)  # its own rank, not 99
    moved = max((a[name] - b[name]).abs().max().item() for name in a)
    assert 0 < moved < 2e-3  # one small step away from where the first run ended


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_an_adapter_over_a_quantised_base(rows, tmp_path, family):
    """Trained, told beside the adapter, and loaded over the same base and over one in full precision."""
    base = tiny_checkpoint(tmp_path / "base", family)
    precision = {"load_in_4bit": True, "quantize_vocabulary": True, "quantize_tower": True}
    recipe = tiny_recipe(base, rows, tmp_path / "run", model=precision, training={"num_train_epochs": 4})
    result = train(recipe)
    losses = [line["loss"] for line in result.history]
    assert losses[-1] < losses[0]
    metadata = read_metadata(result.adapter_dir)
    assert (metadata.quantization, metadata.quantize_vocabulary, metadata.quantize_tower) == ("4bit", True, True)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = result.model(input_ids=ids).logits
        same, other = load(base, result.adapter_dir, **precision), load(base, result.adapter_dir)
        assert torch.allclose(same.model(input_ids=ids).logits, expected, atol=1e-5)
        assert not torch.allclose(other.model(input_ids=ids).logits, expected, atol=1e-3)
    assert any("trained over a base in 4bit" in note for note in other.notes) and not any("trained over" in n for n in same.notes)
    other.model.merge_and_unload()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_full_tuning_leaves_a_checkpoint_that_loads(rows, tmp_path, family):
    base = tiny_checkpoint(tmp_path / "base", family)
    recipe = tiny_recipe(
        base, rows, tmp_path / "run", tuning={"method": "full", "finetune_merger": True}, training={"max_steps": 2, "learning_rate": 1e-3}
    )
    result = train(recipe)
    assert result.adapter_dir is None and result.weights_dir == tmp_path / "run" / "model"
    again = load(result.weights_dir)
    own = dict(result.model.named_parameters())
    assert all(torch.equal(parameter, own[name]) for name, parameter in again.model.named_parameters())
    before = dict(load(base).model.named_parameters())
    moved = {
        name.split(".")[1] if "merger" not in name else "merger"
        for name, p in again.model.named_parameters()
        if not torch.equal(p, before[name])
    }
    assert moved == {"language_model", "merger", "weight"}  # lm_head.weight; the tower stayed
    assert read_metadata(result.weights_dir).max_pixels == MAX_PIXELS
    # The model of one run is the base of the next.
    assert train(tiny_recipe(result.weights_dir, rows, tmp_path / "next", training={"max_steps": 1})).state.step == 1


def test_adapters_on_experts_train_are_resumed_and_answer(rows, tmp_path):
    base = tiny_checkpoint(tmp_path / "base", "qwen3_vl_moe")

    def run(**training):
        settings = dict(max_steps=3, save_strategy="steps", save_steps=1) | training
        return train(tiny_recipe(base, rows, tmp_path / "run", tuning={"finetune_experts": True}, training=settings))

    whole = run()
    expected = load_file(whole.adapter_dir / "adapter_model.safetensors")
    for folder in ("checkpoint-3", "adapter"):
        shutil.rmtree(tmp_path / "run" / folder)
    found = load_file(run(resume=True).adapter_dir / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)  # bit for bit
    assert sum(".experts." in name and bool(value.any()) for name, value in expected.items()) == 3 * 4  # B has left zero
    answering = load(base, whole.adapter_dir)
    ids = torch.arange(70, 90)[None]
    inputs = dict(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids))
    with torch.no_grad():  # as loaded, and as trained: transformers' forward over either
        assert torch.allclose(answering.model(**inputs).logits, whole.model(**inputs).logits, atol=1e-4)
    console = Console(file=io.StringIO(), width=200)
    train(
        tiny_recipe(
            base, rows, tmp_path / "next", model={"adapter": str(whole.adapter_dir)}, tuning={"finetune_experts": False},
            training={"max_steps": 1},
        ),
        console=console,
    )  # fmt: skip
    assert "tuning.finetune_experts: False is not used" in console.file.getvalue()


def test_tensorboard_gets_the_figures(checkpoint, rows, tmp_path):
    train(tiny_recipe(checkpoint, rows, tmp_path / "run", training={"max_steps": 2, "report_to": "tensorboard"}))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(tmp_path / "run" / "logs" / "finesight"))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("train/loss")] == [1, 2]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_tracker_is_refused_before_anything_else(checkpoint, rows, tmp_path):
    with pytest.raises(RecipeError, match="wandb is not installed"):
        train(tiny_recipe(checkpoint, rows, tmp_path / "run", training={"report_to": "wandb"}))
    assert not (tmp_path / "run").exists()


def test_the_adapter_of_another_run_is_not_overwritten(finished):
    recipe, _, _ = finished
    with pytest.raises(CheckpointError, match="earlier run"):
        train(recipe)
    quiet = recipe.model_copy(update={"training": recipe.training.model_copy(update={"save_strategy": "no"})})
    with pytest.raises(CheckpointError, match="earlier run"):
        train(quiet)


SETTINGS = dict(r=4, lora_alpha=8, dtype="float32", min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, train_batch_size=4, learning_rate=1e-2)


def silent() -> Console:
    return Console(quiet=True)


def test_trainer_takes_the_same_path_as_a_recipe(finished, checkpoint, rows, tmp_path):
    _, result, _ = finished
    trainer = SFTTrainer(
        checkpoint, train_dataset=rows, output_dir=tmp_path / "run", token_budget=256, num_train_epochs=2, console=silent(), **SETTINGS
    )
    own = trainer.train()
    a, b = (load_file(r.adapter_dir / "adapter_model.safetensors") for r in (result, own))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert trainer.model is own.model and trainer.processor.image_limits.max_pixels == MAX_PIXELS


def test_trainer_takes_dicts_with_pictures_and_a_loaded_model(checkpoint, tmp_path):
    picture = Image.new("RGB", (48, 40), (200, 10, 10))
    row = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "colour?"}]}, {"role": "assistant", "content": "red"}],
           "images": [picture]}  # fmt: skip
    loaded = load(checkpoint, dtype="float32")
    trainer = SFTTrainer(
        loaded,
        train_dataset=[row] * 5,
        eval_dataset=[row],
        eval_strategy="epoch",
        output_dir=tmp_path / "run",
        console=silent(),
        **SETTINGS,
    )
    result = trainer.train()
    assert result.state.step == 2 and result.state.best_metric is not None
    assert trainer.processor.image_limits.max_pixels == MAX_PIXELS  # the setting counts for a loaded model too


def test_trainer_takes_a_datasets_dataset(checkpoint, tmp_path):
    import datasets

    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(6)]
    trainer = SFTTrainer(
        str(checkpoint), train_dataset=datasets.Dataset.from_list(rows), output_dir=tmp_path / "run", console=silent(), **SETTINGS
    )
    assert trainer.train().plan.num_samples == 6


def test_trainer_starts_from_a_recipe_and_settings_go_before_it(checkpoint, rows, tmp_path):
    trainer = SFTTrainer(recipe=tiny_recipe(checkpoint, rows, tmp_path / "run"), r=2, seed=9, console=silent())
    assert (trainer.recipe.tuning.r, trainer.recipe.tuning.lora_alpha, trainer.recipe.training.seed) == (2, 8, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, "learning_rate"),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, "train_batch_size=8"),
        ({"eval_strategy": "epoch"}, "eval_split"),
    ],
)
def test_trainer_refuses_unknown_settings_with_the_equivalent(checkpoint, settings, message):
    with pytest.raises(RecipeError, match=message):
        SFTTrainer(checkpoint, train_dataset=[], console=silent(), **settings)


class TestOnAQuantisedModel:
    """A model that was loaded in fewer bits before it is handed over."""

    ROWS = ({"prompt": "question", "completion": "answer"},) * 4

    @pytest.fixture
    def loaded(self, checkpoint):
        return load(checkpoint, device="cpu", load_in_8bit=True, quantize_tower=True)

    def test_full_tuning_is_refused(self, loaded, tmp_path):
        with pytest.raises(RecipeError, match=r"model\.load_in_8bit is for tuning\.method: lora"):
            SFTTrainer(loaded, train_dataset=self.ROWS, output_dir=tmp_path / "run", method="full", console=silent(), **SETTINGS)
        with pytest.raises(ModelError, match=r"tuning\.method: full trains the weights themselves.*quantised"):
            apply_tuning(loaded.model, TuningSettings(method="full"), loaded.family, seed=0)

    def test_its_precision_is_that_of_the_run(self, loaded, tmp_path):
        trainer = SFTTrainer(loaded, train_dataset=self.ROWS, output_dir=tmp_path / "run", console=silent(), max_steps=1, **SETTINGS)
        assert trainer.recipe.model.load_in_8bit and trainer.recipe.model.quantize_tower
        metadata = read_metadata(trainer.train().adapter_dir)
        assert (metadata.quantization, metadata.quantize_tower, metadata.quantize_vocabulary) == ("8bit", True, False)

    def test_another_precision_is_refused(self, loaded):
        for settings in ({"load_in_4bit": True}, {"load_in_8bit": False}):
            with pytest.raises(RecipeError, match="but the model was loaded with"):
                SFTTrainer(loaded, train_dataset=self.ROWS, console=silent(), **settings)


def test_trainer_refuses_rows_that_are_none(checkpoint, tmp_path):
    with pytest.raises(DataError, match="no rows"):
        SFTTrainer(checkpoint, train_dataset=[], output_dir=tmp_path / "a", console=silent()).train()
    with pytest.raises(DataError, match="not int"):
        SFTTrainer(checkpoint, train_dataset=[1], output_dir=tmp_path / "b", console=silent()).train()
    user = [{"type": "image", "image": "none.png"}, {"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": "This."}]}
    with pytest.raises(DataError, match=r"looked in the present folder, .*, since the rows are in memory"):
        SFTTrainer(checkpoint, train_dataset=[row], output_dir=tmp_path / "c", console=silent()).train()


def test_a_video_of_given_frames_goes_the_whole_way(checkpoint, tmp_path):
    folder = tmp_path / "frames"
    path = write_rows(folder, images=4, questions=1, text_rows=0)
    frames = [f"image-{i}.png" for i in range(4)]
    for name in frames:
        Image.open(folder / name).resize((48, 40)).save(folder / name)
    row = {"messages": [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "read the number"}]},
                        {"role": "assistant", "content": "the value"}]}  # fmt: skip
    path.write_text(json.dumps(row) + "\n")
    recipe = tiny_recipe(checkpoint, path, tmp_path / "run", data={"video_min_pixels": MIN_PIXELS, "video_max_pixels": 4 * MAX_PIXELS})
    assert train(recipe).state.num_samples == 1


def test_an_adapter_to_go_on_from_keeps_its_shape_and_the_run_says_so(checkpoint, rows, tmp_path):
    first = train(tiny_recipe(checkpoint, rows, tmp_path / "first", tuning={"r": 4}))
    console = Console(file=io.StringIO(), width=200)
    recipe = tiny_recipe(checkpoint, rows, tmp_path / "second", model={"adapter": str(first.adapter_dir)}, tuning={"r": 16})
    second = train(recipe, console=console)
    assert "tuning.r: 16 is not used" in console.file.getvalue()
    assert load_recipe(second.output_dir / "recipe.yaml").tuning.r == 4


def test_an_output_folder_that_cannot_be_made_is_told_before_loading(checkpoint, rows, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RecipeError, match=r"training\.output_dir"):
        train(tiny_recipe(checkpoint, rows, tmp_path / "taken"))


def test_what_loading_says_is_said_once(checkpoint, rows, tmp_path, caplog):
    """Going on from an adapter that other software wrote: the log says that its pixel limits are not known, no note repeats it."""
    first = train(tiny_recipe(checkpoint, rows, tmp_path / "first", training={"max_steps": 1}))
    adapter = shutil.copytree(first.adapter_dir, tmp_path / "foreign")
    (adapter / "finesight.json").unlink()
    console = Console(file=io.StringIO(), width=400)
    caplog.clear()
    model = {"adapter": str(adapter)}
    train(tiny_recipe(checkpoint, rows, tmp_path / "second", model=model, tuning={"r": 2}, training={"max_steps": 1}), console=console)
    printed = console.file.getvalue()
    assert (caplog.text + printed).count("has no finesight.json") == 1
    assert "Note: tuning.r: 2 is not used" in printed  # what was found before is still a note
