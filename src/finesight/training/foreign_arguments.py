"""Objects that configure other trainers (TRL's `SFTConfig` and `GRPOConfig`, peft's `LoraConfig`) as settings of a recipe.

What has a counterpart is carried over with its value, set by the user or not, since the defaults of the other library are
part of what the user asked for. What has none and was set is refused by name.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from finesight.errors import RecipeError
from finesight.foreign_names import FOREIGN_NAMES
from finesight.recipe_files import all_setting_names
from finesight.training.flat_settings import REINFORCEMENT, as_keywords

_RENAMED = {
    "shuffle_dataset": "shuffle", "dataloader_num_workers": "num_workers", "vllm_importance_sampling_cap": "importance_cap",
    "vllm_importance_sampling_clip_max": "importance_cap",
}  # fmt: skip
# Are translated, together or with another range of values.
_TRANSLATED = frozenset({
    "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size", "max_steps", "warmup_steps",
    "warmup_ratio", "optim", "scale_rewards", "importance_sampling_level", "bf16", "fp16", "torch_compile", "gradient_checkpointing",
    "activation_checkpointing", "use_vllm", "max_length",
})  # fmt: skip
# Change nothing about what is trained: how it is computed, shown and kept is settled otherwise here.
_WITHOUT_EFFECT = frozenset({
    # devices, precision of products, memory
    "use_cpu", "no_cuda", "use_mps_device", "local_rank", "tf32", "accelerator_config", "parallelism_config", "torch_compile_backend",
    "torch_compile_mode", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "use_liger_kernel", "liger_kernel_config",
    "torch_empty_cache_steps", "use_cache", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph",
    "ddp_backend", "ddp_timeout", "average_tokens_across_devices", "ds3_gather_for_generation", "use_transformers_paged", "cache_implementation",
    "use_transformers_continuous_batching", "transformers_continuous_batching_config", "bf16_full_eval", "fp16_full_eval",
    "pad_to_multiple_of", "auto_find_batch_size",
    # how rows are read
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    "dataloader_in_order", "remove_unused_columns", "label_names", "length_column_name", "dataset_num_proc", "padding_free", "packing_strategy",
    # what is shown and kept
    "disable_tqdm", "logging_dir", "logging_first_step", "logging_strategy", "logging_nan_inf_filter", "log_on_each_node", "log_level",
    "log_level_replica", "include_num_input_tokens_seen", "include_tokens_per_second", "skip_memory_metrics", "run_name", "project", "debug",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "log_completions", "log_multimodal", "num_completions_to_print",
    "log_unique_prompts", "save_on_each_node", "save_safetensors", "enable_jit_checkpoint", "overwrite_output_dir",
    "restore_callback_states_from_checkpoint",
    # the hub, where push_to_hub says whether anything is sent
    "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    # held-out rows
    "per_device_eval_batch_size", "prediction_loss_only", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object",
    "do_train", "do_eval", "do_predict",
    # of vLLM, which use_vllm says whether it samples
    "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_server_base_url", "vllm_server_host", "vllm_server_port",
    "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
})  # fmt: skip
# Values that mean what is done here anyway.
_AS_HERE: dict[str, tuple[Any, ...]] = {
    "metric_for_best_model": ("loss", "eval_loss"), "greater_is_better": (False,), "loss_type": ("nll", "chunked_nll"),
    "completion_only_loss": (True,), "assistant_only_loss": (True,), "dataset_kwargs": ({}, {"skip_prepare_dataset": True}),
}  # fmt: skip
# What a class needs to be built without arguments where the user's object could be built.
_FOR_BUILDING = ("output_dir", "use_cpu", "no_cuda", "bf16", "fp16", "use_liger_kernel")
_OPTIMIZERS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
_SCALES = {True: "group", False: "none"}
_ATTENTION, _MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}


def is_foreign_config(value: Any) -> bool:
    """Whether this is an object in the shape of `transformers.TrainingArguments`, as TRL's are."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "per_device_train_batch_size")


