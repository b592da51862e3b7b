"""Opens images and videos. Every failure is a :class:`MediaError` that says what was wrong.

Sizes come from file headers alone; pixels are decoded only by :func:`open_image` and :func:`read_frames`, and the two
always agree on width and height (orientation tags applied to both).
"""

from __future__ import annotations

import hashlib
import io
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from finesight.data import video
from finesight.data.conversation import MediaRef
from finesight.data.fetch import fetch
from finesight.data.media_policy import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaPolicy
from finesight.data.video import VideoInfo
from finesight.errors import MediaError

__all__ = [
    "IMAGE_SUFFIXES", "VIDEO_SUFFIXES", "MediaPolicy", "VideoInfo", "describe", "image_size", "media_key", "open_image", "read_frames",
    "video_info",
]  # fmt: skip

# What is decoded at all. PIL knows more, some of which (EPS) runs other programs.
_IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "HEIF", "JPEG2000", "ICO")
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap width and height
_WHITE = (255, 255, 255, 255)

# (path, size, time of last change) -> result, for this process.
_image_sizes: dict[tuple[str, int, int], tuple[int, int]] = {}
_video_infos: dict[tuple[str, int, int], VideoInfo] = {}
_file_keys: dict[tuple[str, int, int], str] = {}
_ref_keys: weakref.WeakKeyDictionary[MediaRef, str] = weakref.WeakKeyDictionary()


def describe(ref: MediaRef) -> str:
    """A reference as messages name it."""
    if ref.path is not None:
        return ref.path
    if ref.url is not None:
        return ref.url
    if ref.data is not None:
        return f"embedded media of {len(ref.data)} bytes"
    if ref.frames is not None:
        return f"{len(ref.frames)} frames"
    return "an image object"


def image_size(ref: MediaRef) -> tuple[int, int]:
    """(width, height) in pixels, upright, from the header.

    Raises:
        MediaError: the image is missing, empty, of an unknown format, or has too many pixels.
    """
    stamp = _stamp(ref)
    if stamp is not None and stamp in _image_sizes:
        return _image_sizes[stamp]
    with _opened(ref) as image:
        size = _upright_size(image)
    if stamp is not None:
        _image_sizes[stamp] = size
    return size


def open_image(ref: MediaRef) -> Image.Image:
    """The image upright, in RGB, decoded; the first frame of an animation; transparency on white.

    Raises:
        MediaError: as in :func:`image_size`, or the pixels are damaged or cut short.
    """
    with _opened(ref) as image:
        method = _TRANSPOSE.get(_orientation(image))
        try:
            image.load()
            rgb = _to_rgb(image)
        except Exception as error:  # a damaged file may provoke anything in a decoder
            raise MediaError(f"{describe(ref)} cannot be decoded: {error}") from None
    return rgb if method is None else rgb.transpose(method)


def video_info(ref: MediaRef) -> VideoInfo:
    """Number of frames, rate and size of a video (see :func:`finesight.data.video.probe`), or of frames given one by one.

    Raises:
        MediaError: the video is missing or cannot be decoded, or given frames differ in size.
    """
    if ref.frames is not None:
        return _info_of_frames(ref.frames)
    stamp = _stamp(ref)
    if stamp is not None and stamp in _video_infos:
        return _video_infos[stamp]
    info = video.probe(_video_source(ref), describe(ref))
    if stamp is not None:
        _video_infos[stamp] = info
    return info


def read_frames(ref: MediaRef, indices: Sequence[int]) -> list[Image.Image]:
    """The frames of these indices, upright, in RGB, in the order asked for; an index may come more than once.

    Raises:
        MediaError: the video cannot be decoded, or has no frame of such an index.
    """
    if not indices:
        return []
    if min(indices) < 0:
        raise MediaError(f"{describe(ref)}: frame {min(indices)} was asked for; frames are counted from 0")
    if ref.frames is not None:
        if max(indices) >= len(ref.frames):
            raise MediaError(f"frame {max(indices)} was asked for, of {len(ref.frames)} given")
        opened = {index: open_image(ref.frames[index]) for index in set(indices)}
        return [opened[index] for index in indices]
    return video.decode(_video_source(ref), indices, describe(ref))


def media_key(ref: MediaRef) -> str:
    """Hash of the content: of a file's bytes, of encoded bytes, of an image object's pixels; 32 hexadecimal digits.

    Two names of the same bytes have the same key. Kept for as long as the file's size and time of change stay.

    Raises:
        MediaError: the file cannot be read.
    """
    stamp = _stamp(ref)
    if stamp is not None:
        if stamp not in _file_keys:
            _file_keys[stamp] = _hash_file(Path(stamp[0]))
        return _file_keys[stamp]
    if (known := _ref_keys.get(ref)) is not None:
        return known
    digest = hashlib.blake2b(digest_size=16)
    if ref.data is not None:
        digest.update(ref.data)
    elif ref.frames is not None:
        digest.update(b"frames")
        for frame in ref.frames:
            digest.update(bytes.fromhex(media_key(frame)))
    else:
        digest.update(f"{ref.image.mode} {ref.image.size}".encode())
        digest.update(ref.image.tobytes())
    _ref_keys[ref] = digest.hexdigest()
    return _ref_keys[ref]


