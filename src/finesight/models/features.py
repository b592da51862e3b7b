"""Features of a frozen tower, computed once and kept.

Where neither tower nor merger trains, what the language model gets of an image never changes. It is kept in main memory
up to a byte budget (first come, first kept: evicting would only make room for images that are met as rarely), on disk
if asked, and fetched ahead of the step that needs it, on a thread and a stream of its own.

An entry is all that an image gives: (1 + DeepStack levels, visual tokens, hidden size), the merged features first.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from finesight.data.batch import PackedBatch
from finesight.errors import ModelError
from finesight.models.vision import VisualFeatures


@dataclass
class CacheFigures:
    """What a cache did so far; bytes of entries."""

    hits: int = 0
    misses: int = 0
    entries: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    refused: int = 0  # computed, but past the budget and not kept


def tower_fingerprint(visual: nn.Module, pixels: Sequence[object] = ()) -> str:
    """Identity of everything that features depend on besides the pixels of an item.

    Args:
        visual: the vision model, mergers included; every byte of its weights counts.
        pixels: how pixels are prepared (normalisation, patch size); compared by their text.
    """
    digest = hashlib.blake2b(repr(tuple(pixels)).encode(), digest_size=16)
    for name, tensor in sorted(visual.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_checksum(tensor))
    return digest.hexdigest()


def _checksum(tensor: torch.Tensor) -> bytes:
    """Depends on every bit and its place; summed where the tensor is, so that no weights travel."""
    words = tensor.detach().contiguous().view(torch.uint8).to(torch.int64)
    places = torch.arange(words.numel(), device=words.device) % 65521 + 1
    return torch.stack([words.sum(), (words.flatten() * places).sum()]).cpu().numpy().tobytes()


class FeatureCache:
    """Keeps features by the identity of an image or video.

    Args:
        fingerprint: of the tower; part of every file name, so that another tower's features are never met.
        budget_bytes: of main memory.
        folder: where every entry is also written, for this run beyond its budget and for later ones; None: nowhere.
        on_kept: is told the key of each entry once it is kept.

    Raises:
        ModelError: the folder cannot be written.
    """

    def __init__(
        self, fingerprint: str, *, budget_bytes: int, folder: Path | None = None, on_kept: Callable[[str], None] = lambda key: None
    ) -> None:
        self.fingerprint, self.budget_bytes, self.on_kept = fingerprint, budget_bytes, on_kept
        self.folder = folder / fingerprint if folder is not None else None
        self.figures = CacheFigures()
        self.bytes_per_token: int | None = None  # of an entry, for each visual token; None: none was computed yet
        self.handed_over: set[str] = set()  # identities of all items that were ever given to store
        self._memory: dict[str, torch.Tensor] = {}
        self._disk: set[str] = set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="features")
        self._storing: list[Future[None]] = []
        self._copies: torch.cuda.Stream | None = None
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ModelError(f"The folder for features, {self.folder}, cannot be made: {error.strerror}.") from None
            self._disk = {path.stem for path in self.folder.glob("*.safetensors")}

    def __contains__(self, key: object) -> bool:
        return key in self._memory or (bool(self._disk) and isinstance(key, str) and _file_name(key) in self._disk)

    def store(self, keys: Sequence[str], tokens: Sequence[int], features: VisualFeatures) -> None:
        """Keeps the features of items laid end to end; copies them without waiting for the device.

        Args:
            keys: identities of the items.
            tokens: visual tokens of each.
            features: of all of them, without a graph.
        """
        stacked = torch.stack([features.merged, *features.deepstack]).detach()
        self.bytes_per_token = stacked.shape[0] * stacked.shape[2] * stacked.element_size()
        ready = None
        if stacked.is_cuda:
            stream = self._side_stream(stacked.device)
            stream.wait_stream(torch.cuda.current_stream(stacked.device))
            with torch.cuda.stream(stream):
                host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
                host.copy_(stacked, non_blocking=True)
                stacked.record_stream(stream)
                ready = stream.record_event()
        else:
            host = stacked
        self.handed_over.update(keys)
        self._storing = [future for future in self._storing if not _finished(future)]
        self._storing.append(self._thread.submit(self._keep, list(keys), list(tokens), host, ready))

    def _keep(self, keys: list[str], tokens: list[int], host: torch.Tensor, ready: torch.cuda.Event | None) -> None:
        if ready is not None:
            ready.synchronize()
        for key, entry in zip(keys, host.split(tokens, dim=1), strict=True):
            size = entry.numel() * entry.element_size()
            if key in self:
                continue
            fits = self.figures.memory_bytes + size <= self.budget_bytes
            if fits:
                self._memory[key] = entry.clone()
                self.figures.memory_bytes += size
            if self.folder is not None:
                name = _file_name(key)
                self._write(entry, name, self.folder)
                self._disk.add(name)
                self.figures.disk_bytes += size
            elif not fits:
                self.figures.refused += 1
                continue
            self.figures.entries += 1
            self.on_kept(key)

    @staticmethod
    def _write(entry: torch.Tensor, name: str, folder: Path) -> None:
        partial = folder / f"{name}.{os.getpid()}.partial"
        try:
            save_file({"features": entry.contiguous()}, partial)
            partial.replace(folder / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"Features cannot be written to {folder} ({error}). Free space there, or name another training.feature_cache_dir."
            ) from None

    def prefetch(self, batch: PackedBatch, device: torch.device) -> Future[PackedBatch]:
        """Starts bringing the features that a batch expects to the device; the result is the batch with them.

        Args:
            batch: its `stored_keys` name entries of this cache, or items that were handed to :meth:`store` before.

        Raises:
            ModelError: when the result is asked for, if an entry on disk is damaged or gone, or could not be written.
        """
        return self._thread.submit(self._attach, batch, device)

    def _attach(self, batch: PackedBatch, device: torch.device) -> PackedBatch:
        for storing in self._storing:  # all handed over before this batch are done: one thread does both
            if storing.done():
                storing.result()
        self.figures.hits += len(batch.stored_keys)
        self.figures.misses += len(batch.item_keys)
        if not batch.stored_keys:
            return batch
        entries = [self._entry(key) for key in batch.stored_keys]
        if device.type != "cuda":
            return replace(batch, stored=torch.cat(entries, dim=1))
        shape = (entries[0].shape[0], sum(entry.shape[1] for entry in entries), entries[0].shape[2])
        staging = torch.empty(shape, dtype=entries[0].dtype, pin_memory=True)
        torch.cat(entries, dim=1, out=staging)
        stream = self._side_stream(device)
        with torch.cuda.stream(stream):
            stored = staging.to(device, non_blocking=True)
            stream.record_event().synchronize()  # on this thread: the step finds them there
        return replace(batch, stored=stored)

    def _entry(self, key: str) -> torch.Tensor:
        if key in self._memory:
            return self._memory[key]
        path = self._file(key)
        try:
            return load_file(path)["features"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelError(f"Kept features {path} cannot be read ({error}). Delete the file, or the folder, and start again.") from None

    def finish(self) -> None:
        """Waits until everything handed to :meth:`store` is kept."""
        for future in self._storing:
            future.result()
        self._storing = []

    def known(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys whose features are kept."""
        return [key for key in keys if key in self]

    def close(self) -> None:
        """Lets go of the thread and of what is kept in memory."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._memory.clear()

    def _file(self, key: str) -> Path:
        if self.folder is None:
            raise ModelError(f"Features of {key} are not kept.")
        return self.folder / f"{_file_name(key)}.safetensors"

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if self._copies is None:
            self._copies = torch.cuda.Stream(device)
        return self._copies


def _finished(future: Future[None]) -> bool:
    """Whether a store is done; raises what went wrong in it."""
    if future.done():
        future.result()
        return True
    return False


def _file_name(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=20).hexdigest()
