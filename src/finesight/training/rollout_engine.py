"""The engine that samples for a run in place of the model in training, where the recipe names one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from finesight.sampling.vllm_sampler import VllmSampler
from finesight.sampling.vllm_server import TOWER_OPTION, VllmServer, start_command
from finesight.training.prepare import Prepared

ADAPTERS = "rollout-adapters"  # in the folder of a run, while it runs


def rollout_engine(
    prepared: Prepared, accelerator: Accelerator, save: Callable[[Path], None], say: Callable[[str], None] = lambda text: None
) -> VllmSampler | None:
    """The engine of the recipe, known to be able to sample for this run; None: the model in training samples.

    Args:
        save: writes the adapter in training into a folder.
        say: is told what cannot be checked.

    Raises:
        EngineError, DataError: as :meth:`VllmSampler.check`.
    """
    recipe, rollout = prepared.recipe, prepared.recipe.rollout
    if rollout is None or rollout.engine == "builtin" or rollout.url is None:
        return None
    run = broadcast_object_list([secrets.token_hex(4)])[0]
    tower = recipe.tuning.finetune_vision_layers or recipe.tuning.finetune_merger
    if tower:
        say(
            f"Note: vLLM passes over what an adapter holds for tower and merger unless it was started with {TOWER_OPTION}; "
            "sampling/sampling_logp_difference/mean would then grow from step to step."
        )
    server = VllmServer(
        rollout.url,
        start=start_command(recipe.model.name_or_path, recipe.tuning.r, tower=tower),
        api_key=os.environ.get(rollout.api_key_env) or None,
        timeout_s=rollout.timeout_s,
    )
    sampler = VllmSampler(
        server,
        prepared.processor,
        prepared.conversations,
        folder=Path(recipe.training.output_dir) / ADAPTERS,
        save=save,
        run=run,
        image_first=recipe.data.image_first,
        publishes=accelerator.is_main_process,
        wait=accelerator.wait_for_everyone,
    )
    sampler.check(recipe.model.name_or_path, rollout, prepared.samples)
    return sampler
