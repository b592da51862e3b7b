"""What trains: LoRA scopes through peft, full tuning with parts frozen.

The modules that get an adapter are named by exact patterns over the transformers classes: peft's "all-linear" would
also reach the vision tower, and suffixes such as "mlp" would reach whatever is called so.
"""

from __future__ import annotations

import logging
import math
import re
from contextlib import nullcontext
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from finesight.errors import ModelError
from finesight.families import Family
from finesight.models.adapter_files import load_adapter, quiet_peft, save_adapter
from finesight.models.adapter_metadata import EXPERT_PARAMETERS, AdapterMetadata, adapter_metadata, read_metadata, restore_data_settings
from finesight.models.expert_adapters import adapt_quantized_experts
from finesight.models.experts import experts_of
from finesight.models.parameters import ParameterCounts, PartCount, count_parameters, freeze_biases_of_other_parts, part_of
from finesight.models.quantize import is_quantized
from finesight.models.tuning_notes import tuning_notes
from finesight.recipe import TuningSettings

__all__ = [
    "AdapterMetadata",
    "ParameterCounts",
    "PartCount",
    "adapter_metadata",
    "apply_tuning",
    "count_parameters",
    "load_adapter",
    "part_of",
    "read_metadata",
    "restore_data_settings",
    "save_adapter",
    "target_modules",
]

logger = logging.getLogger(__name__)

_LANGUAGE_ATTENTION = r"model\.language_model\.layers\.\d+\.self_attn\.(?:q_proj|k_proj|v_proj|o_proj)"
_LANGUAGE_MLP = r"model\.language_model\.layers\.\d+\.mlp\.(?:gate_proj|up_proj|down_proj)"
_TOWER_ATTENTION = r"model\.visual\.blocks\.\d+\.attn\.(?:qkv|proj)"
_TOWER_MLP = r"model\.visual\.blocks\.\d+\.mlp\.(?:gate_proj|up_proj|down_proj|linear_fc1|linear_fc2)"
_MERGER = r"model\.visual\.(?:merger\.(?:mlp\.[02]|linear_fc[12])|deepstack_merger_list\.\d+\.linear_fc[12])"

_ATTENTION_STEPS = {"self_attn", "attn"}


def target_modules(tuning: TuningSettings) -> str:
    """The regular expression that full names of modules with an adapter match, as peft's `target_modules`.

    Adapters on experts are not among them: peft puts those onto parameters (`adapter_metadata.EXPERT_PARAMETERS`).

    Raises:
        ModelError: the settings leave nothing to adapt.
    """
    patterns: list[str] = []
    for wanted, attention, mlp in (
        (tuning.finetune_language_layers, _LANGUAGE_ATTENTION, _LANGUAGE_MLP),
        (tuning.finetune_vision_layers, _TOWER_ATTENTION, _TOWER_MLP),
    ):
        if wanted and tuning.finetune_attention_modules:
            patterns.append(attention)
        if wanted and tuning.finetune_mlp_modules:
            patterns.append(mlp)
    if tuning.finetune_merger:
        patterns.append(_MERGER)
    if not patterns and not tuning.finetune_experts:
        raise ModelError(
            "No module is left to adapt: set tuning.finetune_attention_modules or tuning.finetune_mlp_modules for the layers "
            "that train, or tuning.finetune_merger."
        )
    return "|".join(patterns)


def apply_tuning(model: nn.Module, tuning: TuningSettings, family: Family, seed: int) -> nn.Module:
    """Decide what trains, adding adapters where the settings ask for them.

    With `method: lora` the model comes back wrapped by peft; the base is frozen, adapter weights are float32, A drawn
    from `seed` (the same on every device) and B zero. A model that already carries an adapter keeps it as it is. With
    `method: full` the model itself comes back with `requires_grad` set: the language model with embeddings, norms and
    lm_head under `finetune_language_layers`; the tower with its patch and position embeddings under
    `finetune_vision_layers`; merger and DeepStack mergers under `finetune_merger`.

    Raises:
        ModelError: nothing would train, or quantised weights would.
    """
    for note in tuning_notes(tuning, family):
        logger.info(note)
    if isinstance(model, PeftModel):
        freeze_biases_of_other_parts(model)
    elif tuning.method == "full":
        if is_quantized(model):
            raise ModelError(
                "tuning.method: full trains the weights themselves, and those of this model are quantised: they cannot train. Set "
                "tuning.method: lora, or load a checkpoint in full precision (without load_in_4bit, load_in_8bit and load_in_fp8)."
            )
        _train_weights(model, tuning)
    else:
        model = _add_adapter(model, tuning, seed)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("Nothing trains under these tuning settings: set one of the tuning.finetune_… settings to true.")
    return model


def _add_adapter(model: nn.Module, tuning: TuningSettings, seed: int) -> PeftModel:
    pattern = target_modules(tuning)
    reached = bool(pattern) and any(re.fullmatch(pattern, name) for name, _ in model.named_modules())
    if tuning.finetune_experts and not any(True for _ in experts_of(model)):
        raise ModelError("tuning.finetune_experts: this model has no experts. Leave it out, or choose a mixture of experts.")
    if not reached and not tuning.finetune_experts:
        raise ModelError(
            "No module of this model can get an adapter under these settings (the experts of a mixture of experts get one by "
            "tuning.finetune_experts only): set tuning.finetune_attention_modules: true."
        )
    alpha = tuning.lora_alpha
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=pattern if reached else [],
        target_parameters=EXPERT_PARAMETERS if tuning.finetune_experts else None,
        r=tuning.r,
        lora_alpha=int(alpha) if float(alpha).is_integer() else cast(int, alpha),  # peft divides it; a fraction is fine
        lora_dropout=tuning.lora_dropout,
        bias=tuning.bias,
        use_rslora=tuning.use_rslora,
    )
    on_meta = next(model.parameters()).device.type == "meta"
    # peft draws initial weights from the global generator; they are drawn again below, so its state is put back.
    with torch.random.fork_rng(devices=[]), torch.device("meta") if on_meta else nullcontext(), quiet_peft():
        wrapped = cast(PeftModel, get_peft_model(cast(Any, model), adapt_quantized_experts(config)))
    if not on_meta:
        _draw_adapter_weights(wrapped, seed)
    freeze_biases_of_other_parts(wrapped)
    return wrapped


@torch.no_grad()
def _draw_adapter_weights(model: PeftModel, seed: int) -> None:
    """A as peft draws it (Kaiming uniform with a = sqrt 5), but on the CPU under a seed of its own; B zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            drawn = torch.empty(parameter.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            parameter.copy_(drawn)
        elif ".lora_B." in name:
            parameter.zero_()


def _train_weights(model: nn.Module, tuning: TuningSettings) -> None:
    trains = {
        "tower": tuning.finetune_vision_layers,
        "merger": tuning.finetune_merger,
        "language_model": tuning.finetune_language_layers,
        "embeddings": tuning.finetune_language_layers,
        "lm_head": tuning.finetune_language_layers,
    }
    for name, parameter in model.named_parameters():
        part = part_of(name)
        steps = set(name.split("."))
        kept = (part != "merger") and (
            (bool(steps & _ATTENTION_STEPS) and not tuning.finetune_attention_modules)
            or ("mlp" in steps and not tuning.finetune_mlp_modules)
            or name.endswith(".mlp.gate.weight")  # the router of a mixture of experts
        )
        parameter.requires_grad_(trains[part] and not kept)
