"""Supervised fine-tuning with Unsloth or TRL, as their own guides do it; one setting, one line of JSON.

    python -m bench.peers unsloth CHECKPOINT_DIR --kind chart --batch 16 --accumulation 4 --no-gc

Every system gets the same samples, the same adapter (LoRA r=16 on the language model), the same optimizer and pinned pixels. A
result counts only if exactly as many tokens were supervised and exactly as many patches computed as our encoder finds in
these samples; two defaults are changed for that: images are not shrunk (Unsloth), and the line feed that the template writes
behind an answer is not supervised (both).

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

from bench import workload
from bench.machine import versions
from bench.rows import Row, emit, failed, significant, speeds

SYSTEMS = ("unsloth", "trl")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16
SEED = 3407


def settings_of(a: argparse.Namespace) -> Row:
    """What a row says of how it was measured."""
    return {
        "row": "sft",
        "system": a.system,
        "system_version": versions().get(a.system),
        "model": a.model or a.checkpoint.name,
        "kind": a.kind,
        "per_image": a.per_image,
        "precision": "nf4" if a.four_bit else "float32" if a.cpu else "bf16",
        "recompute": "none" if a.no_gc else "unsloth" if a.system == "unsloth" else "full",
        "grouped": a.grouped,
        "batch": a.batch,
        "accumulation": a.accumulation,
        "samples_per_step": a.batch * a.accumulation,
        "workers": a.workers,
        "steps": a.steps,
        "warm": a.warm,
        "learning_rate": a.learning_rate,
    }


def rows_of(a: argparse.Namespace) -> list[workload.Row]:
    """The samples: each is seen exactly once."""
    made = workload.rows(a.kind, a.batch * a.accumulation * a.steps, per_image=a.per_image)
    return workload.in_batches_of_like_length(made, a.batch) if a.grouped else made


def without_final_line_feed(collator_class: type, end_id: int, line_feed_id: int) -> type:
    """A collator of the same kind that does not supervise the line feed behind the end of a turn: a user's loss is not about it."""

    class Collator(collator_class):
        __slots__ = ()

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            batch = super().__call__(*args, **kwargs)
            ids, labels = batch["input_ids"], batch["labels"]
            behind_end = (ids[:, 1:] == line_feed_id) & (ids[:, :-1] == end_id)
            labels[:, 1:].masked_fill_(behind_end.to(labels.device), -100)
            return batch

    return Collator


def trainer_settings(a: argparse.Namespace) -> dict[str, Any]:
    """Arguments of SFTConfig that both get."""
    return dict(
        output_dir=tempfile.mkdtemp(prefix="bench-peer-"), per_device_train_batch_size=a.batch, gradient_accumulation_steps=a.accumulation,
        max_steps=a.steps, learning_rate=a.learning_rate, bf16=not a.cpu, use_cpu=a.cpu, logging_steps=1, save_strategy="no",
        report_to="none", warmup_steps=1, remove_unused_columns=False, dataloader_num_workers=a.workers, max_length=None,
        optim="adamw_torch_fused", seed=SEED, **({"train_sampling_strategy": "sequential"} if a.grouped else {}),
    )  # fmt: skip


