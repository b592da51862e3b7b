"""The demo: every stage runs, what is shown is what was measured, and a second demo starts from what the first left.

Settings are far too small to learn anything; whether the demo reaches its bar is measured by running it.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from finesight.data.encode import Encoder
from finesight.data.formats import read_source
from finesight.data.processor import load_processor
from finesight.data_settings import DataSettings, SourceSettings
from finesight.demo import DemoResult, DemoSettings, run_demo
from finesight.demo.cache import cache_key, is_whole
from finesight.demo.model import demo_tokenizer, write_random_checkpoint
from finesight.demo.recipes import DemoFolders, new_questions_recipe, reading_recipe
from finesight.demo.scenes import NEW_QUESTIONS, OLD_QUESTIONS, QUESTIONS, compose, load_scans, rows_file, write_rows, write_scenes
from finesight.demo.view import answers_table, figures_table, scenes_view
from finesight.errors import DataError
from finesight.evaluation.results import read_result
from finesight.models.load import load_model
from finesight.recipe import ModelSettings
from finesight.recipe_files import load_recipe

SETTINGS = DemoSettings.quick()
CPU = torch.device("cpu")


class TestModel:
    def test_questions_and_answers_are_whole_words(self) -> None:
        tokenizer = demo_tokenizer()
        for question in QUESTIONS:
            assert len(tokenizer.tokenize(question.text)) == len(re.findall(r"\w+|[?.]", question.text))
        assert tokenizer.tokenize("odd") == ["odd"] and tokenizer.tokenize("47") == ["4", "7"]

    def test_any_text_survives_the_tokenizer(self) -> None:
        tokenizer = demo_tokenizer()
        text = "Größe 数字 \n\t🙂"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_the_checkpoint_loads_as_a_users_would(self, tmp_path: Path) -> None:
        folder = write_random_checkpoint(tmp_path / "model", SETTINGS.model, SETTINGS.scene, seed=0)
        loaded = load_model(ModelSettings(name_or_path=str(folder)))
        config = loaded.model.config
        assert loaded.family.model_type == "qwen3_vl"
        assert config.vision_config.deepstack_visual_indexes == [0]
        assert config.text_config.rope_parameters["mrope_interleaved"] is True
        assert sum(parameter.numel() for parameter in loaded.model.parameters()) < 500_000

    def test_a_scene_keeps_its_pixels(self, tmp_path: Path) -> None:
        processor = load_processor(write_random_checkpoint(tmp_path / "model", SETTINGS.model, SETTINGS.scene, seed=0))
        scenes = write_scenes(tmp_path, compose(load_scans(), 1, SETTINGS.scene, (0, 1)), 1)
        write_rows(tmp_path, scenes, NEW_QUESTIONS)
        source = SourceSettings(path=str(rows_file(tmp_path, NEW_QUESTIONS[0])))
        (conversation,) = read_source(source, data=DataSettings(), base_dir=tmp_path).conversations
        sample = Encoder(processor).encode(conversation)
        (item,) = sample.visual_items
        assert (item.resized_width, item.resized_height) == (64, 32)
        assert sum(count for _, count in item.runs) == 8

    def test_weights_come_from_the_seed_alone(self, tmp_path: Path) -> None:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        files = [
            (write_random_checkpoint(tmp_path / name, SETTINGS.model, SETTINGS.scene, seed) / "model.safetensors").read_bytes()
            for name, seed in (("one", 0), ("same", 0), ("other", 1))
        ]
        assert files[0] == files[1] != files[2]
        assert torch.equal(torch.get_rng_state(), before)


class TestCache:
    def test_the_key_follows_all_that_determines_the_model(self) -> None:
        def key(settings: DemoSettings = SETTINGS, seed: int = 0, dtype: str = "float32") -> str:
            return cache_key(settings, seed, CPU, dtype)

        others = {
            key(seed=1),
            key(dtype="bfloat16"),
            key(replace(SETTINGS, reading=replace(SETTINGS.reading, max_steps=3))),
            key(replace(SETTINGS, scene=replace(SETTINGS.scene, max_rotation=0.0))),
            key(replace(SETTINGS, model=replace(SETTINGS.model, num_layers=1))),
        }
        assert len(others) == 5 and key() not in others
        assert key(replace(SETTINGS, judging=replace(SETTINGS.judging, scenes=9), new=replace(SETTINGS.new, r=2))) == key()


class TestRecipes:
    def test_reading_trains_everything_and_the_adapter_the_language_model_alone(self, tmp_path: Path) -> None:
        folders = DemoFolders(tmp_path)
        reading = reading_recipe(tmp_path, tmp_path / "run", folders, SETTINGS, seed=0, dtype="float32").tuning
        assert reading.method == "full" and reading.finetune_vision_layers and reading.finetune_merger
        new = new_questions_recipe(tmp_path, folders, SETTINGS, seed=0, dtype="float32").tuning
        assert new.method == "lora" and not new.finetune_vision_layers and not new.finetune_merger

    def test_keep_old_adds_rows_of_the_old_questions(self, tmp_path: Path) -> None:
        sources = {
            keep: [Path(s.path).stem for s in new_questions_recipe(
                tmp_path, DemoFolders(tmp_path), SETTINGS, seed=0, dtype="float32", keep_old=keep
            ).data.train]
            for keep in (False, True)
        }  # fmt: skip
        assert len(sources[False]) == len(NEW_QUESTIONS)
        assert len(sources[True]) == len(QUESTIONS) and set(sources[False]) < set(sources[True])


class TestView:
    def test_as_many_scenes_as_fit(self) -> None:
        images = [scene.image for scene in compose(load_scans(), 4, SETTINGS.scene, (0, 1))]
        for width, scenes in ((20, 1), (70, 2), (100, 3), (400, 3)):
            lines = scenes_view(images, width).plain.split("\n")
            assert len(lines) == 8 and {len(line) for line in lines} == {32 * scenes + 2 * (scenes - 1)}
            assert any("█" in line for line in lines)

    def test_answers_that_look_like_markup_are_shown_as_they_are(self) -> None:
        answer = {"image": "00000.png", "question": "Read the number.", "answer": "[/b]", "expected": "47"}
        console = Console(width=80)
        with console.capture() as shown:
            console.print(answers_table([answer]))
        assert "[/b]" in shown.get() and "00000.png" in shown.get()


class Ran:
    """Two demos in one folder: the first cold, the second with what the first left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.threads = torch.get_num_threads()
        self.first, self.first_text = self._run()
        self.second, self.second_text = self._run()

    def _run(self) -> tuple[DemoResult, str]:
        console = Console(record=True, width=120, force_terminal=False, file=io.StringIO())
        result = run_demo(self.folder, seed=5, settings=SETTINGS, console=console)
        return result, console.export_text()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("demo") / "out")


