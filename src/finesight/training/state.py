"""What a checkpoint holds besides the model: optimizer, random states, position in the data, and whose run it is."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finesight.data.sample import Sample
from finesight.errors import CheckpointError
from finesight.recipe import Recipe
from finesight.recipe_files import section_class

TRAINER_STATE = "trainer.json"
# Most bytes of tensors in one file, and so held twice while saving.
SHARD_BYTES = 2 * 2**30

# Settings that change neither the course of a run nor what a later step computes (beyond rounding).
_FREE_TO_CHANGE = frozenset(
    {
        "data.share_prefixes",
        "data.on_bad_row",
        "data.allow_urls",
        "data.allowed_dirs",
        "training.output_dir",
        "training.token_budget",
        "training.gradient_checkpointing",
        "training.mlp_chunk_tokens",
        "training.sharding",
        "training.logging_steps",
        "training.save_strategy",
        "training.save_steps",
        "training.save_total_limit",
        "training.save_only_model",
        "training.eval_strategy",
        "training.eval_steps",
        "training.early_stopping_patience",
        "training.load_best_model_at_end",
        "training.sample_answers",
        "training.resume",
        "training.report_to",
        "training.num_workers",
        "rollout.batch_size",
        "rollout.url",
        "rollout.model",
        "rollout.api_key_env",
        "rollout.timeout_s",
    }
)


@dataclass
class TrainerState:
    """Where a run stands. Steps are counted from 1 once done: `step` of them are."""

    step: int = 0
    epoch: int = 0  # of the next step
    index: int = 0  # of the next step within its epoch
    best_metric: float | None = None  # lowest held-out loss, or highest held-out reward
    best_step: int | None = None
    evaluations_without_better: int = 0
    num_samples: int = 0  # counted over the whole run
    num_tokens: int = 0  # computed
    unshared_tokens: int = 0  # had nothing been shared
    padded_tokens: int = 0  # had each step been padded to its longest sample
    num_targets: int = 0
    skipped_updates: int = 0  # float16 overflows
    out_of_memory: int = 0  # packs that did not fit and were divided
    token_limit: int | None = None  # most tokens of a pack, as learned from them
    seconds: float = 0.0
    last_loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> TrainerState:
        known = {f.name for f in fields(TrainerState)}
        return TrainerState(**{name: value for name, value in content.items() if name in known})


def run_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that make a run what it is, by dotted name."""
    content = recipe.model_dump(mode="json", exclude={"evaluation"})
    flat: dict[str, Any] = {}
    for section, values in content.items():
        if isinstance(values, Mapping):
            flat |= {f"{section}.{name}": value for name, value in values.items()}
        elif values:  # a list of sections
            flat[section] = values
    return {name: value for name, value in flat.items() if name not in _FREE_TO_CHANGE}


def run_digest(recipe: Recipe) -> str:
    """Hash of :func:`run_settings`."""
    return hashlib.sha256(json.dumps(run_settings(recipe), sort_keys=True).encode()).hexdigest()


def data_fingerprint(samples: Iterable[Sample]) -> str:
    """Hash of all that training sees of the samples, pixels included, in their order."""
    digest = hashlib.sha256()
    for sample in samples:
        for array in (sample.token_ids, sample.position_ids, sample.trained):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(json.dumps([len(sample), sample.weight, [item.key for item in sample.visual_items]]).encode())
    return digest.hexdigest()


def check_same_run(saved: Mapping[str, Any], recipe: Recipe, fingerprint: str, where: Path) -> None:
    """Refuses to go on from the state of another run.

    Raises:
        CheckpointError: names the settings that differ, or says that the data does.
    """
    now = run_settings(recipe)
    # A setting that is newer than the checkpoint had its default.
    settings = {**{name: _default(name) for name in now}, **saved["settings"]}
    differing = [name for name in sorted(settings) if settings[name] != now.get(name)]
    if differing:
        lines = [f"  {name}: {settings.get(name)!r} in the checkpoint, {now.get(name)!r} in the recipe" for name in differing]
        raise CheckpointError(
            f"{where} belongs to another run:\n"
            + "\n".join(lines)
            + "\nSet these back, or start a new run with another training.output_dir"
            " (model.adapter goes on from an adapter under new settings)."
        )
    if saved["data_fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{where} was trained on other data: rows, images or their order have changed since. Restore the data, or start a new run "
            "with another training.output_dir."
        )


def _default(name: str) -> Any:
    section, _, setting = name.partition(".")
    below = section_class(Recipe.model_fields[section].annotation)
    if not setting or below is None:
        return Recipe.model_fields[section].get_default(call_default_factory=True)
    return below.model_fields[setting].get_default(call_default_factory=True)


def save_tree(folder: Path, name: str, tree: Any) -> None:
    """Writes nested dicts, lists and tuples of tensors, numbers, text and None as `name.json` and `name-….safetensors`.

    Raises:
        CheckpointError: something else is in it.
    """
    tensors: dict[str, torch.Tensor] = {}
    skeleton = _split(tree, "", tensors)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    names = []
    for number, shard in enumerate(shards):
        if shard:
            names.append(f"{name}-{number:05d}.safetensors")
            # Tensors may share memory, or be views; the file holds each by itself.
            save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in shard.items()}, folder / names[-1])
    (folder / f"{name}.json").write_text(json.dumps({"tree": skeleton, "files": names}), encoding="utf-8")


def load_tree(folder: Path, name: str) -> Any:
    """Reads what :func:`save_tree` wrote, tensors on the CPU.

    Raises:
        CheckpointError: a file is missing or unreadable.
    """
    try:
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        tensors: dict[str, torch.Tensor] = {}
        for file in content["files"]:
            tensors.update(load_file(folder / file))
        return _join(content["tree"], tensors)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder / name}.json cannot be read ({error}). Use another checkpoint.") from None


def _split(tree: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        key = path or "tensor"
        tensors[key] = tree
        return {"$tensor": key}
    if isinstance(tree, Mapping):
        return {"$dict": [[key, _split(value, f"{path}/{key}" if path else str(key), tensors)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        items = [_split(value, f"{path}/{index}" if path else str(index), tensors) for index, value in enumerate(tree)]
        return {"$tuple": items} if isinstance(tree, tuple) else items
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise CheckpointError(f"{path}: a {type(tree).__name__} cannot be kept in a checkpoint")


def _join(skeleton: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(skeleton, list):
        return [_join(item, tensors) for item in skeleton]
    if isinstance(skeleton, dict):
        if "$tensor" in skeleton:
            return tensors[skeleton["$tensor"]]
        if "$tuple" in skeleton:
            return tuple(_join(item, tensors) for item in skeleton["$tuple"])
        return {key: _join(value, tensors) for key, value in skeleton["$dict"]}
    return skeleton


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of all generators that this process draws from, as a tree for :func:`save_tree`."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(algorithm), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Sets all generators as they were."""
    random.setstate(state["python"])
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def write_trainer_state(folder: Path, state: TrainerState, recipe: Recipe, fingerprint: str) -> None:
    """Writes `trainer.json`: position, best loss, counters, and the settings, data and folder they belong to."""
    content = {
        "state": state.to_json(),
        "settings": run_settings(recipe),
        "recipe_digest": run_digest(recipe),
        "data_fingerprint": fingerprint,
        "folder": str(Path.cwd()),  # that relative paths of the recipe start at
    }
    (folder / TRAINER_STATE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """What :func:`write_trainer_state` wrote.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        content = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
        content["state"] = TrainerState.from_json(content["state"])
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / TRAINER_STATE} cannot be read ({error}). Use another checkpoint.") from None
