"""Settings -> a model with its processor, on its device, ready to train or to answer.

The real transformers class of the family, weights from safetensors only, no code from a checkpoint is run.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from pydantic import ValidationError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from finesight.allocator import use_expandable_segments
from finesight.data.processor import Processor, checkpoint_folder, load_processor
from finesight.data_settings import DataSettings
from finesight.errors import ModelError, RecipeError
from finesight.families import Family
from finesight.models.adapter_files import load_adapter
from finesight.models.adapter_metadata import AdapterMetadata, read_metadata, restore_data_settings
from finesight.models.quantize import Scheme, quantization_notes, quantize
from finesight.models.quantized_loading import WhileLoading, adopt_bitsandbytes, stored_precision
from finesight.recipe import PRECISION_SETTINGS, ModelSettings, Recipe

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model and what belongs to it."""

    model: PreTrainedModel | PeftModel  # in evaluation mode
    processor: Processor
    device: torch.device
    dtype: torch.dtype  # of the base weights
    family: Family
    metadata: AdapterMetadata | None = None  # what the adapter, or else the model itself, was trained under, if it says
    notes: tuple[str, ...] = ()  # what people should know of how it was loaded: warnings, then facts; also logged as such
    settings: ModelSettings | None = None  # that it was loaded with

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, without the wrapping of an adapter."""
        return cast(PreTrainedModel, getattr(self.model, "get_base_model", lambda: self.model)())

    def precision(self, recipe: Recipe | None = None, given: Mapping[str, Any] | None = None) -> dict[str, bool]:
        """The bits that it was loaded in, as settings of a recipe's `model` section: what trains on it is planned, checked and
        written down by them.

        Args:
            recipe, given: what a user asks for besides.

        Raises:
            RecipeError: it asks for other bits.
        """
        if self.settings is None:
            return {}
        present = {name: bool(getattr(self.settings, name)) for name in PRECISION_SETTINGS}
        asked = recipe.model.model_dump(exclude_unset=True) if recipe is not None else {}
        for name, value in (asked | dict(given or {})).items():
            if name in present and value != present[name]:
                raise RecipeError(
                    f"{name} is {str(value).lower()}, but the model was loaded with {str(present[name]).lower()}. Leave it out, or load the "
                    "model so."
                )
        return {name: value for name, value in present.items() if value}


def load(
    name_or_path: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    hub: str = "huggingface",
    data: DataSettings | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    load_in_fp8: bool = False,
    quantize_vocabulary: bool = False,
    quantize_tower: bool = False,
) -> LoadedModel:
    """A model for answering: a checkpoint, and an adapter on it where one is given.

    Args:
        name_or_path: folder, or name on the hub.
        adapter: folder of an adapter. Pixel limits and frame sampling are those it was trained with, unless `data`
            sets them; overriding them is warned about.
        dtype: auto, bfloat16, float16 or float32, of the base weights.
        device: none: the first GPU, or the CPU where there is none.
        load_in_4bit, load_in_8bit, load_in_fp8, quantize_vocabulary, quantize_tower: as in a recipe's `model` section.
            An adapter may be put on a base in another precision than it was trained over.

    Raises:
        RecipeError: `dtype` or `hub` is none of those, or the precisions do not go together.
        ModelError: see :func:`load_model`.
    """
    given: dict[str, Any] = {"name_or_path": str(name_or_path), "hub": hub, "revision": revision, "dtype": dtype}
    given |= {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit, "load_in_fp8": load_in_fp8}
    given |= {"quantize_vocabulary": quantize_vocabulary, "quantize_tower": quantize_tower}
    try:
        settings = ModelSettings(**given, adapter=None if adapter is None else str(adapter))
    except ValidationError as error:
        problems = "; ".join(f"{problem['loc'][-1] if problem['loc'] else 'model'}: {problem['msg']}" for problem in error.errors())
        raise RecipeError(f"These settings of load cannot be used: {problems}.") from None
    return load_model(settings, data=data, device=device)


def load_model(
    settings: ModelSettings,
    *,
    data: DataSettings | None = None,
    device: str | torch.device | None = None,
    train_adapter: bool = False,
) -> LoadedModel:
    """The model of a recipe.

    Args:
        data: limits of pixels and frames for the processor. Where it does not set them, those count that the adapter,
            or a model tuned as a whole, was trained with.
        device: none: the first GPU, or the CPU where there is none.
        train_adapter: whether the adapter of `settings` is to be trained on rather than used.

    Raises:
        ModelError: there is no such checkpoint, its type is not supported, weights are missing or surplus, the adapter
            does not fit, or the GPU is out of memory.
    """
    use_expandable_segments()
    name = checkpoint_folder(settings.name_or_path, settings.hub, settings.revision)
    warnings: list[str] = []  # what may be worse than was meant, and what to change
    facts: list[str] = []
    trained = settings.adapter if settings.adapter is not None else name
    metadata = read_metadata(trained)
    if metadata is not None or settings.adapter is not None:
        data, warnings = restore_data_settings(trained, data)
    processor = load_processor(name, data=data, revision=settings.revision)
    chosen = choose_device(device)
    dtype, dtype_note = choose_dtype(settings.dtype, chosen)
    warnings += [dtype_note] if dtype_note else []
    if settings.quantization != "none" and dtype == torch.float32 and chosen.type == "cuda":
        warnings.append(
            f"model.dtype: float32 with model.load_in_{settings.quantization}: weights are dequantised to float32 for their products, which is "
            "slow and gains nothing. Leave model.dtype at auto."
        )
    if settings.load_in_fp8 and chosen.type == "cpu":
        warnings.append(
            "model.load_in_fp8 on a CPU: float8 weights are dequantised at every use, which is slow. It is meant for tests and export."
        )
    with without_library_bars(when=not sys.stderr.isatty()):
        model: Any = _load_weights(name, settings.revision, processor.family, dtype, chosen, Scheme.of(settings))
    facts += quantization_notes(model)
    if metadata is not None and metadata.quantization not in ("none", settings.quantization):
        warnings.append(
            f"{trained} was trained over a base in {metadata.quantization}, and the base is loaded otherwise now: answers may differ a little. "
            f"Set model.load_in_{metadata.quantization}: true for the base that it knows."
        )
    model.name_or_path = settings.name_or_path
    if settings.adapter is not None:
        model = load_adapter(model, settings.adapter, is_trainable=train_adapter)
    for note in warnings:
        logger.warning(note)
    for note in facts:
        logger.info(note)
    return LoadedModel(model.eval(), processor, chosen, dtype, processor.family, metadata, (*warnings, *facts), settings)


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or else the current GPU, or else the CPU.

    Raises:
        ModelError: a GPU is asked for and there is none.
    """
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"Device {device} is asked for, but torch sees no GPU. Use device cpu, or install torch with CUDA.")
    return chosen