def _local_path(ref: MediaRef) -> Path | None:
    if ref.path is not None:
        return Path(ref.path)
    return fetch(ref.url) if ref.url is not None else None


def _stamp(ref: MediaRef) -> tuple[str, int, int] | None:
    """What tells a file from a later one of the same name; None where there is no file."""
    path = _local_path(ref)
    if path is None:
        return None
    try:
        status = path.stat()
    except OSError as error:
        raise MediaError(f"{describe(ref)} cannot be read: {error.strerror}") from None
    if status.st_size == 0:
        raise MediaError(f"{describe(ref)} is empty (0 bytes)")
    return str(path), status.st_size, status.st_mtime_ns


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from None


def _video_source(ref: MediaRef) -> Path | bytes:
    if ref.data is not None:
        return ref.data
    path = _local_path(ref)
    if path is None:
        raise MediaError("an image object stands where a video is expected; give a file, or a list of frames")
    return path


def _info_of_frames(frames: Sequence[MediaRef]) -> VideoInfo:
    if not frames:
        raise MediaError("a video is given as an empty list of frames")
    sizes = [image_size(frame) for frame in frames]
    for number, size in enumerate(sizes):
        if size != sizes[0]:
            raise MediaError(
                f"frame {number} ({describe(frames[number])}) is {size[0]} × {size[1]} pixels, the first one {sizes[0][0]} × {sizes[0][1]}; "
                "frames of one video must be of one size"
            )
    return VideoInfo(len(frames), None, *sizes[0])


@contextmanager
def _opened(ref: MediaRef) -> Iterator[Image.Image]:
    """The image with its header read and its number of pixels checked."""
    if ref.frames is not None:
        raise MediaError("a list of frames (or a folder) stands where one image is expected; give one file, or make it a video")
    if ref.image is not None:
        _refuse_bomb(ref, ref.image.size)
        yield ref.image
        return
    if ref.data is not None and not ref.data:
        raise MediaError("an embedded image is empty (0 bytes)")
    stamp = _stamp(ref)
    source: Any = io.BytesIO(ref.data or b"") if stamp is None else stamp[0]
    Image.init()  # registers all formats, so that the list below can be asked for
    try:
        image = Image.open(source, formats=[name for name in _IMAGE_FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        raise MediaError(f"{describe(ref)} is no image of a known format{_looks_like(ref)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaError(_too_many_pixels(ref, None)) from None
    except Exception as error:  # a damaged header may provoke anything in a parser
        raise MediaError(f"{describe(ref)} cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    with image:
        _refuse_bomb(ref, image.size)
        yield image


def _refuse_bomb(ref: MediaRef, size: tuple[int, int]) -> None:
    if Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
        raise MediaError(_too_many_pixels(ref, size))


def _too_many_pixels(ref: MediaRef, size: tuple[int, int] | None) -> str:
    what = "" if size is None else f"{size[0]} × {size[1]} pixels, "
    return (
        f"{describe(ref)} has {what}more than the {Image.MAX_IMAGE_PIXELS} that are decoded (a small file can hold a huge image); "
        "scale it down beforehand"
    )


def _looks_like(ref: MediaRef) -> str:
    """What a file that is no image seems to be instead, from its first bytes or its name."""
    path = _local_path(ref)
    if path is None:
        start = (ref.data or b"")[:64]
    else:
        with path.open("rb") as file:
            start = file.read(64)
    if start.lstrip()[:1] == b"<":
        return " (it is HTML or SVG: a failed download?)"
    if start.startswith(b"version https://git-lfs"):
        return " (it is a Git LFS pointer; run `git lfs pull`)"
    if path is not None and path.suffix.lower() in VIDEO_SUFFIXES:
        return " (its name is that of a video)"
    return ""


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8, without decoding pixels."""
    if image.format == "TIFF":
        return 1  # PIL turns TIFF files by itself, and gives their upright size from the start
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1  # asking on would make PIL decode all pixels in search of a tag behind them
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata is no damage to the picture
        return 1
    return value if isinstance(value, int) else 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: more than 8 bits scaled down, transparency on white."""
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")
    if image.mode == "RGB":
        return image.copy()
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of 16 or 32 bits, or floating point, as 8 bits. PIL alone would clip everything above 255 to white.

    Full scale is 65,535 for integers (PIL holds 16-bit files in modes I;16 and I), 255 where nothing is larger; of
    floating-point images 1 where nothing is larger.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    top = float(values.max(initial=0.0))
    if image.mode == "F" and top <= 1.0:
        full = 1.0
    elif image.mode.startswith("I;16"):
        full = 65535.0
    else:
        full = 255.0 if top <= 255.0 else max(65535.0, top)
    return Image.fromarray(np.rint(np.clip(values / full, 0.0, 1.0) * 255.0).astype(np.uint8))


_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
