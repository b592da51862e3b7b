"""Every setting of a run, in one frozen and strict object. Imports no torch.

Names are those that users of transformers, peft and TRL know; units are in names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from finesight.data_settings import DataSettings, SourceSettings
from finesight.foreign_names import BATCH_NAMES
from finesight.grpo_settings import GRPOSettings, RewardSettings, RolloutSettings
from finesight.settings import Settings

Tracker = Literal["tensorboard", "swanlab", "wandb", "mlflow", "trackio"]


class ModelSettings(Settings):
    name_or_path: str = Field(description="Checkpoint: a folder, or a name on the hub.")
    hub: Literal["huggingface", "modelscope"] = Field("huggingface", description="Where a name is looked up.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Precision of the base weights; auto: bfloat16 where the GPU has it, float16 on older GPUs, float32 on a CPU."
    )
    load_in_fp8: bool = Field(
        False,
        description="Keep the frozen linear layers of the language model in 8-bit float and compute with them so: half their memory, "
        "faster. Needs a Hopper or newer GPU; for adapters.",
    )
    load_in_4bit: bool = Field(
        False,
        description="Keep the frozen linear layers (and experts) of the language model in 4 bits (NF4, scales quantised too); needs bitsandbytes.",
    )
    load_in_8bit: bool = Field(
        False, description="Keep the frozen linear layers of the language model in 8-bit integers with a scale a row."
    )
    quantize_vocabulary: bool = Field(
        False, description="With load_in_4bit, load_in_8bit or load_in_fp8: keep the embedding and lm_head in 8 bits too."
    )
    quantize_tower: bool = Field(
        False,
        description="With load_in_4bit, load_in_8bit or load_in_fp8: keep the linear layers of tower and merger in the same bits too.",
    )
    adapter: str | None = Field(None, description="Adapter folder to go on from (its r, targets and pixel limits are kept).")

    @property
    def quantization(self) -> Literal["none", "fp8", "8bit", "4bit"]:
        """In what the frozen matrices of the language model are kept."""
        asked = {"load_in_fp8": "fp8", "load_in_8bit": "8bit", "load_in_4bit": "4bit"}
        chosen: Any = next((name for setting, name in asked.items() if getattr(self, setting)), "none")
        return chosen

    @model_validator(mode="after")
    def _one_precision(self) -> ModelSettings:
        asked = [name for name in ("load_in_4bit", "load_in_8bit", "load_in_fp8") if getattr(self, name)]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} cannot be set together: choose one of them")
        further = [name for name in ("quantize_vocabulary", "quantize_tower") if getattr(self, name)]
        if further and not asked:
            raise ValueError(f"{' and '.join(further)} need load_in_4bit, load_in_8bit or load_in_fp8: true")
        return self


# What of `model` says in how many bits the base is kept.
PRECISION_SETTINGS = ("load_in_4bit", "load_in_8bit", "load_in_fp8", "quantize_vocabulary", "quantize_tower")


class TuningSettings(Settings):
    """What trains."""

    method: Literal["lora", "full"] = Field("lora", description="lora: an adapter; full: the weights themselves.")
    r: int = Field(16, ge=1, description="Rank of the adapter.")
    lora_alpha: float = Field(16, gt=0, description="Scale of the adapter: its update counts lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter; above 0 no prefix is shared.")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases train beside the adapter.")
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead.")
    finetune_vision_layers: bool = Field(False, description="Train the blocks of the vision tower.")
    finetune_merger: bool = Field(False, description="Train the merger (and DeepStack mergers) between tower and language model.")
    finetune_language_layers: bool = Field(True, description="Train the layers of the language model.")
    finetune_attention_modules: bool = Field(True, description="Among those, the attention projections.")
    finetune_mlp_modules: bool = Field(True, description="Among those, the MLP projections (of a mixture of experts: none).")
    finetune_experts: bool = Field(
        False,
        description="Mixture of experts: adapters on the experts' matrices too, with lora only. On Qwen3-VL-30B-A3B with r: 16 they have 629 "
        "million parameters, those on attention 13 million.",
    )
    bf16_updates: Literal["float32_masters", "stochastic_rounding"] = Field(
        "float32_masters",
        description="How small updates of bfloat16 weights survive in full tuning: float32 copies (4 bytes a weight) or stochastic rounding.",
    )

    @model_validator(mode="after")
    def _experts_can_be_adapted(self) -> TuningSettings:
        if self.finetune_experts and self.lora_dropout > 0:
            raise ValueError("finetune_experts and lora_dropout cannot both be set: peft has no dropout for adapters on experts")
        if self.finetune_experts and not self.finetune_language_layers:
            raise ValueError("finetune_experts needs finetune_language_layers: true: experts belong to the language model")
        return self


class TrainingSettings(Settings):
    output_dir: str = Field("runs/default", description="Folder of the run.")
    train_batch_size: int = Field(8, ge=1, description="Samples in one optimizer step, whatever the packs and the number of GPUs.")
    token_budget: int = Field(8192, ge=1, description="Most tokens in one packed forward pass; a matter of memory and speed only.")
    num_train_epochs: float = Field(1.0, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many steps, whatever the epochs.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    vision_learning_rate: float | None = Field(None, gt=0, description="Of the tower; none: learning_rate.")
    merger_learning_rate: float | None = Field(None, gt=0, description="Of the merger; none: learning_rate.")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr"] = Field(
        "cosine", description="Shape of the schedule."
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="For cosine_with_min_lr: the last learning rate over the peak.")
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="Share of the steps in which the learning rate rises.")
    warmup_steps: int | None = Field(None, ge=0, description="The same as a number of steps; goes before the ratio.")
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "muon"] = Field(
        "adamw",
        description="adamw; adamw_8bit and paged_adamw_8bit (its state may move to main memory) need the gpu extra; muon for matrices with "
        "adamw for the rest (full tuning).",
    )
    muon_learning_rate: float | None = Field(None, gt=0, description="Of the matrices under muon; none: learning_rate.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="First-moment decay of Adam.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Second-moment decay of Adam.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Term added to the denominator of Adam.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled decay, on matrices only.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are scaled down to this norm; 0: never.")
    gradient_checkpointing: Literal["auto"] | bool | Literal["none", "selective", "full", "offload"] = Field(
        "auto",
        description="What is kept of a layer for its backward pass. false or none: everything; selective: matrix products; true or full: "
        "its input, the layer is computed again; offload: its input, in host memory. auto: the fastest that fits, as planned beforehand; "
        "full where that cannot be told.",
    )
    mlp_chunk_tokens: int | None = Field(
        None,
        ge=1,
        description="Compute the MLP of a layer so many tokens at a time, to save memory; none: all at once. Layers of experts are always "
        "computed at once: each chunk would dequantise them anew.",
    )
    gradient_release: bool = Field(
        False,
        description="Update each weight as soon as its gradient is complete and let the gradient go; for full tuning with max_grad_norm: 0. "
        "Saves memory where a step is one pack: gradients of a step's earlier packs wait for the last one.",
    )
    sharding: Literal["none", "full"] = Field(
        "none",
        description="Several GPUs (under torchrun). none: each holds the whole model, and gradients are averaged; full: weights, gradients "
        "and optimizer state are divided over them (FSDP2) and gathered layer by layer. For supervised training with optim: adamw; a tower that "
        "does not train stays whole.",
    )
    torch_compile: Literal["auto"] | bool = Field(
        "auto", description="Compile the layers; auto: on GPUs from Ampere on, for runs long enough to repay it."
    )
    feature_cache_gib: Literal["auto"] | float = Field(
        "auto",
        description="Main memory for features of a frozen tower, used again in later epochs; auto: on a GPU, a quarter of what is free; 0: off.",
    )
    feature_cache_dir: str | None = Field(
        None, description="Folder that features are also written to, for what memory cannot hold and for later runs."
    )
    seed: int = Field(3407, ge=0, description="Seed of adapters and dropout.")
    data_seed: int | None = Field(None, ge=0, description="Seed of the order of samples; none: seed.")
    shuffle: bool = Field(True, description="New order each epoch.")
    logging_steps: int = Field(1, ge=1, description="Steps between lines of metrics.jsonl.")
    save_strategy: Literal["no", "steps", "epoch"] = Field(
        "epoch", description="When checkpoints are written; the end of training always is."
    )
    save_steps: int = Field(100, ge=1, description="For save_strategy steps.")
    save_total_limit: int | None = Field(2, ge=1, description="Checkpoints kept; the best one is kept besides.")
    save_only_model: bool = Field(False, description="No optimizer state: smaller, but such a checkpoint cannot be resumed.")
    eval_strategy: Literal["no", "steps", "epoch"] = Field("no", description="When the held-out loss is measured.")
    eval_steps: int = Field(100, ge=1, description="For eval_strategy steps.")
    early_stopping_patience: int | None = Field(None, ge=1, description="Stop after so many evaluations without a better loss.")
    load_best_model_at_end: bool = Field(False, description="End with the checkpoint of the lowest held-out loss.")
    sample_answers: int = Field(0, ge=0, description="Held-out prompts answered at each evaluation, kept with their images.")
    resume: bool | str = Field(False, description="true: from the newest valid checkpoint of output_dir; or the path of one.")
    report_to: list[Tracker] = Field(default_factory=list, description="Trackers, through accelerate; none are contacted by default.")
    num_workers: int = Field(0, ge=0, description="Processes that open and resize images ahead of the training loop.")

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        if value in (None, "none"):
            return []
        return [value] if isinstance(value, str) else value

    @field_validator("save_strategy", "eval_strategy", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare `no` as false."""
        return "no" if value is False else value

    @field_validator("feature_cache_gib", mode="after")
    @classmethod
    def _no_negative_memory(cls, value: Any) -> Any:
        if value != "auto" and value < 0:
            raise ValueError("must not be negative; 0 switches it off")
        return value

    @model_validator(mode="before")
    @classmethod
    def _steps_are_samples(cls, value: Any) -> Any:
        _refuse_batch_names(value)
        return value