@pytest.fixture
def summary(ran: Ran) -> dict[str, Any]:
    return json.loads((ran.folder / "summary.json").read_text())


class TestRun:
    def test_the_summary_is_on_the_disk(self, ran: Ran, summary: dict[str, Any]) -> None:
        assert summary == ran.second.summary
        assert summary["seed"] == 5 and summary["held_out_scenes"] == SETTINGS.judging.scenes
        assert [stage["seconds"] >= 0 for stage in summary["stages"]] == [True] * 7
        assert Path(summary["adapter"]) == ran.second.adapter_dir and (ran.second.adapter_dir / "adapter_model.safetensors").is_file()

    def test_what_is_printed_names_stages_in_words(self, ran: Ran) -> None:
        assert "after reinforcement" in ran.second_text and "after_rewards" not in ran.second_text

    def test_figures_are_those_measured(self, ran: Ran, summary: dict[str, Any]) -> None:
        before, after = read_result(ran.folder / "before"), read_result(ran.folder / "after")
        assert {task["task"]: task["kind"] for task in summary["tasks"]} == {
            **{question.name: "new" for question in NEW_QUESTIONS},
            **{question.name: "old" for question in OLD_QUESTIONS},
        }
        for task in summary["tasks"]:
            assert task["before"] == before.task(task["task"]).accuracy
            assert task["after"] == after.task(task["task"]).accuracy
            assert task["held_out_scenes"] == after.task(task["task"]).num_samples == SETTINGS.judging.scenes

    def test_rewards_go_on_from_an_adapter_taught_by_half(self, ran: Ran, summary: dict[str, Any]) -> None:
        before, after = (read_result(ran.folder / label) for label in ("before_rewards", "after_rewards"))
        rewarded = summary["rewarded"]
        assert [task["task"] for task in rewarded["tasks"]] == [question.name for question in NEW_QUESTIONS]
        for task in rewarded["tasks"]:
            assert (task["before"], task["after"]) == (before.task(task["task"]).accuracy, after.task(task["task"]).accuracy)
        recipe = load_recipe(ran.folder / "rewarded" / "recipe.yaml")
        assert recipe.model.adapter == str(ran.folder / "half_taught" / "adapter") and recipe.grpo is not None
        assert rewarded["rewards"] and len(list((ran.folder / "rewarded" / "completions").iterdir())) == SETTINGS.rewarded.max_steps

    def test_the_table_printed_is_that_of_the_summary(self, ran: Ran, summary: dict[str, Any]) -> None:
        console = Console(width=120)
        with console.capture() as shown:
            console.print(figures_table(summary))
        assert shown.get().strip() in ran.second_text
        for line in (summary["adapter"], summary["report"], "summary.json"):
            assert line in ran.second_text

    def test_no_scan_is_trained_on_and_judged(self, ran: Ran) -> None:
        shown = {
            name: {scan for file in (ran.folder / "scenes" / name).glob("*.jsonl") for line in file.open() for scan in json.loads(line)["scans"]}
            for name in ("reading", "new", "held_out")
        }  # fmt: skip
        assert all(shown.values())
        assert not (shown["reading"] | shown["new"]) & shown["held_out"]

    def test_the_second_demo_starts_from_the_model_of_the_first(self, ran: Ran) -> None:
        cached = [result.summary["stages"][0]["cached"] for result in (ran.first, ran.second)]
        assert cached == [False, True]
        assert "Kept from an earlier demo" in ran.second_text and "Kept from an earlier demo" not in ran.first_text
        (model,) = (ran.folder / "cache").glob("*/model")
        assert is_whole(model)

    def test_a_seed_gives_the_same_figures_again(self, ran: Ran) -> None:
        assert ran.first.summary["tasks"] == ran.second.summary["tasks"]
        assert ran.first.summary["answers"] == ran.second.summary["answers"]

    def test_a_fresh_process_answered(self, ran: Ran, summary: dict[str, Any]) -> None:
        assert len(summary["answers"]) == SETTINGS.judging.shown_scenes * len(NEW_QUESTIONS)
        after = {(r.prompt, r.row): r.answer for r in read_result(ran.folder / "after").records}
        for place, answer in enumerate(summary["answers"]):
            assert answer["answer"] == after[(answer["question"], place // len(NEW_QUESTIONS))]

    def test_the_report_is_one_offline_file(self, ran: Ran) -> None:
        page = ran.second.report.read_text()
        assert all(question.name in page for question in QUESTIONS)
        assert "data:image/png;base64," in page and not re.search(r'(?:src|href)="https?:', page)

    def test_the_recipe_of_the_run_can_be_used_again(self, ran: Ran) -> None:
        recipe = load_recipe(ran.folder / "new_questions" / "recipe.yaml")
        assert [task.name for task in recipe.evaluation.tasks] == [question.name for question in QUESTIONS]

    def test_threads_are_put_back(self, ran: Ran, summary: dict[str, Any]) -> None:
        assert summary["machine"]["threads"] == 1 and torch.get_num_threads() == ran.threads

    def test_a_damaged_model_is_not_used(self, ran: Ran, tmp_path: Path) -> None:
        (model,) = (ran.folder / "cache").glob("*/model")
        copy = tmp_path / "model"
        copy.mkdir()
        for file in model.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        assert is_whole(copy)
        (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-1])
        assert not is_whole(copy) and not is_whole(tmp_path / "nothing")


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        run_demo(tmp_path / "file", settings=SETTINGS, console=Console(quiet=True))
