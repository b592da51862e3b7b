"""Real-dimension Qwen-VL models with random weights, made on the device: speed and memory depend on shapes, not values.

Two tiny models of the same classes let every script be tried on a CPU; their vocabulary is the single bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

TOKEN_IDS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653}

# name: text (hidden, layers, MLP, heads, key-value heads, tied), tower (depth, hidden, MLP, DeepStack levels)
QWEN3_VL = {
    "qwen3-vl-2b": ((2048, 28, 6144, 16, 8, True), (24, 1024, 4096, [5, 11, 17])),
    "qwen3-vl-4b": ((2560, 36, 9728, 32, 8, True), (24, 1024, 4096, [5, 11, 17])),
    "qwen3-vl-8b": ((4096, 36, 12288, 32, 8, False), (27, 1152, 4304, [8, 16, 24])),
    "qwen3-vl-32b": ((5120, 64, 25600, 64, 8, False), (27, 1152, 4304, [8, 16, 24])),
}
QWEN2_5_VL = {  # hidden, layers, MLP, heads, key-value heads, tied
    "qwen2.5-vl-3b": (2048, 36, 11008, 16, 2, True),
    "qwen2.5-vl-7b": (3584, 28, 18944, 28, 4, False),
}
TINY = ("tiny-qwen3-vl", "tiny-qwen2.5-vl")
NAMES = (*QWEN3_VL, *QWEN2_5_VL, *TINY)
# Ids of special tokens begin behind the vocabulary's last rank: here behind the 256 single bytes.
TINY_TOKEN_IDS = {name: token - 151643 + 256 for name, token in TOKEN_IDS.items()}


def is_qwen3(name: str) -> bool:
    """Whether a model is a Qwen3-VL; otherwise it is a Qwen2.5-VL.

    Raises:
        ValueError: there is no such model here.
    """
    if name not in NAMES:
        raise ValueError(f"{name!r} is none of {', '.join(NAMES)}")
    return name in QWEN3_VL or name == "tiny-qwen3-vl"


def configuration(name: str, layers: int | None = None) -> transformers.PreTrainedConfig:
    """The published dimensions of a model, with fewer layers if asked."""
    if name in TINY:
        return _tiny_configuration(name, layers)
    if is_qwen3(name):
        (hidden, depth, mlp, heads, kv, tied), (tower_depth, tower_hidden, tower_mlp, levels) = QWEN3_VL[name]
        text: dict[str, Any] = dict(
            hidden_size=hidden, num_hidden_layers=layers or depth, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=kv,
            head_dim=128, vocab_size=151936, max_position_embeddings=262144, rms_norm_eps=1e-6, eos_token_id=151645, bos_token_id=151643,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        )  # fmt: skip
        tower: dict[str, Any] = dict(
            depth=tower_depth, hidden_size=tower_hidden, intermediate_size=tower_mlp, num_heads=16, patch_size=16, spatial_merge_size=2,
            temporal_patch_size=2, out_hidden_size=hidden, deepstack_visual_indexes=levels, num_position_embeddings=2304,
        )  # fmt: skip
        return transformers.Qwen3VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=tied, **TOKEN_IDS)
    hidden, depth, mlp, heads, kv, tied = QWEN2_5_VL[name]
    text = dict(
        hidden_size=hidden, num_hidden_layers=layers or depth, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=kv,
        vocab_size=151936 if tied else 152064, max_position_embeddings=128000, tie_word_embeddings=tied, eos_token_id=151645, bos_token_id=151643,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )  # fmt: skip
    tower = dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, spatial_merge_size=2, temporal_patch_size=2,
        out_hidden_size=hidden, window_size=112, fullatt_block_indexes=[7, 15, 23, 31],
    )  # fmt: skip
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=tied, **TOKEN_IDS)


def _tiny_configuration(name: str, layers: int | None) -> transformers.PreTrainedConfig:
    text: dict[str, Any] = dict(
        hidden_size=32, num_hidden_layers=layers or 3, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=288,
        max_position_embeddings=4096, tie_word_embeddings=False, eos_token_id=258, bos_token_id=None,
    )  # fmt: skip
    tower: dict[str, Any] = dict(
        depth=3, hidden_size=32, intermediate_size=48, num_heads=4, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=32
    )
    if name == "tiny-qwen3-vl":
        text |= dict(
            head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True, "mrope_section": [2, 1, 1]}
        )
        tower |= dict(patch_size=16, deepstack_visual_indexes=[0, 1], num_position_embeddings=36)
        return transformers.Qwen3VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=False, **TINY_TOKEN_IDS)
    text |= dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]})
    tower |= dict(patch_size=14, window_size=56, fullatt_block_indexes=[1])
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=False, **TINY_TOKEN_IDS)


def outline(name: str, layers: int | None = None, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model of these dimensions on the meta device: modules and shapes, no weights."""
    config = configuration(name, layers)
    config.dtype = dtype
    kind = transformers.Qwen3VLForConditionalGeneration if is_qwen3(name) else transformers.Qwen2_5_VLForConditionalGeneration
    with torch.device("meta"):
        return kind(config).to(dtype)


def build(
    name: str, device: str = "cuda", layers: int | None = None, dtype: torch.dtype = torch.bfloat16, std: float = 0.02
) -> PreTrainedModel:
    """A model of these dimensions, normal random weights, made where it will be used."""
    model = outline(name, layers, dtype).to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, std, generator=generator)
            else:
                parameter.fill_(1.0 if "norm" in path and path.endswith("weight") else 0.0)
    # Frequencies of the rotary embeddings are no part of a checkpoint and were lost on the meta device.
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            _restore_frequencies(module, device)
    model.tie_weights()
    return model


def _restore_frequencies(module: Any, device: str) -> None:
    if hasattr(module, "config"):
        frequencies = type(module)(module.config).inv_freq.to(device)
    else:
        size = module.inv_freq.shape[0] * 2
        frequencies = 1.0 / (10000.0 ** (torch.arange(0, size, 2, dtype=torch.float, device=device) / size))
    module.inv_freq = frequencies
    if hasattr(module, "original_inv_freq"):
        module.original_inv_freq = frequencies.clone()
