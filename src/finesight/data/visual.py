"""How large each image or video of a conversation becomes, before any pixel is decoded.

What a row says of an item goes before the recipe's limits, which go before the checkpoint's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial

from finesight import geometry
from finesight.data.conversation import Part
from finesight.data.media import describe, image_size, media_key, video_info
from finesight.data.processor import Processor
from finesight.data.sample import VisualItem
from finesight.errors import DataError
from finesight.geometry import Grid, PixelLimits


@dataclass(frozen=True, eq=False)
class Measured:
    """An image or video whose original size is known, and for a video the frames that are taken."""

    part: Part
    processor: Processor
    content_key: str  # hash of the file's or the pixels' content
    width: int  # pixels, of the original
    height: int
    frame_indices: tuple[int, ...] = ()  # of a video
    total_frames: int = 0  # of the video they are taken from
    native_fps: float = 0.0  # its frames a second

    @property
    def is_video(self) -> bool:
        return self.part.type == "video"

    def size(self, cap_tokens: int | None = None) -> tuple[int, int]:
        """(height, width) in pixels after resizing.

        Args:
            cap_tokens: most visual tokens, as far as the lower pixel limit allows; a size that the row asked for stays.

        Raises:
            DataError: the limits of the row contradict each other, or the picture's shape is refused.
        """
        layout, family = self.processor.layout, self.processor.family
        if self.part.resized_height is not None and self.part.resized_width is not None:
            return geometry.rounded_size(self.part.resized_height, self.part.resized_width, layout)
        limits = self.processor.video_limits if self.is_video else self.processor.image_limits
        limits = limits.override(self.part.min_pixels, self.part.max_pixels)
        limits.check(layout)
        if cap_tokens is not None:
            limits = PixelLimits(limits.min_pixels, max(limits.min_pixels, min(limits.max_pixels, self._pixels_of_tokens(cap_tokens))))
        if self.is_video:
            return geometry.resized_video_size(len(self.frame_indices), self.height, self.width, layout, limits, family)
        return geometry.resized_image_size(self.height, self.width, layout, limits)

    def grid(self, cap_tokens: int | None = None) -> Grid:
        """Patches at :meth:`size`."""
        return geometry.grid_of(*self.size(cap_tokens), self.processor.layout, len(self.frame_indices) if self.is_video else None)

    def num_tokens(self, cap_tokens: int | None = None) -> int:
        """Visual tokens at :meth:`size`."""
        return self.processor.layout.visual_tokens(self.grid(cap_tokens))

    def item(self, runs: tuple[tuple[int, int], ...], cap_tokens: int | None = None) -> VisualItem:
        """The item at :meth:`size`, whose visual tokens stand at `runs`."""
        height, width = self.size(cap_tokens)
        key = f"{self.content_key}-{height}x{width}"
        if self.is_video:
            key += "-" + hashlib.blake2b(repr(self.frame_indices).encode(), digest_size=8).hexdigest()
        return VisualItem(
            kind="video" if self.is_video else "image",
            part=self.part,
            grid=self.grid(cap_tokens),
            resized_height=height,
            resized_width=width,
            runs=runs,
            key=key,
            frame_indices=self.frame_indices,
        )

    @property
    def time_interval(self) -> float:
        """M-RoPE positions from one pair of frames to the next, where the family counts seconds."""
        if not (self.is_video and self.processor.family.video_time_positions):
            return 1.0
        seconds = geometry.seconds_per_grid(len(self.frame_indices), self.total_frames, self.native_fps, self.processor.layout)
        return geometry.video_time_interval(self.processor.tokens_per_second, seconds)

    @property
    def timestamps(self) -> tuple[str, ...]:
        """The times that stand before each pair of frames, for a family that writes them."""
        seconds = geometry.frame_timestamps(self.frame_indices, self.native_fps, self.processor.layout)
        return tuple(geometry.timestamp_text(second) for second in seconds)

    def _pixels_of_tokens(self, tokens: int) -> int:
        """The upper pixel limit that stands for this many visual tokens."""
        layout = self.processor.layout
        if not self.is_video:
            return tokens * layout.token_pixels
        if self.processor.family.video_pixels_span_frames:
            return tokens * layout.token_pixels * layout.temporal_patch_size
        return tokens * layout.token_pixels // -(-len(self.frame_indices) // layout.temporal_patch_size)


def measure(part: Part, processor: Processor) -> Measured:
    """Reads the size of an image, or size, rate and number of frames of a video, and chooses the frames.

    Frames given one by one are all taken (evenly thinned beyond `max_frames`), at the row's `fps`, else the recipe's.

    Raises:
        MediaError: the image or video cannot be opened.
        DataError: its settings contradict each other, or the video cannot be sampled.
    """
    if part.media is None:
        raise DataError(f"a part of type {part.type} names no file")
    if (part.resized_height is None) != (part.resized_width is None):
        raise DataError("give both resized_height and resized_width, or neither")
    if part.type == "image":
        width, height = image_size(part.media)
        return Measured(part, processor, media_key(part.media), width, height)
    info = video_info(part.media)
    sample = partial(geometry.sampled_frames, max_frames=processor.max_frames, layout=processor.layout, family=processor.family)
    if part.media.frames is not None:
        native_fps = part.fps or processor.fps
        pair = processor.layout.temporal_patch_size
        if part.num_frames is None and info.num_frames <= processor.max_frames:
            indices = tuple(range(info.num_frames))
        else:
            most = part.num_frames or processor.max_frames // pair * pair
            indices = sample(info.num_frames, native_fps, num_frames=most)
    else:
        if not info.fps:
            raise DataError(f"the frame rate of {describe(part.media)} is not known; convert it, or give its frames and their fps")
        native_fps = info.fps
        fps = processor.fps if part.fps is None and part.num_frames is None else part.fps
        indices = sample(info.num_frames, native_fps, fps=fps, num_frames=part.num_frames)
    return Measured(part, processor, media_key(part.media), info.width, info.height, indices, info.num_frames, native_fps)
