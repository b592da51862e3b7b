"""Rewards: called as TRL calls them, weighed and counted; nothing that goes wrong in one ends a run."""

from __future__ import annotations

import asyncio
import math
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image

from finesight.data.conversation import Conversation, MediaRef, Part, RowSource, Turn
from finesight.errors import EvaluationError, RecipeError
from finesight.grpo_settings import RewardSettings
from finesight.tasks.deadline import TimeLimitExceeded, call_within
from finesight.tasks.reward_types import Reward, RewardCall
from finesight.tasks.rewards import RewardSet, check_rewards, function_reward, load_rewards, reward_statistics


def row(number: int, answer: str = "yes", picture: MediaRef | None = None, **extra) -> Conversation:
    parts = (Part("text", f"Question {number}"),) if picture is None else (Part("image", media=picture), Part("text", f"Question {number}"))
    return Conversation((Turn("user", parts), Turn("assistant", (Part("text", answer),))), RowSource("rows.jsonl", number), extra=extra)


def call_of(*texts: str, rows=None, groups=None) -> RewardCall:
    rows = rows or [row(i) for i in range(len(texts))]
    return RewardCall(tuple(rows), texts, tuple(tuple(range(len(t))) for t in texts), tuple(groups or range(len(texts))), step=3)


def only(*functions, **options) -> RewardSet:
    return RewardSet([function_reward(function, **options) for function in functions])


def values_of(function, call: RewardCall, **options):
    result = only(function, name="f", **options)(call)
    return result.values["f"], result


class TestCalling:
    def test_the_guides_function_without_keywords_for_the_rest(self, tmp_path):
        Image.new("RGB", (7, 5)).save(tmp_path / "a.png")
        seen = {}

        def reward_fn(completions, images, ground_truths):
            seen["images"] = [[picture.size for picture in pictures] for pictures in images]
            return [1.0 if truth in completion[0]["content"] else 0.0 for completion, truth in zip(completions, ground_truths, strict=True)]

        shared = row(0, picture=MediaRef(path=str(tmp_path / "a.png")), ground_truth="cat")
        call = call_of("a cat", "a dog", rows=[shared, shared], groups=[0, 0])
        assert values_of(reward_fn, call)[0] == (1.0, 0.0)
        assert seen["images"] == [[(7, 5)], [(7, 5)]]

    def test_everything_that_trl_gives(self):
        def reward(prompts, completions, completion_ids, solution, level=7, trainer_state=None, **kwargs):
            assert prompts[0] == [{"role": "user", "content": "Question 0"}]
            assert completions[1] == [{"role": "assistant", "content": "bb"}]
            assert completion_ids == [[0], [0, 1]]
            assert solution == ["s", None]  # a row without the column
            assert level == [1, 2]
            assert trainer_state.global_step == 3
            assert set(kwargs) >= {"images", "answer"} and kwargs["answer"] == ["yes", "yes"]
            kwargs["log_metric"]("length", 1.5)
            kwargs["log_extra"]("note", ["x", "y"])
            return [0, True]

        values, result = values_of(reward, call_of("a", "bb", rows=[row(0, solution="s", level=1), row(1, level=2)]))
        assert (values, result.failures) == ((0.0, 1.0), ())
        assert (result.metrics, result.extra) == ({"length": (1.5,)}, {"note": ("x", "y")})

    def test_pictures_in_prompts_are_parts_and_are_not_opened_unasked(self):
        def reward(prompts, **kwargs):
            return [float(prompt[0]["content"] == [{"type": "image"}, {"type": "text", "text": "Question 0"}]) for prompt in prompts]

        assert values_of(reward, call_of("a", rows=[row(0, picture=MediaRef(path="missing.png"))]))[0] == (1.0,)

    def test_a_default_stands_where_there_is_no_column(self):
        assert values_of(lambda completions, scale=2: [scale] * len(completions), call_of("a"))[0] == (2.0,)

    def test_callable_objects_and_arrays(self):
        import numpy as np

        class Longer:
            def __call__(self, completion_ids):
                return np.array([len(ids) for ids in completion_ids], dtype=np.float32)

        reward = function_reward(Longer())
        assert reward.name == "Longer"
        assert RewardSet([reward])(call_of("a", "bbb")).values["Longer"] == (1.0, 3.0)

    def test_coroutines_run_side_by_side_and_beside_a_running_loop(self):
        async def slow(completions):
            await asyncio.sleep(0.3)
            return [1.0] * len(completions)

        class Judge:
            async def __call__(self, completions):
                await asyncio.sleep(0.3)
                return [2.0] * len(completions)

        rewards = RewardSet([function_reward(slow), function_reward(Judge()), function_reward(slow, name="again")])

        async def inside_a_loop():
            return rewards(call_of("a", "b"))

        started = time.perf_counter()
        result = asyncio.run(inside_a_loop())
        assert time.perf_counter() - started < 0.8
        assert result.totals == (4.0, 4.0)
        assert 0.2 < result.statistics["slow"].seconds < 0.8

    def test_functions_stay_in_the_main_thread(self):
        """Libraries with an alarm of their own (math-verify) need it."""

        def reward(completions):
            signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))
            return [float(threading.current_thread() is threading.main_thread())] * len(completions)

        assert values_of(reward, call_of("a"))[0] == (1.0,)


