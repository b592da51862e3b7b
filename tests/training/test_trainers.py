"""The trainer of reinforcement from Python: rewards as functions, settings in the words of TRL and peft."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from peft import LoraConfig
from PIL import Image
from rich.console import Console
from transformers import TrainingArguments

import finesight
from finesight.data.conversation import Conversation, Part, RowSource, Turn
from finesight.errors import EvaluationError, RecipeError
from finesight.grpo_settings import RewardSettings
from finesight.models.load import load
from finesight.training.trainers import GRPOTrainer, SFTTrainer
from tiny_runs import MAX_PIXELS, MIN_PIXELS

QUICK = dict(
    dtype="float32", min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, num_generations=2, train_batch_size=4, max_completion_length=6,
    max_steps=2, save_strategy="no", image_ablation_steps=0, learning_rate=1e-2, token_budget=256,
)  # fmt: skip


def trl_rows(count: int = 3) -> list[dict[str, Any]]:
    """As data sets for TRL's trainer are: a conversational prompt, pictures beside it, further columns."""
    return [
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"which colour, {number}?"}]}],
            "images": [Image.new("RGB", (40, 48), (50 * number, 9, 9))],
            "solution": f"colour {number}",
        }
        for number in range(count)
    ]


def trainer_of(checkpoint, tmp_path, rewards, **more) -> GRPOTrainer:
    return GRPOTrainer(
        model=str(checkpoint), reward_funcs=rewards, output_dir=tmp_path / "run", console=Console(quiet=True), **{**QUICK, **more}
    )


def test_functions_are_called_as_trl_calls_them(checkpoint, tmp_path):
    """A closure, a coroutine, a partial, an object, and graders by name, over rows in TRL's shape."""
    seen: list[dict[str, Any]] = []

    def watches(prompts, completions, completion_ids, solution, **kwargs):
        seen.append({"prompts": prompts, "completions": completions, "solution": solution, "ids": completion_ids, **kwargs})
        return [float(sum(ids) % 5) for ids in completion_ids]

    async def waits(completions, **kwargs):
        await asyncio.sleep(0)
        return [None] * len(completions)

    def pictures(completions, images, ground_truths, weight):
        """The guides' shape: no `**kwargs`, plural columns."""
        assert all(picture[0].size == (40, 48) for picture in images)
        return [weight * len(truth) for truth in ground_truths]

    class Length:
        def __call__(self, completions, **kwargs):
            return [len(completion[0]["content"]) / 10 for completion in completions]

    rewards = [watches, waits, partial(pictures, weight=0.5), Length(), "json", RewardSettings(name="length", options={"maximum": 3})]
    rows = [{**row, "ground_truth": "abcd"} for row in trl_rows()]
    trainer = trainer_of(
        checkpoint, tmp_path, rewards, train_dataset=rows, eval_dataset=rows[:1], eval_strategy="steps", eval_steps=2,
        reward_weights=[1.0, 1.0, 0.1, 0.5, 1, 1], peft_config=LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    )  # fmt: skip
    assert [(reward.name, reward.weight) for reward in trainer.recipe.rewards][:4] == [
        ("watches", 1.0),
        ("waits", 1.0),
        ("pictures", 0.1),
        ("Length", 0.5),
    ]
    result = trainer.train()
    assert result.state.step == 2 and result.adapter_dir is not None and trainer.model.peft_config["default"].r == 3
    call = seen[0]
    assert len(call["prompts"]) == 4 and call["solution"][0] == call["solution"][1]
    assert call["prompts"][0][0]["role"] == "user" and call["completions"][0][0]["role"] == "assistant"
    assert call["trainer_state"].max_steps == 2 and len(call["images"]) == 4
    lines = [line for line in result.history if "reward" in line]
    assert lines[0]["rewards/pictures/mean"] == 2.0 and "rewards/waits/mean" not in lines[0] and lines[0]["rewards/Length/failed"] == 0
    assert "eval_reward" in result.history[-1]
    assert not any("mlp" in name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad)
    assert (result.output_dir / "report.html").is_file()


def test_a_loaded_model_and_conversations(checkpoint, tmp_path):
    rows = [Conversation((Turn("user", (Part("text", text=f"question {n}"),)),), RowSource("mine", n)) for n in range(3)]
    loaded = load(checkpoint, dtype="float32")
    trainer = GRPOTrainer(
        loaded, lambda completions: [1.0] * len(completions), {**QUICK, "output_dir": str(tmp_path / "run"), "max_steps": 1},
        rows, processing_class=loaded.processor, console=Console(quiet=True),
    )  # fmt: skip
    assert trainer.recipe.rewards[0].name == "lambda"
    (line,) = [line for line in trainer.train().history if "reward" in line]
    assert line["frac_reward_zero_std"] == 1.0 and line["reward"] == 1.0


