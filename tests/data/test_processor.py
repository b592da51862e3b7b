"""Processors read from checkpoint folders: templates, limits, what is refused, where names come from."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import sys
import types
from pathlib import Path

import pytest
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from finesight.data.processor import checkpoint_folder, load_processor
from finesight.data_settings import DataSettings
from finesight.errors import ModelError, RecipeError
from finesight.families import QWEN3_VL
from finesight.geometry import PatchLayout, PixelLimits
from tiny import CHAT_TEMPLATE, FAMILIES, tiny_checkpoint


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / request.param, request.param)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small files of a checkpoint: no weights are needed for any of these tests."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("qwen3") / "checkpoint", "qwen3_vl")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def folder(qwen3: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(qwen3, tmp_path / "checkpoint"))


def change(file: Path, **values: object) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(content | values), encoding="utf-8")


def test_every_family_is_read(checkpoint: tuple[str, Path]) -> None:
    family, folder = checkpoint
    processor = load_processor(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert processor.family.model_type == family
    assert processor.layout == PatchLayout(processor.family.patch_size, 2, 2)
    assert processor.image_limits == PixelLimits(*((3136, 12845056) if family == "qwen2_5_vl" else (65536, 16777216)))
    assert processor.video_limits == PixelLimits(processor.family.video_min_pixels, processor.family.video_max_pixels)
    assert processor.image_token_id == config.image_token_id
    assert processor.tokenizer.convert_ids_to_tokens(processor.vision_end_token_id) == "<|vision_end|>"
    assert processor.chat_template == CHAT_TEMPLATE
    assert processor.tokens_per_second == (2.0 if family == "qwen2_5_vl" else 1.0)
    assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessorPil"
    assert (processor.fps, processor.max_frames) == (2.0, 768)


def test_loading_says_nothing_of_backends(qwen3: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            load_processor(qwen3)
    finally:
        transformers.utils.logging.disable_propagation()
    assert "torchvision" not in caplog.text
    assert capfd.readouterr().err == ""


def test_a_processor_can_be_pickled(qwen3: Path) -> None:
    processor = load_processor(qwen3)
    copy = pickle.loads(pickle.dumps(processor))
    assert copy.layout == processor.layout
    assert copy.tokenizer("the value")["input_ids"] == processor.tokenizer("the value")["input_ids"]


def test_limits_of_the_recipe_go_first(qwen3: Path) -> None:
    data = DataSettings(min_pixels=1024, max_pixels=50_176, video_max_pixels=100_000, fps=1.0, max_frames=16)
    processor = load_processor(qwen3, data=data)
    assert processor.image_limits == PixelLimits(1024, 50_176)
    assert processor.video_limits == PixelLimits(QWEN3_VL.video_min_pixels, 100_000)
    assert (processor.fps, processor.max_frames) == (1.0, 16)
    # An upper limit alone takes the checkpoint's lower one (65,536) down with it.
    assert load_processor(qwen3, data=DataSettings(max_pixels=50_176)).image_limits == PixelLimits(50_176, 50_176)


def test_limits_below_one_token_are_refused(qwen3: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.min_pixels and data\.max_pixels: max_pixels of 1000 .* 32 × 32 = 1024"):
        load_processor(qwen3, data=DataSettings(max_pixels=1000))
    with pytest.raises(RecipeError, match=r"data\.video_min_pixels and .* more than max_pixels"):
        load_processor(qwen3, data=DataSettings(video_min_pixels=20_000, video_max_pixels=10_000))


@pytest.mark.parametrize("declared", [None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"])
def test_the_tokenizer_is_the_one_that_transformers_chooses(folder: Path, declared: str | None) -> None:
    """Its class is named here without asking AutoTokenizer, which loads torch."""
    change(folder / "tokenizer_config.json", tokenizer_class=declared)
    ours, chosen = load_processor(folder).tokenizer, transformers.AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(chosen)
    text = "read the Number 2026 in\n\nthe image: 图片里有什么？ I'm   <|im_end|>"
    assert ours(text)["input_ids"] == chosen(text)["input_ids"]
    assert ours.get_vocab() == chosen.get_vocab()


def test_another_tokenizer_class_is_left_to_transformers(folder: Path) -> None:
    change(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    assert type(load_processor(folder).tokenizer) is type(transformers.AutoTokenizer.from_pretrained(folder))


def test_what_config_json_leaves_out_is_as_transformers_has_it(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "qwen2_5_vl")
    config = json.loads((folder / "config.json").read_text())
    for key in ("tokens_per_second", "spatial_merge_size"):
        del config["vision_config"][key]
    (folder / "config.json").write_text(json.dumps(config))
    vision = transformers.AutoConfig.from_pretrained(folder).vision_config
    processor = load_processor(folder)
    assert processor.tokens_per_second == float(vision.tokens_per_second)
    assert processor.layout.merge_size == vision.spatial_merge_size


@pytest.mark.parametrize(
    "settings",
    [
        {},  # all of it left out
        {"size": {"shortest_edge": 4096, "longest_edge": 90_000}},
        {"min_pixels": 5000, "max_pixels": 70_000},
        {"size": {"shortest_edge": 4096, "longest_edge": 90_000}, "max_pixels": 70_000},
    ],
)
def test_image_settings_mean_what_the_image_processor_takes_them_for(tmp_path: Path, settings: dict[str, object]) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "qwen2_5_vl")
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = load_processor(folder)
    library = Qwen2VLImageProcessorPil.from_pretrained(folder)
    assert processor.image_limits == PixelLimits(library.size["shortest_edge"], library.size["longest_edge"])
    assert processor.layout == PatchLayout(library.patch_size, library.merge_size, library.temporal_patch_size)
    assert processor.image_processor.to_dict() == library.to_dict()


def test_an_image_half_of_processor_config_goes_first(folder: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    nested = settings | {"size": {"shortest_edge": 4096, "longest_edge": 50_000}}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    processor = load_processor(folder)
    assert processor.image_limits == PixelLimits(4096, 50_000)
    assert processor.image_processor.to_dict() == Qwen2VLImageProcessorPil.from_pretrained(folder).to_dict()


def test_image_settings_that_the_library_refuses_say_where_they_stand(folder: Path) -> None:
    change(folder / "preprocessor_config.json", size={"height": 4, "depth": 4})
    with pytest.raises(ModelError, match=r"preprocessor_config\.json of the checkpoint cannot be used"):
        load_processor(folder).image_processor  # noqa: B018


def test_limits_of_the_checkpoint(folder: Path) -> None:
    (folder / "processor_config.json").write_text(
        json.dumps({"video_processor": {"size": {"shortest_edge": 5000, "longest_edge": 50_000}}})
    )
    assert load_processor(folder).video_limits == PixelLimits(5000, 50_000)
    change(folder / "video_preprocessor_config.json", size={"shortest_edge": 4096, "longest_edge": 4_000_000})
    assert load_processor(folder).video_limits == PixelLimits(4096, 4_000_000)
    change(folder / "video_preprocessor_config.json", size=None, min_pixels=6000, max_pixels=60_000)  # as older checkpoints have it
    assert load_processor(folder).video_limits == PixelLimits(6000, 60_000)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    del settings["size"]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"min_pixels": 4096, "max_pixels": 8192}))
    assert load_processor(folder).image_limits == PixelLimits(4096, 8192)
    change(folder / "preprocessor_config.json", max_pixels=100)
    with pytest.raises(ModelError, match="checkpoint's pixel limits"):
        load_processor(folder)


def test_sources_of_the_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("from jinja")
    change(folder / "chat_template.json", chat_template="from json")
    assert load_processor(folder).chat_template == "from jinja"
    (folder / "chat_template.jinja").unlink()
    assert load_processor(folder).chat_template == "from json"
    (folder / "chat_template.json").unlink()
    change(folder / "tokenizer_config.json", chat_template="from the tokenizer")
    assert load_processor(folder).chat_template == "from the tokenizer"
    change(folder / "tokenizer_config.json", chat_template=None)
    with pytest.raises(ModelError, match="no chat template"):
        load_processor(folder)


def test_what_is_no_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    change(adapter / "adapter_config.json", base_model_name_or_path="Qwen/Qwen3-VL-8B-Instruct")
    with pytest.raises(ModelError, match=r"Set model\.adapter to it .*Qwen/Qwen3-VL-8B-Instruct"):
        load_processor(adapter)
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load_processor(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        load_processor(tmp_path / "missing")
    with pytest.raises(ModelError, match="is a file"):
        load_processor(folder / "config.json")
    (folder / "video_preprocessor_config.json").write_text("{broken")
    with pytest.raises(ModelError, match=r"video_preprocessor_config\.json is not valid JSON"):
        load_processor(folder)


def test_the_folder_of_a_run_leads_to_what_was_trained(tmp_path: Path) -> None:
    for kind, file in (("adapter", "adapter_config.json"), ("model", "config.json")):
        inside = tmp_path / f"run_{kind}" / kind
        inside.mkdir(parents=True)
        change(inside / file)
        setting = {"adapter": "model.adapter", "model": "model.name_or_path"}[kind]
        with pytest.raises(ModelError, match=rf"holds no config\.json\. What was trained is in it: set {setting} to {inside}"):
            load_processor(inside.parent)


def test_parts_of_different_models_are_refused(folder: Path) -> None:
    change(folder / "preprocessor_config.json", patch_size=14)
    with pytest.raises(ModelError, match=r"patch_size=14.* expects .*patch_size=16"):
        load_processor(folder)
    change(folder / "preprocessor_config.json", patch_size=16)
    change(folder / "config.json", image_token_id=300)
    with pytest.raises(ModelError, match=r"image_token_id .* is 300, which is no special token"):
        load_processor(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"preprocessor_config\.json cannot be read"):
        load_processor(folder)


def test_other_models_are_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ModelError, match="'qwen2' is not supported"):
        load_processor(folder)


def test_a_name_that_is_not_cached_is_refused_without_a_network() -> None:
    with pytest.raises(ModelError, match=r"Qwen/no-such-model is neither a folder here nor in the cache of the hub .*HF_HUB_OFFLINE"):
        load_processor("Qwen/no-such-model")


def test_names_and_folders(folder: Path) -> None:
    assert checkpoint_folder(folder) == str(folder)
    assert checkpoint_folder(folder, "modelscope") == str(folder)  # a folder is a folder, whatever the hub
    for missing in ("./gone", "../gone", "~/gone", "a/b/c"):
        with pytest.raises(ModelError, match="does not exist"):
            checkpoint_folder(missing)


def test_modelscope_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelError, match="pip install modelscope"):
        checkpoint_folder("Qwen/Qwen3-VL-8B-Instruct", "modelscope")


def test_modelscope_is_asked_for_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package needs the network for everything, so its one function is stood in for."""
    asked: list[tuple[str, str | None, bool]] = []

    def snapshot_download(model_id: str, revision: str | None = None, ignore_file_pattern: list[str] | None = None) -> str:
        asked.append((model_id, revision, ignore_file_pattern is None))
        if model_id == "Qwen/gone":
            raise RuntimeError("404")
        return str(folder)

    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert checkpoint_folder("Qwen/Qwen3-VL-8B-Instruct", "modelscope", "v1") == str(folder)
    assert load_processor("Qwen/Qwen3-VL-8B-Instruct", hub="modelscope", revision="v1").family == QWEN3_VL
    assert asked == [("Qwen/Qwen3-VL-8B-Instruct", "v1", True), ("Qwen/Qwen3-VL-8B-Instruct", "v1", False)]
    with pytest.raises(ModelError, match="Qwen/gone cannot be fetched from ModelScope: 404"):
        checkpoint_folder("Qwen/gone", "modelscope")
