"""One frozen table of what differs between the Qwen vision-language families.

Whatever else a checkpoint can vary (patch size, window size, DeepStack levels) is read from its configuration; this
table holds only what the configuration does not say. No other file compares model names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finesight.errors import ModelError


@dataclass(frozen=True)
class Family:
    """What sets one model family apart from the others."""

    model_type: str  # `model_type` of the transformers configuration
    model_class: str  # class in transformers, by name so that nothing heavy is imported here
    label: str  # as people write it
    patch_size: int  # pixels; the default of the published checkpoints
    image_min_pixels: int  # defaults of the published image processors
    image_max_pixels: int
    video_min_pixels: int  # defaults of the published video processors: of one frame, or of the whole video
    video_max_pixels: int
    video_pixels_span_frames: bool  # the limits above hold for frames * height * width (Qwen3-VL), not for one frame
    video_timestamps: bool  # a video is written as "<1.5 seconds>" and one run of visual tokens for each pair of frames
    video_time_positions: bool  # the temporal M-RoPE axis of a video counts seconds (Qwen2.5-VL), not pairs of frames
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    moe: bool  # decoder layers hold fused experts
    coordinates: Literal["resized_pixels", "thousandths"]  # the frame in which it was trained to give boxes and points


_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)

QWEN2_5_VL = Family(
    model_type="qwen2_5_vl",
    model_class="Qwen2_5_VLForConditionalGeneration",
    label="Qwen2.5-VL",
    patch_size=14,
    image_min_pixels=56 * 56,
    image_max_pixels=16384 * 28 * 28,
    video_min_pixels=128 * 28 * 28,
    video_max_pixels=768 * 28 * 28,
    video_pixels_span_frames=False,
    video_timestamps=False,
    video_time_positions=True,
    image_mean=_CLIP_MEAN,
    image_std=_CLIP_STD,
    moe=False,
    coordinates="resized_pixels",
)
QWEN3_VL = Family(
    model_type="qwen3_vl",
    model_class="Qwen3VLForConditionalGeneration",
    label="Qwen3-VL",
    patch_size=16,
    image_min_pixels=256 * 256,
    image_max_pixels=4096 * 4096,
    video_min_pixels=4 * 32 * 32,
    video_max_pixels=24576 * 32 * 32,
    video_pixels_span_frames=True,
    video_timestamps=True,
    video_time_positions=False,
    image_mean=_HALF,
    image_std=_HALF,
    moe=False,
    coordinates="thousandths",
)
QWEN3_VL_MOE = Family(
    **{
        **QWEN3_VL.__dict__,
        "model_type": "qwen3_vl_moe",
        "model_class": "Qwen3VLMoeForConditionalGeneration",
        "label": "Qwen3-VL-MoE",
        "moe": True,
    }
)

FAMILIES: dict[str, Family] = {f.model_type: f for f in (QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE)}


def family_of(model_type: str) -> Family:
    """The family of a transformers `model_type`.

    Raises:
        ModelError: the model type is not one of the supported families.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        known = ", ".join(f"{f.label} ({f.model_type})" for f in FAMILIES.values())
        raise ModelError(
            f"Model type {model_type!r} is not supported. Supported: {known}. Set `model.name_or_path` to one of these."
        ) from None
