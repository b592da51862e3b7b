"""Runs of reinforcement: from prompts to an adapter, exactly and in the open."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import pytest
import torch
from pyarrow import parquet
from rich.console import Console

from finesight.cli import main
from finesight.data.blank import blanked
from finesight.data.pixels import visual_patches
from finesight.errors import EvaluationError, RecipeError
from finesight.planner.fit import with_settings
from finesight.recipe_files import dump_recipe, load_recipe, parse_recipe
from finesight.training.completion_files import ablation_words
from finesight.training.grpo import GRPO
from finesight.training.prepare import prepare
from finesight.training.processes import start_accelerator
from finesight.training.rollout_source import RolloutSource
from finesight.training.run import train
from finesight.training.run_folder import read_run
from finesight.training.run_sizes import DataSizes
from finesight.training.session import Session
from finesight.training.telemetry import read_metrics
from tiny_runs import tiny_recipe, write_rows
from training.test_loop import distance, weights

REWARDS = '''
def letters(completions, **kwargs):
    """The share of letters e, in five steps."""
    return [min(1.0, completion[0]["content"].count("e") / 5) for completion in completions]

def length(completion_ids, **kwargs):
    return [float(len(ids) % 5) for ids in completion_ids]

def some_rows(completions, answer, completion_ids, **kwargs):
    """Tells completions apart for every second answer alone."""
    return [float(sum(ids) % 7) if own.endswith("0") else 1.0 for ids, own in zip(completion_ids, answer)]

def fails(completions, **kwargs):
    if len(completions) > 1:
        raise RuntimeError("too many")
    if "e" in completions[0][0]["content"]:
        raise ValueError("no e, please")
    return [0.0]

def logs(completions, log_metric, log_extra, **kwargs):
    log_metric("own_figure", 2.0)
    log_metric("reward", 99.0)
    log_metric("step", -5.0)
    log_extra("parsed", ["answer 0", {"of": 1}, *[None] * (len(completions) - 2)])
    return [1.0] * len(completions)

def raises(completions, **kwargs):
    return {}["a"]

def short(completions, **kwargs):
    return [1.0]

def bare(completions, **kwargs):
    return 1.0

def judges_nothing(completions, **kwargs):
    return [None] * len(completions)

def fails_held_out(completions, **kwargs):
    if len(completions) == 12:
        return [0.0] * 12
    raise ValueError("held out")
'''


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "own.py"
    path.write_text(REWARDS, encoding="utf-8")
    return path


@pytest.fixture
def recipe_of(checkpoint, rows, code):
    def make(output_dir, *rewards, grpo=None, rollout=None, training=None, prompts=None, **sections):
        return tiny_recipe(
            checkpoint,
            prompts or rows,
            output_dir,
            grpo={"num_generations": 4, "image_ablation_steps": 0, **(grpo or {})},
            rollout={"max_completion_length": 12, **(rollout or {})},
            training={"train_batch_size": 12, "max_steps": 3, "save_strategy": "no", "lr_scheduler_type": "constant", **(training or {})},
            rewards=[f"{code}:{name}" for name in rewards or ("letters",)],
            **sections,
        )

    return make


def run(recipe, algorithm=None):
    accelerator = start_accelerator(recipe, Path(recipe.training.output_dir), torch.device("cpu"))
    return Session(prepare(recipe), accelerator, algorithm=algorithm).run()


def steps_of(result) -> list[dict]:
    return [line for line in result.history if "loss" in line]


def test_what_a_run_tells_and_leaves(recipe_of, tmp_path):
    recipe = recipe_of(tmp_path / "run", "letters", "length", grpo={"image_ablation_steps": 2}, rollout={"temperature": 0.8, "top_p": 0.9})
    out = io.StringIO()
    result = train(recipe, console=Console(file=out, width=300))
    assert "9 prompts to train on" in out.getvalue() and "3 steps of 12 completions: 4 for each of 3 prompts" in out.getvalue()
    assert (
        "a step: on average at most " in out.getvalue() and "completion tokens/s" in out.getvalue() and "supervised" not in out.getvalue()
    )
    assert result.adapter_dir is not None and result.state.step == 3 and result.state.num_samples == 36
    lines = steps_of(result)
    for line in lines:
        # The sampler and the trainer agree: rollouts were made with the very weights that the step trains.
        assert line["sampling/sampling_logp_difference/max"] < 1e-5 and line["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
        assert line["clip_ratio/region_mean"] == 0 and "kl" not in line and 0 < line["entropy"] < 6
        assert line["reward"] == pytest.approx(line["rewards/letters/mean"] + line["rewards/length/mean"])
        assert {"reward_std", "frac_reward_zero_std", "rewards/letters/saturation", "completions/clipped_ratio", "rollout_s"} <= line.keys()
        assert line["sharing_ratio"] > 1.5
    checked = ["image_ablation/reward/without_image" in line for line in lines]
    assert checked == [True, False, True]  # of the steps after 0 and 2 updates
    files = sorted((result.output_dir / "completions").iterdir())
    assert [file.name for file in files] == [f"step-{step:06d}.parquet" for step in (1, 2, 3)]
    table = parquet.read_table(files[0]).to_pylist()
    assert len(table) == 12 and [row["group"] for row in table] == sorted([0, 1, 2] * 4)
    assert sum(row["reward"] for row in table) / 12 == pytest.approx(lines[0]["reward"])
    assert all(row["reward"] == pytest.approx(row["reward_letters"] + row["reward_length"]) for row in table)
    assert all(row["images"] and row["images"][0].endswith(".png") for row in table if "question" not in row["prompt"][-12:])
    groups = [[row["advantage"] for row in table if row["group"] == number] for number in range(3)]
    assert all(abs(sum(group)) < 1e-3 for group in groups)
    assert all(len(row["thumbnails"]) == len(row["images"]) for row in table)
    page = (result.output_dir / "report.html").read_text(encoding="utf-8")
    for shown in ("Completions of step 1", "Completions of step 3", "Image ablation", "Entropy", "data:image/png;base64"):
        assert shown in page, shown
    assert "KL from the base" not in page  # there was none to draw


def test_reward_rises(recipe_of, tmp_path):
    training = {"max_steps": 25, "train_batch_size": 32, "learning_rate": 2e-2, "num_train_epochs": 100, "warmup_ratio": 0}
    rewards = [line["reward"] for line in steps_of(run(recipe_of(tmp_path / "run", grpo={"num_generations": 8}, training=training)))]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1, rewards


def test_a_rollout_may_serve_several_updates(recipe_of, tmp_path):
    """Old log-probabilities are those before the first of them; only that one is exactly on-policy."""
    grpo = {"steps_per_generation": 2, "num_iterations": 2}
    result = run(recipe_of(tmp_path / "run", grpo=grpo, training={"max_steps": 6, "num_train_epochs": 9, "learning_rate": 3e-2}))
    lines = steps_of(result)
    assert result.plan.steps_per_epoch == 6  # 3 steps over the prompts, twice
    made = [line["step"] for line in lines if "rollout_s" in line]
    assert made == [1, 5] == [int(file.stem[5:]) for file in sorted((result.output_dir / "completions").iterdir())]
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-5 for line in lines)
    off = [abs(line["ratio_mean"] - 1) > 1e-4 for line in lines]
    assert off == [False, True, True, True, False, True]


def test_going_on_ends_with_the_same_bits(recipe_of, tmp_path):
    def recipe(name, **training):
        return recipe_of(
            tmp_path / name,
            "length",
            training={"max_steps": 4, "num_train_epochs": 9, "save_strategy": "steps", "save_steps": 2, **training},
        )

    whole = run(recipe("whole"))
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = train(recipe("again", resume=True))
    assert again.state.step == 4 and [line["step"] for line in steps_of(again)] == [3, 4]
    first, second = weights(whole), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [line["reward"] for line in steps_of(whole)][2:] == [line["reward"] for line in steps_of(again)]


class SmallMemory(GRPO):
    """Packs past 150 tokens run out of memory."""

    failures = 0

    def loss(self, scores, batch, step):
        if batch.num_tokens > 150:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return super().loss(scores, batch, step)


def test_out_of_memory_changes_nothing(recipe_of, tmp_path):
    training = {"adam_epsilon": 1.0, "learning_rate": 0.2, "token_budget": 400}
    grpo = {"num_iterations": 2, "beta": 0.1}
    undisturbed = run(recipe_of(tmp_path / "a", "length", grpo=grpo, training=training))
    recipe = recipe_of(tmp_path / "b", "length", grpo=grpo, training=training)
    algorithm = SmallMemory(recipe.grpo, recipe.rollout.max_completion_length)
    result = run(recipe, algorithm)
    assert algorithm.failures == result.state.out_of_memory > 0
    assert distance(weights(result), weights(undisturbed)) < 1e-5
    for a, b in zip(steps_of(result), steps_of(undisturbed), strict=True):
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-4, abs=1e-7) and a["entropy"] == pytest.approx(b["entropy"], rel=1e-5)


def test_divergence_from_the_base(recipe_of, tmp_path):
    result = run(recipe_of(tmp_path / "run", grpo={"beta": 0.05}))
    kl = [line["kl"] for line in steps_of(result)]
    assert abs(kl[0]) < 1e-9 < 1e-6 < kl[1] < kl[2]  # a fresh adapter is the base itself
    trains = {name for name, parameter in result.model.named_parameters() if parameter.requires_grad}
    assert trains and all("lora_" in name for name in trains)


def test_groups_that_teach_nothing_are_replaced(recipe_of, tmp_path):
    result = run(recipe_of(tmp_path / "run", "some_rows", grpo={"max_resampling_rounds": 3}, training={"max_steps": 2}))
    lines = steps_of(result)
    assert sum(line["resampling/replaced_groups"] for line in lines) >= 1
    assert all(line["resampling/constant_groups_left"] <= line["frac_reward_zero_std"] for line in lines)
    for file in (result.output_dir / "completions").iterdir():
        table = parquet.read_table(file).to_pylist()
        rewards = [{row["reward"] for row in table if row["group"] == number} for number in range(3)]
        assert len({(row["group"], row["row"]) for row in table}) == 3 and sum(len(group) > 1 for group in rewards) >= 2


def test_stop_texts_end_completions(recipe_of, tmp_path):
    result = run(recipe_of(tmp_path / "run", rollout={"stop": "e", "max_completion_length": 30}, training={"max_steps": 1}))
    (line,) = steps_of(result)
    table = parquet.read_table(result.output_dir / "completions" / "step-000001.parquet").to_pylist()
    assert any(row["finish_reason"] == "stop" for row in table) and not any("e" in row["completion"] for row in table)
    assert line["sampling/sampling_logp_difference/max"] < 1e-5  # of what was drawn, the token with the text included


def test_what_is_cut_off_can_be_left_out_and_penalised(recipe_of, tmp_path):
    """All completions of three tokens: each is cut off, none counts, and each earns the whole penalty less."""
    grpo = {"mask_truncated_completions": True, "overlong_buffer": 2, "overlong_penalty": 0.5}
    result = run(recipe_of(tmp_path / "run", grpo=grpo, rollout={"max_completion_length": 3}, training={"max_steps": 1}))
    (line,) = steps_of(result)
    assert line["reward"] == pytest.approx(line["rewards/letters/mean"] - 0.5, abs=0.05)
    assert line["completions/clipped_ratio"] > 0.9 and line["loss"] == pytest.approx(0, abs=0.5)


def test_a_reward_that_fails_is_told_and_the_run_goes_on(recipe_of, tmp_path):
    result = run(recipe_of(tmp_path / "run", "letters", "fails"))
    assert result.state.step == 3
    events = [line for line in result.history if line.get("event") == "reward_failed"]
    assert events and "no e, please" in events[0]["failures"][0] and "rows.jsonl, row" in events[0]["failures"][0]
    assert steps_of(result)[0]["rewards/fails/failed"] == events[0]["count"]
    table = parquet.read_table(result.output_dir / "completions" / "step-000001.parquet").to_pylist()
    failed = [row for row in table if row["failures"]]
    assert len(failed) == events[0]["count"] and all("no e, please" in row["failures"] and row["reward_fails"] is None for row in failed)
    assert "failed: " in (result.output_dir / "report.html").read_text(encoding="utf-8")


def line_of(code: str) -> int:
    return REWARDS[: REWARDS.index(code)].count("\n") + 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", f"KeyError: 'a' (line {line_of('return {}[')} of own.py)"),
        (
            "bare",
            "it gave 1.0 for 12 completions; it must give a list of one number or None for each, as f(completions, **columns) -> list",
        ),
        ("short", "it gave 1 values for 12 completions; it must give a list"),
    ],
)
def test_a_reward_that_always_fails_is_warned_of_and_stops_a_run_that_has_no_other(recipe_of, tmp_path, name, reason):
    out = io.StringIO()
    result = train(recipe_of(tmp_path / "two", "letters", name), console=Console(file=out, width=400))
    assert result.state.step == 3
    told = re.sub(r"\S*own.py:", "own.py:", out.getvalue())
    warning = f"WARNING: the reward own.py:{name} gave no number for any of the 12 completions of the first rollout: {reason}"
    assert told.count(warning) == 1, told
    assert f"The reward own.py:{name} failed for 36 of 36 completions." in told
    assert "letters failed" not in told and "times)" not in told
    with pytest.raises(EvaluationError, match=r"No reward gave a number for any of the 12 completions") as stopped:
        run(recipe_of(tmp_path / "alone", name))
    assert f"own.py:{name}: {reason}" in str(stopped.value)
    assert not [path.name for path in (tmp_path / "alone").iterdir() if path.is_dir()]  # neither weights nor checkpoints


def test_what_functions_log_is_kept_and_passes_for_nothing_else(recipe_of, tmp_path):
    result = run(recipe_of(tmp_path / "run", "logs", training={"max_steps": 1}))
    (line,) = steps_of(result)
    assert line["own_figure"] == 2.0 and line["logged/reward"] == 99.0 and line["reward"] == 1.0
    assert line["logged/step"] == -5.0 and line["step"] == 1
    table = parquet.read_table(result.output_dir / "completions" / "step-000001.parquet").to_pylist()
    assert [row["extra_parsed"] for row in table[:3]] == ["answer 0", '{"of": 1}', None]


def test_a_run_without_any_reward_says_so_and_has_a_report(recipe_of, tmp_path):
    out = io.StringIO()
    result = train(recipe_of(tmp_path / "run", "judges_nothing", training={"max_steps": 1}), console=Console(file=out, width=400))
    assert not any("reward" in line for line in result.history)
    assert "No reward was given in any step" in out.getvalue() and f"Report: {result.output_dir / 'report.html'}" in out.getvalue()
    page = (result.output_dir / "report.html").read_text(encoding="utf-8")
    assert "No reward was given in any step" in page
    assert "Completions of step 1: 3 of 3 prompts, mean reward not given" in page
    run = read_run(result.output_dir)
    assert run.is_reinforcement and run.missing == ()


def test_rewards_that_fail_on_held_out_prompts_are_told(recipe_of, tmp_path):
    training = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    out = io.StringIO()
    recipe = recipe_of(tmp_path / "run", "letters", "fails_held_out", data={"eval_split": "last 2"}, training=training)
    result = train(recipe, console=Console(file=out, width=400))
    (event,) = [line for line in result.history if line.get("event") == "reward_failed"]
    (measured,) = [line for line in result.history if "eval_samples" in line]
    assert event["count"] == measured["eval_samples"] == 3 and "3 rewards of held-out prompts failed" in out.getvalue()


def test_what_is_earned_without_looking_is_said(recipe_of, tmp_path):
    out = io.StringIO()
    recipe = recipe_of(tmp_path / "run", grpo={"image_ablation_steps": 1}, training={"max_steps": 1})
    (line,) = steps_of(train(recipe, console=Console(file=out, width=300)))
    seen, blind = (line[f"image_ablation/reward/{side}"] for side in ("with_image", "without_image"))
    assert f"step 1: {ablation_words(seen, blind)}" in out.getvalue()


@pytest.mark.parametrize(
    ("seen", "blind", "meaning"),
    [
        (0.5, 0.25, "that much is earned without looking"),
        (0.5, 0.0, "nothing is earned without looking"),
        (0.0, 0.0, "looking earns nothing so far"),
        (0.5, 0.5001, "looking earns nothing so far"),
        (0.25, 0.5, "looking earns nothing so far, and less is earned with it"),
        (-0.25, -0.5, "nothing is earned without looking"),
    ],
)
def test_the_words_follow_what_was_earned(seen, blind, meaning):
    assert ablation_words(seen, blind).endswith(f"{blind:.3f} with images blanked: {meaning}")


def test_the_command_has_the_words_of_reinforcement(recipe_of, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe_of(tmp_path / "run", training={"max_steps": 1})), encoding="utf-8")
    for arguments in (["--dry-run"], []):
        with pytest.raises(SystemExit) as ended:
            main(["train", str(path), *arguments])
        shown = capsys.readouterr().out
        assert not ended.value.code and "trained on" not in shown and "supervised" not in shown and "One epoch" not in shown
        assert ("tokens of a prompt" in shown) == (arguments == ["--dry-run"]) != ("Next: name a grader in evaluation.tasks" in shown)
        assert shown.count("Next:") == shown.count("finesight eval") == int(not arguments)


def test_failures_with_images_blanked_are_told_apart_and_each_reason_once(recipe_of, tmp_path):
    out = io.StringIO()
    recipe = recipe_of(tmp_path / "run", "letters", "raises", grpo={"image_ablation_steps": 1}, training={"max_steps": 1})
    result = train(recipe, console=Console(file=out, width=400))
    trained, blind = [line for line in result.history if line.get("event") == "reward_failed"]
    assert trained["count"] == 12 and 4 <= blind["count"] <= 12  # three prompts, at least one of them with an image
    assert steps_of(result)[0]["rewards/raises/failed"] == 12
    assert f"{blind['count']} rewards of completions with images blanked failed" in out.getvalue()
    (reason,) = trained["failures"]  # one reason, each of the three rows once
    line = line_of('return {}["a"]')
    assert reason.endswith(f"KeyError: 'a' (line {line} of own.py)") and re.search(r"rows.jsonl, rows \d, \d, \d: KeyError", reason)


def test_full_tuning_and_held_out_reward(recipe_of, tmp_path):
    training = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-2,
    }
    recipe = recipe_of(tmp_path / "run", tuning={"method": "full"}, data={"eval_split": "last 2"}, training=training)
    result = run(recipe)
    measured = {line["step"]: line["eval_reward"] for line in result.history if "eval_reward" in line}
    assert measured.keys() == {1, 2, 3} and result.adapter_dir is None
    assert result.state.best_metric == max(measured.values()) == measured[result.state.best_step]


def test_prompts_without_answers_will_do(recipe_of, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"messages": [{{"role": "user", "content": "question {n}"}}]}}\n' for n in range(4)))
    result = run(
        recipe_of(tmp_path / "run", prompts=path, grpo={"image_ablation_steps": 1}, training={"train_batch_size": 8, "max_steps": 1})
    )
    (line,) = steps_of(result)
    assert result.state.step == 1 and not any(name.startswith("image_ablation") for name in line)


def test_a_blank_prompt_has_the_same_tokens_and_no_picture(checkpoint, tmp_path):
    prepared = prepare(tiny_recipe(checkpoint, write_rows(tmp_path, images=2, questions=1, text_rows=0), tmp_path / "run"))
    first, second = (blanked(sample) for sample in prepared.samples)
    assert first.token_ids is prepared.samples[0].token_ids and first.visual_items[0].grid == prepared.samples[0].visual_items[0].grid
    patches = visual_patches(first.visual_items[0], prepared.processor)
    assert len(set(patches[:, 0].tolist())) == 1 and patches.shape[0] == first.visual_items[0].grid.patches
    assert first.visual_items[0].key != prepared.samples[0].visual_items[0].key
    assert (first.visual_items[0].grid == second.visual_items[0].grid) == (first.visual_items[0].key == second.visual_items[0].key)


def test_the_next_rollout_waits_for_the_update(recipe_of, tmp_path, monkeypatch):
    """Whether steps may be asked for ahead: within a rollout only."""
    asked = []
    ahead = RolloutSource.can_go_ahead.fget
    monkeypatch.setattr(RolloutSource, "can_go_ahead", property(lambda self: asked.append(ahead(self)) or asked[-1]))
    run(recipe_of(tmp_path / "run", grpo={"num_iterations": 2}, training={"max_steps": 6, "num_train_epochs": 9}))
    assert asked == [True, False] * 3


def test_recipe_round_trips(recipe_of, tmp_path):
    recipe = recipe_of(tmp_path / "run")
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


def test_sampling_is_planned_for(recipe_of, tmp_path):
    recipe = recipe_of(tmp_path / "run", rollout={"batch_size": 8})
    prepared = prepare(recipe)
    sizes = DataSizes(prepared)(recipe)
    assert sizes.rollout is not None and (sizes.rollout.groups, sizes.rollout.completions, sizes.rollout.completion_tokens) == (2, 4, 12)
    assert max(pack.targets for pack in sizes.packs) >= 8 * 12  # completions at their full length
    fewer = DataSizes(prepared)(with_settings(recipe, {"rollout.batch_size": 4})).rollout
    assert fewer is not None and (fewer.groups, fewer.completions) == (1, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grpo": None}, "rewards and rollout are for reinforcement: add a section `grpo"),
        ({"rewards": []}, "grpo needs rewards"),
        ({"training": {"sample_answers": 2}}, "training.sample_answers is for supervised training"),
        ({"training": {"train_batch_size": 10}}, r"multiple of grpo.num_generations \(4\); set it to 8 or 12"),
        ({"tuning": {"method": "full"}, "grpo": {"beta": 0.1}}, "full tuning changes the base"),
        (
            {"rollout": {"max_completion_length": 5000}, "training": {"token_budget": 4096, "train_batch_size": 4}},
            "leaves no room for a prompt",
        ),
        ({"rollout": {"temperature": 0}}, "rollout.temperature"),
        ({"rollout": {"stop": ["a", ""]}}, "an empty text"),
        ({"rollout": {"max_new_tokens": 5}}, "write rollout.max_completion_length"),
    ],
)
def test_contradictions_are_refused(change, message):
    content = {
        "model": {"name_or_path": "x"},
        "training": {"train_batch_size": 8},
        "grpo": {"num_generations": 4},
        "rewards": ["exact_match"],
        "rollout": {"top_k": 5},
    }
    for section, values in change.items():
        content[section] = {**(content.get(section) or {}), **values} if isinstance(values, dict) else values
    with pytest.raises(RecipeError, match=message):
        parse_recipe(content)


def test_a_reward_that_asks_for_a_missing_column_is_refused_before_training(recipe_of, tmp_path, code):
    code = tmp_path / "asks.py"
    code.write_text("def asks(completions, solution):\n    return [0.0] * len(completions)\n")
    recipe = recipe_of(tmp_path / "run")
    with pytest.raises(EvaluationError, match=r"'solution', which is no column.*; without a column there are: prompts.*, answer"):
        prepare(recipe.model_copy(update={"rewards": [recipe.rewards[0].model_copy(update={"name": f"{code}:asks"})]}))


def test_metrics_are_on_the_disk(recipe_of, tmp_path):
    result = run(recipe_of(tmp_path / "run", training={"max_steps": 2, "logging_steps": 2}))
    (line,) = [line for line in read_metrics(result.output_dir / "metrics.jsonl") if "reward" in line]
    assert line["step"] == 2
