"""Decodes videos with PyAV. `media.py` is the door to it; paths and frames given one by one are its business."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from finesight.errors import MediaError

# Containers, by FFmpeg's names. Playlists (HLS, concat) are left out: they make FFmpeg open further files and addresses.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc,ivf,mjpeg"
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video before its frames are decoded."""

    num_frames: int
    fps: float | None  # average frames a second; None where it is not known, as for frames given one by one
    width: int  # pixels, upright
    height: int


def probe(source: Path | bytes, name: str) -> VideoInfo:
    """Number of frames, rate and size. Decodes one frame, to know that the codec can be read.

    The number of frames is the container's where it agrees with duration and rate; otherwise packets are counted.

    Raises:
        MediaError: no frame can be decoded. `name` is what the message calls the video.
    """
    with _opened(source, name) as (container, stream):
        first = next(_decoded(container, stream, name), None)
        if first is None:
            raise MediaError(f"{name} holds no frame that can be decoded")
        width, height = (first.height, first.width) if first.rotation % 180 else (first.width, first.height)
        rate = stream.average_rate or stream.guessed_rate
        fps = float(rate) if rate and rate > 0 else None
        num_frames = _declared_frames(container, stream, fps)
    if num_frames is None:
        with _opened(source, name) as (container, stream):
            num_frames = _count_packets(container, stream, name)
    return VideoInfo(num_frames, fps, width, height)


def decode(source: Path | bytes, indices: Sequence[int], name: str) -> list[Image.Image]:
    """The frames of these indices (at least one, none negative), upright, in RGB, in the order asked for.

    Frames before the last one asked for are decoded in passing, since most of them refer to one another; only those
    asked for are converted.

    Raises:
        MediaError: the video cannot be decoded, or ends before a frame asked for.
    """
    wanted, last = set(indices), max(indices)
    found: dict[int, Image.Image] = {}
    number = -1
    with _opened(source, name) as (container, stream):
        for number, frame in enumerate(_decoded(container, stream, name)):
            if number in wanted:
                turn = _TURNS.get(round(frame.rotation) % 360)
                image = frame.to_image()
                found[number] = image if turn is None else image.transpose(turn)
            if number >= last:
                break
    if last not in found:
        raise MediaError(
            f"{name}: frame {last} was asked for, but only {number + 1} frames can be decoded; the file is damaged or cut short, "
            "write it anew (for example with `ffmpeg -i old.mp4 new.mp4`)"
        )
    return [found[index] for index in indices]


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream)."""
    try:
        import av
    except ImportError:
        raise MediaError(f"{name} is a video, which needs PyAV: pip install av") from None
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        container = av.open(file, options={"format_whitelist": _CONTAINERS})
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{name} cannot be opened as a video: {_reason(error)}") from None
    with container:
        if not container.streams.video:
            raise MediaError(f"{name} holds no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise MediaError(f"{name} is coded in a way that this build of PyAV cannot decode; write it anew as H.264")
        stream.thread_type = "AUTO"
        yield container, stream


def _decoded(container: Any, stream: Any, name: str) -> Iterator[Any]:
    import av

    try:
        yield from container.decode(stream)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{name} cannot be decoded: {_reason(error)}") from None


def _declared_frames(container: Any, stream: Any, fps: float | None) -> int | None:
    """The number of frames in the container's header, or None where it has none or contradicts itself."""
    import av

    if stream.frames <= 0:
        return None
    seconds = None
    if stream.duration is not None and stream.time_base is not None:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        seconds = container.duration / av.time_base
    if seconds is None or fps is None or abs(seconds * fps - stream.frames) > max(1.0, 0.01 * stream.frames):
        return None
    return int(stream.frames)


def _count_packets(container: Any, stream: Any, name: str) -> int:
    """Frames by their packets: reads the file through, but decodes nothing."""
    import av

    try:
        count = sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{name} cannot be read: {_reason(error)}") from None
    if not count:
        raise MediaError(f"{name} holds no frames")
    return count


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