def unsloth_trainer(a: argparse.Namespace, rows: list[workload.Row]) -> Any:
    """As in Unsloth's vision notebooks."""
    # Before torch and transformers, so that it can change them.
    fast_vision_model = importlib.import_module("unsloth").FastVisionModel
    import torch
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]
    from unsloth.trainer import UnslothVisionDataCollator  # type: ignore[import-not-found]

    model, processor = fast_vision_model.from_pretrained(
        str(a.checkpoint), max_seq_length=16384, load_in_4bit=a.four_bit, dtype=torch.bfloat16, local_files_only=True
    )
    model = fast_vision_model.get_peft_model(
        model, finetune_vision_layers=False, finetune_language_layers=True, finetune_attention_modules=True, finetune_mlp_modules=True,
        r=RANK, lora_alpha=RANK, lora_dropout=0, bias="none", random_state=SEED, use_gradient_checkpointing=False if a.no_gc else "unsloth",
    )  # fmt: skip
    fast_vision_model.for_training(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    collator = without_final_line_feed(UnslothVisionDataCollator, *_end_ids(tokenizer))(
        model, processor, resize=8192,  # by default it shrinks Qwen's images to 512 pixels
        train_on_responses_only=True, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n",
    )  # fmt: skip
    dataset = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": row.image}, {"type": "text", "text": row.question}]},
                {"role": "assistant", "content": [{"type": "text", "text": row.answer}]},
            ]
        }
        for row in rows
    ]
    settings = SFTConfig(dataset_text_field="", dataset_kwargs={"skip_prepare_dataset": True}, **trainer_settings(a))
    return SFTTrainer(model=model, processing_class=tokenizer, data_collator=collator, train_dataset=dataset, args=settings)


def trl_trainer(a: argparse.Namespace, rows: list[workload.Row]) -> Any:
    """As in TRL's examples for vision-language models: prompt and completion, so that answers alone are supervised."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    four_bit = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True)
    model = AutoModelForImageTextToText.from_pretrained(
        a.checkpoint, dtype=torch.float32 if a.cpu else torch.bfloat16, attn_implementation="sdpa", device_map=None if a.cpu else {"": 0},
        quantization_config=BitsAndBytesConfig(**four_bit) if a.four_bit else None,
    )  # fmt: skip
    processor = AutoProcessor.from_pretrained(a.checkpoint)
    dataset = Dataset.from_list(
        [
            {
                "images": [row.image],
                "prompt": [{"role": "user", "content": row.question}],
                "completion": [{"role": "assistant", "content": row.answer}],
            }
            for row in rows
        ]
    )
    checkpointing = dict(gradient_checkpointing=False) if a.no_gc else dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )  # fmt: skip
    pattern = r".*language_model.*\.(" + "|".join(PROJECTIONS) + ")"
    trainer = SFTTrainer(
        model=model, processing_class=processor, train_dataset=dataset, args=SFTConfig(**checkpointing, **trainer_settings(a)),
        peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules=pattern, task_type="CAUSAL_LM"),
    )  # fmt: skip
    own = trainer.data_collator  # made by the trainer from its settings
    own.__class__ = without_final_line_feed(type(own), *_end_ids(processor.tokenizer))
    return trainer


def _end_ids(tokenizer: Any) -> tuple[int, int]:
    """Ids of the end of a turn and of the line feed that the template writes behind it."""
    return tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.encode("\n", add_special_tokens=False)[0]


class Listener:
    """Times a trainer's optimizer steps and counts what really goes into the model."""

    def __init__(self, trainer: Any, warm: int) -> None:
        import torch
        from transformers import TrainerCallback

        self.wait_s: list[float] = []  # between steps: data and whatever the trainer does
        self.compute_s: list[float] = []
        self.seen: list[tuple[int, Any, Any, int]] = []  # of each forward pass: padded tokens, tokens, supervised tokens, patches
        on_gpu = torch.cuda.is_available()
        listener = self

        def now() -> float:
            if on_gpu:
                torch.cuda.synchronize()
            return time.perf_counter()

        class Callback(TrainerCallback):
            last = begun = 0.0

            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                self.last = now()

            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                self.begun = now()
                listener.wait_s.append(self.begun - self.last)

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                self.last = now()
                listener.compute_s.append(self.last - self.begun)
                if len(listener.compute_s) == warm and on_gpu:
                    torch.cuda.reset_peak_memory_stats()

        trainer.add_callback(Callback())
        inner = trainer.training_step

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            ids, labels, mask, pixels = (inputs.get(key) for key in ("input_ids", "labels", "attention_mask", "pixel_values"))
            # The first label of a row is never predicted. Sums stay on the device until the end.
            supervised = (labels[:, 1:] != -100).sum()
            listener.seen.append(
                (ids.numel(), ids.numel() if mask is None else mask.sum(), supervised, 0 if pixels is None else len(pixels))
            )
            return inner(model, inputs, *args, **kwargs)

        trainer.training_step = training_step

    @property
    def step_s(self) -> list[float]:
        return [wait + compute for wait, compute in zip(self.wait_s, self.compute_s, strict=True)]

    def sums(self, first: int = 0) -> tuple[int, int, int, int]:
        """Padded tokens, tokens, supervised tokens and patches from a forward pass on."""
        return tuple(sum(int(counts[place]) for counts in self.seen[first:]) for place in range(4))  # type: ignore[return-value]


