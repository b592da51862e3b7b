"""Sizes and frames of the images and videos of a row: whose word counts."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from finesight.data.conversation import MediaRef, Part
from finesight.data.processor import Processor, load_processor
from finesight.data.visual import measure
from finesight.data_settings import DataSettings
from finesight.errors import DataError
from finesight.geometry import Grid
from tiny import tiny_checkpoint

DATA = DataSettings(min_pixels=2048, max_pixels=40_000, video_min_pixels=2048, video_max_pixels=40_000, max_frames=8)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("visual") / request.param, request.param)
    return load_processor(folder, data=DATA)


def image(width: int, height: int, **settings: int) -> Part:
    return Part("image", media=MediaRef(image=Image.new("RGB", (width, height))), **settings)


def frames(count: int, **settings: float) -> Part:
    refs = tuple(MediaRef(image=Image.new("RGB", (64, 48), (number, 0, 0))) for number in range(count))
    return Part("video", media=MediaRef(frames=refs), **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def video_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 frames of 64 × 48 pixels at 10 a second."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(50):
            picture = np.full((48, 64, 3), number * 5, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_limits_of_the_row_go_before_those_of_the_recipe(processor: Processor) -> None:
    factor = processor.layout.factor
    assert measure(image(1000, 1000), processor).num_tokens() <= 40_000 // factor**2
    assert measure(image(1000, 1000, max_pixels=4 * factor**2), processor).num_tokens() == 4
    assert measure(image(10, 10, min_pixels=10 * factor**2), processor).num_tokens() >= 10
    assert measure(image(1000, 1000, min_pixels=90_000), processor).num_tokens() > 40_000 // factor**2
    with pytest.raises(DataError, match="less than one visual token"):
        measure(image(100, 100, max_pixels=100), processor).size()
    with pytest.raises(DataError, match="200 times"):
        measure(image(1000, 3), processor).size()


def test_sizes_of_the_row_go_before_all_limits(processor: Processor) -> None:
    factor = processor.layout.factor
    found = measure(image(100, 100, resized_height=20 * factor, resized_width=30 * factor + 1), processor)
    assert found.size() == (20 * factor, 30 * factor)
    assert found.num_tokens(cap_tokens=5) == 600
    with pytest.raises(DataError, match="both resized_height and resized_width"):
        measure(image(100, 100, resized_height=56), processor)


def test_a_cap_of_tokens_lowers_the_upper_limit_down_to_the_lower_one(processor: Processor) -> None:
    factor = processor.layout.factor
    found = measure(image(1000, 1000), processor)
    full = found.num_tokens()
    counts = [found.num_tokens(cap) for cap in range(full, 0, -1)]
    assert counts[0] == full
    assert all(count <= max(cap, -(-2048 // factor**2) + 2) for count, cap in zip(counts, range(full, 0, -1), strict=True))
    assert counts == sorted(counts, reverse=True)
    video = measure(frames(6), processor)
    assert video.num_tokens(video.num_tokens()) == video.num_tokens() >= video.num_tokens(6)


def test_keys_tell_pixels_apart(processor: Processor) -> None:
    def key(part: Part) -> str:
        return measure(part, processor).item(()).key

    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    assert key(Part("image", media=MediaRef(image=red))) == key(Part("image", media=MediaRef(image=red.copy())))
    assert key(Part("image", media=MediaRef(image=red))) != key(Part("image", media=MediaRef(image=blue)))
    sized = Part("image", media=MediaRef(image=red), resized_height=112, resized_width=112)
    assert key(sized) != key(Part("image", media=MediaRef(image=red)))
    assert key(frames(8)) == key(frames(8, fps=5.0))  # the same pixels; their times are a matter of positions
    assert key(frames(8)) != key(frames(8, num_frames=4)) != key(frames(4))


def test_given_frames_are_all_taken(processor: Processor) -> None:
    found = measure(frames(5, fps=4.0), processor)
    assert found.frame_indices == (0, 1, 2, 3, 4) and found.native_fps == 4.0
    assert found.grid().t == 3
    assert measure(frames(5), processor).native_fps == DATA.fps
    assert len(measure(frames(12), processor).frame_indices) == DATA.max_frames
    assert len(measure(frames(12, num_frames=4), processor).frame_indices) == 4


def test_files_are_sampled_by_rate_or_number(processor: Processor, video_file: Path) -> None:
    def indices(**settings: float) -> tuple[int, ...]:
        return measure(Part("video", media=MediaRef(path=str(video_file)), **settings), processor).frame_indices  # type: ignore[arg-type]

    qwen3 = processor.family.video_timestamps
    assert indices() == (tuple(np.linspace(0, 49, 8).round().astype(int)) if qwen3 else (0, 6, 12, 18, 25, 31, 37, 43))  # max_frames
    assert len(indices(fps=1.0)) == (5 if qwen3 else 4)
    assert indices(num_frames=2) == ((0, 49) if qwen3 else (0, 25))
    assert len(indices(num_frames=20)) == 20  # what the row asks for is not limited
    with pytest.raises(DataError, match="not both"):
        indices(num_frames=2, fps=1.0)
    with pytest.raises(DataError, match="names no file"):
        measure(Part("video"), processor)


def test_times_of_a_video(processor: Processor, video_file: Path) -> None:
    found = measure(Part("video", media=MediaRef(path=str(video_file)), fps=1.0), processor)
    if processor.family.video_timestamps:
        assert found.frame_indices == (0, 12, 24, 37, 49)
        assert found.timestamps == ("<0.6 seconds>", f"<{(2.4 + 3.7) / 2:.1f} seconds>", "<4.9 seconds>")
        assert found.time_interval == 1.0
    else:
        # 4 of 50 frames at 10 a second: one every 1.25 s, a pair every 2.5 s, 2 positions a second
        assert found.time_interval == 5.0
    assert found.grid() == Grid(3 if processor.family.video_timestamps else 2, *found.grid()[1:])
    assert measure(image(64, 64), processor).time_interval == 1.0