def settings_of_arguments(arguments: Any, *, reinforcement: bool) -> dict[str, Any]:
    """Settings by their own names.

    Args:
        arguments: None, a mapping of such settings, or an object with the attributes of TRL's `SFTConfig` or `GRPOConfig`
            (a dataclass).
        reinforcement: whether it is for a trainer of reinforcement.

    Raises:
        RecipeError: something was set that has no counterpart, or it is no such object.
    """
    if arguments is None:
        return {}
    if isinstance(arguments, Mapping):
        return dict(arguments)
    if not is_foreign_config(arguments):
        kind = "GRPOConfig" if reinforcement else "SFTConfig"
        raise RecipeError(f"args must be a mapping of settings, or TRL's {kind}, not {type(arguments).__name__}")
    given = {field.name: _plain(getattr(arguments, field.name)) for field in dataclasses.fields(arguments) if field.name[0] != "_"}
    chosen = _set_by_the_user(arguments, given)
    same = _of_the_same_name(reinforcement)
    # Supervised, that setting shuffles once more what is shuffled anyway.
    renamed = {theirs: ours for theirs, ours in _RENAMED.items() if reinforcement or theirs != "shuffle_dataset"}
    _refuse_without_counterpart(type(arguments).__name__, given, [name for name in chosen if name not in same])
    found = {name: given[name] for name in same & given.keys() if given[name] is not None or name == "save_total_limit"}
    found |= {ours: given[theirs] for theirs, ours in renamed.items() if given.get(theirs) is not None}
    if "max_length" in chosen and given["max_length"] is not None:  # TRL's default cuts texts short; nothing is cut here
        found["max_length_tokens"] = given["max_length"]
    batch = _batch(given, reinforcement)
    return found | batch | _schedule(given) | _others(given)


def _of_the_same_name(reinforcement: bool) -> set[str]:
    """Settings that have the same name and meaning there."""
    sections = ("training.", "grpo.", "rollout.") if reinforcement else ("training.",)
    names = [name.split(".") for name in all_setting_names() if name.startswith(sections)]
    return ({path[1] for path in names if len(path) == 2} | ({"reward_weights"} if reinforcement else set())) - _TRANSLATED


def _plain(value: Any) -> Any:
    """The value of an enumeration."""
    return getattr(value, "value", value)


def _refuse_without_counterpart(kind: str, given: Mapping[str, Any], chosen: Sequence[str]) -> None:
    """Refuses what vLLM would sample, and chosen fields that are neither translated nor without effect."""
    if given.get("use_vllm"):
        mode = f', vllm_mode="{given["vllm_mode"]}"' if "vllm_mode" in given else ""
        raise RecipeError(
            f"args: use_vllm=True{mode}: vLLM runs only as a server beside the run here. Leave both out of {kind}, and the model in training "
            'samples itself; or start a server and give the trainer engine="vllm" and url="http://…"'
        )
    taken = _TRANSLATED | _WITHOUT_EFFECT | _RENAMED.keys()
    if wrong := [name for name in chosen if name not in taken and given[name] not in _AS_HERE.get(name, ())]:
        hints = [f"{name} ({as_keywords(FOREIGN_NAMES[name], REINFORCEMENT)})" if name in FOREIGN_NAMES else name for name in wrong]
        raise RecipeError(f"args: there is no such setting here: {', '.join(hints)}. Leave it out of {kind}")


def _set_by_the_user(arguments: Any, given: Mapping[str, Any]) -> list[str]:
    """Fields that hold neither the default of the class nor what the class itself makes of its defaults.

    Its checks may not let it be built where the user built theirs (bfloat16 on a CPU): then only the fields' defaults count.
    """
    fields = {field.name: field for field in dataclasses.fields(arguments) if field.name in given}
    defaults = {name: [_default_of(field)] for name, field in fields.items()}
    try:
        built = type(arguments)(**{name: given[name] for name in _FOR_BUILDING if name in fields and fields[name].init})
    except Exception:  # whatever its own checks raise
        built = None
    if built is not None:
        for name, known in defaults.items():
            known.append(_plain(getattr(built, name)))
    return [name for name, known in defaults.items() if repr(given[name]) not in map(repr, known)]


def _default_of(field: dataclasses.Field[Any]) -> Any:
    return _plain(field.default if field.default_factory is dataclasses.MISSING else field.default_factory())


def _batch(given: Mapping[str, Any], reinforcement: bool) -> dict[str, Any]:
    """Samples or completions of an optimizer step, over all processes, and how many steps a rollout serves."""
    accumulation = given.get("gradient_accumulation_steps") or 1
    samples = given["per_device_train_batch_size"] * accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    if not reinforcement:
        return {"train_batch_size": samples}
    micro_steps = given.get("steps_per_generation") or accumulation
    if micro_steps % accumulation:
        raise RecipeError(
            f"args: steps_per_generation ({micro_steps}) counts backward passes; here a rollout serves whole optimizer steps: make it a "
            f"multiple of gradient_accumulation_steps ({accumulation})"
        )
    return {"train_batch_size": samples, "steps_per_generation": micro_steps // accumulation}


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
