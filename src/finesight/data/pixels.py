"""Images and video frames -> patches, exactly as the checkpoint's image processor makes them, only faster.

The image processor of transformers rescales and normalises each value, then cuts patches, in float32 or wider all along.
Both steps go value by value, so they are done here the other way round: bytes are put into patch order, then each is
looked up in a table of what the image processor itself makes of the 256 values of each channel. The result has the same bits.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from finesight.data.media import open_image, read_frames
from finesight.data.processor import Processor
from finesight.data.sample import VisualItem
from finesight.errors import DataError
from finesight.geometry import PatchLayout

_CHANNELS = 3


def visual_patches(item: VisualItem, processor: Processor) -> np.ndarray:
    """Opens, resizes and cuts one image or video.

    Patches stand in the order of the tower: time, then blocks of merge × merge patches row by row, then the patches of
    a block. Values of a patch: channel, frame of the pair, row, column. Both frames of an image's pair are the image; a last
    video frame without a pair stands for both.

    Returns:
        (grid.patches, 3 * temporal_patch_size * patch_size²) float32.

    Raises:
        MediaError: the image or video cannot be decoded.
    """
    return cut_patches([np.asarray(frame) for frame in resized_frames(item, processor)], processor)


def resized_frames(item: VisualItem, processor: Processor) -> list[Image.Image]:
    """The image, or the frames of the video, as the tower is to see them: upright, in RGB, of the item's size.

    Raises:
        MediaError: the image or video cannot be decoded.
    """
    if item.part.media is None:
        raise DataError(f"a part of type {item.part.type} names no file")
    if item.kind == "image":
        frames = [open_image(item.part.media)]
    else:
        frames = read_frames(item.part.media, item.frame_indices)
    size = (item.resized_width, item.resized_height)
    resample = Image.Resampling(int(processor.image_processor.resample))
    return [frame if frame.size == size else frame.resize(size, resample) for frame in frames]


def cut_patches(frames: list[np.ndarray], processor: Processor) -> np.ndarray:
    """Patches of frames that already have their size. A single frame makes a pair with itself.

    Args:
        frames: each (height, width, 3) uint8, sides multiples of the layout's factor.

    Returns:
        (patches, 3 * temporal_patch_size * patch_size²) float32, in the order of :func:`visual_patches`.
    """
    layout, table = processor.layout, value_table(processor)
    patch, merge, pair = layout.patch_size, layout.merge_size, layout.temporal_patch_size
    height, width = frames[0].shape[:2]
    steps = -(-len(frames) // pair)
    rows, columns = height // patch // merge, width // patch // merge
    # time, block row, block column, row and column in the block, channel, frame of the pair, row and column in the patch
    out = np.empty((steps, rows, columns, merge, merge, _CHANNELS, pair, patch, patch), dtype=np.float32)
    for number in range(steps * pair):
        step, place = divmod(number, pair)
        if number >= len(frames):
            out[step, ..., place, :, :] = out[step, ..., place - 1, :, :]
            continue
        ordered = _patch_order(frames[number], layout)
        for channel in range(_CHANNELS):
            out[step, ..., channel, place, :, :] = table[channel][ordered[..., channel, :, :]]
    return out.reshape(-1, _CHANNELS * pair * patch * patch)


@lru_cache(maxsize=8)
def value_table(processor: Processor) -> np.ndarray:
    """(3, 256) float32: what the image processor makes of each value of each channel."""
    library = processor.image_processor
    values = np.broadcast_to(np.arange(256, dtype=np.uint8), (_CHANNELS, 1, 256))
    if library.do_rescale:
        values = library.rescale(values, library.rescale_factor)
    if library.do_normalize:
        values = library.normalize(values, library.image_mean, library.image_std)
    return np.ascontiguousarray(values.reshape(_CHANNELS, 256), dtype=np.float32)


def _patch_order(frame: np.ndarray, layout: PatchLayout) -> np.ndarray:
    """A view of a frame (height, width, 3) as (block row, block column, row, column, channel, patch row, patch column)."""
    patch, merge = layout.patch_size, layout.merge_size
    height, width = frame.shape[:2]
    blocks = frame.reshape(height // patch // merge, merge, patch, width // patch // merge, merge, patch, _CHANNELS)
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5)