def test_going_on_from_a_checkpoint(checkpoint, tmp_path):
    def own(completion_ids, **kwargs):
        return [float(len(ids) % 3) for ids in completion_ids]

    settings = dict(train_dataset=trl_rows(), save_strategy="steps", save_steps=1, num_train_epochs=9)
    trainer_of(checkpoint, tmp_path, own, **settings).train()
    result = trainer_of(checkpoint, tmp_path, own, **settings).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert result.state.step == 2


@dataclass
class GRPOConfig(TrainingArguments):
    """The settings of TRL's that matter here, with its defaults and what it makes of them."""

    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    scale_rewards: str | bool = "group"
    reward_weights: list[float] | None = None
    steps_per_generation: int | None = None
    generation_batch_size: int | None = None
    use_vllm: bool = False
    vllm_mode: str = "colocate"
    shuffle_dataset: bool = True
    vllm_importance_sampling_cap: float = 3.0
    learning_rate: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        self.generation_batch_size = self.per_device_train_batch_size * self.steps_per_generation


def test_a_config_of_trl_becomes_settings(tmp_path):
    config = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=4, steps_per_generation=8, num_generations=4,
        max_steps=7, warmup_steps=3, beta=0.04, scale_rewards=False, optim="adamw_torch", reward_weights=[2.0], bf16=False, lr_scheduler_type="constant",
    )  # fmt: skip
    recipe = GRPOTrainer("model", "json", config).recipe
    t, g, r = recipe.training, recipe.grpo, recipe.rollout
    assert (t.train_batch_size, t.max_steps, t.warmup_steps, t.learning_rate, t.optim, t.lr_scheduler_type) == (
        16,
        7,
        3,
        1e-6,
        "adamw",
        "constant",
    )
    assert (g.num_generations, g.steps_per_generation, g.beta, g.scale_rewards, g.importance_cap) == (4, 2, 0.04, "none", 3.0)
    assert r.max_completion_length == 256 and recipe.rewards[0].weight == 2.0 and t.seed == 42
    again = GRPOTrainer("model", "json", config, learning_rate=5e-6).recipe
    assert again.training.learning_rate == 5e-6  # what is given by name goes before


@dataclass
class HalfByDefaultConfig(GRPOConfig):
    """As TRL's from 1.0 on: bfloat16 unless something else is said, which cannot be built everywhere."""

    bf16: bool | None = None
    gradient_checkpointing: bool = True

    def __post_init__(self):
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()
        if self.bf16:
            raise ValueError("Your setup doesn't support bf16/gpu. You need to assign use_cpu")


@pytest.mark.parametrize(
    "change",
    [
        {"use_cpu": True},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"dataloader_persistent_workers": True, "dataloader_num_workers": 2, "dataloader_prefetch_factor": 2},
        {"logging_nan_inf_filter": False, "log_level": "error", "run_name": "mine", "hub_model_id": "me/mine"},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5, "save_steps": 10},
        {"ddp_timeout": 60, "torch_compile_backend": "inductor", "tf32": False},
    ],
)
def test_a_config_that_cannot_be_built_bare_is_taken_with_what_changes_no_training(tmp_path, change):
    config = HalfByDefaultConfig(output_dir=str(tmp_path), max_steps=1, bf16=False, **change)
    training = GRPOTrainer("model", "json", config, eval_dataset=[{}]).recipe.training
    assert training.max_steps == 1 and training.num_workers == change.get("dataloader_num_workers", 0)
    assert training.gradient_checkpointing == "auto"


