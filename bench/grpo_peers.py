"""Whole steps of GRPO with TRL or Unsloth, completions by their own generate, as their guides do it; one line of JSON.

    python -m bench.grpo_peers trl CHECKPOINT_DIR --batch 8 --no-gc

Every system is asked the same prompts, with the same adapter (LoRA r=16 on the language model), reward and lengths, and pinned
pixels. Completions cannot end before their full length: `min_new_tokens` suppresses the tokens that end one. Nor can tokens of
images and videos be drawn, which would stop either trainer (random weights draw them, trained ones hardly ever). A result counts
only if the trainer itself tells that all completions had that length, and as many tokens in all as our encoder finds.

bench/prepare_peers.sh packs what this needs beside torch and transformers; put it on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

# Before any of their libraries is imported.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", UNSLOTH_DISABLE_STATISTICS="1")

from bench.machine import versions
from bench.peers import PROJECTIONS, SYSTEMS
from bench.rewards import share_of_even_tokens
from bench.rows import Row, emit, failed, significant, speeds
from bench.step_settings import LEARNING_RATE, RANK, SEED, add_arguments, pinned, prompts_of, step_tokens


def settings_of(a: argparse.Namespace) -> Row:
    """What a row says of how it was measured."""
    return {
        **pinned(a),
        "system": a.system,
        "system_version": versions().get(a.system),
        "model": a.model or a.checkpoint.name,
        "precision": "float32" if a.cpu else "bf16",
        "recompute": "none" if a.no_gc else "unsloth" if a.system == "unsloth" else "full",
        "batch": a.batch,
        "accumulation": a.prompts * a.generations // a.batch,
    }


def dataset_of(a: argparse.Namespace) -> Any:
    """Prompts in the form of TRL's guide to vision-language models: a conversation, and its image in a column of its own."""
    from datasets import Dataset

    rows = prompts_of(a, a.checkpoint)
    return Dataset.from_list([{"prompt": [{"role": "user", "content": row.question}], "image": row.image} for row in rows])


def trainer_settings(a: argparse.Namespace) -> dict[str, Any]:
    """Arguments of GRPOConfig that both get."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(a.checkpoint)
    drawing = {"min_new_tokens": a.completion_tokens, "suppress_tokens": [config.image_token_id, config.video_token_id]}
    checkpointing: dict[str, Any] = {"gradient_checkpointing": False}
    if not a.no_gc and a.system == "trl":
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return dict(
        output_dir=tempfile.mkdtemp(prefix="bench-peer-"), per_device_train_batch_size=a.batch,
        gradient_accumulation_steps=a.prompts * a.generations // a.batch, num_generations=a.generations,
        max_completion_length=a.completion_tokens, generation_kwargs=drawing, temperature=1.0, beta=0.0,
        loss_type="dapo", mask_truncated_completions=False, use_vllm=False, max_steps=a.steps, learning_rate=LEARNING_RATE, warmup_steps=1,
        bf16=not a.cpu, use_cpu=a.cpu, optim="adamw_torch_fused", logging_steps=1, save_strategy="no", report_to="none", seed=SEED,
        dataloader_num_workers=a.workers, shuffle_dataset=False, **checkpointing,
    )  # fmt: skip


def trl_trainer(a: argparse.Namespace) -> Any:
    """As in TRL's example of GRPO with a vision-language model."""
    from bench.torchvision_on_cpu import stand_in

    stand_in()
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

    model = AutoModelForImageTextToText.from_pretrained(
        a.checkpoint, dtype=torch.float32 if a.cpu else torch.bfloat16, attn_implementation="sdpa", device_map=None if a.cpu else {"": 0}
    )
    processor = AutoProcessor.from_pretrained(a.checkpoint, padding_side="left", truncation_side="left")
    pattern = r".*language_model.*\.(" + "|".join(PROJECTIONS) + ")"
    return GRPOTrainer(
        model=model, processing_class=processor, reward_funcs=share_of_even_tokens, train_dataset=dataset_of(a),
        args=GRPOConfig(**trainer_settings(a)),
        peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules=pattern, task_type="CAUSAL_LM"),
    )  # fmt: skip


