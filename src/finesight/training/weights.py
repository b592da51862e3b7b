"""Model weights in a checkpoint: an adapter as peft writes it, or a whole model as transformers does.

Either folder can be used by itself, by this project and by others.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from finesight.data.processor import Processor
from finesight.errors import CheckpointError
from finesight.models.adapter_files import adapter_weights, save_adapter
from finesight.models.adapter_metadata import ADAPTER_WEIGHTS, METADATA, AdapterMetadata
from finesight.models.load import without_library_bars
from finesight.models.sharding import divided_like, gathered, is_sharded

ADAPTER, MODEL = "adapter", "model"


def weights_folder(model: torch.nn.Module) -> str:
    """Name of the folder that a model's weights are kept in."""
    return ADAPTER if isinstance(model, PeftModel) else MODEL


def gather_weights(model: PreTrainedModel | PeftModel, *, keep: bool) -> dict[str, torch.Tensor] | None:
    """What :func:`save_weights` writes of a model that is divided over processes, in one piece; None where it is not divided.

    Collective.

    Args:
        keep: whether this process is the one that writes.
    """
    if not is_sharded(model):
        return None
    if isinstance(model, PeftModel):
        own = adapter_weights(model)
    else:
        # The variables themselves, so that a matrix that embedding and lm_head share is known for one.
        named = model.state_dict(keep_vars=True)
        first_names = {id(tensor): name for name, tensor in reversed(named.items())}
        own = {name: tensor.detach() for name, tensor in named.items() if first_names[id(tensor)] == name}
    weights: dict[str, torch.Tensor] = gathered(own, keep=keep)
    return weights


def save_weights(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    metadata: AdapterMetadata,
    processor: Processor,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes the adapter, or the whole model with its processor, and what it was trained under (`finesight.json`).

    Args:
        weights: of :func:`gather_weights`; None: the model's own.
    """
    if isinstance(model, PeftModel):
        save_adapter(model, folder, metadata, weights)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with without_library_bars():
        model.save_pretrained(folder, state_dict=weights)
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(processor.chat_template, encoding="utf-8")
    limits = processor.video_limits
    size = {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
    _write_json(folder / "video_preprocessor_config.json", {"size": size})
    _write_json(folder / METADATA, {"format": 1, **asdict(metadata)})


def restore_weights(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Sets the weights of a model of the same kind to those that :func:`save_weights` wrote, bit for bit.

    Raises:
        CheckpointError: the files are unreadable or belong to another model.
    """
    if isinstance(model, PeftModel):
        _restore_adapter(model, folder)
    else:
        _restore_model(model, folder)


def _restore_adapter(model: PeftModel, folder: Path) -> None:
    try:
        weights = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS} cannot be read ({error}). Use another checkpoint.") from None
    own = adapter_weights(model)
    differing = set(own) ^ set(weights) or {name for name in own if own[name].shape != weights[name].shape}
    if differing:
        raise CheckpointError(
            f"{folder} holds another adapter than this run trains (differs in {sorted(differing)[0]}). Use another checkpoint."
        )
    if is_sharded(model):
        with torch.no_grad():
            for name, tensor in own.items():  # shares its memory with the parameter
                tensor.copy_(divided_like(weights[name], tensor))
        return
    set_peft_model_state_dict(model, weights)


@torch.no_grad()
def _restore_model(model: PreTrainedModel, folder: Path) -> None:
    try:
        # On the CPU and by transformers' own names: files may be divided and named otherwise than modules are.
        with without_library_bars():
            saved = type(model).from_pretrained(folder, dtype=model.dtype, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be read ({str(error).splitlines()[0]}). Use another checkpoint.") from None
    weights = dict(cast(torch.nn.Module, saved).named_parameters())
    own = dict(model.named_parameters())
    differing = set(own) ^ set(weights) or {name for name in own if own[name].shape != weights[name].shape}
    if differing:
        raise CheckpointError(
            f"{folder} holds another model than this run trains (differs in {sorted(differing)[0]}). Use another checkpoint."
        )
    for name, parameter in own.items():
        parameter.copy_(divided_like(weights[name], parameter))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
