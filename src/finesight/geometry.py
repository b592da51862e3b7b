"""Pixels -> resized size -> patch grid -> visual tokens -> positions. The only source of token counts.

Integers in, integers out; nothing is opened and no torch is imported. Every formula is that of the transformers image
and video processors of the Qwen-VL families and of their models' `get_rope_index`, and tests hold it equal to them.

A video is resized without the per-frame cap that transformers calls `cap_pixels_per_frame`: left unset it is off in every
version from 5.17 to 5.23 (its announced change of default would give other sizes, hence other prompts). Lower the upper
limit of videos to get smaller frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from finesight.errors import DataError
from finesight.families import Family

MAX_ASPECT_RATIO = 200  # the processors refuse longer or taller pictures
MIN_FRAMES = 4  # fewest frames that sampling by rate takes, where the video has as many
_SINGLE = 1  # an image: one time step


class Grid(NamedTuple):
    """An image or video in patches: t pairs of frames (1 for an image), h rows, w columns; before merging."""

    t: int
    h: int
    w: int

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w


@dataclass(frozen=True)
class PatchLayout:
    """How a tower cuts pixels: read from a checkpoint's configuration."""

    patch_size: int  # pixels
    merge_size: int = 2  # patches on a side that become one visual token
    temporal_patch_size: int = 2  # frames in one patch

    @property
    def factor(self) -> int:
        """Sides of a resized image are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    @property
    def token_pixels(self) -> int:
        """Pixels of one visual token of an image."""
        return self.factor**2

    def visual_tokens(self, grid: Grid) -> int:
        return grid.patches // self.merge_size**2


@dataclass(frozen=True)
class PixelLimits:
    """Fewest and most pixels after resizing: of an image, of a frame, or of a whole video (see `Family`)."""

    min_pixels: int
    max_pixels: int

    def override(self, min_pixels: int | None = None, max_pixels: int | None = None) -> PixelLimits:
        """These limits with those that are given put in their place.

        A limit that is given wins: where it passes the one that is not, the other moves with it.
        """
        low = self.min_pixels if min_pixels is None else min_pixels
        high = self.max_pixels if max_pixels is None else max_pixels
        if low > high:
            if min_pixels is None:
                low = high
            elif max_pixels is None:
                high = low
        return PixelLimits(low, high)

    def check(self, layout: PatchLayout) -> None:
        """Refuses limits that no size can meet.

        Raises:
            DataError: the lower limit is not positive, or the upper one is below it or below one visual token.
        """
        if self.min_pixels < 1:
            raise DataError(f"min_pixels is {self.min_pixels}; it must be at least 1")
        if self.max_pixels < layout.token_pixels:
            raise DataError(
                f"max_pixels of {self.max_pixels} is less than one visual token, which is {layout.factor} × {layout.factor} = "
                f"{layout.token_pixels} pixels; raise it"
            )
        if self.min_pixels > self.max_pixels:
            raise DataError(f"min_pixels of {self.min_pixels} is more than max_pixels of {self.max_pixels}; lower it, or raise max_pixels")


def resized_image_size(height: int, width: int, layout: PatchLayout, limits: PixelLimits) -> tuple[int, int]:
    """(height, width) in pixels that an image is resized to.

    `smart_resize` of transformers' Qwen2-VL image processor: multiples of the factor near the original, scaled so that
    their product lies within the limits.

    Raises:
        DataError: an empty image, or one more than 200 times as long as wide.
    """
    _check_shape(height, width)
    return _smart_resize(_SINGLE, _SINGLE, height, width, layout.factor, limits)


def image_grid(height: int, width: int, layout: PatchLayout, limits: PixelLimits) -> Grid:
    """Patches of an image of this original size. Raises as :func:`resized_image_size`."""
    return grid_of(*resized_image_size(height, width, layout, limits), layout)


def resized_video_size(
    num_frames: int, height: int, width: int, layout: PatchLayout, limits: PixelLimits, family: Family
) -> tuple[int, int]:
    """(height, width) in pixels that each of the `num_frames` sampled frames is resized to.

    `smart_resize` of transformers' video processors. Qwen2.5-VL: as for an image, the limits hold for each frame.
    Qwen3-VL: the limits hold for frames × height × width, frames being rounded to whole pairs; a video smaller than one
    visual token is enlarged first.

    Raises:
        DataError: no frames, fewer frames than one pair where the family needs a pair, an empty or too long a picture.
    """
    factor, pair = layout.factor, layout.temporal_patch_size
    if num_frames < 1:
        raise DataError("a video of no frames has no size")
    if not family.video_pixels_span_frames:
        return resized_image_size(height, width, layout, limits)
    if num_frames < pair:
        raise DataError(f"{family.label} takes videos of at least {pair} frames, this one has {num_frames}; give it as an image")
    if 0 < min(height, width) < factor:
        scale = factor / min(height, width)
        height, width = int(height * scale), int(width * scale)
    _check_shape(height, width)  # only now, as transformers has it
    return _smart_resize(num_frames, round(num_frames / pair) * pair, height, width, factor, limits)


def video_grid(num_frames: int, height: int, width: int, layout: PatchLayout, limits: PixelLimits, family: Family) -> Grid:
    """Patches of a video of `num_frames` sampled frames. Raises as :func:`resized_video_size`."""
    return grid_of(*resized_video_size(num_frames, height, width, layout, limits, family), layout, num_frames)


def rounded_size(height: int, width: int, layout: PatchLayout) -> tuple[int, int]:
    """A size that somebody asked for, on the nearest multiples of the factor; pixel limits do not apply.

    Raises:
        DataError: as in :func:`resized_image_size`.
    """
    _check_shape(height, width)
    return tuple(max(1, round(side / layout.factor)) * layout.factor for side in (height, width))  # type: ignore[return-value]


def grid_of(resized_height: int, resized_width: int, layout: PatchLayout, num_frames: int | None = None) -> Grid:
    """Patches of an image (or, with `num_frames`, a video) of a resized size. A last frame without a pair makes one with itself."""
    pairs = _SINGLE if num_frames is None else -(-num_frames // layout.temporal_patch_size)
    return Grid(pairs, resized_height // layout.patch_size, resized_width // layout.patch_size)


def sampled_frames(
    total_frames: int,
    native_fps: float | None,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    max_frames: int,
    layout: PatchLayout,
    family: Family,
) -> tuple[int, ...]:
    """Indices of the frames that are taken of a video of `total_frames` frames at `native_fps` frames a second.

    `sample_frames` of transformers' video processors. By rate (`fps`), at least 4 frames (where there are so many) and at
    most `max_frames` are taken. Qwen3-VL spreads them from the first frame to the last; Qwen2.5-VL takes a whole number
    of pairs, each frame at the beginning of its interval. A `num_frames` that is given is not limited by `max_frames`.

    Qwen2.5-VL's indices are exact here. There they come from a float32 range, whose rounding makes an index one frame
    later or earlier in a few percent of videos, and may add one behind the last frame.

    Raises:
        DataError: both or neither of `fps` and `num_frames` are given, the video is too short, or its rate is unknown.
    """
    if (fps is None) == (num_frames is None):
        raise DataError("give either fps or nframes of a video, not both" if fps is not None else "give fps or nframes of a video")
    if total_frames < 1:
        raise DataError("a video of no frames cannot be sampled")
    if num_frames is None and (not native_fps or native_fps <= 0):
        raise DataError("the frame rate of the video is not known, so it cannot be sampled by fps; give nframes")
    if family.video_time_positions:
        return _frames_of_intervals(total_frames, native_fps, fps, num_frames, max_frames, layout.temporal_patch_size)
    if num_frames is None:
        num_frames = min(max(int(total_frames / native_fps * fps), MIN_FRAMES), max_frames, total_frames)  # type: ignore[operator]
    if num_frames < 1:
        raise DataError(f"nframes is {num_frames}; at least one frame must be taken")
    return tuple(np.linspace(0, total_frames - 1, num_frames).round().astype(int).tolist())


def frame_timestamps(indices: Sequence[int], native_fps: float, layout: PatchLayout) -> tuple[float, ...]:
    """Seconds at which each pair of frames stands: the mean of the pair's two; a last frame without a pair counts twice.

    `_calculate_timestamps` of transformers' Qwen3-VL processor.
    """
    pair = layout.temporal_patch_size
    padded = [*indices, *[indices[-1]] * (-len(indices) % pair)]
    seconds = [index / native_fps for index in padded]
    return tuple((seconds[i] + seconds[i + pair - 1]) / 2 for i in range(0, len(seconds), pair))


def timestamp_text(seconds: float) -> str:
    """How a Qwen3-VL prompt names the time of a pair of frames, for example ``<1.5 seconds>``."""
    return f"<{seconds:.1f} seconds>"


def seconds_per_grid(num_sampled: int, total_frames: int, native_fps: float, layout: PatchLayout) -> float:
    """Seconds between pairs of frames, for Qwen2.5-VL: `second_per_grid_ts` of its transformers processor."""
    sampled_fps = num_sampled / total_frames * native_fps
    return layout.temporal_patch_size / sampled_fps


def text_positions(start: int, count: int) -> np.ndarray:
    """(3, count) int64: M-RoPE positions of a run of text tokens, equal on all three axes. Goes on at start + count."""
    return np.broadcast_to(np.arange(start, start + count, dtype=np.int64), (3, count))


def visual_positions(start: int, grid: Grid, layout: PatchLayout, time_interval: float = 1.0) -> np.ndarray:
    """(3, visual tokens) int64: M-RoPE positions (time, height, width) of one run of visual tokens that begins at `start`.

    `get_vision_position_ids` of transformers' models. A Qwen3-VL video is a run of one time step for each pair of frames.

    Args:
        time_interval: positions between time steps; for a Qwen2.5-VL video `tokens_per_second` × seconds per step (see
            :func:`video_time_interval`), whose multiples are rounded down.
    """
    rows, columns = grid.h // layout.merge_size, grid.w // layout.merge_size
    # float32 as transformers computes it, so that multiples a hair below an integer round alike.
    times = (np.arange(grid.t, dtype=np.float32) * np.float32(time_interval)).astype(np.int64)
    positions = np.empty((3, grid.t, rows, columns), dtype=np.int64)
    positions[0] = times[:, None, None]
    positions[1] = np.arange(rows)[:, None]
    positions[2] = np.arange(columns)
    positions += start
    return positions.reshape(3, -1)


def video_time_interval(tokens_per_second: float, seconds: float) -> float:
    """Positions between pairs of frames of a Qwen2.5-VL video, as transformers computes them (float32)."""
    return float(np.float32(tokens_per_second) * np.float32(seconds))


def positions_passed(grid: Grid, layout: PatchLayout) -> int:
    """How far a run of visual tokens moves the position of what follows: the longer side in visual tokens, whatever its time.

    `get_rope_index` of transformers' models. Text behind a long Qwen2.5-VL video may thus stand at a smaller temporal
    position than the video's last frames.
    """
    return max(grid.h, grid.w) // layout.merge_size


def _smart_resize(frames: int, rounded_frames: int, height: int, width: int, factor: int, limits: PixelLimits) -> tuple[int, int]:
    """transformers' `smart_resize`, for images (one frame) and videos; floating point in the same order."""
    resized_height = round(height / factor) * factor
    resized_width = round(width / factor) * factor
    pixels = rounded_frames * resized_height * resized_width
    if pixels > limits.max_pixels:
        shrink = math.sqrt((frames * height * width) / limits.max_pixels)
        resized_height = max(factor, math.floor(height / shrink / factor) * factor)
        resized_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif pixels < limits.min_pixels:
        grow = math.sqrt(limits.min_pixels / (frames * height * width))
        resized_height = math.ceil(height * grow / factor) * factor
        resized_width = math.ceil(width * grow / factor) * factor
    return resized_height, resized_width


def _check_shape(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise DataError(f"a picture of {width} × {height} pixels is empty")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise DataError(
            f"a picture of {width} × {height} pixels is more than {MAX_ASPECT_RATIO} times as long as it is wide; crop it or pad it"
        )


def _frames_of_intervals(
    total_frames: int, native_fps: float | None, fps: float | None, num_frames: int | None, max_frames: int, pair: int
) -> tuple[int, ...]:
    """Qwen2-VL's rule: a whole number of pairs, frames at the beginnings of equal intervals."""
    if num_frames is not None:
        count = round(num_frames / pair) * pair
    else:
        most = math.floor(min(max_frames, total_frames) / pair) * pair
        wanted = min(max(total_frames / native_fps * fps, MIN_FRAMES), most, total_frames)  # type: ignore[operator]
        count = math.floor(wanted / pair) * pair
    if count < pair:
        raise DataError(
            f"a video must give at least {pair} frames; of the {total_frames} of this one {count} would be taken. "
            "Raise fps, nframes or max_frames, or give it as an image"
        )
    if count > total_frames:
        raise DataError(f"{count} frames are asked for of a video that has {total_frames}; lower nframes")
    return tuple(index * total_frames // count for index in range(count))
