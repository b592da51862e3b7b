"""Several adapters on one base, one of them (or none) at work at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from finesight.errors import ModelError
from finesight.models.adapter_files import load_adapter
from finesight.models.adapter_metadata import adapter_shape


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
        if (bias := adapter_shape(folder).get("bias", "none")) != "none":
            raise ModelError(
                f"The adapter in {folder} was trained with tuning.bias: {bias}, which changes the base itself: it cannot be switched on "
                "and off. Merge it into the base, and use the merged model alone."
            )
        # peft's own names become parts of parameter names, where a dot may not be.
        peft_name = f"adapter_{self._loaded}"
        self._loaded += 1
        try:
            self.model = load_adapter(self.model, folder, name=peft_name)
        except ModelError:
            self._withdraw(peft_name)
            raise
        self._peft_names[name] = peft_name

    def remove(self, name: str) -> None:
        """Forgets an adapter and puts the base alone to work.

        Raises:
            ModelError: no adapter of that name is loaded.
        """
        if name not in self._peft_names:
            raise self._unknown(name)
        self._withdraw(self._peft_names.pop(name))
        self.use(None)

    def _withdraw(self, peft_name: str) -> None:
        """Takes an adapter out of the layers, also one whose loading failed halfway."""
        if self._peft_names and isinstance(self.model, PeftModel):
            if peft_name in self.model.peft_config:
                self.model.set_adapter(next(iter(self._peft_names.values())), inference_mode=True)  # peft warns if the active one goes
                self.model.delete_adapter(peft_name)
            return
        # It was the only one, and peft keeps no model without adapters.
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        adapted = [path for path, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
        for path in adapted:
            parent, _, leaf = path.rpartition(".")
            if not any(path.startswith(f"{outer}.") for outer in adapted):
                setattr(base.get_submodule(parent), leaf, base.get_submodule(path).get_base_layer())
        if hasattr(base, "peft_config"):
            del base.peft_config
        self.model = base

    def use(self, name: str | None) -> None:
        """Puts an adapter to work, or with None the base alone.

        Raises:
            ModelError: no adapter of that name is loaded.
        """
        if name is not None and name not in self._peft_names:
            raise self._unknown(name)
        if not isinstance(self.model, PeftModel):
            return
        if name is None:
            self.model.base_model.disable_adapter_layers()
            return
        self.model.base_model.enable_adapter_layers()
        self.model.set_adapter(self._peft_names[name], inference_mode=True)

    def _unknown(self, name: str) -> ModelError:
        return ModelError(f"No adapter {name!r} is loaded, only {', '.join(self._peft_names) or 'the base'}.")
