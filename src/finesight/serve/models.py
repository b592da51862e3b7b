"""The models that a server offers: a base, and adapters on it that see images as they were trained to."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finesight.data.encode import Encoder
from finesight.data.processor import Processor, checkpoint_folder, load_processor
from finesight.data_settings import DataSettings
from finesight.errors import ModelError
from finesight.models.adapter_metadata import read_metadata, restore_data_settings
from finesight.models.adapter_switch import AdapterSwitch
from finesight.models.load import LoadedModel, load_model
from finesight.models.packed import PackedModel
from finesight.recipe import ModelSettings
from finesight.sampling.blocks import fitting_blocks
from finesight.sampling.engine import DecodingEngine, stop_ids
from finesight.sampling.grammar import GrammarCompiler
from finesight.sampling.requests import EngineSize, blocks_for
from finesight.serve.settings import ServeSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ServedModel:
    """What a client can choose with `model`."""

    name: str
    adapter: str | None  # as the switch knows it; None: the base
    processor: Processor
    encoder: Encoder
    system: str | None  # prompt for requests that have none
    created: int  # seconds since 1970


class ModelShelf:
    """Everything loaded.

    Args:
        settings: of the base; an adapter in it is not read.
        adapters: folders, by the names that clients choose them with.
        name: of the base; none: the last part of its path, or its name on the hub.
        data: goes before the pixel limits and frame sampling that adapters were trained with.

    Raises:
        ModelError: from loading; two models of one name.
    """

    def __init__(
        self,
        settings: ModelSettings,
        adapters: Mapping[str, Path],
        *,
        name: str | None = None,
        data: DataSettings | None = None,
        device: str | None = None,
    ) -> None:
        settings = settings.model_copy(update={"adapter": None})
        self.base_name = base_name = name or (
            Path(settings.name_or_path).resolve().name if Path(settings.name_or_path).is_dir() else settings.name_or_path
        )
        if base_name in adapters:
            raise ModelError(
                f"An adapter and the base are both called {base_name}. Name the base with --name, or the adapter with NAME=folder."
            )
        self.loaded: LoadedModel = load_model(settings, data=data, device=device)
        self.switch = AdapterSwitch(self.loaded.base, adapters)
        self.packed = PackedModel(self.switch.model.eval())
        self.stop_ids = stop_ids(self.loaded.processor)
        metadata, now = self.loaded.metadata, int(time.time())
        image_first = metadata.image_first if metadata is not None else (data or DataSettings()).image_first
        encoder = Encoder(self.loaded.processor, image_first=image_first)
        system = None if metadata is None else metadata.system
        self.models = {base_name: ServedModel(base_name, None, self.loaded.processor, encoder, system, now)}
        self._settings, self._data = settings, data
        self._checkpoint = checkpoint_folder(settings.name_or_path, settings.hub, settings.revision)
        for adapter, path in adapters.items():
            self.models[adapter] = _adapter(adapter, path, self._checkpoint, settings, data, now)

    def add_adapter(self, name: str, folder: Path) -> None:
        """Offers one more adapter. Engines made before do not know it.

        Raises:
            ModelError: the folder holds no adapter that fits.
        """
        model = _adapter(name, folder, self._checkpoint, self._settings, self._data, int(time.time()))
        try:
            self.switch.add(name, folder)
        finally:  # what failed halfway has been taken out of the layers again
            self.packed = PackedModel(self.switch.model.eval())
        self.models[name] = model

    def remove_adapter(self, name: str) -> None:
        """Gives the memory of an adapter back. Engines made before must not be used any more."""
        self.models.pop(name, None)
        self.switch.remove(name)
        self.packed = PackedModel(self.switch.model.eval())

    def grammar_compiler(self) -> GrammarCompiler:
        """Makes grammars for answers of any of the models: they have one tokenizer.

        Raises:
            GrammarError: the library for it is missing.
        """
        vocabulary = self.packed.base.config.text_config.vocab_size
        return GrammarCompiler(self.loaded.processor.tokenizer, vocabulary, self.stop_ids)

    def engine(self, settings: ServeSettings) -> DecodingEngine:
        """An engine for these models, with a cache for as many answers as asked for, or as fit.

        Raises:
            ModelError: the GPU has no memory for a single one.
        """
        length = settings.max_length_tokens
        needed = 2 + 2 * blocks_for(length)  # a prompt, and one answer that shares nothing with it
        blocks = fitting_blocks(self.packed, max(needed, 1 + settings.batch_size * blocks_for(length)), needed)
        return DecodingEngine(
            self.packed,
            self.loaded.processor,
            EngineSize(settings.batch_size, length, length, blocks),
            use_adapter=self.switch.use,
            compile_layers=self.loaded.device.type == "cuda",
            say=lambda text: logger.warning("%s", text),
        )


def _adapter(name: str, folder: Path, base: str, settings: ModelSettings, data: DataSettings | None, now: int) -> ServedModel:
    restored, notes = restore_data_settings(folder, data)
    for note in notes:
        logger.warning("%s", note)
    processor = load_processor(base, data=restored, revision=settings.revision)
    metadata = read_metadata(folder)
    return ServedModel(
        name, name, processor, Encoder(processor, image_first=restored.image_first), None if metadata is None else metadata.system, now
    )
