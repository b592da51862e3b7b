"""A tiny Qwen3-VL with random weights, written as a checkpoint folder: the real classes, and a tokenizer made here."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from finesight.demo.scenes import QUESTIONS
from finesight.demo.settings import ModelSize, SceneSettings

_MERGE = 2
_HEADS, _KV_HEADS = 4, 2
_SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
_WORDS = ["system", "user", "assistant", "odd", "even"]
# ChatML as the Qwen-VL checkpoints write it, without tools and default system prompt.
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows the words of the questions; any other text falls into bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=_SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([question.text for question in QUESTIONS] + _WORDS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=_SPECIAL_TOKENS,
        model_max_length=4096,
    )  # fmt: skip
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def demo_config(size: ModelSize, scene: SceneSettings, tokenizer: PreTrainedTokenizerFast) -> transformers.Qwen3VLConfig:
    """Qwen3-VL made small: DeepStack after the first tower block, interleaved M-RoPE, tied embeddings."""
    hidden, head_size = size.hidden_size, size.hidden_size // _HEADS
    common = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "initializer_range": size.initializer_range}
    pairs = head_size // 2  # of rotary angles, divided over the axes time, height, width
    text = dict(
        common, num_hidden_layers=size.num_layers, num_attention_heads=_HEADS, num_key_value_heads=_KV_HEADS, head_dim=head_size,
        vocab_size=len(tokenizer), max_position_embeddings=4096, tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True, "mrope_section": [pairs - 2 * (pairs // 4), pairs // 4, pairs // 4]
        },
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    side = max(scene.image_width, scene.image_height) // size.patch_size
    vision = dict(
        common, depth=size.tower_depth, num_heads=_HEADS, patch_size=size.patch_size, spatial_merge_size=_MERGE, temporal_patch_size=2,
        out_hidden_size=hidden, deepstack_visual_indexes=[0], num_position_embeddings=side**2,
    )  # fmt: skip
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in _VISUAL_TOKENS.items()}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


_VISUAL_TOKENS = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}


def write_random_checkpoint(folder: Path, size: ModelSize, scene: SceneSettings, seed: int) -> Path:
    """Writes model, tokenizer and image processor as a checkpoint on a hub would hold them; returns the folder."""
    tokenizer = demo_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen3VLForConditionalGeneration(demo_config(size, scene, tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    pixels = scene.image_width * scene.image_height
    Qwen2VLImageProcessorPil(
        patch_size=size.patch_size, merge_size=_MERGE, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": pixels // 2, "longest_edge": 2 * pixels},
    ).save_pretrained(folder)  # fmt: skip
    return folder
