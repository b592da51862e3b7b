"""Pictures for reports: small, and inside the page itself."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from finesight.data.conversation import Part
from finesight.data.media import open_image, read_frames
from finesight.errors import MediaError

THUMBNAIL_PIXELS = 160  # of the longer side
_PNG_START = b"\x89PNG"


@dataclass(frozen=True)
class Picture:
    """What a page shows of an image."""

    url: str | None  # data URL, or None where the file cannot be opened
    label: str


def thumbnail_of(part: Part, side: int = THUMBNAIL_PIXELS) -> bytes:
    """An image made small, as PNG or JPEG; of a video, its first frame.

    Raises:
        MediaError: it cannot be opened.
    """
    if part.media is None:
        raise MediaError(f"a part of type {part.type} names no file")
    return thumbnail(read_frames(part.media, [0])[0] if part.type == "video" else open_image(part.media), side)


def thumbnail(image: Image.Image, side: int = THUMBNAIL_PIXELS) -> bytes:
    """An RGB image made small: PNG where that is exact and tiny, JPEG otherwise."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    if small.width * small.height <= 4096:  # drawings of a few pixels suffer from JPEG
        small.save(buffer, "PNG")
    else:
        small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def picture_of(part: Part, label: str) -> Picture:
    """What is shown of an image or video; the reason in words where it cannot be opened."""
    if part.media is None:
        return Picture(None, label)
    try:
        return Picture(data_url(thumbnail_of(part)), label)
    except MediaError as error:
        return Picture(None, str(error))


def data_url(encoded: bytes) -> str:
    """A data URL of what :func:`thumbnail` gave."""
    kind = "png" if encoded.startswith(_PNG_START) else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode('ascii')}"
