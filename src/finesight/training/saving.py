"""What a run writes at a checkpoint and reads at resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedModel

from finesight.data.processor import Processor
from finesight.errors import CheckpointError
from finesight.models.adapter_metadata import AdapterMetadata
from finesight.models.sharding import gathered
from finesight.recipe import Recipe
from finesight.training.checkpoint import checkpoint_path, list_checkpoints, newest_valid, remove_old, verify_checkpoint, write_checkpoint
from finesight.training.optimizer import StepOptimizer
from finesight.training.state import (
    TrainerState,
    check_same_run,
    load_tree,
    random_state,
    read_trainer_state,
    restore_random_state,
    save_tree,
    write_trainer_state,
)
from finesight.training.telemetry import Telemetry
from finesight.training.weights import ADAPTER, MODEL, gather_weights, restore_weights, save_weights, weights_folder


def find_resume(output_dir: Path, resume: bool | str) -> tuple[Path | None, tuple[str, ...]]:
    """The checkpoint to go on from, and why newer ones are passed over.

    Args:
        resume: as in the recipe: false, true (the newest valid one of `output_dir`, none if there is none yet), or a path.

    Raises:
        CheckpointError: the checkpoint named is damaged or cannot be resumed; all of `output_dir` are; or the folder
            holds checkpoints although `resume` is false.
    """
    if isinstance(resume, str):
        manifest = verify_checkpoint(resume)
        if not manifest.get("resumable", False):
            raise CheckpointError(
                f"{resume} holds no optimizer state (training.save_only_model): it cannot be resumed. Use it as model.adapter."
            )
        return Path(resume), ()
    present = list_checkpoints(output_dir)
    if not resume:
        left = [path.name for path in (*present, output_dir / ADAPTER, output_dir / MODEL) if path.is_dir()]
        if left:
            raise CheckpointError(
                f"{output_dir} holds {left[-1]} of an earlier run. Add --resume (training.resume: true) to go on from its newest checkpoint, choose "
                "another training.output_dir, or delete that folder."
            )
        return None, ()
    found = newest_valid(output_dir)
    if found.path is None and present:
        raise CheckpointError(f"No checkpoint in {output_dir} can be resumed:\n  " + "\n  ".join(found.skipped))
    return found.path, found.skipped


def nothing_to_resume(output_dir: Path) -> str:
    """What a user should know who asked to go on where no checkpoint is."""
    finished = next((path for path in (output_dir / ADAPTER, output_dir / MODEL) if path.is_dir()), None)
    replaced = "" if finished is None else f" {finished}, of an earlier run, is replaced at its end."
    return f"there is no checkpoint in {output_dir} to go on from: training begins at step 1.{replaced}"


class RunSaver:
    """Saves and restores one run: weights, optimizer, random states of all processes, position and counters."""

    def __init__(
        self,
        *,
        output_dir: Path,
        recipe: Recipe,
        fingerprint: str,
        accelerator: Accelerator,
        model: PreTrainedModel | PeftModel,
        processor: Processor,
        metadata: AdapterMetadata,
        optimizer: StepOptimizer,
        telemetry: Telemetry | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.output_dir, self.recipe, self.fingerprint = output_dir, recipe, fingerprint
        self.accelerator, self.model, self.processor, self.metadata = accelerator, model, processor, metadata
        self.optimizer, self.telemetry, self.scaler = optimizer, telemetry, scaler

    def save(self, state: TrainerState) -> None:
        """Writes the checkpoint of the present step and deletes what `save_total_limit` has no room for.

        Raises:
            CheckpointError: the disk refuses.
        """
        settings, writes = self.recipe.training, self.accelerator.is_main_process
        random_states = gather_object([random_state(self.accelerator.device)])
        weights = gather_weights(self.model, keep=writes)
        optimizer = None if settings.save_only_model else gathered(self.optimizer.state_dict(), keep=writes)

        def fill(folder: Path) -> None:
            save_weights(self.model, folder / weights_folder(self.model), self.metadata, self.processor, weights)
            write_trainer_state(folder, state, self.recipe, self.fingerprint)
            if settings.save_only_model:
                return
            save_tree(folder, "optimizer", optimizer)
            save_tree(folder, "scaler", None if self.scaler is None else self.scaler.state_dict())
            for process, content in enumerate(random_states):
                save_tree(folder, f"random-{process}", content)

        if writes:
            about = {"resumable": not settings.save_only_model, "best_step": state.best_step}
            try:
                path = write_checkpoint(self.output_dir, state.step, fill, about)
                remove_old(self.output_dir, settings.save_total_limit, newest=path, best_step=state.best_step)
            except OSError as error:
                raise CheckpointError(
                    f"The checkpoint of step {state.step} cannot be written to {self.output_dir}: {error.strerror or error}. Free space there, "
                    "or choose another training.output_dir; --resume (training.resume: true) then goes on from the checkpoint before."
                ) from error
            if self.telemetry is not None:
                self.telemetry.message(f"saved {path}")
        self.accelerator.wait_for_everyone()

    def restore(self, path: Path) -> TrainerState:
        """Sets everything as it was at a checkpoint.

        Raises:
            CheckpointError: it belongs to other settings or other data, or cannot be read.
        """
        content = read_trainer_state(path)
        check_same_run(content, self.recipe, self.fingerprint, path)
        self.restore_weights(path)
        self.optimizer.load_state_dict(load_tree(path, "optimizer"))
        scaler: dict[str, Any] | None = load_tree(path, "scaler")
        if self.scaler is not None and scaler:
            self.scaler.load_state_dict(scaler)
        own = f"random-{self.accelerator.process_index}"
        if (path / f"{own}.json").is_file():  # missing where there were fewer processes
            restore_random_state(load_tree(path, own), self.accelerator.device)
        state: TrainerState = content["state"]
        return state

    def restore_weights(self, path: Path) -> None:
        """Sets the weights alone as they were at a checkpoint."""
        restore_weights(self.model, path / weights_folder(self.model))

    def restore_best(self, state: TrainerState) -> bool:
        """Sets the weights of the lowest held-out loss; returns whether they differ from the present ones.

        Raises:
            CheckpointError: that checkpoint is damaged.
        """
        if state.best_step is None or state.best_step == state.step:
            return False
        path = checkpoint_path(self.output_dir, state.best_step)
        verify_checkpoint(path)
        self.restore_weights(path)
        return True