class TestWhatGoesWrong:
    def test_an_error_is_the_fault_of_one_completion(self):
        calls = []

        def reward(completions):
            calls.append(len(completions))
            return [1 / (len(completion[0]["content"]) - 2) for completion in completions]

        values, result = values_of(reward, call_of("a", "bb", "ccc"))
        assert values == (-1.0, None, 1.0)
        assert calls == [3, 1, 1, 1]
        (failure,) = result.failures
        assert (failure.reward, failure.index, failure.kind) == ("f", 1, "error")
        line = reward.__code__.co_firstlineno + 2
        assert str(failure) == f"f, rows.jsonl, row 1: ZeroDivisionError: division by zero (line {line} of test_rewards.py)"
        assert (result.statistics["f"].failed, result.statistics["f"].count) == (1, 2)

    def test_an_async_error_too(self):
        async def reward(completions):
            await asyncio.sleep(0)
            return [1 / (len(completion[0]["content"]) - 2) for completion in completions]

        async def fine(completions):
            return [1.0] * len(completions)

        result = only(reward, fine)(call_of("a", "bb"))
        assert result.values == {"reward": (-1.0, None), "fine": (1.0, 1.0)}
        assert [failure.index for failure in result.failures] == [1]
        assert result.totals == (0.0, 1.0)

    @pytest.mark.parametrize("way_out", [SystemExit(1), EvaluationError("x"), RecursionError(), MemoryError()])
    def test_no_way_out_ends_the_run(self, way_out):
        def reward(completions):
            raise way_out

        values, result = values_of(reward, call_of("a", "b"))
        assert (values, len(result.failures)) == ((None, None), 2)

    def test_an_interrupt_by_the_user_does(self):
        def reward(completions):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            values_of(reward, call_of("a"))

    @pytest.mark.parametrize(
        "hang", [lambda: time.sleep(30), lambda: re.match(r"(a+)+$", "a" * 40 + "b"), lambda: [None for _ in iter(int, 1)]]
    )
    def test_a_call_that_does_not_end(self, hang):
        def stubborn(completions):
            try:
                hang()
            except Exception:
                return [1.0] * len(completions)

        def fine(completions):
            return [1.0] * len(completions)

        started = time.perf_counter()
        result = only(stubborn, fine, timeout_s=0.2)(call_of("a", "b"))
        assert time.perf_counter() - started < 3
        assert result.values == {"stubborn": (None, None), "fine": (1.0, 1.0)}
        assert [(failure.kind, failure.message) for failure in result.failures] == [("timeout", "it took longer than 0.2 s")] * 2

    def test_a_coroutine_that_does_not_end(self):
        async def slow(completions):
            await asyncio.sleep(30)

        async def fine(completions):
            return [1.0] * len(completions)

        result = RewardSet([function_reward(slow, timeout_s=0.1), function_reward(fine)])(call_of("a"))
        assert result.values == {"slow": (None,), "fine": (1.0,)}
        assert result.failures[0].kind == "timeout"

    def test_in_other_threads_a_call_is_left_behind(self):
        release, found = threading.Event(), []

        def work():
            try:
                call_within(0.1, release.wait)
            except TimeLimitExceeded as error:
                found.append(str(error))
            found.append(call_within(5, lambda: 7))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(5)
        release.set()
        assert found == ["it took longer than 0.1 s", 7]

    def test_an_alarm_that_was_set_before_goes_on(self):
        rang = []
        earlier = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
        timer = signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            assert call_within(5, lambda: 1) == 1
            remaining = signal.getitimer(signal.ITIMER_REAL)[0]
            assert 0 < remaining <= 0.3
            time.sleep(0.4)
            assert rang == [True]
        finally:
            signal.signal(signal.SIGALRM, earlier)
            signal.setitimer(signal.ITIMER_REAL, *timer)

    @pytest.mark.parametrize(
        ("given", "values", "message"),
        [
            ([1.0], (None, None), "gave 1 values for 2"), (None, (None, None), "gave None for 2"), ("ab", (None, None), "gave 'ab'"),
            ([1.0, "x"], (1.0, None), "gave 'x', which is no finite number"), ([math.nan, 2], (None, 2.0), "gave nan"),
            ([None, math.inf], (None, None), "gave inf"), ([[1], 2], (None, 2.0), r"gave \[1\]"), ({"a": 1}, (None, None), "gave {'a': 1}"),
        ],
        ids=range(8),
    )  # fmt: skip
    def test_what_is_no_reward(self, given, values, message):
        found, result = values_of(lambda completions: given, call_of("a", "b"))
        assert found == values
        assert {failure.kind for failure in result.failures} == {"value"}
        assert re.search(message, result.failures[0].message)

    def test_none_is_no_failure(self):
        values, result = values_of(lambda completions: [None, 0.5], call_of("a", "b"))
        assert (values, result.failures, result.totals) == ((None, 0.5), (), (None, 0.5))


