"""What turns a conversation into tokens and pixels, read from a checkpoint: tokenizer, image processor, template, limits.

The `*Processor` classes of transformers need torchvision for their video half, which does not load beside a CPU build of
torch. Their parts do not: tokenizer, PIL image processor and configuration are loaded here, no weights are read.

Nor is torch loaded, so that a run can be planned at once: files are read as the JSON that they are, the tokenizer's class
is named rather than looked up, and transformers' image processor is made only where pixels are wanted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from finesight.data_settings import DataSettings
from finesight.errors import DataError, ModelError, RecipeError
from finesight.families import Family, family_of
from finesight.geometry import PatchLayout, PixelLimits
from finesight.hub import checkpoint_on_hub

Hub = Literal["huggingface", "modelscope"]

# Regular expressions as modelscope takes them: everything large that tokens and pixels do without.
_WEIGHT_FILES = [r".*\.safetensors", r".*\.bin", r".*\.pt", r".*\.pth", r".*\.gguf", r".*\.onnx", r".*\.h5"]

# What transformers' AutoTokenizer, which loads torch, makes of `tokenizer_class` in the checkpoints of these families.
_TOKENIZERS = {
    None: "Qwen2Tokenizer",
    "Qwen2Tokenizer": "Qwen2Tokenizer",
    "Qwen2TokenizerFast": "Qwen2Tokenizer",
    "PreTrainedTokenizerFast": "PreTrainedTokenizerFast",
    "TokenizersBackend": "PreTrainedTokenizerFast",
}
# What transformers' Qwen2VLImageProcessor takes where preprocessor_config.json does not say.
_IMAGE_DEFAULTS: dict[str, Any] = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
}
_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_VISION_SIZES = ("patch_size", "spatial_merge_size", "temporal_patch_size")


@dataclass(frozen=True, eq=False)
class Processor:
    """Tokenizer, image processor and settings of one checkpoint. Compared by identity; can be pickled."""

    tokenizer: Any  # a fast transformers tokenizer
    image_settings: Mapping[str, Any]  # preprocessor_config.json
    family: Family
    layout: PatchLayout
    image_limits: PixelLimits
    video_limits: PixelLimits  # of a frame, or of a whole video: see `Family.video_pixels_span_frames`
    tokens_per_second: float  # temporal positions of a second of video; only Qwen2.5-VL reads it
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    chat_template: str
    fps: float = 2.0  # frames sampled a second of video
    max_frames: int = 768

    @cached_property
    def image_processor(self) -> Any:
        """transformers' own, on its PIL backend (which loads torch).

        The PIL backend everywhere: by default the choice, and with it the pixels, would hang on what is installed.

        Raises:
            ModelError: preprocessor_config.json holds what the class does not take.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        try:
            return Qwen2VLImageProcessorPil.from_dict(dict(self.image_settings))
        except (TypeError, ValueError, KeyError) as error:
            raise ModelError(f"preprocessor_config.json of the checkpoint cannot be used: {error}") from error

    def pixel_identity(self) -> tuple[object, ...]:
        """What patches depend on besides the pixels of an image and its resized size."""
        p = self.image_processor
        return (self.family.model_type, self.layout, p.resample, p.do_rescale, p.rescale_factor, p.do_normalize, p.image_mean, p.image_std)


def load_processor(
    name_or_path: str | Path, *, data: DataSettings | None = None, hub: Hub = "huggingface", revision: str | None = None
) -> Processor:
    """Reads a processor from a checkpoint folder, or by name from a hub.

    The chat template is `chat_template.jinja`, else `chat_template.json`, else the tokenizer's. Pixel limits are the
    checkpoint's (`preprocessor_config.json`, `video_preprocessor_config.json`), else the family's; those of `data` go before both.

    Raises:
        ModelError: the checkpoint cannot be read, is an adapter, or is not of a supported family.
        RecipeError: a pixel limit of `data` is below one visual token, or contradicts another.
    """
    name = checkpoint_folder(name_or_path, hub, revision, weights=False)
    data = data or DataSettings()
    config = _config(name, revision)
    family = family_of(config["model_type"])
    image_settings = _image_settings(name, revision)
    layout = _layout(image_settings, config["vision_config"], name)
    tokenizer = _tokenizer(name, revision)
    return Processor(
        tokenizer=tokenizer,
        image_settings=image_settings,
        family=family,
        layout=layout,
        image_limits=_limits(
            _image_limits(image_settings, family), data.min_pixels, data.max_pixels, layout, name, "data.min_pixels and data.max_pixels"
        ),
        video_limits=_limits(
            _video_limits(name, revision, family), data.video_min_pixels, data.video_max_pixels, layout, name,
            "data.video_min_pixels and data.video_max_pixels",
        ),
        tokens_per_second=float(config["vision_config"].get("tokens_per_second", 1.0)),
        chat_template=_chat_template(name, revision, tokenizer),
        fps=data.fps,
        max_frames=data.max_frames,
        **_visual_token_ids(config, tokenizer, name),
    )  # fmt: skip


