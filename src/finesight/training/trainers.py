"""Trainers: the Python face of a run, with the words that users of TRL and peft know. Settings are those of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from finesight.data.conversation import Conversation
from finesight.data.formats import ReadResult, read_source
from finesight.data.processor import Processor
from finesight.data.tables import RowTable
from finesight.data_settings import SourceSettings
from finesight.errors import DataError, RecipeError
from finesight.foreign_names import FOREIGN_OBJECTS
from finesight.grpo_settings import RewardSettings
from finesight.models.load import LoadedModel
from finesight.recipe import Recipe
from finesight.recipe_files import parse_recipe
from finesight.training.flat_settings import REINFORCEMENT, SUPERVISED, in_sections
from finesight.training.foreign_arguments import is_foreign_config, settings_of_arguments, settings_of_peft_config
from finesight.training.run import RunResult, run_recipe

RewardFunction = Callable[..., Any]


class SFTTrainer:
    """Supervised fine-tuning from Python, with the words of a recipe.

    Example::

        trainer = SFTTrainer("Qwen/Qwen3-VL-8B-Instruct", train_dataset=rows, output_dir="runs/mine", r=16, learning_rate=1e-4)
        result = trainer.train()

    Args:
        model: a checkpoint (folder or hub name), or what :func:`finesight.load` gave. May be left out if the recipe names it.
        processor: of a model that is loaded already; goes before its own. TRL's `SFTConfig` may stand in its place, as it does there.
        train_dataset: rows: dicts in any format that files may have, conversations, a `datasets.Dataset`, or a path.
            None: what the recipe names.
        eval_dataset: held-out rows, likewise; `eval_split` divides them off the others instead.
        args: settings by their own names, as `settings`; or TRL's `SFTConfig`, whose batch sizes then make up `train_batch_size`.
        processing_class: as `processor`.
        peft_config: a `peft.LoraConfig`, for settings of the section `tuning`.
        recipe: settings to start from.
        console: for progress; None: a new one on stdout.
        settings: any setting of the sections `training`, `tuning`, `data` and `model` by its own name (`learning_rate=…`, `r=…`,
            `max_pixels=…`); these go before those of `args`, and `args` before those of the recipe.

    Raises:
        RecipeError: a setting is unknown or does not fit.
    """

    sections: tuple[str, ...] = SUPERVISED  # whose settings are taken by their own names; of two with one name, the first

    def __init__(
        self,
        model: str | Path | LoadedModel | None = None,
        processor: Processor | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        args: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        recipe: Recipe | None = None,
        console: Console | None = None,
        **settings: Any,
    ) -> None:
        if args is None and is_foreign_config(processor):
            args, processor = processor, None
        processor = processing_class if processor is None else processor
        settings = self._without_objects({**settings_of_arguments(args, reinforcement=False), **settings})
        if model is not None and not isinstance(model, (str, Path, LoadedModel)):
            raise RecipeError(
                f"{self._name}: model is a {type(model).__name__}; give the folder or name of a checkpoint, or what finesight.load(…) gave for it"
            )
        self.loaded = model if isinstance(model, LoadedModel) else None
        if processor is not None:
            if self.loaded is None or not isinstance(processor, Processor):
                raise RecipeError(
                    f"{self._name}: a processor is for a model that is loaded already; give finesight.load(…) as model, or leave it out. "
                    "The processor of a checkpoint is read with it; limits are settings: min_pixels, max_pixels"
                )
            self.loaded = replace(self.loaded, processor=processor)
        if eval_dataset is not None and recipe is None:
            settings.setdefault("eval_split", "eval_dataset")  # whose rows are handed over, not read
        if peft_config is not None:
            settings = {**settings_of_peft_config(peft_config), **settings}
        if self.loaded is not None:
            settings = {**settings, **self.loaded.precision(recipe, settings)}
        name = self.loaded.model.name_or_path if self.loaded is not None else model
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.recipe = self._recipe_with(recipe, None if name is None else str(name), settings)
        self.console = console or Console()
        self.result: RunResult | None = None

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> RunResult:
        """Trains and returns what :func:`finesight.train` does; `model` and `processor` are then the trained ones.

        Args:
            resume_from_checkpoint: True: go on from the newest valid checkpoint of `output_dir`; or the path of one. None: as
                the setting `resume` says.

        Raises:
            FinesightError: as :func:`finesight.train`.
        """
        recipe = self.recipe
        if resume_from_checkpoint is not None:
            resume = resume_from_checkpoint if isinstance(resume_from_checkpoint, bool) else str(resume_from_checkpoint)
            recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"resume": resume})})
        held_out = None if self.eval_dataset is None else [self._read(self.eval_dataset, "eval_dataset")]
        sources = None if self.train_dataset is None else [self._read(self.train_dataset, "train_dataset")]
        self.result = run_recipe(
            recipe,
            console=self.console,
            loaded=self.loaded,
            sources=sources,
            held_out_sources=held_out,
            reward_functions=self.reward_functions,
        )
        return self.result

    @property
    def reward_functions(self) -> Mapping[str, RewardFunction]:
        """Functions in memory that the recipe's rewards name."""
        return {}

    @property
    def model(self) -> Any:
        """The trained model (transformers, or peft around it)."""
        return self._done().model

    @property
    def processor(self) -> Processor:
        """The processor that the model was trained with."""
        return self._done().processor

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _done(self) -> RunResult:
        if self.result is None:
            raise RecipeError(f"{self._name}: call train() first")
        return self.result

    def _read(self, dataset: Any, name: str) -> ReadResult:
        data, answers = self.recipe.data, self.recipe.grpo is None
        like = data.train[0] if data.train else SourceSettings(path=name)
        if isinstance(dataset, (str, Path)):
            return read_source(like.model_copy(update={"path": str(dataset)}), data=data, base_dir=Path.cwd(), require_answer=answers)
        rows = list(dataset)
        if not rows:
            raise DataError(f"{name} holds no rows")
        if all(isinstance(row, Conversation) for row in rows):
            return ReadResult(rows, [], "messages", name)
        odd = next((row for row in rows if not isinstance(row, Mapping)), None)
        if odd is not None:
            raise DataError(f"{name}: rows must be dicts or conversations, not {type(odd).__name__}")
        table = RowTable(name, Path.cwd(), iter([dict(row) for row in rows]), in_memory=True)
        source = like.model_copy(update={"path": name})
        return read_source(source, data=data, base_dir=Path.cwd(), table=table, require_answer=answers)

    def _without_objects(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings without what is an object in other trainers, and may be given as None."""
        for key in FOREIGN_OBJECTS.keys() & settings.keys():
            value = settings[key]
            if value is not None and not (isinstance(value, (tuple, list)) and all(one is None for one in value)):
                raise RecipeError(f"{self._name}: {key} is not taken: {FOREIGN_OBJECTS[key]}")
        return {key: value for key, value in settings.items() if key not in FOREIGN_OBJECTS}

    def _recipe_with(self, recipe: Recipe | None, name: str | None, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with flat settings put into their sections."""
        content: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True) if recipe is not None else {}
        for section, values in in_sections(settings, self.sections, self._name).items():
            content[section] = {**(content.get(section) or {}), **values} if isinstance(values, dict) else values
        if name is not None:
            content.setdefault("model", {})["name_or_path"] = name
        return parse_recipe(content, origin=self._name)


