"""Images opened ahead of their use: the same patches, opened once, no more than there is room for."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finesight.data.conversation import MediaRef, Part
from finesight.data.pixels import visual_patches
from finesight.data.processor import Processor, load_processor
from finesight.data.sample import VisualItem
from finesight.data.visual import measure
from finesight.data_settings import DataSettings
from finesight.errors import MediaError
from finesight.sampling import opening
from finesight.sampling.opening import Opening
from tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return load_processor(tiny_checkpoint(tmp_path_factory.mktemp("opening") / "qwen3_vl", "qwen3_vl"), data=DataSettings())


@pytest.fixture
def items(processor: Processor) -> list[VisualItem]:
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (80, 60 + 20 * n, 3), dtype=np.uint8)) for n in range(5)]
    return [measure(Part("image", media=MediaRef(image=picture)), processor).item(()) for picture in pictures]


def test_patches_are_those_of_one_after_the_other(processor: Processor, items: list[VisualItem]) -> None:
    ahead = Opening(processor)
    ahead.begin(items[:2])
    found = ahead.take([*items, items[0]])
    assert list(found) == [item.key for item in items]
    assert all(np.array_equal(found[item.key], visual_patches(item, processor)) for item in items)


def test_each_is_opened_once_and_let_go(processor: Processor, items: list[VisualItem], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    lock = threading.Lock()

    def counted(item: VisualItem, processor: Processor) -> np.ndarray:
        with lock:
            opened.append(item.key)
        return visual_patches(item, processor)

    monkeypatch.setattr(opening, "visual_patches", counted)
    ahead = Opening(processor)
    ahead.begin(items)
    ahead.begin(items)
    ahead.take(items)
    assert sorted(opened) == sorted(item.key for item in items)
    ahead.take(items[:1])  # not kept for another time
    assert len(opened) == len(items) + 1


def test_no_more_is_open_than_there_is_room_for(processor: Processor, items: list[VisualItem]) -> None:
    ahead = Opening(processor, most_patches=items[0].grid.patches)
    ahead.begin(items)
    assert not ahead.has_room
    ahead.forget(items)
    assert ahead.has_room
    assert len(ahead.take(items)) == len(items)  # what is needed now is opened all the same


def test_an_image_that_cannot_be_opened_is_named_and_the_others_go_on(
    processor: Processor, items: list[VisualItem], tmp_path: Path
) -> None:
    path = tmp_path / "gone.png"
    Image.new("RGB", (50, 50)).save(path)
    lost = measure(Part("image", media=MediaRef(path=str(path))), processor).item(())
    path.unlink()
    ahead = Opening(processor)
    ahead.begin([lost])
    with pytest.raises(MediaError, match=r"gone\.png"):
        ahead.take([*items, lost])
    assert len(ahead.take(items)) == len(items) and ahead.has_room
