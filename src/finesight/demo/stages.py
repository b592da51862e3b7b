"""The stages of the demo, each through the code that a user's run takes: recipes, `train`, `evaluate`, `predict`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from finesight import __version__
from finesight.demo.cache import cache_key, is_whole
from finesight.demo.model import write_random_checkpoint
from finesight.demo.recipes import DemoFolders, half_taught_recipe, new_questions_recipe, reading_recipe, rewarded_recipe
from finesight.demo.scenes import (
    NEW_QUESTIONS,
    OLD_QUESTIONS,
    QUESTIONS,
    READING_TURNS,
    Scans,
    Scene,
    compose,
    divide_scans,
    load_scans,
    rows_file,
    write_rows,
    write_scenes,
)
from finesight.demo.settings import DemoSettings
from finesight.demo.view import answers_table, figures_table, rewards_table, scenes_view, seconds_table
from finesight.errors import EvaluationError
from finesight.evaluation.compare import compare
from finesight.evaluation.evaluate import evaluate_model
from finesight.evaluation.report import write_report
from finesight.evaluation.results import EvaluationResult
from finesight.models.adapter_metadata import library_versions
from finesight.models.load import choose_device, choose_dtype, load_model, without_library_bars
from finesight.recipe import Recipe
from finesight.recipe_files import RECIPE_FILE, dump_recipe
from finesight.tasks.task import Task, load_task
from finesight.training.run import RunResult, train
from finesight.training.run_report import reinforcement_of
from finesight.training.telemetry import METRICS, duration, progress

SUMMARY, REPORT, ANSWERS = "summary.json", "report.html", "answers.jsonl"
_STAGES = 7
# The folders of what was measured, in a reader's words.
_WHEN = {
    "before": "before training",
    "after": "after training",
    "before_rewards": "before reinforcement",
    "after_rewards": "after reinforcement",
}
# Streams of random draws, so that no two sets of scenes are alike.
_READING, _NEW, _HELD_OUT = 1, 2, 3


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What a demo left behind."""

    output_dir: Path
    adapter_dir: Path
    report: Path
    summary: dict[str, Any] = field(repr=False)  # the content of summary.json


