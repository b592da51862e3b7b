"""Objects that configure other trainers (TRL's `GRPOConfig`, peft's `LoraConfig`) as settings of a recipe.

What has a counterpart is carried over with its value, set by the user or not, since the defaults of the other library are
part of what the user asked for. What has none and was set is refused by name.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from finesight.errors import RecipeError
from finesight.foreign_names import FOREIGN_NAMES
from finesight.recipe_files import all_setting_names

_RENAMED = {"shuffle_dataset": "shuffle", "dataloader_num_workers": "num_workers", "vllm_importance_sampling_cap": "importance_cap"}
# Are translated, together or with another range of values.
_TRANSLATED = frozenset({
    "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size", "max_steps", "warmup_steps",
    "warmup_ratio", "optim", "scale_rewards", "importance_sampling_level", "bf16", "fp16", "torch_compile", "gradient_checkpointing",
})  # fmt: skip
# Change nothing about what is trained: how it is computed, shown and kept is settled otherwise here.
_WITHOUT_EFFECT = frozenset({
    "gradient_checkpointing_kwargs", "per_device_eval_batch_size", "remove_unused_columns", "disable_tqdm", "logging_dir", "logging_first_step",
    "logging_strategy", "log_completions", "num_completions_to_print", "log_unique_prompts", "dataloader_pin_memory", "use_liger_kernel",
    "ds3_gather_for_generation", "use_transformers_paged", "cache_implementation", "run_name", "label_names", "do_train", "do_eval",
})  # fmt: skip
_OPTIMIZERS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
_SCALES = {True: "group", False: "none"}
_ATTENTION, _MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}


def settings_of_arguments(arguments: Any) -> dict[str, Any]:
    """Settings by their own names.

    Args:
        arguments: None, a mapping of such settings, or an object with the attributes of TRL's `GRPOConfig` (a dataclass).

    Raises:
        RecipeError: something was set that has no counterpart, or it is no such object.
    """
    if arguments is None:
        return {}
    if isinstance(arguments, Mapping):
        return dict(arguments)
    if not dataclasses.is_dataclass(arguments) or isinstance(arguments, type) or not hasattr(arguments, "per_device_train_batch_size"):
        raise RecipeError(f"args must be a mapping of settings, or TRL's GRPOConfig, not {type(arguments).__name__}")
    given = {field.name: _plain(getattr(arguments, field.name)) for field in dataclasses.fields(arguments) if field.name[0] != "_"}
    _refuse_without_counterpart(arguments, given)
    found = {name: given[name] for name in _of_the_same_name() & given.keys() if given[name] is not None or name == "save_total_limit"}
    found |= {ours: given[theirs] for theirs, ours in _RENAMED.items() if given.get(theirs) is not None}
    return found | _batch(given) | _schedule(given) | _others(given)


def _of_the_same_name() -> set[str]:
    """Settings that have the same name and meaning there."""
    names = [name.split(".") for name in all_setting_names() if name.startswith(("training.", "grpo.", "rollout."))]
    return {path[1] for path in names if len(path) == 2} - _TRANSLATED | {"reward_weights"}


def _plain(value: Any) -> Any:
    """The value of an enumeration."""
    return getattr(value, "value", value)


def _refuse_without_counterpart(arguments: Any, given: Mapping[str, Any]) -> None:
    try:
        default = type(arguments)()
    except Exception as error:  # whatever its own checks raise
        raise RecipeError(f"args: {type(arguments).__name__} cannot be compared with its defaults: {error}") from None
    taken = _of_the_same_name() | _TRANSLATED | _WITHOUT_EFFECT | _RENAMED.keys()
    wrong = [name for name, value in given.items() if name not in taken and repr(value) != repr(_plain(getattr(default, name)))]
    if wrong:
        hints = [f"{name} ({FOREIGN_NAMES[name]})" if name in FOREIGN_NAMES else name for name in wrong]
        raise RecipeError(f"args: there is no such setting here: {', '.join(hints)}. Leave it out of {type(arguments).__name__}")


def _batch(given: Mapping[str, Any]) -> dict[str, Any]:
    """Completions of an optimizer step, over all processes, and how many steps a rollout serves."""
    accumulation = given.get("gradient_accumulation_steps") or 1
    completions = given["per_device_train_batch_size"] * accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    micro_steps = given.get("steps_per_generation") or accumulation
    if micro_steps % accumulation:
        raise RecipeError(
            f"args: steps_per_generation ({micro_steps}) counts backward passes; here a rollout serves whole optimizer steps: make it a "
            f"multiple of gradient_accumulation_steps ({accumulation})"
        )
    return {"train_batch_size": completions, "steps_per_generation": micro_steps // accumulation}


def _schedule(given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (given.get("max_steps") or -1) > 0:
        found["max_steps"] = given["max_steps"]
    steps = given.get("warmup_steps") or 0
    if steps >= 1:
        found["warmup_steps"] = int(steps)
    else:  # transformers 5 takes a ratio under this name too
        found["warmup_ratio"] = steps or given.get("warmup_ratio") or 0.0
    return found


def _others(given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (optim := given.get("optim")) is not None:
        found["optim"] = _OPTIMIZERS.get(optim, optim)
    if (scale := given.get("scale_rewards")) is not None:
        found["scale_rewards"] = _SCALES[scale] if isinstance(scale, bool) else scale
    if given.get("importance_sampling_level") == "sequence":
        if given.get("loss_type") != "grpo":
            raise RecipeError(
                'args: importance_sampling_level="sequence" is loss_type="gspo" here; set loss_type="grpo" with it, or gspo alone'
            )
        found["loss_type"] = "gspo"
    if given.get("fp16"):
        found["dtype"] = "float16"
    if given.get("torch_compile"):
        found["torch_compile"] = True
    if given.get("gradient_checkpointing") is False:
        found["gradient_checkpointing"] = False
    return found


def settings_of_peft_config(config: Any) -> dict[str, Any]:
    """Settings of `tuning` of a `peft.LoraConfig`. Which modules it names says which parts train.

    Raises:
        RecipeError: it is of another kind, or sets what has no counterpart.
    """
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise RecipeError(f"peft_config must be a peft.LoraConfig, not {type(config).__name__}; adapters are LoRA here")
    default = LoraConfig()
    ours = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora")
    passed_over = {"task_type", "target_modules", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
    wrong = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in {*ours, *passed_over} and getattr(config, field.name) != getattr(default, field.name)
    ]
    if wrong:
        raise RecipeError(f"peft_config: there is no setting here for {', '.join(wrong)}; leave it out")
    return {name: getattr(config, name) for name in ours} | _parts(config.target_modules)


def _parts(modules: Any) -> dict[str, Any]:
    """Which parts the names of modules mean."""
    if modules is None:
        return {}
    if modules == "all-linear":
        return {"finetune_language_layers": True, "finetune_vision_layers": True, "finetune_merger": True}
    names = {modules} if isinstance(modules, str) else set(modules)
    if names in (_ATTENTION, _MLP, _ATTENTION | _MLP):
        return {"finetune_attention_modules": bool(names & _ATTENTION), "finetune_mlp_modules": bool(names & _MLP)}
    raise RecipeError(
        f"peft_config: target_modules {sorted(names)} is no choice here: name all attention projections ({', '.join(sorted(_ATTENTION))}), all "
        f'MLP projections ({", ".join(sorted(_MLP))}), both, or "all-linear", which means the tower and the merger too'
    )
