"""Patches, bit for bit those of transformers' own processors."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finesight.data.conversation import MediaRef, Part
from finesight.data.pixels import cut_patches, value_table, visual_patches
from finesight.data.processor import Processor, load_processor
from finesight.data.visual import measure
from finesight.data_settings import DataSettings
from finesight.errors import MediaError
from tiny import tiny_checkpoint


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("pixels") / request.param, request.param)
    return load_processor(folder, data=DataSettings(min_pixels=2000, max_pixels=60_000, video_min_pixels=2000, video_max_pixels=60_000))


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), np.random.default_rng(seed).bytes(width * height * channels))


def patches_of(processor: Processor, part: Part) -> np.ndarray:
    return visual_patches(measure(part, processor).item(()), processor)


def library_patches(processor: Processor, image: Image.Image) -> np.ndarray:
    limits = processor.image_limits
    size = {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
    return processor.image_processor(images=[image], size=size, return_tensors="np")["pixel_values"]


@pytest.mark.parametrize("size", [(100, 80), (640, 480), (31, 400), (28, 28), (64, 64), (333, 7)])
def test_images_equal_the_real_processor_bit_for_bit(processor: Processor, size: tuple[int, int]) -> None:
    image = picture(*size)
    found = patches_of(processor, Part("image", media=MediaRef(image=image)))
    expected = library_patches(processor, image)
    assert found.dtype == np.float32 and found.flags["C_CONTIGUOUS"]
    assert found.shape == expected.shape and np.array_equal(found, expected)


def test_image_files_of_any_mode(processor: Processor, tmp_path: Path) -> None:
    for mode, name in (("L", "grey.png"), ("CMYK", "print.jpg"), ("RGB", "photo.webp")):
        picture(90, 70, mode=mode).save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            expected = library_patches(processor, image.convert("RGB"))
        assert np.array_equal(patches_of(processor, Part("image", media=MediaRef(path=str(tmp_path / name)))), expected), mode
    clear = picture(90, 70, mode="RGBA")
    white = Image.alpha_composite(Image.new("RGBA", clear.size, (255, 255, 255, 255)), clear).convert("RGB")
    assert np.array_equal(patches_of(processor, Part("image", media=MediaRef(image=clear))), library_patches(processor, white))


def test_sizes_of_the_row_are_honoured(processor: Processor) -> None:
    factor, image = processor.layout.factor, picture(200, 100)
    part = Part("image", media=MediaRef(image=image), resized_height=2 * factor + 3, resized_width=3 * factor - 3)
    resized = image.resize((3 * factor, 2 * factor), Image.Resampling.BICUBIC)
    expected = processor.image_processor(images=[resized], do_resize=False, return_tensors="np")["pixel_values"]
    assert np.array_equal(patches_of(processor, part), expected)
    limited = Part("image", media=MediaRef(image=image), min_pixels=factor**2, max_pixels=2 * factor**2)
    size = {"shortest_edge": factor**2, "longest_edge": 2 * factor**2}
    expected = processor.image_processor(images=[image], size=size, return_tensors="np")["pixel_values"]
    assert np.array_equal(patches_of(processor, limited), expected)


def published_patchify(frames: np.ndarray, patch: int, merge: int, pair: int) -> np.ndarray:
    """`patchify` of the transformers video processors, for one video of shape (frames, channels, height, width)."""
    if pad := -len(frames) % pair:
        frames = np.concatenate([frames, np.repeat(frames[-1:], pad, axis=0)])
    t, channels, height, width = len(frames) // pair, *frames.shape[1:]
    h, w = height // patch, width // patch
    view = frames.reshape(t, pair, channels, h // merge, merge, patch, w // merge, merge, patch)
    return view.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, channels * pair * patch * patch)


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_videos_are_cut_as_the_real_video_processor_does(processor: Processor, count: int) -> None:
    frames = [picture(90, 60, seed) for seed in range(count)]
    part = Part("video", media=MediaRef(frames=tuple(MediaRef(image=frame) for frame in frames)), fps=2.0)
    item = measure(part, processor).item(())
    found = visual_patches(item, processor)
    size = (item.resized_width, item.resized_height)
    library = processor.image_processor
    values = np.stack([np.asarray(frame.resize(size, Image.Resampling.BICUBIC)).transpose(2, 0, 1) for frame in frames])
    normal = np.stack(
        [library.normalize(library.rescale(v, library.rescale_factor), library.image_mean, library.image_std) for v in values]
    )
    layout = processor.layout
    expected = published_patchify(normal.astype(np.float32), layout.patch_size, layout.merge_size, layout.temporal_patch_size)
    assert found.shape == (item.grid.patches, 3 * 2 * layout.patch_size**2)
    assert np.array_equal(found, expected)


def test_the_real_video_processor_makes_the_same_of_frames_that_keep_their_size(processor: Processor) -> None:
    """Its resizing differs from PIL's by a hair; all the rest does not."""
    module, name = ("qwen3_vl", "Qwen3VL") if processor.family.video_timestamps else ("qwen2_vl", "Qwen2VL")
    try:
        importlib.import_module("torchvision")
        real_class = getattr(importlib.import_module(f"transformers.models.{module}.video_processing_{module}"), f"{name}VideoProcessor")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"transformers' video processors need a working torchvision: {error}")
    factor, library = processor.layout.factor, processor.image_processor
    real = real_class(
        size={"shortest_edge": factor**2, "longest_edge": 100 * factor**2}, image_mean=library.image_mean, image_std=library.image_std
    )
    frames = [np.asarray(picture(3 * factor, 2 * factor, seed)) for seed in range(5)]
    video = torch.from_numpy(np.stack(frames).transpose(0, 3, 1, 2))
    expected = real([video], return_tensors="pt", do_sample_frames=False)["pixel_values_videos"].numpy()
    found = cut_patches(frames, processor)
    assert found.shape == expected.shape and np.abs(found - expected).max() < 1e-5


def test_an_image_is_a_video_of_itself_twice(processor: Processor) -> None:
    side = 2 * processor.layout.factor
    frame = np.asarray(picture(side, side))
    assert np.array_equal(cut_patches([frame], processor), cut_patches([frame, frame], processor))


def test_value_table_follows_the_settings_of_the_image_processor(processor: Processor) -> None:
    table = value_table(processor)
    assert table.shape == (3, 256) and table.dtype == np.float32
    plain = replace(processor, image_settings={**processor.image_settings, "do_rescale": False, "do_normalize": False})
    assert np.array_equal(value_table(plain)[1], np.arange(256, dtype=np.float32))


def test_missing_files_say_so(processor: Processor, tmp_path: Path) -> None:
    picture(64, 64).save(tmp_path / "gone.png")
    item = measure(Part("image", media=MediaRef(path=str(tmp_path / "gone.png"))), processor).item(())
    (tmp_path / "gone.png").unlink()
    with pytest.raises(MediaError, match=r"gone\.png"):
        visual_patches(item, processor)