def unsloth_trainer(a: argparse.Namespace) -> Any:
    """As in Unsloth's notebooks of GRPO with vision, without vLLM (fast_inference=False)."""
    # Before torch and transformers, so that it can change them.
    fast_vision_model = importlib.import_module("unsloth").FastVisionModel
    import torch
    from trl import GRPOConfig, GRPOTrainer

    model, processor = fast_vision_model.from_pretrained(
        str(a.checkpoint), max_seq_length=16384, load_in_4bit=False, fast_inference=False, dtype=torch.bfloat16, local_files_only=True
    )
    model = fast_vision_model.get_peft_model(
        model, finetune_vision_layers=False, finetune_language_layers=True, finetune_attention_modules=True, finetune_mlp_modules=True,
        r=RANK, lora_alpha=RANK, lora_dropout=0, bias="none", random_state=SEED, use_gradient_checkpointing=False if a.no_gc else "unsloth",
    )  # fmt: skip
    settings = trainer_settings(a)
    if not a.no_gc:
        del settings["gradient_checkpointing"]  # its own, put in place above
    return GRPOTrainer(
        model=model,
        processing_class=processor,
        reward_funcs=[share_of_even_tokens],
        train_dataset=dataset_of(a),
        args=GRPOConfig(**settings),
    )


class Clock:
    """Times a trainer's optimizer steps, each from the end of the one before: completions, rewards and update."""

    def __init__(self, trainer: Any, warm: int) -> None:
        import torch
        from transformers import TrainerCallback

        self.step_s: list[float] = []
        clock, on_gpu = self, torch.cuda.is_available()

        def now() -> float:
            if on_gpu:
                torch.cuda.synchronize()
            return time.perf_counter()

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                self.last = now()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                ended = now()
                clock.step_s.append(ended - self.last)
                self.last = ended
                if len(clock.step_s) == warm and on_gpu:
                    torch.cuda.reset_peak_memory_stats()

        trainer.add_callback(Callback())


def figures(a: argparse.Namespace, trainer: Any, clock: Clock, load_s: float) -> Row:
    """What was measured, and whether it was the work asked for."""
    import torch

    lines = [line for line in trainer.state.log_history if "reward" in line]
    lengths = [(line["completions/min_length"], line["completions/max_length"]) for line in lines]
    memory = {}
    if torch.cuda.is_available():
        memory["peak_gib"] = significant(torch.cuda.max_memory_allocated() / 2**30)
        memory["reserved_gib"] = significant(torch.cuda.max_memory_reserved() / 2**30)
    step_s = clock.step_s[a.warm :]
    row = {
        **speeds(step_s, a.prompts * a.generations, tokens=len(step_s) * step_tokens(a)),
        "step_s": [round(seconds, 4) for seconds in clock.step_s],
        "figures": {name: significant(lines[-1][name]) for name in ("reward", "reward_std", "frac_reward_zero_std") if name in lines[-1]},
        "tokens_counted": lines[-1].get("num_tokens"),
        "first_step_s": round(clock.step_s[0], 2),
        "load_s": round(load_s, 1),
        "trainable": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        **memory,
    }
    if set(lengths) != {(a.completion_tokens, a.completion_tokens)}:
        return failed(
            row, f"not comparable: shortest and longest completions of its steps have {lengths} tokens in place of {a.completion_tokens}"
        )
    if row["tokens_counted"] != a.steps * step_tokens(a):
        return failed(row, f"not comparable: it counts {row['tokens_counted']} tokens, where {a.steps * step_tokens(a)} were asked for")
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("checkpoint", type=Path, help="folder written by bench.checkpoint, with weights")
    parser.add_argument("--model", help="name of the model, for the result; else the folder's")
    add_arguments(parser)
    parser.add_argument("--batch", type=int, default=8, help="completions of a forward pass of the update; all are generated at once")
    parser.add_argument("--no-gc", action="store_true", help="no gradient checkpointing")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="float32 on the CPU, to try the script (TRL only)")
    a = parser.parse_args(arguments)
    row = settings_of(a)
    try:
        begun = time.perf_counter()
        trainer = (unsloth_trainer if a.system == "unsloth" else trl_trainer)(a)
        load_s = time.perf_counter() - begun
        clock = Clock(trainer, a.warm)
        trainer.train()
        emit({**row, **figures(a, trainer, clock, load_s)})
    except Exception as error:  # one setting of many: the others go on
        emit(failed(row, error))


if __name__ == "__main__":
    main()
