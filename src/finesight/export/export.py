"""A trained model as something that others load, and the proof that it is still the model that was trained."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file

from finesight.data.conversation import Conversation
from finesight.errors import ExportError
from finesight.export.companions import local_checkpoint, write_companions
from finesight.export.deltas import NO_DELTAS, AdapterDeltas, read_deltas
from finesight.export.four_bit import FOUR_BIT, quantization_config
from finesight.export.merge import Merged, Merger, MergeSettings, Rounding, tensor_differences, write_merged
from finesight.export.stored import StoredCheckpoint, empty_model
from finesight.export.verify import BOUNDS, Agreement, Witness, agreement, drawn_prompts, witness
from finesight.file_modes import give_usual_mode
from finesight.models.adapter_metadata import ADAPTER_CONFIG, ADAPTER_WEIGHTS, METADATA, AdapterMetadata, checked_folder, read_metadata
from finesight.models.load import load_model
from finesight.models.quantize import Scheme
from finesight.recipe import ModelSettings

Kind = Literal["adapter", "merged", "merged-4bit"]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Largest |written - exact| / |exact| of a tensor. Rounding of 16-bit floats: half of the last place, or all of it at random
# (float16 also loses what is below 6e-5); NF4 leaves 0.1 of normally distributed values, and more where there are outliers.
_TENSOR_BOUNDS = {"float32": 1e-6, "bfloat16": 2.0**-8, "stochastic": 2.0**-7, "float16": 2.0**-9, "4bit": 0.3}

TOWER_NOTE = (
    "The adapter changes {count} matrices of the vision tower and merger. As an adapter: transformers with peft applies them; vLLM applies "
    "them only where its version and model support LoRA in the tower (--enable-tower-connector-lora) and otherwise leaves them out with no more "
    "than a warning; llama.cpp and SGLang (0.5.23) apply adapters to the language model alone. Merged, every engine "
    "has them."
)


@dataclass(frozen=True)
class ExportSettings:
    """How a trained model is handed over.

    Raises:
        ExportError: a value is none of those that there are.
    """

    to: Kind
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of merged weights
    rounding: Rounding = "nearest"
    # Into which values an adapter is merged that was trained over a base in fewer bits: those it knew, or those of the checkpoint.
    base: Literal["trained", "stored"] = "trained"
    seed: int = 0
    bound: float | None = None  # of the verification, in nats; None: `verify.BOUNDS`
    max_shard_bytes: int = MergeSettings.max_shard_bytes

    def __post_init__(self) -> None:
        for name, kind in (("to", Kind), ("rounding", Rounding), ("dtype", Literal["bfloat16", "float16", "float32"])):
            if getattr(self, name) not in get_args(kind):
                raise ExportError(f"Export setting {name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(kind))}.")
        if self.rounding == "stochastic" and self.dtype != "bfloat16":
            raise ExportError("Stochastic rounding is for bfloat16: leave out --rounding stochastic, or choose --dtype bfloat16.")

    @property
    def agreed(self) -> float:
        """The bound of the verification."""
        if self.bound is not None:
            return self.bound
        return BOUNDS["4bit"] if self.to == "merged-4bit" else BOUNDS["float32" if self.to == "adapter" else self.dtype]


@dataclass(frozen=True)
class Export:
    """What was handed over."""

    folder: Path
    to: Kind
    agreement: Agreement
    merged: Merged | None = None
    metadata: AdapterMetadata | None = None
    notes: tuple[str, ...] = field(default=())


def export(
    model: ModelSettings,
    output: str | Path,
    settings: ExportSettings,
    *,
    prompts: Sequence[Conversation] = (),
    device: str | torch.device | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Export:
    """Writes a trained model for others and verifies it. The folder appears only once the verification holds.

    Args:
        model: base and adapter, or a fully tuned model; the precision is taken from what the adapter was trained over.
        output: a new folder.
        prompts: asked for the verification; none: drawn images.
        on_progress: told (tensors done, tensors in all) of merging.

    Raises:
        ExportError: the folder is not empty, there is no adapter to export, or the verification fails; it says where they part.
        ModelError: base or adapter cannot be read.
    """
    output = Path(output).expanduser()
    check_output(output)
    trained = model.adapter if model.adapter is not None else model.name_or_path
    metadata = read_metadata(trained)
    known = _as_trained(model, metadata, settings)
    said = _let_answer(known, prompts or drawn_prompts(), metadata, device)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if settings.to == "adapter":
            exported, merged, where, notes = _write_adapter(known, partial)
        else:
            exported, merged, where, notes = _write_checkpoint(known, partial, settings, metadata, on_progress)
        held = _compare(exported, said, metadata, settings, device)
        if not held.holds:
            raise ExportError(
                f"The export does not answer as what was trained: {held}. {where()} Nothing is left at {output}. If this is as near as the "
                f"precision comes, choose --dtype float32, or allow more with --bound (in nats)."
            )
        give_usual_mode(partial)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Export(output, settings.to, held, merged, metadata, tuple(notes))


def check_output(output: Path) -> None:
    """Refuses what an export would replace.

    Raises:
        ExportError: the folder is not empty, or a file.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(f"{output} exists already. Give a new folder, or delete that one.")


