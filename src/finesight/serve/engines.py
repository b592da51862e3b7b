"""How vLLM and SGLang are started so that they serve what was trained here: their arguments, and what they cannot serve.

The arguments were read in the sources of vLLM 0.20.0, 0.27.0 and 0.33.0, and of SGLang 0.5.23. Newer versions are started with the
same ones and a note; older ones are refused, since nobody has looked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from finesight.data_settings import DataSettings
from finesight.errors import ModelError
from finesight.models.adapter_metadata import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EXPERT_PARAMETERS, read_metadata, restore_data_settings
from finesight.recipe import ModelSettings
from finesight.serve.settings import ServeSettings

EngineName = Literal["vllm", "sglang"]
Version = tuple[int, ...]
# Oldest and newest version whose arguments were checked.
CHECKED: Mapping[EngineName, tuple[Version, Version]] = {"vllm": ((0, 20, 0), (0, 33, 0)), "sglang": ((0, 5, 23), (0, 5, 23))}
_LABELS: Mapping[EngineName, str] = {"vllm": "vLLM", "sglang": "SGLang"}
# vLLM: limits of images apart from those of videos; bitsandbytes was there up to 0.27 and is gone in 0.33; ranks of its kernels.
_SCOPED_LIMITS: Version = (0, 33, 0)
_LAST_BITSANDBYTES: Version = (0, 27, 99)
_RANK_PATTERNS: Version = (0, 33, 0)
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MERGE = "Serve a merged model: `finesight export --to merged`."
_NO_DOMAIN = "none.invalid"  # RFC 2606: never resolves, so that no address is fetched
# Limits that only the project's own server has.
_OWN_LIMITS = {
    "max_completion_length": "--max-completion-length",
    "queue_size": "--queue-size",
    "max_body_bytes": "--max-body-mib",
    "timeout_s": "--timeout-s",
    "adapter_dirs": "--adapter-dir",
}


@dataclass(frozen=True)
class AdapterFacts:
    """What an engine must know of an adapter before it loads it."""

    name: str
    folder: Path
    rank: int  # the largest of any matrix
    tower: int  # matrices of the vision tower and merger that it changes
    experts: bool  # whether it changes fused experts
    patterns: bool  # whether ranks or scales differ between matrices
    unusual: tuple[str, ...]  # features of peft that engines do not know
    data: DataSettings  # limits that it was trained with
    system: str | None
    notes: tuple[str, ...]  # where limits that were given go before those

    @staticmethod
    def read(name: str, folder: Path, given: DataSettings) -> AdapterFacts:
        """Of an adapter's folder.

        Args:
            given: goes before what it was trained with.

        Raises:
            ModelError: the folder holds no adapter that can be read.
        """
        try:
            config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            with safe_open(folder / ADAPTER_WEIGHTS, framework="np") as weights:
                names = list(weights.keys())
        except (OSError, ValueError) as error:
            raise ModelError(f"The adapter in {folder} cannot be read: {error}.") from None
        unusual = [feature for feature in ("modules_to_save", "use_dora", "lora_bias") if config.get(feature)]
        if config.get("bias", "none") != "none":
            unusual.append("bias")
        data, notes = restore_data_settings(folder, given)
        metadata = read_metadata(folder)
        return AdapterFacts(
            name=name,
            folder=folder.resolve(),
            rank=max([config["r"], *(config.get("rank_pattern") or {}).values()]),
            tower=sum(".visual." in f".{tensor}" and ".lora_A." in tensor for tensor in names),
            experts=any(tensor in EXPERT_PARAMETERS for tensor in config.get("target_parameters") or ()),
            patterns=bool(config.get("rank_pattern") or config.get("alpha_pattern")),
            unusual=tuple(unusual),
            data=data,
            system=None if metadata is None else metadata.system,
            notes=tuple(notes),
        )


@dataclass(frozen=True)
class Wanted:
    """What is to be served."""

    model: ModelSettings  # its adapter is not read
    limits: ServeSettings
    adapters: tuple[AdapterFacts, ...] = ()
    name: str | None = None  # of the base; none: what the engine calls it
    data: DataSettings = field(default_factory=DataSettings)  # of the base where it is alone, and what goes before the adapters'
    tensor_parallel_size: int = 1
    images_per_prompt: int | None = None  # none: as the engine has it


@dataclass(frozen=True)
class EngineCommand:
    """How an engine is started."""

    arguments: tuple[str, ...]  # the executable first
    environment: Mapping[str, str]  # beside that of this process
    notes: tuple[str, ...]  # what users should know


def parse_version(text: str) -> Version:
    """The numbers of a version: `0.33.0.post1` is (0, 33, 0).

    Raises:
        ModelError: there are none.
    """
    found = re.search(r"\d+(\.\d+)+", text)
    if found is None:
        raise ModelError(f"{text.strip()[:80]!r} is no version.")
    return tuple(int(number) for number in found[0].split("."))


def engine_command(engine: EngineName, wanted: Wanted, version: Version | None) -> EngineCommand:
    """The command that serves what is wanted.

    Args:
        version: of the engine; None where it is not installed: the newest that was checked is taken.

    Raises:
        ModelError: that version cannot serve it, with the reason.
    """
    oldest, newest = CHECKED[engine]
    notes = []
    if version is None:
        version = newest
        notes.append(f"{_LABELS[engine]} is not installed here: these are the arguments of {_dotted(newest)}.")
    elif version < oldest:
        raise ModelError(
            f"{_LABELS[engine]} {_dotted(version)} is older than {_dotted(oldest)}, whose arguments are known. Install a newer one."
        )
    elif version > newest:
        notes.append(f"The arguments were checked up to {_LABELS[engine]} {_dotted(newest)}; {_dotted(version)} is installed.")
    _check(engine, wanted)
    data, more = _limits(wanted)
    build = _vllm if engine == "vllm" else _sglang
    command = build(wanted, data, version)
    return EngineCommand(command.arguments, command.environment, (*notes, *more, *_client_notes(engine, wanted, data), *command.notes))


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def _check(engine: EngineName, wanted: Wanted) -> None:
    """Refuses what neither engine serves."""
    label, model = _LABELS[engine], wanted.model
    defaults = ServeSettings()
    for limit, flag in _OWN_LIMITS.items():
        if getattr(wanted.limits, limit) != getattr(defaults, limit):
            raise ModelError(f"{flag} is a limit of the server of this project; {label} has none such. Leave it out.")
    if model.load_in_8bit:
        raise ModelError(f"{label} does not quantise to 8-bit integers while loading. {_MERGE} Or take --load-in-fp8.")
    if model.quantize_vocabulary or model.quantize_tower:
        raise ModelError(f"{label} decides by itself which matrices are quantised. Leave out --quantize-vocabulary and --quantize-tower.")
    for adapter in wanted.adapters:
        if adapter.unusual:
            raise ModelError(f"{adapter.folder} uses {', '.join(adapter.unusual)}, which {label} does not load. {_MERGE}")
    _check_heads(wanted)


def _check_heads(wanted: Wanted) -> None:
    """Heads must divide among the GPUs; a checkpoint on the hub is left to the engine."""
    size, path = wanted.tensor_parallel_size, Path(wanted.model.name_or_path) / "config.json"
    if size < 1:
        raise ModelError(f"--tensor-parallel-size is {size}; it must be at least 1.")
    if not path.is_file():
        return
    heads = json.loads(path.read_text(encoding="utf-8")).get("text_config", {}).get("num_attention_heads")
    if heads is not None and heads % size:
        raise ModelError(
            f"The {heads} attention heads of {wanted.model.name_or_path} do not divide among {size} GPUs (--tensor-parallel-size)."
        )


def _limits(wanted: Wanted) -> tuple[DataSettings, list[str]]:
    """How images and videos are to be seen; an engine has one setting for all models.

    Raises:
        ModelError: adapters were trained with different ones.
    """
    if not wanted.adapters:
        return wanted.data, []
    first, *others = wanted.adapters
    for other in others:
        for name in ("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels", "fps", "max_frames"):
            one, two = getattr(first.data, name), getattr(other.data, name)
            if one != two:
                advice = f"give --{name.replace('_', '-')}" if name in ("min_pixels", "max_pixels") else "serve them apart"
                raise ModelError(
                    f"{first.name} was trained with {name} {one} and {other.name} with {two}; this engine has one setting for all models. "
                    f"Serve one of them, or {advice}."
                )
    return first.data, ["The base sees images at the limits of its adapters."]


def _client_notes(engine: EngineName, wanted: Wanted, data: DataSettings) -> list[str]:
    """What the project's own server does for clients and this one does not."""
    notes = [note for adapter in wanted.adapters for note in adapter.notes]
    notes += [
        f"{adapter.name} was trained with a system prompt; {_LABELS[engine]} adds none, clients must send it: {adapter.system!r}."
        for adapter in wanted.adapters
        if adapter.system
    ]
    if data.image_first:
        notes.append("Trained with images first: clients must send a turn's images before its text.")
    return notes


