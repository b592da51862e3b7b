"""An adapter on disk: plain peft files, which load in plain peft, and `finesight.json` (`adapter_metadata.py`) beside them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from finesight.errors import ModelError
from finesight.families import FAMILIES
from finesight.models.adapter_metadata import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    METADATA,
    METADATA_FORMAT,
    AdapterMetadata,
    adapter_base,
    checked_folder,
    read_metadata,
)
from finesight.models.expert_adapters import adapt_quantized_experts
from finesight.models.parameters import freeze_biases_of_other_parts


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """The tensors of an adapter under the names of its file."""
    # With the default ("auto") peft would look the base up on the hub; the embeddings never train beside an adapter.
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def save_adapter(
    model: PeftModel, folder: str | Path, metadata: AdapterMetadata, weights: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """Write `adapter_model.safetensors`, `adapter_config.json` and `finesight.json`; returns the folder.

    Nothing is renamed into place here: whoever needs a crash-safe folder writes into one to the side.

    Args:
        weights: what :func:`adapter_weights` gives, where the model itself holds only a part of it; None: the model's.

    Raises:
        ModelError: the model carries no adapter.
    """
    if not isinstance(model, PeftModel):
        raise ModelError("This model carries no adapter to save. Train with tuning.method: lora, or save the whole model.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = adapter_weights(model) if weights is None else weights
    kept = {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()}
    save_file(kept, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    content = dict(model.peft_config["default"].to_dict())
    content.update(base_model_name_or_path=metadata.base, inference_mode=True)
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
    about = {"format": METADATA_FORMAT, **asdict(metadata)}
    (folder / METADATA).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def load_adapter(model: nn.Module, folder: str | Path, *, is_trainable: bool = False, name: str = "default") -> PeftModel:
    """Put the adapter of a folder onto a base model; its rank, targets and scale are kept. Its weights are float32.

    Args:
        model: a base, or a peft model that carries other adapters already; the first one stays the active one.
        name: what peft calls it.

    Raises:
        ModelError: the folder is no LoRA adapter in safetensors, belongs to another family, or its tensors do not fit.
    """
    folder = checked_folder(folder)
    metadata = read_metadata(folder)
    family = getattr(getattr(model, "config", None), "model_type", None)
    if metadata is not None and family is not None and metadata.family != family:
        label = FAMILIES[metadata.family].label if metadata.family in FAMILIES else metadata.family
        raise ModelError(f"The adapter in {folder} was trained on {label} ({metadata.base}), not on this {family} model. Use that base.")
    _check_shapes(model, folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise ModelError(f"{folder} holds an adapter of type {config.peft_type}, not LoRA. Only LoRA adapters are supported.")
        with quiet_peft():
            if isinstance(model, PeftModel):
                config.inference_mode = not is_trainable
                model.add_adapter(name, adapt_quantized_experts(config))  # so that loading finds this configuration
                model.load_adapter(str(folder), name, is_trainable=is_trainable)
                wrapped = model
            else:
                wrapped = PeftModel.from_pretrained(
                    cast(Any, model), str(folder), name, is_trainable=is_trainable, config=adapt_quantized_experts(config)
                )
    except (ValueError, RuntimeError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise ModelError(f"The adapter in {folder} does not fit this model: {_first_line(error)} {_bases(model, folder)}") from error
    _check_tensors(wrapped, folder, name)
    if is_trainable:
        freeze_biases_of_other_parts(wrapped)
    else:
        wrapped.requires_grad_(False)  # peft leaves the biases of `bias: all` trainable
    return wrapped


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warnings of peft that say nothing to a user: a name it uses that transformers renamed, and missing
    tensors, which are an error here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        yield


def _check_shapes(model: nn.Module, folder: Path) -> None:
    """Compares the inputs and outputs of adapted matrices with those of the base, before anything is put onto it.

    Names that the base does not have are left to :func:`_check_tensors`: peft knows what transformers has renamed.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = dict(base.named_modules())
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - the file is no mapping
    except SafetensorError as error:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS} is damaged: {error}. Copy it again, or use a checkpoint of its run.") from None
    for key, shape in shapes.items():
        path, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        features, axis = ("in_features", 1) if part == "A.weight" else ("out_features", 0)
        wanted = getattr(modules.get(path), features, None)
        if part in ("A.weight", "B.weight") and isinstance(wanted, int) and len(shape) == 2 and shape[axis] != wanted:
            raise ModelError(
                f"The adapter in {folder} does not fit this model: {path} has {wanted:,} {features} here and {shape[axis]:,} in the "
                f"adapter. {_bases(model, folder)}"
            )


def _bases(model: nn.Module, folder: Path) -> str:
    """Which base an adapter names and which it was given, and what to do about it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    given = getattr(base, "name_or_path", None) or "another one"
    named = adapter_base(folder)
    if named == given:
        return f"It names the base {named}, which is the one given: its files are not of one run, or the base was replaced since."
    return f"It names the base {named}; the one given is {given}. Give the former with --model (model.name_or_path), or an adapter of the latter."


def _check_tensors(model: PeftModel, folder: Path, name: str) -> None:
    """peft leaves what a file lacks at its first values and passes over what it has too much; neither is right."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        stored = set(file.keys())
    expected = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    if stored != expected:
        missing, surplus = sorted(expected - stored), sorted(stored - expected)
        shown = "; ".join(
            f"{len(names)} {what} (such as {names[0]})" for names, what in ((missing, "missing"), (surplus, "without a place")) if names
        )
        raise ModelError(
            f"The tensors of {folder / ADAPTER_WEIGHTS} are not those of its adapter on this model: {shown}. {_bases(model, folder)}"
        )


def _first_line(error: BaseException) -> str:
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    said = more[0].strip() if first.endswith(":") and more else first  # torch heads a list of what differs
    return said.rstrip(".") + "."
