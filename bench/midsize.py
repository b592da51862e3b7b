"""A mid-size Qwen3-VL from random weights: supervised, then by rewards alone, and what it earns on held-out scenes.

    python -m bench.midsize --output runs/midsize --result bench/results/gpu/midsize.json

The scenes, questions and recipes of `finesight demo`, with a larger model and settings for a GPU: the whole model learns to read two
digits, an adapter is half taught two new questions, and GRPO goes on from there. Held-out accuracy (exact match, which is the
reward) is taken before and after GRPO, on scenes none of whose scans was trained on.

On a CPU: --tiny takes the demo's model and a few steps, which teach nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.machine import provenance
from bench.rows import significant
from finesight.demo.model import write_random_checkpoint
from finesight.demo.recipes import DemoFolders, half_taught_recipe, reading_recipe, rewarded_recipe
from finesight.demo.scenes import (
    NEW_QUESTIONS,
    OLD_QUESTIONS,
    READING_TURNS,
    Question,
    compose,
    divide_scans,
    load_scans,
    write_rows,
    write_scenes,
)
from finesight.demo.settings import DemoSettings, ModelSize
from finesight.evaluation.compare import compare
from finesight.evaluation.evaluate import evaluate_model
from finesight.evaluation.results import EvaluationResult
from finesight.models.load import choose_device, choose_dtype, load_model
from finesight.recipe import Recipe
from finesight.tasks.task import load_task
from finesight.training.run import RunResult, train

# Streams of random draws of the scenes, as in the demo: no two sets are alike.
_READING, _NEW, _HELD_OUT = 1, 2, 3


def settings_of(a: argparse.Namespace) -> DemoSettings:
    """The demo's settings with the sizes and learning rates that the options name."""
    if a.tiny:
        return DemoSettings.quick()
    own = DemoSettings(dtype=a.dtype)
    return replace(
        own,
        model=ModelSize(
            hidden_size=a.hidden, num_layers=a.layers, tower_depth=a.tower_depth, patch_size=own.model.patch_size, initializer_range=a.init
        ),
        reading=replace(
            own.reading, max_steps=a.reading_steps, train_batch_size=a.reading_batch, scenes=min(20_000, a.reading_steps * a.reading_batch),
            learning_rate=a.learning_rate, muon_learning_rate=a.muon_learning_rate,
        ),
        new=replace(own.new, learning_rate=a.adapter_rate, warmup_steps=5),
        rewarded=replace(
            own.rewarded, supervised_steps=a.taught_steps, max_steps=a.grpo_steps, train_batch_size=a.completions,
            learning_rate=a.grpo_rate,
        ),
    )  # fmt: skip