def _refuse_batch_names(section: Any) -> None:
    """Names of other trainers that make up a step are answered with the equivalent."""
    given = {name: section[name] for name in BATCH_NAMES if name in section} if isinstance(section, Mapping) else {}
    if given:
        raise ValueError(answer_to_batch(given, "train_batch_size: "))


def answer_to_batch(given: Mapping[str, Any], written: str) -> str:
    """What to write in place of the batch sizes of other trainers.

    Args:
        written: how a value of the setting is begun: `train_batch_size: ` or `train_batch_size=`.
    """
    try:
        batch = int(given.get("per_device_train_batch_size", given.get("batch_size")) or 1)
        accumulation = int(given.get("gradient_accumulation_steps") or 1)
        equivalent = (
            f"your batch of {batch} × {accumulation} is `{written}{batch * accumulation}` (times the number of GPUs, if there are several)"
        )
    except (TypeError, ValueError):
        equivalent = "set training.train_batch_size"
    return f"a step is a number of samples here: {equivalent}; remove {' and '.join(given)}"


class TaskSettings(Settings):
    """One thing to be judged: data, and how an answer is graded."""

    name: str = Field(description="Name in tables and reports.")
    data: SourceSettings | Literal["eval_split"] = Field("eval_split", description="Rows with answers; eval_split: the held-out rows.")
    grader: str = Field("exact_match", description="How an answer is graded; `finesight eval --graders` lists them.")
    grader_options: dict[str, Any] = Field(default_factory=dict, description="Options of the grader, by name (docs/graders.md).")
    max_samples: int | None = Field(None, ge=1, description="Judge only so many rows, evenly spread.")

    @field_validator("data", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) and value != "eval_split" else value