def choose_dtype(asked: str, device: torch.device, *, gpu_has_bf16: bool | None = None) -> tuple[torch.dtype, str | None]:
    """(precision of the base weights, what people should know of the choice or None).

    `auto` is bfloat16 where the GPU computes in it, float16 on older GPUs, float32 on a CPU.

    Args:
        gpu_has_bf16: none: ask the GPU.

    Raises:
        ModelError: the precision is not one of those.
    """
    if asked not in ("auto", *_DTYPES):
        raise ModelError(f"Precision {asked!r} is not one of auto, {', '.join(_DTYPES)}. Change model.dtype.")
    if device.type != "cuda":
        return _DTYPES["float32" if asked == "auto" else asked], None
    if gpu_has_bf16 is None:
        gpu_has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)  # from Ampere on
    if asked == "auto":
        if gpu_has_bf16:
            return torch.bfloat16, None
        return (
            torch.float16,
            "This GPU does not compute in bfloat16: the base is loaded in float16 (set model.dtype: float32 if the loss overflows).",
        )
    if asked == "bfloat16" and not gpu_has_bf16:
        return torch.bfloat16, "This GPU does not compute in bfloat16 and will emulate it slowly: set model.dtype: float16."
    return _DTYPES[asked], None


@contextmanager
def without_library_bars(when: bool = True) -> Iterator[None]:
    """Without transformers' progress bars, which would tear a live view of ours or fill a log file."""
    shown = transformers_logging.is_progress_bar_enabled()
    if when:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _load_weights(
    name: str, revision: str | None, family: Family, dtype: torch.dtype, device: torch.device, scheme: Scheme | None
) -> PreTrainedModel:
    if Path(name).is_dir():
        _refuse_missing_weights(Path(name))
    model_class = getattr(transformers, family.model_class)
    stored = stored_precision(model_class.config_class.from_pretrained(name, revision=revision), name)
    if stored is not None and scheme is not None and scheme.precision != stored:
        raise ModelError(
            f"{name} is stored in {stored} already and is loaded as it is: leave out model.load_in_{scheme.precision}, or use the "
            "checkpoint that it was made from."
        )
    advice = "Fetch the checkpoint again."
    if stored is not None and family.moe:
        advice = (
            "Of mixtures of experts those checkpoints are read in which bitsandbytes has quantised linear layers only, as transformers writes "
            "them: experts and router in full precision. Use the checkpoint that this one was made from, with model.load_in_4bit: true; its "
            "experts are quantised while they are loaded."
        )
    loading = WhileLoading(scheme, device) if scheme is not None and stored is None else None
    try:
        model, info = model_class.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            # Straight onto a GPU, shard by shard; on a CPU weights stay where they are read.
            # (bitsandbytes' quantizer would choose a device of its own.)
            device_map={"": device} if device.type != "cpu" or stored is not None else None,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({} if loading is None else {"quantization_config": loading}),
        )
    except torch.OutOfMemoryError as error:
        raise ModelError(_out_of_memory(name, dtype, device)) from error
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = loading.problems[0] if loading is not None and loading.problems else error
        further = f" {advice}" if stored is not None and family.moe else ""
        raise ModelError(f"The weights of {name} cannot be loaded as {family.label}: {reason}{further}") from error
    problems = [
        f"{len(info[kind])} {what} (such as {min(map(str, info[kind]))})"
        for kind, what in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "that the model has no place for"),
            ("mismatched_keys", "of another shape"),
        )
        if info.get(kind)
    ]
    if problems:
        raise ModelError(f"The weights of {name} are not those of a whole {family.label}: {'; '.join(problems)}. {advice}")
    if stored is not None:
        adopt_bitsandbytes(model, dtype)
        if scheme is not None and (scheme.vocabulary or scheme.tower or (scheme.experts is not None and family.moe)):
            quantize(model, replace(scheme, precision=None))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the places of matrices in full precision
    return cast(PreTrainedModel, model)