class Stages:
    """What is done one after another, each timed.

    Args:
        folder: everything is written to.
    """

    def __init__(self, folder: Path, settings: DemoSettings, seed: int) -> None:
        self.folders, self.settings, self.seed = DemoFolders(folder), settings, seed
        self.console = Console(stderr=True)
        self.dtype = str(choose_dtype(settings.dtype, choose_device())[0]).removeprefix("torch.")
        self.train_scans, self.held_out_scans = divide_scans(load_scans(), settings.scene.held_out_scans, seed)
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """All of them; what was found."""
        s, folders = self.settings, self.folders
        common: dict[str, Any] = {"seed": self.seed, "dtype": self.dtype}
        self._scenes(folders.reading_scenes, s.reading.scenes, _READING, OLD_QUESTIONS, READING_TURNS)
        self._scenes(folders.new_scenes, s.new.scenes, _NEW, NEW_QUESTIONS)
        self._scenes(folders.held_out_scenes, s.judging.scenes, _HELD_OUT, NEW_QUESTIONS + OLD_QUESTIONS)
        start = write_random_checkpoint(folders.output / "random_weights", s.model, s.scene, self.seed)
        reading = self._train("reading", reading_recipe(start, folders.output / "reading", folders, s, **common))
        taught = self._train("half taught", half_taught_recipe(reading.weights_dir, folders, s, **common))
        recipe = rewarded_recipe(reading.weights_dir, taught.weights_dir, folders, s, **common)
        before = self._answers("before", recipe, taught.weights_dir)
        rewarded = self._train("rewards", recipe)
        after = self._answers("after", recipe, rewarded.weights_dir)
        changes = compare(before, after)
        lines = [line for line in rewarded.history if "reward" in line]
        return {
            "parameters": {"model": reading.parameters.total, "adapter": rewarded.parameters.trainable},
            "dtype": self.dtype,
            "reading_loss": [significant(line["loss"]) for line in reading.history if "loss" in line][-1],
            "held_out": [
                {
                    "task": question.name,
                    "chance": question.chance,
                    "before": before.task(question.name).accuracy,
                    "after": after.task(question.name).accuracy,
                    "p_value": changes.task(question.name).p_value,
                }
                for question in NEW_QUESTIONS
            ],
            "rewards": [{"step": line["step"], "reward": significant(line["reward"])} for line in lines],
            "without_image": [significant(line[key]) for line in lines if (key := "image_ablation/reward/without_image") in line],
            "seconds": self.seconds,
        }

    def _scenes(self, folder: Path, count: int, stream: int, questions: tuple[Question, ...], turns: Any = None) -> None:
        begun = time.perf_counter()
        scans = self.held_out_scans if stream == _HELD_OUT else self.train_scans
        scenes = write_scenes(folder, compose(scans, count, self.settings.scene, (self.seed, stream)), count, console=self.console)
        write_rows(folder, scenes, questions, turns)
        self.seconds["scenes"] = round(self.seconds.get("scenes", 0.0) + time.perf_counter() - begun, 1)

    def _train(self, name: str, recipe: Recipe) -> RunResult:
        begun = time.perf_counter()
        result = train(recipe, console=self.console)
        self.seconds[name] = round(time.perf_counter() - begun, 1)
        return result

    def _answers(self, name: str, recipe: Recipe, adapter: Path) -> EvaluationResult:
        begun = time.perf_counter()
        tasks = [load_task(task, data=recipe.data, base_dir=Path.cwd()) for task in recipe.evaluation.tasks]
        loaded = load_model(recipe.model.model_copy(update={"adapter": str(adapter)}), data=recipe.data)
        result = evaluate_model(loaded, tasks, recipe.evaluation, seed=self.seed)
        self.seconds[name] = round(time.perf_counter() - begun, 1)
        for task in result.tasks:
            self.console.print(f"{task.task}: {task.accuracy:.1%} {name}")
        return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for scenes and runs; default: a temporary one")
    parser.add_argument("--result", type=Path, help="file for what was found, JSON")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--hidden", type=int, default=512, help="of the language model and of the tower")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tower-depth", type=int, default=4)
    parser.add_argument("--init", type=float, default=0.03, help="standard deviation of the random weights")
    parser.add_argument("--reading-steps", type=int, default=600)
    parser.add_argument("--reading-batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of embeddings and norms while it learns to read")
    parser.add_argument("--muon-learning-rate", type=float, default=2e-3, help="of the matrices")
    parser.add_argument("--taught-steps", type=int, default=40)
    parser.add_argument("--adapter-rate", type=float, default=1e-3)
    parser.add_argument("--grpo-steps", type=int, default=80)
    parser.add_argument("--completions", type=int, default=128, help="of a step, 8 for each prompt")
    parser.add_argument("--grpo-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="only try it")
    a = parser.parse_args(arguments)
    begun = time.perf_counter()
    settings = settings_of(a)
    if a.output is None:
        with tempfile.TemporaryDirectory(prefix="finesight-midsize-") as name:
            found = Stages(Path(name), settings, a.seed).run()
    else:
        found = Stages(a.output, settings, a.seed).run()
    content = {
        "what": "a mid-size model from random weights: supervised, then GRPO",
        "seed": a.seed,
        **found,
        "total_s": round(time.perf_counter() - begun, 1),
        "settings": asdict(settings),
        "threads": torch.get_num_threads(),
        **provenance(),
    }
    text = json.dumps(content, indent=1) + "\n"
    if a.result is not None:
        a.result.parent.mkdir(parents=True, exist_ok=True)
        a.result.write_text(text, encoding="utf-8")
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
