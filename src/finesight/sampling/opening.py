"""Images and videos of prompts that wait, opened and cut in threads ahead of the pass that computes them.

Cutting an image of 1,024 visual tokens takes some 30 ms: on the thread that decodes, all rows would wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from finesight.data.pixels import value_table, visual_patches
from finesight.data.processor import Processor
from finesight.data.sample import VisualItem

_THREADS = 8
# Patches that are kept before their time, about 6 KB each: 64 images of 1,024 visual tokens are more than this.
MOST_PATCHES = 1 << 16


class Opening:
    """Patches by the key of their image or video, opened once whoever asks for them.

    Args:
        most_patches: that may be open ahead of their use.
    """

    def __init__(self, processor: Processor, most_patches: int = MOST_PATCHES) -> None:
        self.processor, self.most_patches = processor, most_patches
        value_table(processor)  # made once, ahead of the threads
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="images")
        self._begun: dict[str, tuple[VisualItem, Future[np.ndarray]]] = {}

    @property
    def has_room(self) -> bool:
        """Whether another one may be opened ahead."""
        return sum(item.grid.patches for item, _ in self._begun.values()) < self.most_patches

    def begin(self, items: Iterable[VisualItem]) -> None:
        """Starts on those that there is room for."""
        for item in items:
            if item.key not in self._begun and self.has_room:
                self._start(item)

    def take(self, items: Iterable[VisualItem]) -> dict[str, np.ndarray]:
        """The patches of all of them, (grid.patches, patch values) float32 each; they are let go here.

        Raises:
            MediaError: one of them cannot be decoded.
        """
        wanted = {item.key: item for item in items}
        for item in wanted.values():
            if item.key not in self._begun:
                self._start(item)
        try:
            return {key: self._begun[key][1].result() for key in wanted}
        finally:
            self.forget(wanted.values())

    def forget(self, items: Iterable[VisualItem]) -> None:
        """Lets go of what nobody waits for any more."""
        for item in items:
            begun = self._begun.pop(item.key, None)
            if begun is not None:
                begun[1].cancel()

    def _start(self, item: VisualItem) -> None:
        self._begun[item.key] = item, self._pool.submit(visual_patches, item, self.processor)