class GRPOTrainer(SFTTrainer):
    """Reinforcement with rewards from Python, called as TRL's trainer of this name.

    Example::

        def brief(completions, **kwargs):
            return [1.0 if len(completion[0]["content"]) < 40 else 0.0 for completion in completions]

        trainer = GRPOTrainer(
            model="Qwen/Qwen3-VL-4B-Instruct",
            reward_funcs=["math", brief],
            args={"output_dir": "runs/mine", "num_generations": 8, "train_batch_size": 64, "reward_weights": [1.0, 0.2]},
            train_dataset=rows,
            peft_config=LoraConfig(r=32, lora_alpha=32),
        )
        result = trainer.train()

    Args:
        model: a checkpoint (folder or hub name), or what :func:`finesight.load` gave. May be left out if the recipe names it.
        reward_funcs: one or several of: a function `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, called
            with the keywords that its signature takes, sync or async; the name of a grader; `module:function` or a file;
            :class:`finesight.grpo_settings.RewardSettings`, for weight, options and time limit. None: what the recipe names.
        args: settings by their own names, as `settings`; or TRL's `GRPOConfig`, whose batch sizes then make up `train_batch_size`.
        train_dataset, eval_dataset: as for :class:`SFTTrainer`; rows without an answer will do.
        processing_class: of a model that is loaded already; goes before its own.
        peft_config: a `peft.LoraConfig`, for settings of the section `tuning`.
        recipe, console: as for :class:`SFTTrainer`.
        settings: any setting of the sections `grpo`, `rollout`, `training`, `tuning`, `data` and `model` by its own name, and
            `reward_weights`; these go before those of `args`, and `args` before those of the recipe.

    Raises:
        RecipeError: a setting is unknown or does not fit.
    """

    sections = REINFORCEMENT

    def __init__(
        self,
        model: str | Path | LoadedModel | None = None,
        reward_funcs: RewardFunction | str | RewardSettings | Sequence[RewardFunction | str | RewardSettings] | None = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Processor | None = None,
        *,
        peft_config: Any = None,
        recipe: Recipe | None = None,
        console: Console | None = None,
        **settings: Any,
    ) -> None:
        settings = {**settings_of_arguments(args, reinforcement=True), **settings}
        weights = settings.pop("reward_weights", None)
        self._functions: dict[str, RewardFunction] = {}
        if reward_funcs is not None:
            several = [reward_funcs] if callable(reward_funcs) or isinstance(reward_funcs, (str, RewardSettings)) else list(reward_funcs)
            settings["rewards"] = self._rewards(several, weights)
        elif weights is not None:
            raise RecipeError("GRPOTrainer: reward_weights are of reward_funcs; give these too, or set the weights in the recipe")
        if recipe is None or recipe.grpo is None:
            settings.setdefault("num_generations", 8)  # so that there is a section grpo
        super().__init__(
            model,
            processing_class,
            train_dataset,
            eval_dataset,
            peft_config=peft_config,
            recipe=recipe,
            console=console,
            **settings,
        )

    @property
    def reward_functions(self) -> Mapping[str, RewardFunction]:
        return self._functions

    def _rewards(self, given: Sequence[Any], weights: Sequence[float] | None) -> list[dict[str, Any]]:
        """Entries of the recipe's rewards; functions are kept by the name that they have there."""
        if weights is not None and len(weights) != len(given):
            raise RecipeError(f"GRPOTrainer: {len(weights)} reward_weights were given for {len(given)} reward_funcs; give one for each")
        rewards: list[dict[str, Any]] = []
        for number, reward in enumerate(given):
            if isinstance(reward, RewardSettings):
                entry = reward.model_dump(mode="json", exclude_unset=True)
            elif isinstance(reward, str):
                entry = {"name": reward}
            elif callable(reward):
                name = _name_of(reward, taken={str(one["name"]) for one in rewards})
                self._functions[name] = reward
                entry = {"name": name}
            else:
                raise RecipeError(
                    f"GRPOTrainer: reward_funcs holds a {type(reward).__name__}; give functions, names of graders, or RewardSettings. "
                    "A reward model is a function of yours that calls it"
                )
            rewards.append(entry if weights is None else {**entry, "weight": weights[number]})
        return rewards


def _name_of(function: RewardFunction, taken: set[str]) -> str:
    """The name of a function in the recipe and in figures, with a number where two have the same."""
    name = str(getattr(function, "__name__", None) or getattr(getattr(function, "func", None), "__name__", None) or type(function).__name__)
    name = "lambda" if name == "<lambda>" else name
    return next(option for option in (name, *(f"{name}_{number}" for number in range(2, len(taken) + 3))) if option not in taken)