class EvaluationSettings(Settings):
    tasks: list[TaskSettings] = Field(default_factory=list, description="What is judged before and after training.")
    text_probe: str | None = Field(
        "builtin", description="Text-only questions that show forgetting: builtin, a JSONL file of question and answer, or null."
    )
    max_completion_length: int = Field(128, ge=1, description="Most tokens of an answer.")
    temperature: float = Field(0.0, ge=0, description="0: the most likely token each time.")
    batch_size: int = Field(8, ge=1, description="Prompts answered side by side.")


class Recipe(Settings):
    """A whole run."""

    model: ModelSettings
    tuning: TuningSettings = Field(default_factory=TuningSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    grpo: GRPOSettings | None = Field(None, description="Reinforcement with rewards (GRPO) in place of supervised training.")
    rewards: list[RewardSettings] = Field(default_factory=list, description="What completions earn; needs grpo.")
    rollout: RolloutSettings | None = Field(None, description="How completions are sampled; needs grpo.")

    @model_validator(mode="before")
    @classmethod
    def _steps_are_samples(cls, value: Any) -> Any:
        _refuse_batch_names(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _rollout_of_grpo(cls, value: Any) -> Any:
        """Reinforcement samples, whether the recipe says how or not."""
        if isinstance(value, Mapping) and value.get("grpo") is not None and value.get("rollout") is None:
            return {**value, "rollout": {}}
        return value

    @field_validator("rewards", mode="before")
    @classmethod
    def _one_reward(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, Mapping)) else value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        d, t, u = self.data, self.training, self.tuning
        if d.min_pixels and d.max_pixels and d.min_pixels > d.max_pixels:
            raise ValueError(f"data.min_pixels ({d.min_pixels}) is larger than data.max_pixels ({d.max_pixels}); swap or change them")
        if "share_prefixes" in d.model_fields_set and d.share_prefixes and u.method == "lora" and u.lora_dropout > 0:
            raise ValueError(
                "data.share_prefixes and tuning.lora_dropout cannot both be asked for: dropout draws a mask for each sample, "
                "a shared prefix has only one. Set tuning.lora_dropout: 0 or data.share_prefixes: false"
            )
        needs_eval = {
            "training.eval_strategy": t.eval_strategy != "no",
            "training.early_stopping_patience": t.early_stopping_patience is not None,
            "training.load_best_model_at_end": t.load_best_model_at_end,
        }
        if d.eval_split is None and (asked := [name for name, on in needs_eval.items() if on]):
            raise ValueError(
                f"{', '.join(asked)}: needs held-out rows; set data.eval_split, for example '5%', or switch this off (eval_strategy: no)"
            )
        if t.eval_strategy == "no" and (t.early_stopping_patience or t.load_best_model_at_end):
            raise ValueError("early stopping and load_best_model_at_end need training.eval_strategy: steps or epoch")
        if t.optim == "muon" and u.method != "full":
            raise ValueError("training.optim: muon is for full tuning; use adamw with an adapter")
        if u.method == "lora" and not (u.finetune_language_layers or u.finetune_vision_layers or u.finetune_merger):
            raise ValueError("nothing trains: set one of tuning.finetune_language_layers, finetune_vision_layers, finetune_merger")
        if self.model.quantization != "none" and u.method == "full":
            raise ValueError(
                f"model.load_in_{self.model.quantization} is for tuning.method: lora: quantised weights cannot train, and full tuning writes "
                f"all weights into its checkpoints. Set model.load_in_{self.model.quantization}: false or tuning.method: lora"
            )
        if u.finetune_experts and u.method == "full":
            raise ValueError("tuning.finetune_experts is for tuning.method: lora; full tuning trains the experts anyway")
        if t.gradient_release and (u.method != "full" or t.max_grad_norm > 0):
            raise ValueError(
                "training.gradient_release lets gradients go before their common norm is known: it needs tuning.method: full and "
                "training.max_grad_norm: 0"
            )
        if self.model.adapter and u.method == "full":
            raise ValueError("model.adapter is for tuning.method: lora")
        self._sharding_consistent()
        self._reinforcement_consistent()
        return self

    def _sharding_consistent(self) -> None:
        """What cannot be divided over processes is refused."""
        t = self.training
        if t.sharding == "none":
            return
        refused = {
            f"model.load_in_{self.model.quantization}": self.model.quantization != "none",
            "grpo": self.grpo is not None,
            f"training.optim: {t.optim}": t.optim != "adamw",
            "tuning.bf16_updates: stochastic_rounding": self.tuning.bf16_updates != "float32_masters",
            "tuning.finetune_experts": self.tuning.finetune_experts,
            f"tuning.bias: {self.tuning.bias}": self.tuning.method == "lora" and self.tuning.bias != "none",
            "training.gradient_release": t.gradient_release,
            "training.sample_answers": t.sample_answers > 0,
        }
        if given := [name for name, on in refused.items() if on]:
            raise ValueError(
                f"training.sharding: full cannot be used together with {' and '.join(given)}; leave {'it' if len(given) == 1 else 'them'} out, "
                "or set training.sharding: none"
            )

    def _reinforcement_consistent(self) -> None:
        g, r, t = self.grpo, self.rollout, self.training
        if g is None or r is None:
            if given := [name for name in ("rewards", "rollout") if getattr(self, name)]:
                raise ValueError(
                    f"{' and '.join(given)} are for reinforcement: add a section `grpo: {{num_generations: 8}}`, or remove {' and '.join(given)}"
                )
            return
        if t.sample_answers:
            raise ValueError(
                "training.sample_answers is for supervised training: with grpo every completion is kept in the run's folder `completions`; "
                "leave it out"
            )
        if not self.rewards:
            raise ValueError("grpo needs rewards: name graders or functions of yours, for example `rewards: [exact_match]`")
        if t.train_batch_size % g.num_generations:
            below = t.train_batch_size // g.num_generations * g.num_generations
            raise ValueError(
                f"training.train_batch_size ({t.train_batch_size}) counts the completions of an optimizer step and must be a multiple of "
                f"grpo.num_generations ({g.num_generations}); set it to {below or g.num_generations} or {below + g.num_generations}"
            )
        if g.overlong_buffer > r.max_completion_length:
            raise ValueError(
                f"grpo.overlong_buffer ({g.overlong_buffer}) must not be longer than rollout.max_completion_length ({r.max_completion_length})"
            )
        if r.max_completion_length >= t.token_budget:
            raise ValueError(
                f"rollout.max_completion_length ({r.max_completion_length}) leaves no room for a prompt in a pack of training.token_budget "
                f"({t.token_budget}) tokens; raise the one or lower the other"
            )
        if r.engine != "builtin" and (self.tuning.method == "full" or self.tuning.bias != "none"):
            raise ValueError(
                f"rollout.engine: {r.engine} is given each new adapter, which is all that may train: set tuning.method: lora and tuning.bias: none, "
                "or rollout.engine: builtin"
            )
        if g.beta > 0 and self.tuning.method == "full":
            raise ValueError(
                "grpo.beta needs the base as its reference, and full tuning changes the base; set grpo.beta: 0 or tuning.method: lora"
            )

    @property
    def shares_prefixes(self) -> bool:
        """Whether samples may share computation: off under adapter dropout (DESIGN, exactness)."""
        return self.data.share_prefixes and not (self.tuning.method == "lora" and self.tuning.lora_dropout > 0)
