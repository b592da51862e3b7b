"""One run with its weights: model, optimizer, loop, and what is left at the end."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from finesight.data.feed import Feed
from finesight.data.processor import Processor
from finesight.errors import FinesightError, ModelError, RecipeError
from finesight.models.adapter_metadata import adapter_metadata, library_versions
from finesight.models.adapters import apply_tuning
from finesight.models.compilation import STEADY_TOKENS, compiles_well, keep_compiled_code
from finesight.models.load import LoadedModel
from finesight.models.packed import PackedModel
from finesight.models.parameters import ParameterCounts, count_parameters
from finesight.models.tuning_notes import thinking_warning
from finesight.models.vision import patch_dtype
from finesight.planner.moments import MemoryPlan
from finesight.recipe_files import RECIPE_FILE, RUN_FILE, dump_recipe
from finesight.sampling.forking_sampler import ForkingSampler
from finesight.sampling.types import SamplingSettings
from finesight.tasks.rewards import RewardSet
from finesight.training.checkpoint import checkpoint_path, write_folder
from finesight.training.completion_files import RolloutLog
from finesight.training.grpo import GRPO
from finesight.training.held_out_reward import HeldOutReward
from finesight.training.kept_features import keep_features
from finesight.training.loop import Algorithm, StepSource, StopReason, TrainingLoop, Validation
from finesight.training.optimizer import StepOptimizer
from finesight.training.parameter_groups import group_part
from finesight.training.planning import plan_note, will_compile
from finesight.training.prepare import Plan, Prepared, data_seed
from finesight.training.processes import load_for_training, over_processes, seed_everything
from finesight.training.rollout_engine import rollout_engine
from finesight.training.rollout_shares import Processes
from finesight.training.rollout_source import RolloutSource
from finesight.training.rollouts import RolloutMaker
from finesight.training.run_report import write_run_report
from finesight.training.saving import RunSaver
from finesight.training.sft import SupervisedFineTuning
from finesight.training.state import TrainerState, data_fingerprint
from finesight.training.telemetry import Telemetry, duration
from finesight.training.trackers import flat_settings, tracker_arguments
from finesight.training.validation import HeldOutValidation
from finesight.training.weights import gather_weights, save_weights, weights_folder
from finesight.wording import counted


@dataclass(eq=False)
class RunResult:
    """What a run left behind."""

    output_dir: Path
    weights_dir: Path  # the adapter or the whole model: final, or of the last checkpoint if the run was interrupted
    history: list[dict[str, Any]] = field(repr=False)  # the lines of metrics.jsonl
    state: TrainerState
    stop_reason: StopReason
    plan: Plan
    parameters: ParameterCounts
    model: PreTrainedModel | PeftModel = field(repr=False)  # as it is in memory at the end; under training.sharding only a part of it
    processor: Processor = field(repr=False)

    @property
    def adapter_dir(self) -> Path | None:
        """The adapter's folder; None after full tuning."""
        return self.weights_dir if isinstance(self.model, PeftModel) else None

    @property
    def interrupted(self) -> bool:
        return self.stop_reason == "interrupted"


