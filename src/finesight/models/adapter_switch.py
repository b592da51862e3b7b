"""Several adapters on one base, one of them (or none) at work at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from finesight.errors import ModelError
from finesight.models.adapter_files import load_adapter


class AdapterSwitch:
    """Loads adapters onto a base and puts one of them to work.

    Args:
        base: without adapters.
        folders: of the adapters, by the name that they are asked for with.

    Raises:
        ModelError: a folder holds no adapter, it does not fit the base, or it changes the base's own weights.
    """

    def __init__(self, base: PreTrainedModel, folders: Mapping[str, str | Path]) -> None:
        self.model: PreTrainedModel | PeftModel = base
        self._peft_names: dict[str, str] = {}
        self._loaded = 0
        for name, folder in folders.items():
            self.add(name, folder)

    def add(self, name: str, folder: str | Path) -> None:
        """Loads one more adapter; which one is at work stays open until :meth:`use` is called.

        Raises:
            ModelError: as for the class; nothing has changed then.
        """
        # peft's own names become parts of parameter names, where a dot may not be.
        peft_name = f"adapter_{self._loaded}"
        self._loaded += 1
        loaded = load_adapter(self.model, folder, name=peft_name)
        self.model = loaded
        if (bias := loaded.peft_config[peft_name].bias) != "none":
            loaded.delete_adapter(peft_name)
            raise ModelError(
                f"The adapter in {folder} was trained with tuning.bias: {bias}, which changes the base itself: it cannot be switched on "
                "and off. Merge it into the base, and use the merged model alone."
            )
        self._peft_names[name] = peft_name

    def remove(self, name: str) -> None:
        """Forgets an adapter and puts the base alone to work.

        Raises:
            ModelError: no adapter of that name is loaded.
        """
        self.use(name)  # it is loaded
        if not isinstance(self.model, PeftModel):
            return
        peft_name = self._peft_names.pop(name)
        if self._peft_names:
            self.model.delete_adapter(peft_name)
            self.use(None)
        else:  # peft keeps no model without adapters
            self.model = self.model.unload()

    def use(self, name: str | None) -> None:
        """Puts an adapter to work, or with None the base alone.

        Raises:
            ModelError: no adapter of that name is loaded.
        """
        if name is not None and name not in self._peft_names:
            raise ModelError(f"No adapter {name!r} is loaded, only {', '.join(self._peft_names) or 'the base'}.")
        if not isinstance(self.model, PeftModel):
            return
        if name is None:
            self.model.base_model.disable_adapter_layers()
            return
        self.model.base_model.enable_adapter_layers()
        self.model.set_adapter(self._peft_names[name], inference_mode=True)