def checkpoint_folder(name_or_path: str | Path, hub: Hub = "huggingface", revision: str | None = None, *, weights: bool = True) -> str:
    """What transformers is given to load a checkpoint from: a folder, or a name that it looks up on Hugging Face.

    Where Hugging Face cannot be reached, it is the folder in its cache.

    Args:
        weights: whether weights will be read; without them ModelScope is asked for the small files only.

    Raises:
        ModelError: the folder does not exist or holds no model, or the hub cannot be reached or cannot deliver.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        _refuse_non_checkpoint(path)
        return str(path)
    if path.is_file():
        raise ModelError(f"{name} is a file. Set model.name_or_path to the folder that holds config.json and the weights.")
    if path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        raise ModelError(f"{name} does not exist. Set model.name_or_path to a checkpoint folder or to a name on the hub.")
    if hub == "huggingface":
        return checkpoint_on_hub(name, revision)
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ModelError(
            f"{name} is to come from ModelScope, but the package modelscope is not installed. "
            "Run `pip install modelscope`, or set model.hub: huggingface."
        ) from None
    try:
        return str(snapshot_download(name, revision=revision, **({} if weights else {"ignore_file_pattern": _WEIGHT_FILES})))
    except Exception as error:  # its errors share no class of their own
        raise ModelError(f"{name} cannot be fetched from ModelScope: {error}") from error


def _refuse_non_checkpoint(path: Path) -> None:
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        try:
            base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            base = None
        raise ModelError(
            f"{path} holds an adapter, not a model. Set model.adapter to it and model.name_or_path to its base"
            + (f" ({base})." if base else ".")
        )
    instead = "Set model.name_or_path to a checkpoint folder or to a name on the hub."
    # The folder of a run, which keeps what was trained in one of these.
    if (path / "adapter" / "adapter_config.json").is_file():
        instead = f"What was trained is in it: set model.adapter to {path / 'adapter'} and model.name_or_path to its base."
    elif (path / "model" / "config.json").is_file():
        instead = f"What was trained is in it: set model.name_or_path to {path / 'model'}."
    raise ModelError(f"{path} holds no config.json. {instead}")


def _config(name: str, revision: str | None) -> dict[str, Any]:
    """config.json. Published ones say all that is asked for; where one does not, transformers' defaults complete it."""
    config = _needed_json(name, "config.json", revision)
    family = family_of(str(config.get("model_type")))
    vision = config.get("vision_config") or {}
    asked = (*_VISION_SIZES, "tokens_per_second") if family.video_time_positions else _VISION_SIZES
    if all(key in config for key in _TOKEN_IDS) and all(key in vision for key in asked):
        return config
    from transformers import AutoConfig  # loads torch

    complete: dict[str, Any] = _from_transformers(AutoConfig, name, revision, "config.json").to_dict()
    return complete


def _tokenizer(name: str, revision: str | None) -> Any:
    import transformers

    declared = (_json_file(name, "tokenizer_config.json", revision) or {}).get("tokenizer_class")
    kind = getattr(transformers, _TOKENIZERS.get(declared, "AutoTokenizer"))
    tokenizer = _from_transformers(kind, name, revision, "the tokenizer's files")
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: the tokenizer is not a fast one, which alone tells where tokens stand in a text; add its tokenizer.json")
    return tokenizer


def _from_transformers(kind: Any, name: str, revision: str | None, what: str) -> Any:
    try:
        return kind.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unreadable(name, what, error) from error