def _pairs(options: Mapping[str, Any]) -> list[str]:
    """`--name value` of those that have a value; True stands for a flag alone, containers for JSON."""
    arguments: list[str] = []
    for name, value in options.items():
        if value is None or value is False or value == {}:
            continue
        arguments.append(f"--{name}")
        if value is not True:
            arguments.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return arguments


def _size(low: int | None, high: int | None) -> dict[str, int]:
    """Limits as the processors of transformers name them."""
    return {name: value for name, value in (("shortest_edge", low), ("longest_edge", high)) if value is not None}


def _vllm(wanted: Wanted, data: DataSettings, version: Version) -> EngineCommand:
    limits, model, notes = wanted.limits, wanted.model, []
    if model.load_in_4bit and version > _LAST_BITSANDBYTES:
        raise ModelError(
            f"vLLM {_dotted(version)} has no 4-bit weights of bitsandbytes. {_MERGE} Or take --load-in-fp8, or --engine finesight."
        )
    if len(limits.allowed_dirs) > 1:
        raise ModelError("vLLM opens files of one folder alone (--allowed-local-media-path). Give one --media-dir.")
    items: dict[str, int] = {} if wanted.images_per_prompt is None else {"image": wanted.images_per_prompt}
    if version >= _SCOPED_LIMITS:
        scoped = {
            "images_kwargs": _size(data.min_pixels, data.max_pixels),
            "videos_kwargs": _size(data.video_min_pixels, data.video_max_pixels),
        }
        processor: dict[str, Any] = {scope: {"size": size} for scope, size in scoped.items() if size}
    else:
        flat = {"min_pixels": data.min_pixels, "max_pixels": data.max_pixels}
        processor = {name: value for name, value in flat.items() if value is not None}
        if processor:
            items["video"] = 0
            notes.append(f"vLLM {_dotted(version)} would see videos at the limits of images: videos are off.")
    frames = {"fps": data.fps, "num_frames": data.max_frames} if wanted.adapters and items.get("video") != 0 else {}
    options: dict[str, Any] = {
        **_common_options(wanted),
        "tensor-parallel-size": wanted.tensor_parallel_size,
        "max-model-len": limits.max_length_tokens,
        "max-num-seqs": limits.batch_size,
        "mm-processor-kwargs": processor,
        "media-io-kwargs": {"video": frames} if frames else {},
        "limit-mm-per-prompt": items,
        "allowed-local-media-path": str(limits.allowed_dirs[0].resolve()) if limits.allowed_dirs else None,
        "allowed-media-domains": None if limits.allow_urls else _NO_DOMAIN,
    }
    if limits.allow_urls:
        notes.append("vLLM fetches any address that a request names, those of this network too. Restrict it with a proxy or a firewall.")
    arguments = ["vllm", "serve", model.name_or_path, *_pairs(options), *_vllm_adapters(wanted.adapters, version)]
    environment = {} if limits.api_key is None else {"VLLM_API_KEY": limits.api_key}  # an argument could be read by anybody here
    if model.hub == "modelscope":
        environment["VLLM_USE_MODELSCOPE"] = "True"
    return EngineCommand(tuple(arguments), environment, tuple(notes))