def figures(a: argparse.Namespace, trainer: Any, listener: Listener, rows: list[workload.Row], load_s: float) -> Row:
    """What was measured, and whether it can be compared."""
    import torch

    from bench.encoding import encode, patches, supervised_tokens

    step_s, wait_s = listener.step_s, listener.wait_s
    padded, tokens, supervised, _ = listener.sums(a.warm * a.accumulation)
    _, all_tokens, all_supervised, all_patches = listener.sums()
    ours = encode(rows, a.kind, a.checkpoint)
    memory = {}
    if torch.cuda.is_available():
        memory["peak_gib"] = significant(torch.cuda.max_memory_allocated() / 2**30)
        memory["reserved_gib"] = significant(torch.cuda.max_memory_reserved() / 2**30)
    row = {
        **speeds(step_s[a.warm :], a.batch * a.accumulation, tokens=tokens, padded_tokens=padded, supervised_tokens=supervised),
        "tokens_per_sample": significant(all_tokens / len(rows), 6),
        "supervised_tokens_per_sample": significant(all_supervised / len(rows), 6),
        "patches_per_sample": significant(all_patches / len(rows), 6),
        "our_tokens_per_sample": significant(sum(map(len, ours)) / len(rows), 6),
        "our_supervised_tokens_per_sample": significant(supervised_tokens(ours) / len(rows), 6),
        "our_patches_per_sample": significant(patches(ours) / len(rows), 6),
        "comparable": (all_supervised, all_patches) == (supervised_tokens(ours), patches(ours)),
        "steps_done": len(step_s),
        "step_s": [round(seconds, 4) for seconds in step_s],
        "wait_s": [round(seconds, 4) for seconds in wait_s],
        "wait_share": significant(sum(wait_s[a.warm :]) / sum(step_s[a.warm :]), 3),
        **memory,
        "losses": [round(float(line["loss"]), 6) for line in trainer.state.log_history if "loss" in line],
        "first_step_s": round(step_s[0], 2),
        "load_s": round(load_s, 1),
        "trainable": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
    }
    if not row["comparable"]:
        reason = (
            f"not comparable: {all_supervised} supervised tokens and {all_patches} patches, where the samples have "
            f"{supervised_tokens(ours)} and {patches(ours)}"
        )
        return failed(row, reason)
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("checkpoint", type=Path, help="folder written by bench.checkpoint")
    parser.add_argument("--model", help="name of the model, for the result; else the folder's")
    parser.add_argument("--kind", default="chart", choices=workload.KINDS)
    parser.add_argument("--per-image", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="samples of a forward pass")
    parser.add_argument("--accumulation", type=int, default=8, help="forward passes of an optimizer step")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--grouped", action="store_true", help="batches of like length, the best case that a careful user could arrange")
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--no-gc", action="store_true", help="no gradient checkpointing")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--cpu", action="store_true", help="float32 on the CPU, to try the script (TRL only)")
    a = parser.parse_args(arguments)
    row = settings_of(a)
    try:
        rows = rows_of(a)
        begun = time.perf_counter()
        trainer = (unsloth_trainer if a.system == "unsloth" else trl_trainer)(a, rows)
        load_s = time.perf_counter() - begun
        listener = Listener(trainer, a.warm)
        trainer.train()
        emit({**row, **figures(a, trainer, listener, rows, load_s)})
    except Exception as error:  # one setting of many: the others go on
        emit(failed(row, error))


if __name__ == "__main__":
    main()