class Session:
    """Holds the parts of one run together.

    Args:
        prepared: rows and their encoding.
        accelerator: of :func:`start_accelerator`.
        loaded: a model in memory already; None: loaded as the recipe says.
        console: for progress and notes; None: silent.
        algorithm: what to do with a step.
        memory: the plan of the GPU's memory, which names the activation policy where the recipe leaves it open; None: there is none.
    """

    def __init__(
        self,
        prepared: Prepared,
        accelerator: Accelerator,
        *,
        loaded: LoadedModel | None = None,
        console: Console | None = None,
        algorithm: Algorithm | None = None,
        memory: MemoryPlan | None = None,
    ) -> None:
        self.memory = memory
        self.prepared, self.recipe, self.accelerator = prepared, prepared.recipe, accelerator
        self.console = console if console is not None and accelerator.is_main_process else Console(quiet=True)
        self.algorithm = algorithm or self._algorithm()
        self.output_dir = Path(self.recipe.training.output_dir)
        self.plan = prepared.plan()
        self.begun = time.time()
        # Before the model is loaded, which takes longer than to find out that a server is missing.
        self.engine = rollout_engine(prepared, accelerator, self._save_adapter, self._say)
        # Adapters are drawn the same on all processes; what dropout draws afterwards differs between them.
        self.loaded = loaded or self._load()
        self.model = apply_tuning(self.loaded.model, self.recipe.tuning, self.loaded.family, self.recipe.training.seed)
        self.parameters = count_parameters(self.model)
        seed_everything(self.recipe.training.seed + accelerator.process_index)
        compiled = self._compile_layers()
        self.packed = PackedModel(
            self.model,
            gradient_checkpointing=self._activation_policy(),
            compile_layers=compiled,
            mlp_chunk_tokens=self.recipe.training.mlp_chunk_tokens,
            say=self._say,
        )
        self.steady_tokens = STEADY_TOKENS if compiled else None
        self.kept = keep_features(prepared, self.plan, self.packed, accelerator, self._say)
        self.wrapped = over_processes(self.packed, accelerator, self.recipe.training)
        self.optimizer = StepOptimizer(self.model.named_parameters(), self.recipe.training, self.recipe.tuning.bf16_updates)
        self._refuse_rows_that_train_nothing()
        self._refuse_release()
        self.scaler = torch.amp.GradScaler(accelerator.device.type) if self.loaded.dtype == torch.float16 else None
        self.metadata = adapter_metadata(self.recipe, prepared.processor)
        self.fingerprint = data_fingerprint(prepared.samples)
        self.rollout_log: RolloutLog | None = None  # of the first process in a run of reinforcement

    def _algorithm(self) -> Algorithm:
        """As the recipe says."""
        grpo, rollout = self.recipe.grpo, self.recipe.rollout
        if grpo is None or rollout is None:
            return SupervisedFineTuning()
        return GRPO(
            grpo,
            rollout.max_completion_length,
            corrects_sampler=rollout.engine != "builtin",
            gather=lambda own: self.accelerator.gather(own[None]),
        )

    def _compile_layers(self) -> bool:
        """Whether layers are compiled: as the recipe says, or where it pays."""
        device = self.accelerator.device
        refusal = compiles_well(device)
        if refusal and self.recipe.training.torch_compile is True:
            self._say(f"Note: training.torch_compile is on, but {refusal}; layers run uncompiled.")
        if not will_compile(self.recipe, self.plan.total_steps, device):
            return False
        folder = keep_compiled_code()
        self._say(f"Layers are compiled in the first steps, which takes up to a minute; later runs find the code in {folder}.")
        return True

    def _activation_policy(self) -> bool | str:
        """The recipe's activation policy, or the planned one; full where nothing was planned (on a CPU)."""
        if self.memory is not None:
            self._say(plan_note(self.memory))
        asked = self.recipe.training.gradient_checkpointing
        if asked != "auto":
            return asked
        return "full" if self.memory is None else self.memory.policy

    def _load(self) -> LoadedModel:
        self._say(f"Loading {self.recipe.model.name_or_path}")
        return load_for_training(self.recipe, self.accelerator.device)

    def _refuse_rows_that_train_nothing(self) -> None:
        """Where only tower and merger train, a pack of text alone has no gradient, for which other processes would wait."""
        language_trains = any(group_part(name) == "language_model" for name in self.optimizer.names)
        if language_trains or (self.accelerator.num_processes == 1 and self.loaded.dtype != torch.float16):
            return
        text = next((sample for sample in self.prepared.samples if not sample.visual_items), None)
        if text is not None:
            raise RecipeError(
                f"{text.source} has no image, and only the tower and the merger train: such a row trains nothing. Remove rows of text, or set "
                "tuning.finetune_language_layers: true."
            )

    def _refuse_release(self) -> None:
        if self.recipe.training.gradient_release and self.loaded.dtype == torch.float16:
            raise RecipeError(
                "training.gradient_release cannot be used in float16, where an update is made only once all gradients are known to be finite: set it "
                "to false, or model.dtype: bfloat16 or float32"
            )

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def tell(self, text: str) -> None:
        """Tells the user of a run something."""
        self._say(text)

    def announce(self) -> None:
        """Prints what trains and what the run will look like."""
        warning = thinking_warning(self.recipe.model.name_or_path, self.prepared.processor.chat_template, self.prepared.conversations)
        for note in (*self.prepared.notes, *([warning] if warning else [])):
            if note not in self.loaded.notes:  # those were logged when it was loaded
                self._say(f"Note: {note}")
        self._say(str(self.parameters))
        for line in self.plan.lines():
            self._say(line)

    def run(self, resume_from: Path | None = None) -> RunResult:
        """Trains to the end, or to an interruption, and writes what is left.

        Raises:
            TrainingError, DataError, CheckpointError: see :class:`TrainingLoop`.
        """
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            (self.output_dir / RECIPE_FILE).write_text(dump_recipe(self.recipe), encoding="utf-8")
        self.announce()
        saver = self._saver()
        state = TrainerState()
        if resume_from is not None:
            state = saver.restore(resume_from)
            self._say(f"Going on from {resume_from} (step {state.step} of {self.plan.total_steps})")
        self._start_trackers()
        try:
            return self._train(state, saver)
        except BaseException:
            with suppress(ModelError):  # the model goes back to its owner whole, if it can; the first error is the one to tell
                self.packed.tower_place.present()
            raise
        finally:
            if self.engine is not None:
                self.engine.close()

    def _train(self, state: TrainerState, saver: RunSaver) -> RunResult:
        with Telemetry(
            self.output_dir,
            total_steps=self.plan.total_steps,
            start_step=state.step,
            logging_steps=self.recipe.training.logging_steps,
            console=self.console,
            track=self.accelerator.log if self.recipe.training.report_to else None,
            main_process=self.accelerator.is_main_process,
        ) as telemetry:
            saver.telemetry = telemetry
            reason = self._loop(state, telemetry, saver).run()
        return self._finish(state, reason, telemetry, saver)

    def _saver(self) -> RunSaver:
        return RunSaver(
            output_dir=self.output_dir,
            recipe=self.recipe,
            fingerprint=self.fingerprint,
            accelerator=self.accelerator,
            model=self.model,
            processor=self.prepared.processor,
            metadata=self.metadata,
            optimizer=self.optimizer,
            scaler=self.scaler,
        )

    def _start_trackers(self) -> None:
        report_to = self.recipe.training.report_to
        if not report_to or not self.accelerator.is_main_process:
            return
        arguments = tracker_arguments(report_to, self.output_dir)
        try:
            self.accelerator.init_trackers("finesight", config=flat_settings(self.recipe), init_kwargs=arguments)
        except Exception as error:  # each tracker has errors of its own
            raise RecipeError(f"training.report_to: {', '.join(report_to)} could not be started: {error}") from error

    def _loop(self, state: TrainerState, telemetry: Telemetry, saver: RunSaver) -> TrainingLoop:
        processes: dict[str, Any] = {
            "processes": self.accelerator.num_processes,
            "process": self.accelerator.process_index,
            "tower": self.packed.tower_shape,
            "pin_memory": self.accelerator.device.type == "cuda",
            "steady_tokens": self.steady_tokens,
            "stored": None if self.kept is None else self.kept.stored,
            "patch_dtype": patch_dtype(self.packed.base.model.visual),
        }
        sampler = ForkingSampler(
            self.packed,
            self.prepared.processor,
            image_first=self.recipe.data.image_first,
            # A few sample answers would not repay it; rollouts, which take most of a step, do wherever compiled updates do.
            compile_layers=self.steady_tokens is not None and self.recipe.grpo is not None,
            say=self._say,
        )
        rewards = RewardSet(self.prepared.rewards)
        feed = self.prepared.feed(**processes)
        source: StepSource = feed if self.recipe.grpo is None else self._rollout_source(feed, sampler, rewards, telemetry)
        validation: Validation | None = None
        if self.prepared.held_out and self.recipe.training.eval_strategy != "no":
            if self.recipe.grpo is not None:
                validation = HeldOutReward(
                    sampler,
                    rewards,
                    self.prepared.held_out,
                    self.prepared.held_out_conversations,
                    self._answer_sampling(),
                    Processes.of(self.accelerator),
                    telemetry,
                )
            else:
                validation = self._held_out_loss(processes, sampler, telemetry)
        return TrainingLoop(
            accelerator=self.accelerator,
            model=self.wrapped,
            algorithm=self.algorithm,
            source=source,
            optimizer=self.optimizer,
            settings=self.recipe.training,
            total_steps=self.plan.total_steps,
            state=state,
            telemetry=telemetry,
            validation=validation,
            saver=saver,
            scaler=self.scaler,
            kept=self.kept,
        )

    def _held_out_loss(self, processes: dict[str, Any], sampler: ForkingSampler, telemetry: Telemetry) -> HeldOutValidation:
        return HeldOutValidation(
            accelerator=self.accelerator,
            model=self.packed,
            feed=self.prepared.held_out_feed(**processes),
            conversations=self.prepared.held_out_conversations[: self.recipe.training.sample_answers],
            sampler=sampler,
            sampling=self._answer_sampling(),
            kept=self.kept,
            output_dir=self.output_dir,
            telemetry=telemetry,
        )

    def _answer_sampling(self) -> SamplingSettings:
        """How held-out prompts are answered."""
        evaluation, rollout = self.recipe.evaluation, self.recipe.rollout
        return SamplingSettings(
            max_completion_length=evaluation.max_completion_length if rollout is None else rollout.max_completion_length,
            temperature=evaluation.temperature,
            stop=() if rollout is None else tuple(rollout.stop),
            batch_size=evaluation.batch_size if rollout is None else rollout.batch_size,
        )

    def _rollout_source(self, feed: Feed, sampler: ForkingSampler, rewards: RewardSet, telemetry: Telemetry) -> RolloutSource:
        grpo, rollout, prepared = self.recipe.grpo, self.recipe.rollout, self.prepared
        if grpo is None or rollout is None:
            raise RecipeError("Rollouts are for reinforcement: add a section grpo to the recipe.")
        maker = RolloutMaker(
            self.engine or sampler,
            rewards,
            prepared.samples,
            prepared.conversations,
            grpo=grpo,
            rollout=rollout,
            seed=data_seed(self.recipe),
            max_steps=self.plan.total_steps,
            processes=Processes.of(self.accelerator),
        )
        schedule = prepared.group_schedule(self.accelerator.num_processes)
        if not self.accelerator.is_main_process:  # all know of every rollout; one writes
            return RolloutSource(feed, schedule, maker, self.packed)
        self.rollout_log = RolloutLog(self.output_dir, prepared.conversations, telemetry)
        return RolloutSource(feed, schedule, maker, self.packed, self.rollout_log)

    def _finish(self, state: TrainerState, reason: StopReason, telemetry: Telemetry, saver: RunSaver) -> RunResult:
        name = weights_folder(self.model)
        if reason == "interrupted":
            weights_dir = checkpoint_path(self.output_dir, state.step) / name
        else:
            if self.recipe.training.load_best_model_at_end and saver.restore_best(state):
                measured = "loss" if self.recipe.grpo is None else "reward"
                self._say(f"Weights of step {state.best_step}, held-out {measured} {state.best_metric:.4f}")
            weights_dir = self.output_dir / name
            weights = gather_weights(self.model, keep=self.accelerator.is_main_process)
            if self.accelerator.is_main_process:
                write_folder(weights_dir, partial(self._fill, weights))
        self.model.eval()
        self.packed.tower_place.present()
        if self.kept is not None:  # up to a quarter of the memory that was free
            self.kept.close()
            self.kept = self.packed.feature_cache = None
        if self.accelerator.is_main_process:
            self._write_run(state, reason)
            self._write_report()
        if self.recipe.training.report_to:
            self.accelerator.end_training()
        self.accelerator.wait_for_everyone()
        self._say(f"{counted(state.step, 'step')} in {duration(state.seconds)}; weights: {weights_dir}")
        return RunResult(
            output_dir=self.output_dir,
            weights_dir=weights_dir,
            history=telemetry.history,
            state=state,
            stop_reason=reason,
            plan=self.plan,
            parameters=self.parameters,
            model=self.model,
            processor=self.prepared.processor,
        )

    def _save_adapter(self, folder: Path) -> None:
        save_weights(self.model, folder, self.metadata, self.prepared.processor)

    def _fill(self, weights: dict[str, torch.Tensor] | None, folder: Path) -> None:
        save_weights(self.model, folder, self.metadata, self.prepared.processor, weights)
        (folder / RECIPE_FILE).write_text(dump_recipe(self.recipe), encoding="utf-8")

    def _write_report(self) -> None:
        """Of reinforcement: curves and completions. What goes wrong with it is told and costs the run nothing."""
        if self.rollout_log is None:
            return
        for line in self.rollout_log.closing_lines():
            self._say(line)
        try:
            path = write_run_report(self.output_dir)
        except (FinesightError, OSError) as error:
            self._say(f"Note: the report of the run could not be written: {error}")
        else:
            if path is not None:
                self._say(f"Report: {path}")

    def _write_run(self, state: TrainerState, reason: StopReason) -> None:
        """Writes `run.json`: what ran where, with which versions, and how it ended."""
        device = self.accelerator.device
        content = {
            "stop_reason": reason,
            "state": state.to_json(),
            "plan": asdict(self.plan),
            "parameters": {"trainable": self.parameters.trainable, "total": self.parameters.total},
            "data_fingerprint": self.fingerprint,
            "bad_rows": len(self.prepared.bad_rows),
            "begun": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.begun)),
            "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": self.accelerator.num_processes,
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "versions": library_versions(),
        }
        (self.output_dir / RUN_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
