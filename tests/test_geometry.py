"""Sizes, grids, frames, times and positions, held equal to transformers' processors and models."""

from __future__ import annotations

import importlib
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as real_image_resize
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as real_video_resize
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeModel

from finesight import geometry
from finesight.errors import DataError
from finesight.families import FAMILIES, QWEN2_5_VL, QWEN3_VL
from finesight.geometry import Grid, PatchLayout, PixelLimits
from tiny import FAMILIES as FAMILY_NAMES
from tiny import tiny_config

LAYOUTS = (PatchLayout(14), PatchLayout(16), PatchLayout(8))


def random_side(rng: random.Random) -> int:
    return int(math.exp(rng.uniform(0, math.log(6000))))


def random_limits(rng: random.Random, layout: PatchLayout, frames: int = 1) -> PixelLimits:
    low = layout.token_pixels * frames * rng.randint(1, 300) + rng.randint(-5, 5)
    return PixelLimits(low, low + rng.randint(layout.token_pixels, layout.token_pixels * frames * 5000))


def test_image_sizes_equal_the_real_processor_on_thousands_of_sizes() -> None:
    rng = random.Random(0)
    compared = 0
    for _ in range(8000):
        layout = rng.choice(LAYOUTS)
        limits = random_limits(rng, layout)
        height, width = random_side(rng), random_side(rng)
        try:
            expected = real_image_resize(height, width, layout.factor, limits.min_pixels, limits.max_pixels)
        except ValueError:
            with pytest.raises(DataError, match="200 times as long"):
                geometry.resized_image_size(height, width, layout, limits)
            continue
        compared += 1
        assert geometry.resized_image_size(height, width, layout, limits) == expected, (height, width, layout, limits)
    assert compared > 5000