def _common_options(wanted: Wanted) -> dict[str, Any]:
    """What both engines call by the same names."""
    limits, model = wanted.limits, wanted.model
    return {
        "host": limits.host,
        "port": limits.port,
        "served-model-name": wanted.name,
        "revision": model.revision,
        "dtype": model.dtype,
        "quantization": "bitsandbytes" if model.load_in_4bit else "fp8" if model.load_in_fp8 else None,
    }


def _vllm_adapters(adapters: Sequence[AdapterFacts], version: Version) -> list[str]:
    if not adapters:
        return []
    for adapter in adapters:
        if adapter.rank > _VLLM_RANKS[-1]:
            raise ModelError(f"{adapter.folder} has rank {adapter.rank}; vLLM serves ranks up to {_VLLM_RANKS[-1]}. {_MERGE}")
        if adapter.patterns and version < _RANK_PATTERNS:
            raise ModelError(
                f"{adapter.folder} has ranks or scales of its own for some matrices, which vLLM {_dotted(version)} would overlook. {_MERGE}"
            )
    rank = max(adapter.rank for adapter in adapters)
    options = {
        "enable-lora": True,
        "max-loras": len(adapters),
        "max-lora-rank": next(known for known in _VLLM_RANKS if known >= rank),
        # Without it vLLM leaves an adapter's matrices of the tower out, with no more than a line in its log.
        "enable-tower-connector-lora": any(adapter.tower for adapter in adapters),
    }
    return [*_pairs(options), "--lora-modules", *(_named(adapter) for adapter in adapters)]