class TestOfARecipe:
    CODE = (
        "def long_enough(completions, at_least=2):\n    return [float(len(c[0]['content']) >= at_least) for c in completions]\n"
        "async def later(completions, **kwargs):\n    return [0.5] * len(completions)\n"
    )

    def test_graders_and_functions_with_weights(self, tmp_path):
        (tmp_path / "rewards_xyz.py").write_text(self.CODE)
        (tmp_path / "alone_xyz.py").write_text("def reward(completions):\n    return [10.0] * len(completions)\n")
        settings = [
            RewardSettings(name="anls", weight=0.5, options={"threshold": 0.9}),
            RewardSettings(name="rewards_xyz:long_enough", weight=2, options={"at_least": 4}),
            RewardSettings(name="rewards_xyz.py:later"),
            RewardSettings.model_validate("alone_xyz.py"),
        ]
        rewards = load_rewards(settings, base_dir=tmp_path)
        assert [(reward.weight, reward.is_async, reward.ceiling) for reward in rewards] == [
            (0.5, False, 1.0),
            (2, False, None),
            (1, True, None),
            (1, False, None),
        ]
        result = RewardSet(rewards)(call_of("hallo", "hel", rows=[row(0, "hello"), row(1, "hello")]))
        assert result.values == {
            "anls": (pytest.approx(0.8), pytest.approx(0.6)), "rewards_xyz:long_enough": (1.0, 0.0), "rewards_xyz.py:later": (0.5, 0.5), "alone_xyz.py": (10.0, 10.0),
        }  # fmt: skip
        assert result.totals == (pytest.approx(0.4 + 2 + 0.5 + 10), pytest.approx(0.3 + 0 + 0.5 + 10))

    def test_a_grader_fails_for_one_row_alone(self):
        (reward,) = load_rewards([RewardSettings(name="field_f1")], base_dir=None)  # type: ignore[arg-type]
        result = RewardSet([reward])(call_of('{"a": 1}', "{}", rows=[row(0, '{"a": 1}'), row(1, "no json")]))
        assert result.values["field_f1"] == (1.0, None)
        assert "no JSON" in result.failures[0].message

    def test_what_a_run_must_not_begin_with(self, tmp_path):
        (tmp_path / "wrong_xyz.py").write_text("def f(completions, solutoin):\n    return []\ndef g(completions, /):\n    return []\n")
        rewards = load_rewards([RewardSettings(name="wrong_xyz.py:f")], base_dir=tmp_path)
        with pytest.raises(EvaluationError, match=r"takes 'solutoin'.*Did you mean 'solution'"):
            check_rewards(rewards, [row(0, solution="x")])
        asks = function_reward(lambda completions, solution: [], name="asks")
        with pytest.raises(EvaluationError) as raised:  # `completions` resembles it, but is taken already
            check_rewards([asks], [row(0, ground_truth="x")])
        told = str(raised.value)
        assert (
            "Did you mean" not in told
            and "'solution' of a table is handed over if it stands in columns.extra" in told
            and "ground_truth" in told
        )
        with pytest.raises(EvaluationError, match="no further columns"):
            check_rewards(rewards, [row(0)])
        check_rewards(load_rewards([RewardSettings(name="anls")], base_dir=tmp_path), [row(0)])
        with pytest.raises(EvaluationError, match=r"row 4.*no box"):
            check_rewards(load_rewards([RewardSettings(name="iou")], base_dir=tmp_path), [row(3, "[1, 2, 3, 4]"), row(4)])
        for name, message in (
            ("wrong_xyz.py:g", "without a name"), ("wrong_xyz.py", "one public function, it has f, g"), ("wrong_xyz:h", r"has no function 'h'; it has f, g\. Define it as h\(completions"),
            ("anlz", "Did you mean 'anls'"), ("absent.py", "no file absent.py, neither beside the recipe nor in /"),
            ("absent_xyz:f", r"No module named 'absent_xyz'\. A file, beside the recipe or in /.*, is named as absent_xyz\.py:function"),
        ):  # fmt: skip
            with pytest.raises(EvaluationError, match=message):
                load_rewards([RewardSettings(name=name)], base_dir=tmp_path)
        with pytest.raises(EvaluationError, match="given twice"):
            load_rewards([RewardSettings(name="anls")] * 2, base_dir=tmp_path)

    def test_a_row_cannot_name_code(self, tmp_path, monkeypatch):
        """Only the recipe names functions: what looks like one in a data file is a column like any other."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "evil_xyz.py").write_text("from pathlib import Path\nPath('ran').touch()\ndef f(completions):\n    return [9.0]\n")
        hostile = dict.fromkeys(("reward", "rewards", "reward_funcs", "grader", "function", "json_schema", "ground_truth"), "evil_xyz.py:f")
        result = RewardSet(load_rewards([RewardSettings(name="exact_match")], base_dir=tmp_path))(
            call_of("evil_xyz.py:f", rows=[row(0, **hostile)])
        )
        assert result.values["exact_match"] == (1.0,)
        assert not (tmp_path / "ran").exists()

    def test_settings(self):
        for wrong in ({"name": "a", "weight": math.nan}, {"name": "a", "timeout_s": 0}, {"name": "a", "wieght": 1}, {}):
            with pytest.raises(ValueError):
                RewardSettings.model_validate(wrong)


class TestStatistics:
    def test_by_hand(self):
        found = reward_statistics([1.0, 0.0, 1.0, 1.0, None, 0.5], [0, 0, 1, 1, 2, 2], ceiling=1.0, failed=1)
        assert (found.count, found.failed, found.minimum, found.maximum) == (5, 1, 0.0, 1.0)
        assert found.mean == pytest.approx(0.7)
        assert found.spread == pytest.approx(math.sqrt((3 * 0.3**2 + 0.7**2 + 0.2**2) / 4))
        assert found.saturation == pytest.approx(3 / 5)
        assert found.constant_groups == pytest.approx(1 / 2)  # group 2 has one value only

    def test_without_values(self):
        found = reward_statistics([None, None], [0, 0], ceiling=1.0)
        assert found.count == 0 and all(math.isnan(v) for v in (found.mean, found.spread, found.saturation, found.constant_groups))

    def test_the_ceiling_of_a_function_is_the_largest_value_met(self):
        rewards = only(lambda completions: [float(completion[0]["content"]) for completion in completions], name="f")
        assert rewards(call_of("1", "3")).statistics["f"].saturation == 0.5
        assert rewards(call_of("1", "2")).statistics["f"].saturation == 0
        assert rewards(call_of("3", "4")).statistics["f"].saturation == 0.5

    def test_of_the_totals(self):
        result = RewardSet([function_reward(lambda completions: [1, 1, 0, 2], name="f", weight=2)])(call_of(*"abcd", groups=[0, 0, 1, 1]))
        assert result.total_statistics.mean == 2
        assert result.total_statistics.constant_groups == 0.5


def test_a_call_must_be_consistent():
    with pytest.raises(RecipeError, match="as many rows"):
        RewardCall((row(0),), ("a", "b"), ((), ()), (0, 0))


def test_types_and_settings_need_no_torch():
    code = "import sys, finesight.tasks.rewards, finesight.grpo_settings; print(*sorted(set(sys.modules) & {'torch', 'transformers', 'datasets'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def test_a_reward_without_anything_to_call():
    result = RewardSet([Reward("empty", 1.0, 1.0)])(call_of("a"))
    assert "neither a grader nor a function" in result.failures[0].message