def test_image_tokens_equal_the_real_processor_class() -> None:
    rng = random.Random(1)
    for family in (QWEN2_5_VL, QWEN3_VL):
        layout = PatchLayout(family.patch_size)
        limits = PixelLimits(family.image_min_pixels, family.image_max_pixels)
        processor = Qwen2VLImageProcessorPil(
            patch_size=layout.patch_size, size={"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
        )
        for _ in range(1500):
            height, width = rng.randint(20, 4000), rng.randint(20, 4000)
            grid = geometry.image_grid(height, width, layout, limits)
            assert grid.t == 1
            assert grid.patches == processor.get_number_of_image_patches(height, width, {})
            assert layout.visual_tokens(grid) * layout.merge_size**2 == grid.patches


def test_known_image_sizes() -> None:
    qwen3 = PatchLayout(16), PixelLimits(QWEN3_VL.image_min_pixels, QWEN3_VL.image_max_pixels)
    qwen2_5 = PatchLayout(14), PixelLimits(QWEN2_5_VL.image_min_pixels, QWEN2_5_VL.image_max_pixels)
    assert geometry.resized_image_size(1080, 1920, *qwen3) == (1088, 1920)
    assert qwen3[0].visual_tokens(geometry.image_grid(1080, 1920, *qwen3)) == 34 * 60
    assert geometry.resized_image_size(1080, 1920, *qwen2_5) == (1092, 1932)
    assert qwen2_5[0].visual_tokens(geometry.image_grid(1080, 1920, *qwen2_5)) == 39 * 69
    assert geometry.image_grid(1, 1, *qwen3) == Grid(1, 16, 16)


def transcribed_qwen3_video_resize(frames: int, height: int, width: int, pair: int, factor: int, low: int, high: int) -> tuple[int, int]:
    """The published formula, written down a second time; frames must be at least one pair."""
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > 200:
        raise ValueError
    h, w, t = round(height / factor) * factor, round(width / factor) * factor, round(frames / pair) * pair
    if t * h * w > high:
        beta = math.sqrt((frames * height * width) / high)
        return max(factor, math.floor(height / beta / factor) * factor), max(factor, math.floor(width / beta / factor) * factor)
    if t * h * w < low:
        beta = math.sqrt(low / (frames * height * width))
        return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return h, w


def test_qwen3_video_sizes_equal_the_real_function_odd_frame_counts_included() -> None:
    rng = random.Random(2)
    odd = compared = 0
    for _ in range(6000):
        layout = rng.choice(LAYOUTS)
        frames = rng.choice((2, 3, 5, 7, rng.randint(2, 40), rng.randint(2, 768)))
        limits = random_limits(rng, layout, frames)
        height, width = random_side(rng), random_side(rng)
        arguments = frames, height, width, layout.temporal_patch_size, layout.factor, limits.min_pixels, limits.max_pixels
        try:
            expected = real_video_resize(*arguments)
        except ValueError:
            with pytest.raises(DataError, match="200 times as long"):
                geometry.resized_video_size(frames, height, width, layout, limits, QWEN3_VL)
            continue
        odd, compared = odd + frames % 2, compared + 1
        assert transcribed_qwen3_video_resize(*arguments) == expected
        assert geometry.resized_video_size(frames, height, width, layout, limits, QWEN3_VL) == expected, arguments
        grid = geometry.video_grid(frames, height, width, layout, limits, QWEN3_VL)
        assert grid == (math.ceil(frames / 2), expected[0] // layout.patch_size, expected[1] // layout.patch_size)
    assert compared > 5000 and odd > 1000


def test_qwen2_5_video_sizes_are_those_of_one_frame() -> None:
    rng = random.Random(3)
    layout = PatchLayout(14)
    for _ in range(2000):
        frames, height, width = rng.randint(1, 100), rng.randint(40, 3000), rng.randint(40, 3000)
        limits = random_limits(rng, layout)
        expected = real_image_resize(height, width, 28, limits.min_pixels, limits.max_pixels)
        assert geometry.resized_video_size(frames, height, width, layout, limits, QWEN2_5_VL) == expected
        assert geometry.video_grid(frames, height, width, layout, limits, QWEN2_5_VL).t == (frames + 1) // 2


def agree(found: tuple[int, ...], real: list[int], total: int) -> bool:
    """Whether Qwen2.5-VL's frames are the same; never more than one frame apart, nor a real one missing."""
    assert len(found) <= len(real) and all(index >= total for index in real[len(found) :])
    assert max(abs(a - b) for a, b in zip(found, real, strict=False)) <= 1
    return list(found) == real[: len(found)]


def real_video_processor(module: str, name: str) -> type:
    """The real class, where torchvision works; it cannot be imported otherwise."""
    try:
        importlib.import_module("torchvision")
        return getattr(importlib.import_module(f"transformers.models.{module}"), name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"transformers' video processors need a working torchvision: {error}")


@pytest.mark.parametrize(
    ("family", "module", "name"),
    [
        (QWEN2_5_VL, "qwen2_vl.video_processing_qwen2_vl", "Qwen2VLVideoProcessor"),
        (QWEN3_VL, "qwen3_vl.video_processing_qwen3_vl", "Qwen3VLVideoProcessor"),
    ],
    ids=["qwen2_5_vl", "qwen3_vl"],
)
def test_real_video_processor_classes(family, module: str, name: str) -> None:
    layout = PatchLayout(family.patch_size)
    limits = PixelLimits(family.video_min_pixels, family.video_max_pixels // 8)
    processor = real_video_processor(module, name)(size={"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels})
    rng = random.Random(4)
    for _ in range(12):
        frames, height, width = rng.randint(2, 7), rng.randint(30, 300), rng.randint(30, 300)
        video = torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8)
        out = processor([video], return_tensors="pt", do_sample_frames=False)
        assert tuple(out["video_grid_thw"][0].tolist()) == geometry.video_grid(frames, height, width, layout, limits, family)
    rounded = 0
    for _ in range(300):
        total, native = rng.randint(2, 2000), rng.choice((8.0, 23.976, 25.0, 29.97, 30.0, 60.0))
        metadata = SimpleNamespace(total_num_frames=total, fps=native)
        asked = {"fps": rng.choice((0.3, 1.0, 2.0, 5.0))} if rng.random() < 0.7 else {"num_frames": rng.randint(2, total)}
        processor.fps = asked.get("fps")
        real = processor.sample_frames(metadata, **asked).tolist()
        found = geometry.sampled_frames(total, native, **asked, max_frames=768, layout=layout, family=family)
        if family.video_time_positions:
            rounded += not agree(found, real, total)
        else:
            assert list(found) == real, (total, native, asked)
    assert rounded < 0.05 * 300


def test_limits_override_and_checks() -> None:
    limits = PixelLimits(65536, 1_000_000)
    assert limits.override() == limits
    assert limits.override(max_pixels=50_000) == PixelLimits(50_000, 50_000)
    assert limits.override(min_pixels=2_000_000) == PixelLimits(2_000_000, 2_000_000)
    assert limits.override(4096, 8192) == PixelLimits(4096, 8192)
    PixelLimits(1, 784).check(PatchLayout(14))
    with pytest.raises(DataError, match="28 × 28 = 784 pixels"):
        PixelLimits(1, 783).check(PatchLayout(14))
    with pytest.raises(DataError, match="more than max_pixels"):
        limits.override(9000, 8000).check(PatchLayout(14))
    with pytest.raises(DataError, match="at least 1"):
        PixelLimits(0, 8000).check(PatchLayout(14))


def test_extreme_and_empty_pictures_are_refused_with_their_size() -> None:
    layout, limits = PatchLayout(16), PixelLimits(65536, 16777216)
    with pytest.raises(DataError, match="3000 × 10 pixels is more than 200 times"):
        geometry.image_grid(10, 3000, layout, limits)
    assert geometry.image_grid(10, 2000, layout, limits).h >= 2
    with pytest.raises(DataError, match="empty"):
        geometry.image_grid(0, 10, layout, limits)
    with pytest.raises(DataError, match="empty"):
        geometry.video_grid(4, 0, 10, layout, limits, QWEN3_VL)
    with pytest.raises(DataError, match="at least 2 frames"):
        geometry.video_grid(1, 64, 64, layout, limits, QWEN3_VL)
    assert geometry.video_grid(1, 64, 64, PatchLayout(14), limits, QWEN2_5_VL).t == 1


def test_rounded_size() -> None:
    layout = PatchLayout(14)
    assert geometry.rounded_size(280, 420, layout) == (280, 420)
    assert geometry.rounded_size(290, 10, layout) == (280, 28)
    with pytest.raises(DataError, match="200 times"):
        geometry.rounded_size(28, 28 * 300, layout)


def test_qwen3_frames_are_spread_from_first_to_last() -> None:
    def frames(total: int, native: float | None = 30.0, **asked) -> tuple[int, ...]:
        return geometry.sampled_frames(total, native, **({"max_frames": 768} | asked), layout=PatchLayout(16), family=QWEN3_VL)

    assert frames(300, fps=2.0) == tuple(np.linspace(0, 299, 20).round().astype(int).tolist())
    assert frames(300, fps=0.1) == (0, 100, 199, 299)  # at least four
    assert frames(3, fps=2.0) == (0, 1, 2)
    assert len(frames(30_000, fps=30.0, max_frames=16)) == 16
    assert frames(10, num_frames=3) == (0, 4, 9)
    assert len(frames(100, fps=2.0, native=29.97)) == int(100 / 29.97 * 2.0)
    assert frames(10, native=None, num_frames=2) == (0, 9)


def test_qwen2_5_frames_are_whole_pairs_at_interval_starts() -> None:
    def frames(total: int, native: float | None = 30.0, **asked) -> tuple[int, ...]:
        return geometry.sampled_frames(total, native, **({"max_frames": 768} | asked), layout=PatchLayout(14), family=QWEN2_5_VL)

    assert frames(300, fps=2.0) == tuple(range(0, 300, 15))
    assert frames(100, fps=1.0) == (0, 25, 50, 75)
    assert frames(3, fps=2.0) == (0, 1)
    assert frames(10, num_frames=5) == (0, 2, 5, 7)  # 5 halves round to the even pair
    assert len(frames(30_000, fps=30.0, max_frames=17)) == 16
    rng = random.Random(5)
    rounded = 0
    for _ in range(2000):
        total = rng.randint(2, 5000)
        count = 2 * rng.randint(1, min(total, 768) // 2)
        real = torch.arange(0, total, total / count).int().tolist()
        rounded += not agree(frames(total, num_frames=count), real, total)
    assert rounded < 0.05 * 2000  # where the real rule's float32 falls on the other side of an integer
    with pytest.raises(DataError, match="at least 2 frames"):
        frames(1, fps=2.0)
    with pytest.raises(DataError, match="lower nframes"):
        frames(4, num_frames=8)


def test_sampling_asks_for_exactly_one_rule() -> None:
    common = dict(max_frames=8, layout=PatchLayout(16), family=QWEN3_VL)
    with pytest.raises(DataError, match="not both"):
        geometry.sampled_frames(10, 30.0, fps=1.0, num_frames=2, **common)
    with pytest.raises(DataError, match="give fps or nframes"):
        geometry.sampled_frames(10, 30.0, **common)
    with pytest.raises(DataError, match="not known"):
        geometry.sampled_frames(10, None, fps=1.0, **common)
    with pytest.raises(DataError, match="at least one frame"):
        geometry.sampled_frames(10, 30.0, num_frames=0, **common)
    with pytest.raises(DataError, match="no frames"):
        geometry.sampled_frames(0, 30.0, num_frames=2, **common)


def test_timestamps_equal_the_real_processor() -> None:
    rng = random.Random(6)
    layout = PatchLayout(16)
    for _ in range(500):
        indices = sorted(rng.choices(range(3000), k=rng.randint(1, 30)))
        fps = rng.choice((24, 25.0, 29.97, 2.0, 0.7))
        real = Qwen3VLProcessor._calculate_timestamps(None, list(indices), fps, 2)
        assert geometry.frame_timestamps(indices, fps, layout) == tuple(real)
    assert geometry.frame_timestamps((0, 30, 90), 30.0, layout) == (0.5, 3.0)  # the last frame stands for its pair
    assert geometry.timestamp_text(1.5) == "<1.5 seconds>"
    assert geometry.timestamp_text(0.25) == f"<{0.25:.1f} seconds>" == "<0.2 seconds>"


def test_seconds_per_grid() -> None:
    assert geometry.seconds_per_grid(20, 300, 30.0, PatchLayout(14)) == pytest.approx(1.0)
    assert geometry.seconds_per_grid(5, 5, 2.0, PatchLayout(14)) == 1.0  # frames given at 2 a second


MODELS = {"qwen2_5_vl": Qwen2_5_VLModel, "qwen3_vl": Qwen3VLModel, "qwen3_vl_moe": Qwen3VLMoeModel}


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_positions_equal_get_rope_index(name: str) -> None:
    """Random sequences of text, images and videos against the model's own function."""
    rng = random.Random(7)
    family, config = FAMILIES[name], tiny_config(name)
    layout = PatchLayout(config.vision_config.patch_size)
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = MODELS[name].get_vision_position_ids.__get__(model)
    for _ in range(40):
        parts, types, images, videos, seconds, position = [], [], [], [], [], 0
        for _ in range(rng.randint(1, 6)):
            parts.append(geometry.text_positions(position, count := rng.randint(1, 9)))
            types += [0] * count
            position += count
            kind = rng.choice(("image", "video"))
            grid = Grid(1 if kind == "image" else rng.randint(1, 4), 2 * rng.randint(1, 4), 2 * rng.randint(1, 4))
            interval = 1.0
            if kind == "video" and family.video_time_positions:
                seconds.append(float(rng.choice((1, 2, 4))))  # whole seconds: the same in every version of transformers
                interval = geometry.video_time_interval(config.vision_config.tokens_per_second, seconds[-1])
            (images if kind == "image" else videos).append(grid)
            steps = [grid] if kind == "image" or not family.video_timestamps else [Grid(1, grid.h, grid.w)] * grid.t
            for number, step in enumerate(steps):
                if number:  # the time stamp between pairs of frames
                    parts.append(geometry.text_positions(position, 2))
                    types += [0] * 2
                    position += 2
                parts.append(geometry.visual_positions(position, step, layout, interval))
                types += [1 if kind == "image" else 2] * layout.visual_tokens(step)
                position += geometry.positions_passed(step, layout)
            parts.append(geometry.text_positions(position, 1))  # <|vision_end|>
            types.append(0)
            position += 1
        extra = {"second_per_grid_ts": torch.tensor(seconds)} if seconds else {}
        expected, _ = MODELS[name].get_rope_index(
            model, torch.zeros(1, len(types), dtype=torch.long), torch.tensor([types]),
            image_grid_thw=torch.tensor(images) if images else None, video_grid_thw=torch.tensor(videos) if videos else None, **extra,
        )  # fmt: skip
        assert np.array_equal(np.concatenate(parts, axis=1), expected[:, 0].numpy())
        assert position == expected[0, 0, -1] + 1


def test_fractional_seconds_are_rounded_down() -> None:
    """As transformers 5.23 computes them: the product is rounded down, not the interval."""
    layout, grid = PatchLayout(14), Grid(5, 2, 2)
    for seconds in (0.5, 1 / 3, 0.9999, 1.3, 2.7):
        interval = geometry.video_time_interval(2, seconds)
        expected = (torch.arange(5) * (2 * torch.tensor(seconds))).long().numpy() + 10
        assert geometry.visual_positions(10, grid, layout, interval)[0].tolist() == expected.tolist()
    assert geometry.visual_positions(0, grid, layout, geometry.video_time_interval(2, 0.75))[0].tolist() == [0, 1, 3, 4, 6]
