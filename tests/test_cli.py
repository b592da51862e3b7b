"""The command, end to end on tiny checkpoints: init -> check -> train --dry-run -> train -> eval -> predict."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from rich.console import Console

from finesight import __version__
from finesight.cli import main
from finesight.cli.weights import find_weights
from finesight.recipe_files import load_recipe
from tiny import tiny_checkpoint


@dataclass(frozen=True)
class Ran:
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls the command in this process: `run("check", "recipe.yaml")`."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("FINESIGHT_DEBUG", raising=False)

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        status = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as done:
            status = int(done.code or 0)
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen3_vl")


def write_charts(folder: Path, count: int = 8) -> Path:
    """Drawn images with two questions each, as OpenAI-style messages; returns the data file."""
    (folder / "images").mkdir(parents=True)
    draw_from = random.Random(0)
    rows = []
    for number in range(count):
        image = Image.new("RGB", (96 + 32 * (number % 3), 96), tuple(draw_from.randrange(256) for _ in range(3)))
        ImageDraw.Draw(image).text((20, 20), str(number))
        image.save(folder / "images" / f"{number}.png")
        for question, answer in (("What number?", str(number)), ("Is it even?", "no" if number % 2 else "yes")):
            user = [{"type": "image", "image": f"images/{number}.png"}, {"type": "text", "text": question}]
            rows.append({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]})
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, run: Run) -> Path:
    """A folder with data and a recipe written by `finesight init`, which the test stands in."""
    monkeypatch.chdir(tmp_path)
    write_charts(tmp_path / "data")
    assert run("init", "--model", checkpoint, "--data", "data/train.jsonl", "--eval-split", "25%", "--output-dir", "runs/a").status == 0
    return tmp_path


def answers(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestInit:
    def test_the_recipe_reads_back_as_the_choices_and_the_defaults(self, work: Path, checkpoint: Path) -> None:
        recipe = load_recipe("recipe.yaml")
        assert recipe.model.name_or_path == str(checkpoint)
        assert [source.path for source in recipe.data.train] == ["data/train.jsonl"]
        assert (recipe.data.eval_split, recipe.training.eval_strategy) == ("25%", "epoch")
        assert recipe.evaluation.tasks[0].data == "eval_split"

    def test_every_setting_is_there_with_its_explanation(self, work: Path) -> None:
        text = Path("recipe.yaml").read_text(encoding="utf-8")
        assert "  # bias: none" in text and "One of: none, all, lora_only." in text
        assert all("  # " in line for line in text.splitlines() if line.startswith("  ") and ":" in line)

    def test_uncommenting_everything_still_parses(self, work: Path) -> None:
        text = Path("recipe.yaml").read_text(encoding="utf-8")
        body = text[text.index("model:") :]
        Path("all.yaml").write_text(_uncommented(body), encoding="utf-8")
        assert load_recipe("all.yaml") == load_recipe("recipe.yaml")

    def test_nothing_is_overwritten(self, work: Path, run: Run) -> None:
        before = Path("recipe.yaml").read_bytes()
        ran = run("init")
        assert (ran.status, Path("recipe.yaml").read_bytes()) == (2, before)
        assert "exists and is not overwritten" in ran.err

    def test_columns_of_a_table(self, work: Path, run: Run) -> None:
        options = ("--column", "image=picture", "--column", "answer=label", "--prompt", "{query} Briefly.", "-o", "table.yaml")
        assert run("init", *options).status == 0
        source = load_recipe("table.yaml").data.train[0]
        assert source.columns is not None and source.columns.image == "picture" and source.prompt == "{query} Briefly."

    @pytest.mark.parametrize(("column", "word"), [("picture", "role=name"), ("imagee=x", "did you mean 'image'")])
    def test_wrong_columns_are_refused(self, work: Path, run: Run, column: str, word: str) -> None:
        ran = run("init", "--column", column, "-o", "other.yaml")
        assert ran.status == 2 and word in ran.err and not Path("other.yaml").exists()

    def test_graders_are_known_or_the_users_own(self, work: Path, run: Run) -> None:
        ran = run("init", "--grader", "exact_mach", "-o", "other.yaml")
        assert ran.status == 2 and "Did you mean 'exact_match'" in ran.err and not Path("other.yaml").exists()
        assert run("init", "--grader", "mine.py:not_written_yet", "-o", "other.yaml").status == 0

    def test_full_tuning_without_hold_out(self, work: Path, run: Run) -> None:
        assert run("init", "--method", "full", "--eval-split", "none", "-o", "deep/full.yaml").status == 0
        recipe = load_recipe("deep/full.yaml")
        assert recipe.tuning.method == "full" and recipe.data.eval_split is None and not recipe.evaluation.tasks


def _uncommented(text: str) -> str:
    """Settings behind a # as they stand; explanations stay comments."""
    lines = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        rest = line.lstrip()
        # `columns` and other sections that are null stay so; a comment of more than a setting's form is none.
        lines.append(indent + rest.removeprefix("# ") if indent and rest.startswith("# ") else line)
    return "\n".join(lines) + "\n"