def _as_trained(model: ModelSettings, metadata: AdapterMetadata | None, settings: ExportSettings) -> ModelSettings:
    """The model in the precision that its adapter knows, or that of the checkpoint."""
    change: dict[str, object] = {"dtype": "float32" if settings.dtype == "float32" or settings.to == "adapter" else "auto"}
    if metadata is not None and model.adapter is not None and settings.base == "trained" and metadata.quantization != "none":
        change |= {f"load_in_{metadata.quantization}": True}
        change |= {"quantize_vocabulary": metadata.quantize_vocabulary, "quantize_tower": metadata.quantize_tower}
    return model.model_copy(update=change)


def _let_answer(
    model: ModelSettings, prompts: Sequence[Conversation], metadata: AdapterMetadata | None, device: str | torch.device | None
) -> Witness:
    loaded = load_model(model, device=device)
    said = witness(loaded, prompts, image_first=metadata is not None and metadata.image_first)
    del loaded
    _let_go()
    return said


def _compare(
    exported: ModelSettings, said: Witness, metadata: AdapterMetadata | None, settings: ExportSettings, device: str | torch.device | None
) -> Agreement:
    held = agreement(load_model(exported, device=device), said, settings.agreed)
    _let_go()
    return held


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_Written = tuple[ModelSettings, Merged | None, Callable[[], str], list[str]]


def _write_adapter(model: ModelSettings, folder: Path) -> _Written:
    if model.adapter is None:
        raise ExportError(f"{model.name_or_path} is a whole model: there is no adapter to export. Use --to merged.")
    source = checked_folder(model.adapter)
    deltas = read_deltas(source, empty_model(local_checkpoint(model)))
    folder.mkdir(parents=True)
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, METADATA):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)

    def where() -> str:
        ours, theirs = load_file(folder / ADAPTER_WEIGHTS), load_file(source / ADAPTER_WEIGHTS)
        worst = max(theirs, key=lambda name: float((ours[name].float() - theirs[name].float()).abs().max()))
        return f"Of the adapter's tensors {worst} differs most."

    return model.model_copy(update={"adapter": str(folder)}), None, where, tower_notes(deltas)


def _write_checkpoint(
    model: ModelSettings,
    folder: Path,
    settings: ExportSettings,
    metadata: AdapterMetadata | None,
    on_progress: Callable[[int, int], None] | None,
) -> _Written:
    base, dtype, four_bit = local_checkpoint(model), _DTYPES[settings.dtype], settings.to == "merged-4bit"
    deltas = NO_DELTAS if model.adapter is None else read_deltas(model.adapter, empty_model(base))
    merger = Merger(base, deltas, Scheme.of(model), dtype)
    how = MergeSettings(dtype, settings.rounding, settings.seed, FOUR_BIT if four_bit else None, settings.max_shard_bytes)
    merged = write_merged(merger, folder, how, on_progress)
    _check_tensors(
        merger, folder, _TENSOR_BOUNDS["4bit" if four_bit else settings.rounding if settings.rounding == "stochastic" else settings.dtype]
    )
    write_companions(base, folder, dtype, metadata, quantization_config(merger.model, dtype) if four_bit else None)
    exported = ModelSettings(name_or_path=str(folder), dtype=model.dtype)
    return exported, merged, lambda: _where_they_part(merger, folder), _notes(model, settings, deltas, merger)


def _check_tensors(merger: Merger, folder: Path, bound: float) -> None:
    """Reads every tensor back and compares it with base and adapter: a bound on answers alone would let a small fault pass."""
    worst = max(tensor_differences(merger, StoredCheckpoint(folder)), key=lambda difference: difference.relative)
    if not worst.relative <= bound:
        raise ExportError(
            f"{worst.name} of the export differs from base and adapter by {worst.relative:.2g} of its size, more than its precision explains "
            f"({bound:.2g}). Nothing is left of the export; is the disk full or the base damaged?"
        )


def _where_they_part(merger: Merger, folder: Path) -> str:
    worst = sorted(tensor_differences(merger, StoredCheckpoint(folder)), key=lambda difference: -difference.relative)[:3]
    shown = ", ".join(f"{difference.name} ({difference.relative:.2g} of its size)" for difference in worst)
    return f"The tensors that differ most from base and adapter: {shown}."


def _notes(model: ModelSettings, settings: ExportSettings, deltas: AdapterDeltas, merger: Merger) -> list[str]:
    notes = tower_notes(deltas)
    if merger.trained_base is not None:
        notes.append(
            f"The adapter was trained over a base in {model.quantization}: it is merged into the values that these stand for, which it knows "
            "(--base stored merges into the checkpoint's own)."
        )
    if settings.to == "merged-4bit" and any(".mlp.experts." in name for name in merger.shapes):
        notes.append(f"Experts stay in {settings.dtype}: bitsandbytes has no form for fused ones.")
    return notes


def tower_notes(deltas: AdapterDeltas) -> list[str]:
    """What engines do with an adapter that reaches the vision tower; empty where it does not."""
    return [TOWER_NOTE.format(count=len(deltas.tower))] if deltas.tower else []