def _refuse_missing_weights(folder: Path) -> None:
    names = {path.name for path in folder.glob("*")}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            needed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            raise ModelError(f"{index} is damaged. Fetch the checkpoint again.") from None
        if absent := sorted(needed - names):
            raise ModelError(
                f"{folder} lacks {len(absent)} of {len(needed)} weight files (such as {absent[0]}). Fetch the checkpoint again."
            )
        return
    if not any(name.endswith(".safetensors") for name in names):
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
        reason = (
            "its weights are pickled files, which can run code and are not read; convert them to safetensors"
            if pickled
            else "it has no weights"
        )
        raise ModelError(f"{folder} cannot be loaded: {reason}. A model.safetensors, or shards with their index, are needed.")


def _out_of_memory(name: str, dtype: torch.dtype, device: torch.device) -> str:
    stored = sum(path.stat().st_size for path in Path(name).glob("*.safetensors")) / 2**30
    free, total = (value / 2**30 for value in torch.cuda.mem_get_info(device))
    size = f"its weights take {stored:.1f} GiB on disk, and " if stored else ""
    return (
        f"The GPU is out of memory loading {name}: {size}{free:.1f} of {total:.1f} GiB are free. Close what else uses the GPU, "
        f"choose a smaller checkpoint, or a smaller precision than {str(dtype).removeprefix('torch.')}."
    )