def run_demo(
    output_dir: str | Path = "runs/demo",
    *,
    seed: int = 0,
    keep_old: bool = False,
    settings: DemoSettings | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Trains a tiny model to read, measures it on new questions, teaches it those with an adapter, measures again.

    Args:
        output_dir: folder that everything is written to; scenes and results of an earlier demo are written over. The
            model of the first stage is kept in its `cache` for the next demo with the same seed.
        seed: of the division of scans, the scenes, the weights and the order of rows.
        keep_old: train the adapter on some rows of the old questions as well, so that they are not forgotten.
        settings: sizes; None: those of the demo.
        console: for progress and tables; None: a new one on stdout.

    Raises:
        FinesightError: scikit-learn is missing, the folder cannot be written, or a stage failed.
        KeyboardInterrupt: training was interrupted.
    """
    with _one_thread(), without_library_bars():
        return _Demo(Path(output_dir), seed, keep_old, settings or DemoSettings(), console or Console()).run()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products this small gain nothing from a second thread, and lose much where another program has the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Demo:
    def __init__(self, output_dir: Path, seed: int, keep_old: bool, settings: DemoSettings, console: Console) -> None:
        self.folders, self.seed, self.keep_old, self.settings, self.console = DemoFolders(output_dir), seed, keep_old, settings, console
        self.device = choose_device()
        self.dtype = str(choose_dtype(settings.dtype, self.device)[0]).removeprefix("torch.")
        self.train_scans, self.held_out_scans = divide_scans(load_scans(), settings.scene.held_out_scans, seed)
        self.stages: list[dict[str, Any]] = []

    def run(self) -> DemoResult:
        """All stages in their order."""
        begun = time.perf_counter()
        with self._stage("Train a tiny Qwen3-VL from random weights to read") as about:
            base, about["cached"] = self._reading_model()
        recipe = new_questions_recipe(base, self.folders, self.settings, seed=self.seed, dtype=self.dtype, keep_old=self.keep_old)
        with self._stage("Ask new questions before training on them"):
            held_out = self._write_scenes(self.folders.held_out_scenes, self.held_out_scans, self.settings.judging.scenes, _HELD_OUT)
            write_rows(self.folders.held_out_scenes, held_out, QUESTIONS)
            self.console.print(scenes_view([scene.image for scene in held_out], self.console.width))
            tasks = [load_task(task, data=recipe.data, base_dir=Path.cwd()) for task in recipe.evaluation.tasks]
            before = self._evaluate(recipe, tasks, "before")
        with self._stage("Train an adapter on the new questions, tower frozen"):
            scenes = self._write_scenes(self.folders.new_scenes, self.train_scans, self.settings.new.scenes, _NEW)
            write_rows(self.folders.new_scenes, scenes, NEW_QUESTIONS)
            write_rows(self.folders.new_scenes, scenes[: int(self.settings.new.old_share * len(scenes))], OLD_QUESTIONS)
            result = self._train(recipe)
        with self._stage("Ask again, and the old questions too"):
            after = self._evaluate(recipe, tasks, "after", adapter=result.weights_dir)
        with self._stage("Let a fresh process load the adapter and answer"):
            answers = self._fresh_answers(result.weights_dir)
        with self._stage("Go on with rewards alone from an adapter that was taught by half (GRPO)"):
            rewarded = self._rewarded(base, tasks)
        with self._stage("Report"):
            report = self._report(before, after, tasks, recipe)
        summary = self._summary(before, after, held_out, result, answers)
        summary["rewarded"] = rewarded
        summary["seconds"] = round(time.perf_counter() - begun, 1)
        path = self.folders.output / SUMMARY
        path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        self._conclude(summary, path)
        return DemoResult(self.folders.output, result.weights_dir, report, summary)

    @contextmanager
    def _stage(self, title: str) -> Iterator[dict[str, Any]]:
        """Prints the heading of a stage, and keeps how long it took with whatever the stage says about itself."""
        self.console.rule(f"[bold]{len(self.stages) + 1} of {_STAGES}[/]  {title}", align="left")
        about: dict[str, Any] = {"stage": title}
        begun = time.perf_counter()
        yield about
        about["seconds"] = round(time.perf_counter() - begun, 1)
        self.stages.append(about)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _write_scenes(self, folder: Path, scans: Scans, count: int, stream: int) -> list[Scene]:
        return write_scenes(folder, compose(scans, count, self.settings.scene, (self.seed, stream)), count, console=self.console)

    def _reading_model(self) -> tuple[Path, bool]:
        """The model of stage 1, and whether it came from the cache."""
        run_dir = self.folders.reading_run(cache_key(self.settings, self.seed, self.device, self.dtype))
        if is_whole(run_dir / "model"):
            self._say(f"Kept from an earlier demo: {run_dir / 'model'} (delete it to see it trained again)")
            return run_dir / "model", True
        scenes = self._write_scenes(self.folders.reading_scenes, self.train_scans, self.settings.reading.scenes, _READING)
        write_rows(self.folders.reading_scenes, scenes, OLD_QUESTIONS, READING_TURNS)
        start = write_random_checkpoint(self.folders.output / "random_weights", self.settings.model, self.settings.scene, self.seed)
        recipe = reading_recipe(start, run_dir, self.folders, self.settings, seed=self.seed, dtype=self.dtype)
        return self._train(recipe).weights_dir, False

    def _train(self, recipe: Recipe) -> RunResult:
        run_dir = Path(recipe.training.output_dir)
        if (run_dir / RECIPE_FILE).is_file():  # of an earlier demo, perhaps an unfinished one
            shutil.rmtree(run_dir)
        result = train(recipe, console=self.console)
        if result.interrupted:
            raise KeyboardInterrupt
        return result

    def _evaluate(self, recipe: Recipe, tasks: Sequence[Task], label: str, adapter: Path | None = None) -> EvaluationResult:
        model = recipe.model.model_copy(update={"adapter": None if adapter is None else str(adapter)})
        loaded = load_model(model, data=recipe.data)
        answered: dict[str, int] = {}
        when = _WHEN[label]
        with progress(self.console, f"Answers {when}", sum(len(task.conversations) for task in tasks)) as advance:

            def on_progress(task: str, done: int, total: int) -> None:
                advance(done - answered.get(task, 0))
                answered[task] = done

            result = evaluate_model(loaded, tasks, recipe.evaluation, seed=self.seed, on_progress=on_progress)
        result.write(self.folders.output / label)
        for task in result.tasks:
            self._say(f"{task.task}: {task.accuracy:.1%} {when}")
        return result

    def _fresh_answers(self, adapter: Path) -> list[dict[str, Any]]:
        """What `finesight predict` in a process of its own answers about the first held-out scenes."""
        folder, output = self.folders.held_out_scenes, self.folders.output / ANSWERS
        rows = [rows_file(folder, question).read_text(encoding="utf-8").splitlines() for question in NEW_QUESTIONS]
        asked = [line for of_scene in list(zip(*rows, strict=True))[: self.settings.judging.shown_scenes] for line in of_scene]
        (folder / "a_few.jsonl").write_text("".join(f"{line}\n" for line in asked), encoding="utf-8")
        arguments = ["predict", str(folder / "a_few.jsonl"), "--adapter", str(adapter), "--output", str(output), "--overwrite"]
        self._say(f"$ finesight {' '.join(arguments)}")
        with self.console.status("Waiting for the answers"):
            ran = subprocess.run([sys.executable, "-m", "finesight", *arguments], capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            raise EvaluationError(f"The fresh process could not answer (status {ran.returncode}): {ran.stderr.strip()}")
        records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        answers = [
            {
                "image": Path(record["images"][0]).name,
                "question": record["question"],
                "answer": record["answer"],
                "expected": record["expected"],
            }
            for record in records
        ]
        self.console.print(answers_table(answers))
        return answers

    def _rewarded(self, base: Path, tasks: Sequence[Task]) -> dict[str, Any]:
        """Reinforcement: figures of the new questions on held-out scenes before and after, and the curve of rewards."""
        half_taught = self._train(half_taught_recipe(base, self.folders, self.settings, seed=self.seed, dtype=self.dtype))
        recipe = rewarded_recipe(base, half_taught.weights_dir, self.folders, self.settings, seed=self.seed, dtype=self.dtype)
        new = [task for task in tasks if task.name in {question.name for question in NEW_QUESTIONS}]
        before = self._evaluate(recipe, new, "before_rewards", adapter=half_taught.weights_dir)
        begun = time.perf_counter()
        result = self._train(recipe)
        seconds = round(time.perf_counter() - begun, 1)
        after = self._evaluate(recipe, new, "after_rewards", adapter=result.weights_dir)
        changes = compare(before, after)
        lines = [line for line in result.history if "reward" in line]
        return {
            "adapter": str(result.weights_dir),
            "seconds": seconds,  # of the rollouts and updates alone
            "rewards": [{"step": line["step"], "reward": line["reward"]} for line in lines],
            "without_image": [
                line["image_ablation/reward/without_image"] for line in lines if "image_ablation/reward/without_image" in line
            ],
            "tasks": [
                {
                    "task": name,
                    "before": before.task(name).accuracy,
                    "after": after.task(name).accuracy,
                    "p_value": changes.task(name).p_value,
                }
                for name in (task.name for task in new)
            ],
        }

    def _report(self, before: EvaluationResult, after: EvaluationResult, tasks: Sequence[Task], recipe: Recipe) -> Path:
        new, old = (", ".join(question.name for question in questions) for questions in (NEW_QUESTIONS, OLD_QUESTIONS))
        return write_report(
            self.folders.output / REPORT,
            after,
            before=before,
            tasks=tasks,
            title="Finesight demo",
            recipe=dump_recipe(recipe),
            metrics=self.folders.new_run / METRICS,
            reinforcement=reinforcement_of(self.folders.rewarded_run),
            notes=[
                f"A tiny Qwen3-VL had learned: {old}. An adapter on its language model, the tower frozen, was trained on: {new}.",
                f"No scan in these held-out scenes was trained on. Seed {self.seed}.",
                f"Chance: {', '.join(f'{question.name} {question.chance:.0%}' for question in QUESTIONS)}.",
            ],
        )

    def _summary(
        self, before: EvaluationResult, after: EvaluationResult, held_out: Sequence[Scene], result: RunResult, answers: list[dict[str, Any]]
    ) -> dict[str, Any]:
        changes = compare(before, after)
        tasks = []
        for question in QUESTIONS:
            was, now, change = before.task(question.name), after.task(question.name), changes.task(question.name)
            figures = {
                "task": question.name,
                "question": question.text,
                "kind": "new" if question in NEW_QUESTIONS else "old",
                "held_out_scenes": now.num_samples,
                "chance": question.chance,
                "before": was.accuracy,
                "before_low": was.low,
                "before_high": was.high,
                "after": now.accuracy,
                "after_low": now.low,
                "after_high": now.high,
                "fixed": change.fixed,
                "broken": change.broken,
                "p_value": change.p_value,
            }
            tasks.append(figures)
        return {
            "seed": self.seed,
            "keep_old": self.keep_old,
            "tasks": tasks,
            "held_out_scenes": len(held_out),
            "scans": {"training": len(self.train_scans), "held_out": len(self.held_out_scans)},
            "parameters": {"adapter": result.parameters.trainable, "with_base": result.parameters.total},
            "stages": self.stages,
            "answers": answers,
            "adapter": str(result.weights_dir),
            "report": str(self.folders.output / REPORT),
            "machine": {"device": self.device.type, "threads": torch.get_num_threads(), "dtype": self.dtype},
            "settings": asdict(self.settings),
            "versions": {"finesight": __version__, **library_versions()},
        }

    def _conclude(self, summary: dict[str, Any], path: Path) -> None:
        self.console.print()
        self.console.print(figures_table(summary))
        self._say("Chance: one and the same answer to every scene. No scan in a held-out scene was trained on.")
        forgotten = [task["task"] for task in summary["tasks"] if task["kind"] == "old" and task["after"] < task["before"] - 0.05]
        if forgotten:
            self._say(f"Forgotten: {', '.join(forgotten)}. Training on some rows of the old kind as well keeps them.")
        self.console.print(rewards_table(summary["rewarded"]))
        self.console.print(seconds_table(summary))
        self._say(f"Adapter: {summary['adapter']}\nReport:  {summary['report']}\nFigures: {path}")
        self._say(f"Done in {duration(summary['seconds'])}.")
