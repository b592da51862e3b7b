"""The rows of a workload as conversations, and as our encoder counts them: the measure that every system is held to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from bench.workload import Row
from finesight.data.conversation import Conversation, MediaRef, Part, RowSource, Turn
from finesight.data.encode import Encoder
from finesight.data.processor import load_processor
from finesight.data.sample import Sample


def conversations(rows: Sequence[Row], name: str, png_folder: Path | None = None) -> list[Conversation]:
    """One conversation for each row: the image, the question, the answer.

    Args:
        name: of the workload, for messages.
        png_folder: write the images there, so that they are opened and decoded where they are used; None: they stay in memory.
    """
    refs: dict[int, MediaRef] = {}
    made = []
    for number, row in enumerate(rows):
        if id(row.image) not in refs:
            refs[id(row.image)] = _media(row.image, None if png_folder is None else png_folder / f"{number}.png")
        user = Turn("user", (Part("image", media=refs[id(row.image)]), Part("text", row.question)))
        assistant = Turn("assistant", (Part("text", row.answer),))
        made.append(Conversation((user, assistant), RowSource(name, number)))
    return made


def _media(image: Image.Image, path: Path | None) -> MediaRef:
    if path is None:
        return MediaRef(image=image)
    image.save(path, compress_level=1)
    return MediaRef(path=str(path))


def encode(rows: Sequence[Row], name: str, checkpoint: Path) -> list[Sample]:
    """The rows as our encoder makes them with a checkpoint's processor."""
    encoder = Encoder(load_processor(checkpoint))
    return [encoder.encode(conversation) for conversation in conversations(rows, name)]


def supervised_tokens(samples: Sequence[Sample]) -> int:
    return sum(int(sample.trained.sum()) for sample in samples)


def patches(samples: Sequence[Sample]) -> int:
    """Patches before merging, of each sample by itself whatever is shared."""
    return sum(item.grid.patches for sample in samples for item in sample.visual_items)