def _named(adapter: AdapterFacts) -> str:
    """`name=path`, or JSON where vLLM would take the path for JSON."""
    if "," in str(adapter.folder) or "," in adapter.name:
        return json.dumps({"name": adapter.name, "path": str(adapter.folder)})
    return f"{adapter.name}={adapter.folder}"


def _sglang(wanted: Wanted, data: DataSettings, version: Version) -> EngineCommand:
    limits, model = wanted.limits, wanted.model
    for adapter in wanted.adapters:
        if adapter.tower:
            raise ModelError(
                f"{adapter.folder} changes {adapter.tower} matrices of the vision tower and merger; SGLang {_dotted(version)} applies "
                f"adapters to the language model alone and would leave them out. {_MERGE}"
            )
        if adapter.experts:
            raise ModelError(f"{adapter.folder} changes fused experts; how SGLang loads such adapters was not checked. {_MERGE}")
        if adapter.patterns:
            raise ModelError(
                f"{adapter.folder} has ranks or scales of its own for some matrices; SGLang is not known to heed them. {_MERGE}"
            )
    if not limits.allow_urls:
        note = "SGLang fetches any address and opens any file that a request names: let only people reach it who may see those."
    else:
        note = "SGLang fetches any address that a request names, those of this network too, and opens files as well."
    if limits.allowed_dirs:
        raise ModelError("SGLang cannot be held to some folders: leave out --media-dir.")
    images = _size(data.min_pixels, data.max_pixels)
    videos: dict[str, Any] = {"min_pixels": data.video_min_pixels, "max_pixels": data.video_max_pixels}
    if wanted.adapters:
        videos |= {"fps": data.fps, "max_frames": data.max_frames}
    videos = {name: value for name, value in videos.items() if value is not None}
    process = ({"image": {"size": images}} if images else {}) | ({"video": videos} if videos else {})
    options: dict[str, Any] = {
        "model-path": model.name_or_path,
        **_common_options(wanted),
        "tp-size": wanted.tensor_parallel_size,
        "context-length": limits.max_length_tokens,
        "max-running-requests": limits.batch_size,
        "mm-process-config": process,
        "limit-mm-data-per-request": {} if wanted.images_per_prompt is None else {"image": wanted.images_per_prompt},
    }
    arguments = ["sglang", "serve", *_pairs(options)]
    if wanted.adapters:
        lora = {
            "enable-lora": True,
            "max-lora-rank": max(adapter.rank for adapter in wanted.adapters),
            "max-loras-per-batch": len(wanted.adapters) + 1,  # the base counts
            "lora-strict-loading": True,  # a matrix that finds no place is an error
        }
        arguments += [*_pairs(lora), "--lora-paths", *(f"{adapter.name}={adapter.folder}" for adapter in wanted.adapters)]
    if limits.api_key is not None:
        arguments += ["--api-key", limits.api_key]
    environment = {"SGLANG_USE_MODELSCOPE": "true"} if model.hub == "modelscope" else {}
    return EngineCommand(tuple(arguments), environment, (note,))