def test_defaults_are_those_of_the_fields_where_a_class_cannot_be_built_again(tmp_path):
    @dataclass
    class Once(GRPOConfig):
        built = False

        def __post_init__(self):
            super().__post_init__()
            if Once.built:
                raise RuntimeError("only once")
            Once.built = True

    config = Once(output_dir=str(tmp_path), neftune_noise_alpha=5.0, use_cpu=True)
    with pytest.raises(RecipeError, match=r"no such setting here: neftune_noise_alpha\. Leave it out of Once"):
        GRPOTrainer("model", "json", config)
    config.neftune_noise_alpha = None
    assert GRPOTrainer("model", "json", config).recipe.training.train_batch_size == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_vllm": True, "vllm_mode": "colocate"}, 'use_vllm=True, vllm_mode="colocate": vLLM runs only as a server'),
        ({"push_to_hub": True}, r"push_to_hub \(upload afterwards: finesight export --to hub"),
        ({"metric_for_best_model": "eval_accuracy"}, "metric_for_best_model"),
        ({"repetition_penalty": 1.2}, "no such setting here: repetition_penalty"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 6}, "a multiple of gradient_accumulation_steps"),
        ({"importance_sampling_level": "sequence"}, "gspo"),
        ({"deepspeed": None, "neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
    ],
)
def test_what_has_no_counterpart_is_refused(tmp_path, change, message):
    with pytest.raises(RecipeError, match=message):
        GRPOTrainer("model", "json", GRPOConfig(output_dir=str(tmp_path), **change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_funcs": [3]}, "holds a int"),
        ({"reward_funcs": ["json"], "reward_weights": [1, 2]}, "2 reward_weights were given for 1"),
        ({"reward_weights": [1]}, "are of reward_funcs"),
        ({"reward_funcs": "json", "args": object()}, "must be a mapping"),
        ({"reward_funcs": "json", "batch_size": 4}, "train_batch_size=4"),
        ({"reward_funcs": "json", "num_generation": 4}, "num_generations"),
        ({"reward_funcs": "json", "processing_class": object()}, "read with it"),
        ({"reward_funcs": "json", "peft_config": LoraConfig(target_modules=["q_proj"])}, "name all attention projections"),
        ({"reward_funcs": "json", "peft_config": LoraConfig(use_dora=True)}, "no setting here for use_dora"),
        ({}, "grpo needs rewards"),
    ],
)
def test_wrong_arguments_say_what_to_change(arguments, message):
    with pytest.raises(RecipeError, match=message):
        GRPOTrainer("model", **arguments)


@dataclass
class SFTConfig(TrainingArguments):
    """As the other, of supervised training."""

    learning_rate: float = 2e-5
    max_length: int | None = 1024
    shuffle_dataset: bool = False
    packing: bool = False
    assistant_only_loss: bool = False
    completion_only_loss: bool | None = None
    dataset_kwargs: dict[str, Any] | None = None
    loss_type: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.loss_type = self.loss_type or "chunked_nll"


def test_a_config_of_supervised_training_becomes_settings_by_name_and_in_second_place(tmp_path):
    config = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=4, max_length=2048, assistant_only_loss=True,
        dataset_kwargs={"skip_prepare_dataset": True}, num_train_epochs=2, bf16=False, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    recipe = SFTTrainer("model", args=config, data_collator=None, callbacks=[], learning_rate=1e-3, processing_class=None).recipe
    t = recipe.training
    assert (t.train_batch_size, t.num_train_epochs, t.learning_rate, t.shuffle, t.output_dir) == (8, 2, 1e-3, True, str(tmp_path))
    assert recipe.grpo is None and recipe.data.max_length_tokens == 2048
    assert SFTTrainer("model", config).recipe.training.learning_rate == 2e-5
    config.max_length = None
    assert SFTTrainer("model", args=config).recipe.data.max_length_tokens is None
    assert SFTTrainer("model", args=SFTConfig(output_dir=str(tmp_path))).recipe.data.max_length_tokens is None  # its default cuts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing": True}, r"no such setting here: packing \(samples are always packed"),
        ({"completion_only_loss": False}, "completion_only_loss"),
        ({"loss_type": "dft"}, "loss_type"),
    ],
)
def test_what_supervised_training_has_not_is_refused(tmp_path, change, message):
    with pytest.raises(RecipeError, match=message):
        SFTTrainer("model", args=SFTConfig(output_dir=str(tmp_path), **change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"args": 3}, "a mapping of settings, or TRL's SFTConfig, not int"),
        ({"processing_class": object()}, "read with it"),
        ({"callbacks": [object()]}, "SFTTrainer: callbacks is not taken: .* metrics.jsonl"),
        ({"data_collator": len}, "data_collator is not taken: samples are packed"),
        ({"formatting_func": len}, "for row in rows"),
        ({"optimizers": (object(), None)}, "write optim"),
    ],
)
def test_objects_of_other_trainers_say_what_to_do(arguments, message):
    with pytest.raises(RecipeError, match=message) as raised:
        SFTTrainer("model", **arguments)
    assert len(str(raised.value)) < 250


def test_a_model_of_another_library_is_refused():
    with pytest.raises(RecipeError, match=r"model is a object; give the folder or name of a checkpoint, or what finesight.load"):
        GRPOTrainer(object(), "json")


def test_a_function_that_asks_for_a_missing_column_is_refused(checkpoint, tmp_path):
    def asks(completions, solutoin):
        return [0.0] * len(completions)

    with pytest.raises(EvaluationError, match="Did you mean 'solution'"):
        trainer_of(checkpoint, tmp_path, asks, train_dataset=trl_rows()).train()


def test_two_functions_of_one_name_are_told_apart():
    def make(value):
        def same(completions):
            return [value] * len(completions)

        return same

    trainer = finesight.GRPOTrainer("model", [make(1.0), make(2.0)])
    assert [reward.name for reward in trainer.recipe.rewards] == ["same", "same_2"]
    assert trainer.reward_functions["same_2"]([0]) == [2.0]