def _unreadable(name: str, what: str, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()
    here = "" if Path(name).is_dir() or not isinstance(error, OSError) else f" (and there is no folder {name} here)"
    return ModelError(f"{name}: {what} cannot be read: {reason[0].rstrip('.') if reason else type(error).__name__}{here}")


def _needed_json(name: str, filename: str, revision: str | None) -> dict[str, Any]:
    from transformers.utils import cached_file

    try:
        file = cached_file(name, filename, revision=revision)
    except (OSError, ValueError) as error:
        raise _unreadable(name, filename, error) from error
    return _json_object(Path(str(file)))


def _image_settings(name: str, revision: str | None) -> dict[str, Any]:
    """What the image processor is made from: as in transformers, an image half of processor_config.json goes first."""
    nested = (_json_file(name, "processor_config.json", revision) or {}).get("image_processor")
    if isinstance(nested, dict):
        settings = nested
    else:
        settings = _needed_json(name, "preprocessor_config.json", revision)
    kind = settings.get("image_processor_type")
    if kind is not None and not str(kind).startswith("Qwen2VLImageProcessor"):
        raise ModelError(f"{name}: preprocessor_config.json names {kind}, which does not cut patches as Qwen-VL towers take them")
    return settings


def _layout(image_settings: Mapping[str, Any], vision: Mapping[str, Any], name: str) -> PatchLayout:
    layout = PatchLayout(*(vision[key] for key in _VISION_SIZES))
    cut = PatchLayout(*(image_settings.get(key, _IMAGE_DEFAULTS[key]) for key in ("patch_size", "merge_size", "temporal_patch_size")))
    if cut != layout:
        raise ModelError(
            f"{name}: preprocessor_config.json cuts patches as {cut}, config.json expects {layout}; one of them is of another model"
        )
    return layout


def _limits(own: PixelLimits, low: int | None, high: int | None, layout: PatchLayout, name: str, settings: str) -> PixelLimits:
    limits = own.override(low, high)
    try:
        limits.check(layout)
    except DataError as error:
        if low is None and high is None:
            raise ModelError(f"{name}: the checkpoint's pixel limits cannot be used: {error}. Set {settings}.") from None
        raise RecipeError(f"{settings}: {error}") from None
    return limits


def _image_limits(settings: Mapping[str, Any], family: Family) -> PixelLimits:
    size = dict(settings.get("size") or _IMAGE_DEFAULTS["size"])
    # As checkpoints have it that were saved before there was `size`; transformers lets these go first.
    size |= {edge: settings[key] for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")) if settings.get(key)}
    return _limits_of_size(size) or PixelLimits(family.image_min_pixels, family.image_max_pixels)


def _video_limits(name: str, revision: str | None, family: Family) -> PixelLimits:
    """Of video_preprocessor_config.json, of the video half of processor_config.json, or the family's."""
    settings = _json_file(name, "video_preprocessor_config.json", revision)
    if settings is None:
        settings = (_json_file(name, "processor_config.json", revision) or {}).get("video_processor") or {}
    size = dict(settings.get("size") or {})
    # Checkpoints saved before there was `size` name the two limits themselves.
    size.setdefault("shortest_edge", settings.get("min_pixels"))
    size.setdefault("longest_edge", settings.get("max_pixels"))
    return _limits_of_size(size) or PixelLimits(family.video_min_pixels, family.video_max_pixels)


def _limits_of_size(size: Mapping[str, Any]) -> PixelLimits | None:
    """`size` of a processor: numbers of pixels, whatever their names say."""
    low, high = size.get("shortest_edge"), size.get("longest_edge")
    return PixelLimits(int(low), int(high)) if low and high else None


def _chat_template(name: str, revision: str | None, tokenizer: Any) -> str:
    file = _checkpoint_file(name, "chat_template.jinja", revision)
    if file is not None:
        return file.read_text(encoding="utf-8")
    template = (_json_file(name, "chat_template.json", revision) or {}).get("chat_template") or tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    if not template:
        raise ModelError(f"{name} has no chat template. Take the Instruct or Thinking version of the model, or add chat_template.jinja.")
    return template


def _visual_token_ids(config: Mapping[str, Any], tokenizer: Any, name: str) -> dict[str, int]:
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids: dict[str, int] = {}
    for field in _TOKEN_IDS:
        token_id = config.get(field)
        if not isinstance(token_id, int) or token_id not in special:
            raise ModelError(
                f"{name}: {field} of config.json is {token_id}, which is no special token of the tokenizer; they are of different models"
            )
        ids[field] = token_id
    return ids


def _json_file(name: str, filename: str, revision: str | None) -> dict[str, Any] | None:
    file = _checkpoint_file(name, filename, revision)
    return None if file is None else _json_object(file)


def _json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold an object, not a {type(content).__name__}")
    return content


def _checkpoint_file(name: str, filename: str, revision: str | None) -> Path | None:
    """A file of a checkpoint that may or may not have it."""
    if Path(name).is_dir():
        file = Path(name) / filename
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(name, filename, revision=revision))
    except EntryNotFoundError:  # also where it is not in the cache of a machine without a network
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: {filename} cannot be fetched: {error} (and there is no folder {name} here)") from error
