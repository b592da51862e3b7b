"""The published models' dimensions, so that a run can be planned by the name of a model, offline.

Numbers are those of the configurations published with the weights. Variants of one size (Instruct, Thinking, FP8, AWQ) have
the same dimensions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from finesight.errors import ModelError
from finesight.families import QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE
from finesight.hub import cached_checkpoint
from finesight.planner.shapes import ModelShape, TextShape, VisionShape, read_shape

_VOCABULARY = 151936


def _qwen3_tower(hidden: int, *, large: bool) -> VisionShape:
    """The two towers of Qwen3-VL; `hidden` is the language model's."""
    depth, width, mlp = (27, 1152, 4304) if large else (24, 1024, 4096)
    return VisionShape(depth, width, mlp, 16, 16, hidden, deepstack_levels=3, positions=2304)


def _qwen2_5_tower(hidden: int, mlp: int) -> VisionShape:
    return VisionShape(32, 1280, mlp, 16, 14, hidden, gated=True, whole_frame_blocks=4, window_patches=64)


def _experts(hidden: int, layers: int, mlp: int, heads: int, kv_heads: int, expert_mlp: int) -> TextShape:
    return TextShape(hidden, layers, mlp, heads, kv_heads, 128, _VOCABULARY, False, 128, 8, expert_mlp, dense_layers=0)


# name in a path or on the hub: language model (hidden, layers, MLP, heads, key-value heads, head size, vocabulary, tied), tower
_QWEN3 = {
    "Qwen3-VL-2B": (TextShape(2048, 28, 6144, 16, 8, 128, _VOCABULARY, True), False),
    "Qwen3-VL-4B": (TextShape(2560, 36, 9728, 32, 8, 128, _VOCABULARY, True), False),
    "Qwen3-VL-8B": (TextShape(4096, 36, 12288, 32, 8, 128, _VOCABULARY, False), True),
    "Qwen3-VL-32B": (TextShape(5120, 64, 25600, 64, 8, 128, _VOCABULARY, False), True),
}
_QWEN3_MOE = {
    "Qwen3-VL-30B-A3B": _experts(2048, 48, 6144, 32, 4, 768),
    "Qwen3-VL-235B-A22B": _experts(4096, 94, 12288, 64, 4, 1536),
}
_QWEN2_5 = {
    "Qwen2.5-VL-3B": (TextShape(2048, 36, 11008, 16, 2, 128, _VOCABULARY, True), 3420),
    "Qwen2.5-VL-7B": (TextShape(3584, 28, 18944, 28, 4, 128, 152064, False), 3420),
    "Qwen2.5-VL-32B": (TextShape(5120, 64, 27648, 40, 8, 128, 152064, False), 3456),
    "Qwen2.5-VL-72B": (TextShape(8192, 80, 29568, 64, 8, 128, 152064, False), 3456),
}
CATALOGUE: dict[str, ModelShape] = {
    **{name: ModelShape(name, QWEN3_VL, text, _qwen3_tower(text.hidden, large=large)) for name, (text, large) in _QWEN3.items()},
    **{name: ModelShape(name, QWEN3_VL_MOE, text, _qwen3_tower(text.hidden, large=True)) for name, text in _QWEN3_MOE.items()},
    **{name: ModelShape(name, QWEN2_5_VL, text, _qwen2_5_tower(text.hidden, mlp)) for name, (text, mlp) in _QWEN2_5.items()},
}


def find_shape(name_or_path: str, revision: str | None = None) -> ModelShape:
    """The shape of a model: of a checkpoint folder, of a configuration fetched before, or of the published model that the name means.

    Nothing is fetched.

    Raises:
        ModelError: there is no such folder, and no published model is of this name.
    """
    if Path(name_or_path).is_dir():
        return read_shape(name_or_path)
    if (fetched := cached_checkpoint(name_or_path, revision)) is not None:
        return replace(read_shape(fetched), name=name_or_path)
    last = name_or_path.rstrip("/").rsplit("/", 1)[-1].casefold()
    # Longest first: "Qwen3-VL-2B" must not be taken for "Qwen3-VL-235B".
    for name in sorted(CATALOGUE, key=len, reverse=True):
        found = name.casefold()
        if last == found or last.startswith(f"{found}-"):
            # By this ending published checkpoints say that bitsandbytes has quantised them.
            stored: Literal["4bit", "none"] = "4bit" if last.endswith("bnb-4bit") else "none"
            return replace(CATALOGUE[name], name=name_or_path, source=f"the catalogue of published models ({name})", stored=stored)
    raise ModelError(
        f"{name_or_path!r} is neither a folder nor a published model whose dimensions are known: {', '.join(CATALOGUE)}. "
        "Download it and name its folder in model.name_or_path."
    )