class TestCheck:
    def test_a_good_recipe(self, work: Path, run: Run) -> None:
        ran = run("check", "recipe.yaml")
        assert ran.status == 0, ran.err
        assert "12 of 12 rows can be used, 4 are held out" in ran.out
        assert "tokens of a sample" in ran.out

    def test_data_alone_needs_no_model(self, work: Path, run: Run) -> None:
        ran = run("check", "data/train.jsonl")
        assert ran.status == 0, ran.err
        assert "16 of 16 rows" in ran.out and "tokens of a sample" not in ran.out

    def test_bad_rows_are_named_and_the_exit_status_is_1(self, work: Path, run: Run) -> None:
        Path("data/images/3.png").unlink()
        with Path("data/train.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"messages": [{"role": "user", "content": "no answer"}]}\n')
        ran = run("check", "recipe.yaml")
        assert ran.status == 1
        assert "data/train.jsonl, row 6" in ran.out and "data/train.jsonl, row 16" in ran.out
        assert "does not exist" in ran.out and "no answer" in ran.out

    def test_json(self, work: Path, run: Run) -> None:
        Path("data/images/3.png").write_bytes(b"no image")
        ran = run("check", "recipe.yaml", "--json")
        report = json.loads(ran.out)
        assert ran.status == 1
        assert report["rows"]["usable"] == 10 and report["can_train"] is False
        assert {row["row"] for group in report["rows"]["bad"] for row in group["rows"]} == {6, 7}

    def test_the_cost_of_reinforcement(self, work: Path, run: Run) -> None:
        settings = ("grpo={num_generations: 4}", "rewards=[exact_match]", "training.train_batch_size=8", "training.max_steps=10")
        table = run("check", "recipe.yaml", *settings)
        assert table.status == 0 and "The run: 10 steps (6 an epoch)" in table.out and "completions (4 of a prompt)" in table.out
        cost = json.loads(run("check", "recipe.yaml", *settings, "--json").out)["group_cost"]
        assert (cost["prompts"], cost["completions"], cost["most_completion_tokens"]) == (20, 80, 80 * 256)

    def test_too_long_samples_are_listed_with_their_tokens(self, work: Path, run: Run) -> None:
        ran = run("check", "recipe.yaml", "data.max_length_tokens=90")
        assert ran.status == 1
        assert "longer than 90 tokens" in ran.out

    @pytest.mark.parametrize(
        ("reward", "reason"),
        [
            ("none.py:f", "no file none.py, neither beside the recipe nor in /"),
            ("/none.py:f", "no file /none.py."),
            ("own.py:needs", "takes 'difficulty', which is no column of the rows"),
            ("box_f1", "data/train.jsonl, row 0"),
            ("exact_mach", "Did you mean 'exact_match'"),
        ],
    )
    def test_rewards_that_training_would_refuse(self, work: Path, run: Run, reward: str, reason: str) -> None:
        Path("own.py").write_text("def needs(completions, difficulty):\n    return difficulty\n", encoding="utf-8")
        assert run("check", "recipe.yaml", "grpo={}", "rewards=[exact_match]").status == 0
        ran = run("check", "recipe.yaml", "grpo={}", f"rewards=[{reward}]")
        assert ran.status == 2 and reason in ran.err

    def test_functions_beside_a_recipe_in_another_folder(self, work: Path, run: Run) -> None:
        """Its own folder first, then the present one; what it names by data stays as it is."""
        Path("kept").mkdir()
        Path("recipe.yaml").rename("kept/recipe.yaml")
        for folder, column in (("kept", "beside"), (".", "here")):
            Path(folder, "own.py").write_text(f"def reward(completions, {column}):\n    return []\n", encoding="utf-8")
        Path("only_here.py").write_text("def reward(completions, here):\n    return []\n", encoding="utf-8")
        Path("kept/grade.py").write_text("def grade(answer, conversation):\n    return 1.0\n", encoding="utf-8")
        task = "evaluation.tasks=[{name: t, data: data/train.jsonl, grader: grade.py:grade}]"
        for reward, column in (("own.py", "beside"), ("own.py:reward", "beside"), ("only_here.py", "here")):
            ran = run("check", "kept/recipe.yaml", "grpo={}", f"rewards=[{reward}]", task)
            assert ran.status == 2 and f"takes '{column}', which is no column" in ran.err
        assert run("check", "kept/recipe.yaml", "grpo={}", "rewards=[exact_match]", task).status == 0

    def test_a_reward_function_that_fails_is_warned_of(self, work: Path, run: Run) -> None:
        Path("own.py").write_text(
            "def brief(completions, **columns):\n    print('called')\n    return [1.0 for c in completions if c[0]['content']]\n\n"
            "def broken(completions, **columns):\n    return [len(c['content']) for c in completions]\n\n"
            "async def bare(completions):\n    return 1.0\n",
            encoding="utf-8",
        )
        ran = run("check", "recipe.yaml", "grpo={}", "rewards=[own.py:brief,own.py:broken,own.py:bare,exact_match]", "--json")
        assert ran.status == 0 and json.loads(ran.out) and ran.err.count("called") == 1 and ran.err.count("WARNING") == 2
        assert (
            "own.py:broken fails" in ran.err and "TypeError: list indices must be integers" in ran.err and "(line 6 of own.py)" in ran.err
        )
        assert "own.py:bare fails" in ran.err and "it gave 1.0 for 1 completion; it must give a list" in ran.err

    def test_missing_data(self, work: Path, run: Run) -> None:
        ran = run("check", "data/none.jsonl")
        assert ran.status == 2 and "data/none.jsonl does not exist" in ran.err


class TestErrors:
    def test_a_misspelt_setting(self, work: Path, run: Run) -> None:
        ran = run("train", "recipe.yaml", "training.learning_rte=1")
        assert ran.status == 2
        assert "did you mean 'learning_rate'" in ran.err and "Traceback" not in ran.err

    def test_a_traceback_on_request(self, work: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        from finesight.errors import RecipeError

        monkeypatch.setenv("FINESIGHT_DEBUG", "1")
        with pytest.raises(RecipeError):
            main(["train", "none.yaml"])

    def test_a_model_that_is_not_there(self, work: Path, run: Run) -> None:
        ran = run("train", "recipe.yaml", "model.name_or_path=./nowhere")
        assert ran.status == 2 and "nowhere" in ran.err

    def test_an_unknown_command(self, run: Run) -> None:
        assert run("trian").status == 2

    def test_a_grader_that_does_not_exist(self, work: Path, run: Run) -> None:
        ran = run("eval", "recipe.yaml", "evaluation.tasks.0.grader=exact_mach", "--base-only")
        assert ran.status == 2 and "exact_match" in ran.err

    def test_images_without_a_question(self, work: Path, run: Run, checkpoint: Path) -> None:
        ran = run("predict", "data/images", "--model", checkpoint)
        assert ran.status == 2 and "--question" in ran.err

    def test_predict_in_fewer_bits(self, work: Path, run: Run, checkpoint: Path) -> None:
        common = ("predict", "data/images/0.png", "-q", "What number?", "--model", checkpoint, "--max-completion-length", "2")
        assert run(*common, "--load-in-4bit", "--quantize-vocabulary", "--quantize-tower").status == 0
        ran = run(*common, "--load-in-4bit", "--load-in-8bit")
        assert ran.status == 2 and "--load-in-4bit and --load-in-8bit cannot be set together" in " ".join(ran.err.split())
        ran = run(*common, "--quantize-tower")
        assert ran.status == 2 and "--quantize-tower need --load-in-4bit, --load-in-8bit or --load-in-fp8" in " ".join(ran.err.split())

    def test_predict_without_a_model(self, work: Path, run: Run) -> None:
        ran = run("predict", "data/images", "-q", "?")
        assert ran.status == 2 and "--model" in ran.err


class TestDryRun:
    def test_shows_recipe_statistics_and_samples_and_trains_nothing(self, work: Path, run: Run) -> None:
        ran = run("train", "recipe.yaml", "--dry-run", "tuning.r=4")
        assert ran.status == 0, ran.err
        assert "r: 4" in ran.out and "lr_scheduler_type: cosine" in ran.out
        assert "12 samples to train on, 4 held out" in ran.out
        assert "<image 8x8>" in ran.out and "<|image_pad|>" not in ran.out
        assert "data/train.jsonl, row 0" in ran.out
        assert not Path("runs").exists()

    def test_loads_no_torch(self, work: Path) -> None:
        """In a fresh process, since this one has long imported torch."""
        code = "import sys\nfrom finesight.cli import main\ntry:\n    main(['train', 'recipe.yaml', '--dry-run'])\nexcept SystemExit as done:\n"
        code += "    assert not done.code\nprint(*sorted({'torch', 'peft', 'accelerate'} & set(sys.modules)), file=sys.stderr)"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ran.returncode == 0 and ran.stderr.strip() == "", ran.stderr

    def test_trained_tokens_are_coloured_and_no_others(self, work: Path, checkpoint: Path) -> None:
        from finesight.cli.preview import TRAINED_STYLE, sample_text
        from finesight.training.prepare import prepare

        prepared = prepare(load_recipe("recipe.yaml"))
        text = sample_text(prepared.samples[0], prepared.processor.tokenizer, prepared.processor.layout)
        coloured = [text.plain[span.start : span.end] for span in text.spans if span.style == TRAINED_STYLE]
        answer = prepared.conversations[0].answer
        assert coloured == [f"{answer}<|im_end|>"]
        console = Console(force_terminal=True, color_system="standard", width=100)
        with console.capture() as captured:
            console.print(text)
        assert f"\x1b[1;32m{answer}" in captured.get()


class TestWholePath:
    def test_train_eval_predict(self, work: Path, run: Run) -> None:
        trained = run("train", "recipe.yaml", "training.num_train_epochs=2", "training.learning_rate=1e-2", "tuning.r=4")
        assert trained.status == 0, trained.err
        assert "finesight eval recipe.yaml" in trained.out
        adapter = Path("runs/a/adapter")
        assert (adapter / "adapter_model.safetensors").is_file()
        assert load_recipe("runs/a/recipe.yaml").tuning.r == 4

        judged = run("eval", "recipe.yaml", "evaluation.max_completion_length=4", "evaluation.text_probe=null")
        assert judged.status == 0, judged.err
        assert "held out" in judged.out
        for side in ("before", "after"):
            assert len(answers(Path("runs/a/eval") / side / "records.jsonl")) == 4
        assert "<html" in Path("runs/a/eval/report.html").read_text(encoding="utf-8")

        again = run(
            "eval",
            "recipe.yaml",
            "evaluation.max_completion_length=4",
            "evaluation.text_probe=null",
            "--before",
            "runs/a/eval/before",
            "-o",
            "second",
        )
        assert again.status == 0, again.err
        assert not Path("second/before").exists() and Path("second/report.html").is_file()

        predicted = run(
            "predict", "data/images", "--adapter", "runs/a", "-q", "What number?", "-o", "out/a.jsonl", "--max-completion-length", "4"
        )
        assert predicted.status == 0, predicted.err
        assert [Path(record["images"][0]).name for record in answers(Path("out/a.jsonl"))] == [f"{number}.png" for number in range(8)]

    def test_predict_rows_to_stdout(self, work: Path, run: Run, checkpoint: Path) -> None:
        ran = run("predict", "data/train.jsonl", "--model", checkpoint, "--max-completion-length", "2", "--max-pixels", "65536")
        assert ran.status == 0, ran.err
        records = [json.loads(line) for line in ran.out.splitlines()]
        assert len(records) == 16
        assert records[1] == records[1] | {"row": 1, "question": "Is it even?", "expected": "yes"}
        assert all(record["num_tokens"] <= 2 for record in records)

    def test_an_image_and_bad_rows(self, work: Path, run: Run, checkpoint: Path) -> None:
        Path("data/images/3.png").unlink()
        common = ("--model", checkpoint, "--max-completion-length", "1")
        assert run("predict", "data/train.jsonl", *common).status == 2
        ran = run("predict", "data/images/0.png", "data/train.jsonl", *common, "-q", "?", "--on-bad-row", "skip")
        assert ran.status == 0, ran.err
        assert len(ran.out.splitlines()) == 1 + 14

    def test_a_second_run_in_the_same_folder_is_refused_and_resume_goes_on(self, work: Path, run: Run) -> None:
        settings = (
            "training.max_steps=2",
            "training.save_strategy=steps",
            "training.save_steps=1",
            "tuning.r=2",
            "training.eval_strategy=no",
        )
        assert run("train", "recipe.yaml", *settings).status == 0
        refused = run("train", "recipe.yaml", *settings)
        assert refused.status == 2 and "--resume (training.resume: true)" in refused.err
        resumed = run("train", "recipe.yaml", *settings, "--resume")
        assert resumed.status == 0, resumed.err

    def test_full_tuning(self, work: Path, run: Run) -> None:
        settings = ("tuning.method=full", "training.max_steps=1", "training.eval_strategy=no", "training.output_dir=runs/full")
        assert run("train", "recipe.yaml", *settings).status == 0
        ran = run("predict", "data/images/0.png", "--adapter", "runs/full", "-q", "What number?", "--max-completion-length", "1")
        assert ran.status == 0, ran.err
        assert json.loads(ran.out)["question"] == "What number?"
        judged = run("eval", "recipe.yaml", *settings, "evaluation.max_completion_length=1", "evaluation.text_probe=null")
        assert judged.status == 0, judged.err
        assert "runs/full/model" in Path("runs/full/eval/report.html").read_text(encoding="utf-8")

    def test_predict_sees_what_was_trained_on(self, work: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
        """System prompt, pixel limits and the bits of the base come from the adapter; what is given anew is warned about."""
        settings = ("data.train.0.system=Be brief.", "data.min_pixels=4096", "data.max_pixels=8192", "training.max_steps=1")
        settings = (*settings, "model.load_in_8bit=true")
        assert run("train", "recipe.yaml", *settings, "training.eval_strategy=no").status == 0
        common = ("predict", "data/images/0.png", "--adapter", "runs/a", "-q", "What number?", "--max-completion-length", "1")
        ran = run(*common)
        assert ran.status == 0, ran.err
        assert json.loads(ran.out)["question"] == "system: Be brief.\nuser: What number?"
        assert "The base is loaded in 8bit, as runs/a/adapter was trained over" in caplog.text and "GiB 8-bit" in caplog.text
        caplog.clear()
        assert run(*common, "--unquantized").status == 0
        assert "GiB 8-bit" not in caplog.text and "the base is loaded otherwise now" in caplog.text
        assert json.loads(run(*common, "--system", "Be kind.").out)["question"].startswith("system: Be kind.")
        checked = run("check", "recipe.yaml", "model.adapter=runs/a/adapter", "--json")  # to go on from it
        assert json.loads(checked.out)["tokens"]["visual"]["max"] <= 8  # of 32 x 32 pixels
        warned = run(*common, "--max-pixels", "16384")
        assert warned.status == 0 and "trained with 8192" in caplog.text

    def test_eval_before_there_is_a_run(self, work: Path, run: Run) -> None:
        settings = ("evaluation.max_completion_length=1", "evaluation.text_probe=null")
        refused = run("eval", "recipe.yaml", *settings)
        assert refused.status == 2 and "runs/a (training.output_dir) does not exist" in refused.err and "--base-only" in refused.err
        assert not Path("runs").exists()
        assert run("eval", "recipe.yaml", *settings, "--adapter", "runs/none").status == 2
        Path("runs/a").mkdir(parents=True)
        assert "holds no trained weights yet" in run("eval", "recipe.yaml", *settings).err
        ran = run("eval", "recipe.yaml", *settings, "--base-only", "-o", "base")
        assert ran.status == 0, ran.err
        assert Path("base/report.html").is_file()

    def test_a_stopped_run_is_judged_and_answers_by_its_newest_checkpoint(
        self, work: Path, run: Run, caplog: pytest.LogCaptureFixture
    ) -> None:
        saves = ("training.max_steps=2", "training.save_strategy=steps", "training.save_steps=1", "training.eval_strategy=no")
        assert run("train", "recipe.yaml", *saves, "training.save_total_limit=2", "tuning.r=2").status == 0
        shutil.rmtree("runs/a/adapter")
        (Path("runs/a/checkpoint-2") / "manifest.json").unlink()
        ran = run("predict", "data/images/0.png", "-q", "?", "--adapter", "runs/a", "--max-completion-length", "1")
        assert ran.status == 0, ran.err
        assert "runs/a/checkpoint-1/adapter" in caplog.text
        # Results go to the run that was judged, not to the one of the recipe.
        settings = ("evaluation.max_completion_length=1", "evaluation.text_probe=null", "training.output_dir=runs/other")
        judged = run("eval", "recipe.yaml", *settings, "--adapter", "runs/a", "--skip-before")
        assert judged.status == 0, judged.err
        assert Path("runs/a/eval/report.html").is_file() and not Path("runs/other").exists()

    def test_weights_of_a_run_that_went_on_are_not_hidden_by_the_finished_ones(
        self, work: Path, run: Run, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A finished run without checkpoints, then one that was stopped in the same folder."""
        settings = ("training.max_steps=2", "tuning.r=2", "training.eval_strategy=no")
        assert run("train", "recipe.yaml", *settings, "training.save_strategy=no").status == 0
        assert find_weights(Path("runs/a")) == Path("runs/a/adapter")
        shutil.copytree("runs/a/adapter", "finished")
        saves = ("training.save_strategy=steps", "training.save_steps=1", "training.save_total_limit=2")
        assert run("train", "recipe.yaml", *settings, *saves, "--resume").status == 0
        assert find_weights(Path("runs/a")) == Path("runs/a/adapter") and not caplog.records  # written after its checkpoints
        # Stopped before its end, it would have left the adapter of the run before.
        shutil.rmtree("runs/a/adapter")
        shutil.copytree("finished", "runs/a/adapter")  # times of files say nothing now
        ran = run("predict", "data/images/0.png", "-q", "?", "--adapter", "runs/a", "--max-completion-length", "1")
        assert ran.status == 0, ran.err
        assert "checkpoint-2/adapter of its newest checkpoint is used. It is newer than runs/a/adapter" in caplog.text
        assert "with runs/a/checkpoint-2/adapter" in ran.err
        ran = run("predict", "data/images/0.png", "-q", "?", "--adapter", "runs/a/adapter", "--max-completion-length", "1")
        assert ran.status == 0 and "with runs/a/adapter" in ran.err


class TestPredictWithDamagedImages:
    @pytest.fixture
    def common(self, work: Path, checkpoint: Path) -> tuple[object, ...]:
        path = Path("data/images/3.png")
        path.write_bytes(path.read_bytes()[:-40])  # the header is whole, the pixels are not
        return ("predict", "data/images", "-q", "?", "--model", checkpoint, "--max-completion-length", "1", "-o", "a.jsonl")

    def test_an_error_keeps_what_was_answered_and_what_was_there(self, run: Run, common: tuple[object, ...]) -> None:
        Path("a.jsonl").write_text("earlier\n", encoding="utf-8")
        ran = run(*common, "--overwrite")
        assert ran.status == 2
        assert "data/images, row 3" in ran.err and "3.png cannot be decoded" in ran.err and "add --on-bad-row skip" in ran.err
        assert "3 answers so far: a.jsonl.partial" in ran.err
        assert len(answers(Path("a.jsonl.partial"))) == 3
        assert Path("a.jsonl").read_text(encoding="utf-8") == "earlier\n"

    def test_skip_leaves_it_out_and_says_so(self, run: Run, common: tuple[object, ...]) -> None:
        Path("a.jsonl").write_text("earlier\n", encoding="utf-8")
        ran = run(*common, "--on-bad-row", "skip", "--overwrite")
        assert ran.status == 0, ran.err
        assert "Left out 1 of 8 rows" in ran.err and "data/images, row 3" in ran.err and "a.jsonl was there and is replaced" in ran.err
        assert [Path(record["images"][0]).stem for record in answers(Path("a.jsonl"))] == ["0", "1", "2", "4", "5", "6", "7"]
        assert not Path("a.jsonl.partial").exists()

    def test_nothing_is_left_behind_when_nothing_was_answered(self, run: Run, common: tuple[object, ...]) -> None:
        ran = run(*common, "data/none.png")
        assert ran.status == 2 and not list(Path().glob("a.jsonl*"))
        for path in Path("data/images").iterdir():
            path.write_bytes(path.read_bytes()[:-40])
        assert run(*common).status == 2 and not list(Path().glob("a.jsonl*"))
        ran = run(*common, "--on-bad-row", "skip")
        assert ran.status == 2 and "None of the rows can be used" in ran.err and not list(Path().glob("a.jsonl*"))

    def test_messages_name_options(self) -> None:
        from finesight.cli.flags import in_flags

        text = "x lies at /m/x, outside; add /m to data.allowed_dirs, or set the source.media_dir to it"
        assert in_flags(text) == "x lies at /m/x, outside; give --media-dir /m"
        assert in_flags("Correct them, or set data.on_bad_row: skip to go on") == "Correct them, or add --on-bad-row skip to go on"
        assert in_flags("Set model.adapter to it and model.name_or_path to its base") == "Give it with --adapter, and its base with --model"


class TestOthers:
    def test_images_of_a_folder_come_in_natural_order(self, work: Path) -> None:
        from finesight.cli.predict import read_inputs
        from finesight.data_settings import DataSettings, SourceSettings

        Path("data/images/0.png").rename("data/images/10.png")
        read = read_inputs(["data/images"], "?", data=DataSettings(), source=SourceSettings(path="-"), console=Console(quiet=True))
        assert [Path(c.media[0].media.path).stem for c in read] == ["1", "2", "3", "4", "5", "6", "7", "10"]  # type: ignore[union-attr]

    def test_version(self, run: Run) -> None:
        ran = run("version")
        assert ran.status == 0
        for name in ("torch", "transformers", "peft", "device"):
            assert name in ran.out
        assert __version__ in ran.out

    def test_graders(self, run: Run) -> None:
        ran = run("eval", "--graders")
        assert ran.status == 0 and "relaxed_accuracy" in ran.out

    @pytest.mark.parametrize("command", ["init", "check", "train", "eval", "predict", "demo", "version"])
    def test_every_command_has_help(self, run: Run, command: str) -> None:
        ran = run(command, "--help")
        assert ran.status == 0 and len(ran.out) > 100

    @pytest.mark.parametrize("command", ["predict", "chat", "serve"])
    def test_names_of_options_are_whole_at_80_columns(self, run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        help_text = run(command, "--help").out
        assert "--max-completion-length" in help_text and "\u2026 " not in help_text

    def test_python_dash_m(self) -> None:
        import subprocess
        import sys

        result = subprocess.run([sys.executable, "-m", "finesight", "--help"], capture_output=True, text=True)
        assert result.returncode == 0 and "predict" in result.stdout


class TestExampleData:
    """The folders of example data that users bring, with a tiny model: check, train and predict."""

    @pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
    def test_charts_whose_paths_need_a_root(
        self, example_data: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        model, folder = tiny_checkpoint("model", family), example_data / "qwen_finetune_demo"
        bare = run("check", folder / "single_images.json")
        assert bare.status == 1
        assert f"data.train.0.media_dir: {folder} would make it resolve" in " ".join(bare.out.split())
        root = ("--media-dir", folder)
        assert run("init", "--model", model, "--data", folder / "single_images.json", "--eval-split", "last 1", *root).status == 0
        assert run("check", "recipe.yaml").status == 0
        assert run("train", "recipe.yaml", "--dry-run").status == 0
        assert run("train", "recipe.yaml", "training.max_steps=1").status == 0
        predicted = run("predict", folder / "single_images.json", "--adapter", "runs/first", *root, "--max-completion-length", "2")
        assert predicted.status == 0, predicted.err
        records = [json.loads(line) for line in predicted.out.splitlines()]
        assert [record["expected"] for record in records] == ["Yes", "6", "2014"]

    def test_a_video_that_is_missing(
        self, example_data: Path, run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        folder = example_data / "qwen_finetune_demo"
        settings = (f"data.train.0.media_dir={folder}/videos", "data.max_frames=4", "data.video_max_pixels=65536")
        ran = run("check", folder / "video.json", *settings, "--model", checkpoint)
        assert ran.status == 1
        assert "v_7bUu05RIksU.mp4" in ran.out and "2 of 3 rows can be used" in ran.out
        assert run("init", "--model", checkpoint, "--data", folder / "video.json", "--eval-split", "none").status == 0
        refused = run("train", "recipe.yaml", *settings)
        assert refused.status == 2 and "row 0" in refused.err
        trained = run("train", "recipe.yaml", *settings, "data.on_bad_row=skip", "training.max_steps=1")
        assert trained.status == 0, trained.err
        assert "v_7bUu05RIksU.mp4" in Path("runs/first/bad_rows.jsonl").read_text(encoding="utf-8")

    def test_llamafactory(self, example_data: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        model, folder = tiny_checkpoint("model", "qwen2_5_vl"), example_data / "llamafactory_demo"
        unnamed = run("check", folder)
        assert unnamed.status == 2 and "mllm_demo" in unnamed.err
        assert run("init", "--model", model, "--data", folder, "--eval-split", "none").status == 0
        for entry, rows in (("mllm_demo", 6), ("mllm_video_demo", 3)):
            named = ("data.train.0.name=" + entry, "data.max_frames=4", f"training.output_dir=runs/{entry}")
            ran = run("check", "recipe.yaml", *named)
            assert ran.status == 0, ran.out
            assert f"{rows} of {rows} rows can be used" in ran.out
            trained = run("train", "recipe.yaml", *named, "training.max_steps=1")
            assert trained.status == 0, trained.err
        lines = folder / "v1_multimodal_demo.jsonl"
        predicted = run(
            "predict", lines, "--media-dir", folder, "--adapter", "runs/mllm_demo", "--max-completion-length", "1", "--on-bad-row", "skip"
        )
        assert predicted.status == 0, predicted.err
        assert len(predicted.out.splitlines()) == 24


def test_check_names_an_image_that_is_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])  # its header is all there
    rows = [
        {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "noise"}], "images": [name]}
        for name in ("whole.png", "cut.png")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["check", str(tmp_path / "rows.jsonl")])
    shown = capsys.readouterr().out
    assert "cut.png" in shown and "truncated" in shown and "whole.png" not in shown
