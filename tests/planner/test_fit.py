"""The choice of a policy, the search, the remedies: what they give must fit, and be the cheapest that does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from finesight.errors import RecipeError
from finesight.planner.activations import Execution
from finesight.planner.calibration import GIB
from finesight.planner.catalogue import CATALOGUE
from finesight.planner.fit import LEAST_SAVING, POLICIES, Situation, choose_policy, fit, levers, remedies, with_settings
from finesight.planner.gpus import find_gpu
from finesight.planner.shapes import TextShape, VisionShape
from finesight.planner.sizes import RunSizes, filled_run
from finesight.planner.speed import pack_seconds
from finesight.planner.text import refusal
from finesight.recipe import Recipe
from finesight.recipe_files import load_recipe

EIGHT = CATALOGUE["Qwen3-VL-8B"]
PIXELS = 1024 * 1024


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, ["model.name_or_path=x", *overrides])


def filled(changed: Recipe) -> RunSizes:
    return filled_run(EIGHT, changed.training.token_budget, changed.data.max_pixels or PIXELS, changed.training.train_batch_size)


def situation(gib: float, *, gpu: str = "RTX 4090", sizes: Callable[[Recipe], RunSizes] = filled, **more: Any) -> Situation:
    return Situation(EIGHT, sizes, find_gpu(gpu), int(gib * GIB), longest_sample=1088, pixels=PIXELS, **more)


class TestChoosingThePolicy:
    def test_the_fastest_that_fits(self) -> None:
        chosen = [choose_policy(situation(gib), recipe()).policy for gib in (141, 48, 24, 21)]
        assert chosen == ["none", "selective", "full", "offload"]

    @pytest.mark.parametrize("gib", [18, 22, 30, 50, 80])
    def test_it_fits_and_nothing_faster_does(self, gib: float) -> None:
        here = situation(gib)
        chosen = choose_policy(here, recipe())
        plans = [here.plan(recipe(), policy) for policy in POLICIES]
        fitting = [plan for plan in plans if plan.fits(here.available_bytes)]
        if fitting:
            assert chosen.fits(here.available_bytes)
            assert here.seconds_a_sample(chosen) == min(here.seconds_a_sample(plan) for plan in fitting)
        else:
            assert chosen.peak_bytes == min(plan.peak_bytes for plan in plans)

    def test_a_named_policy_stays(self) -> None:
        assert choose_policy(situation(8), recipe("training.gradient_checkpointing=selective")).policy == "selective"

    def test_the_same_for_the_same_arguments(self) -> None:
        assert {choose_policy(situation(40), recipe()).policy for _ in range(3)} == {choose_policy(situation(40), recipe()).policy}


class TestFit:
    @pytest.mark.parametrize("gib", [7, 12, 16, 24, 48])
    def test_fits_and_is_cheapest(self, gib: float) -> None:
        here = situation(gib)
        found = fit(here, recipe())
        assert found is not None and found.plan.fits(here.available_bytes)
        assert here.plan(found.recipe, found.plan.policy).peak_bytes == found.plan.peak_bytes  # the recipe says it all
        # Among what changes no pixels, and no precision either where that is possible.
        keeps = not any(name.startswith("model.") for name in found.names)
        others = [other for other in remedies(here, recipe(), count=20) if "data.max_pixels" not in other.names]
        assert all(found.cost <= o.cost for o in others if not (keeps and any(name.startswith("model.") for name in o.names)))

    def test_float8_only_where_the_card_has_it(self) -> None:
        names = {name for change in remedies(situation(17), recipe(), count=50) for name in change.names}
        assert "model.load_in_fp8" not in names
        hopper = {name for change in remedies(situation(17, gpu="H100"), recipe(), count=50) for name in change.names}
        assert "model.load_in_fp8" in hopper

    def test_pixels_go_last(self) -> None:
        def heavy(changed: Recipe) -> RunSizes:  # one image a pack, whatever the budget
            return filled_run(EIGHT, 1, changed.data.max_pixels or 36 * PIXELS, 8)

        here = Situation(EIGHT, heavy, find_gpu("4090"), int(7.5 * GIB), longest_sample=64, pixels=36 * PIXELS)
        found = fit(here, recipe())
        assert found is not None and "data.max_pixels" in found.names
        roomy = Situation(EIGHT, heavy, find_gpu("H200"), 130 * GIB, longest_sample=64, pixels=36 * PIXELS)
        other = fit(roomy, recipe())
        assert other is not None and "data.max_pixels" not in other.names

    def test_nothing_fits(self) -> None:
        assert fit(situation(2), recipe()) is None

    def test_full_tuning_is_not_quantised(self) -> None:
        found = fit(situation(80, gpu="H100"), recipe("tuning.method=full"))
        assert found is not None and found.plan.fits(80 * GIB)
        assert found.names <= {"training.optim", "tuning.bf16_updates", "training.token_budget"}


class TestRemedies:
    def test_three_that_fit_each_with_its_peak(self) -> None:
        here, asked = situation(16), recipe("training.gradient_checkpointing=none")
        assert not choose_policy(here, asked).fits(here.available_bytes)
        found = remedies(here, asked)
        assert len(found) == 3
        assert len({change.names for change in found}) == 3
        for change in found:
            assert change.plan.fits(here.available_bytes)
            assert with_settings(asked, dict(change.settings)) == change.recipe
        text = refusal(choose_policy(here, asked), here.available_bytes, found)
        assert "16.00 GiB are there" in text and "--force" in text
        assert all(f"peak {change.plan.peak_bytes / GIB:.2f} GiB" in text for change in found)

    def test_none_with_a_setting_too_many_goes_before_one_without(self) -> None:
        found = remedies(situation(22, gpu="H100"), recipe("training.gradient_checkpointing=none"), count=50)
        with_too_many = [any(other.names < change.names for other in found) for change in found]
        assert with_too_many == sorted(with_too_many) and not all(with_too_many)

    def test_says_when_there_is_none(self) -> None:
        here = situation(2)
        assert remedies(here, recipe()) == []
        assert "smaller model" in refusal(choose_policy(here, recipe()), here.available_bytes, [])


class TestLevers:
    def test_largest_saving_first(self) -> None:
        here = situation(24)
        plan = choose_policy(here, recipe())
        found = levers(here, plan)
        saved = [plan.peak_bytes - change.plan.peak_bytes for change in found]
        assert saved == sorted(saved, reverse=True) and min(saved) > 0
        assert "model.load_in_4bit" in found[0].names

    def test_what_saves_next_to_nothing_is_left_out(self) -> None:
        """Where the masters of full tuning are nearly all, a smaller pack changes nothing; a set of settings is named
        only where each subset of it that is named saves less."""
        here, full = situation(24), recipe("tuning.method=full", "training.token_budget=4096")
        plan = choose_policy(here, full)
        smaller = choose_policy(here, with_settings(full, {"training.token_budget": 2048}))
        assert plan.peak_bytes * (1 - LEAST_SAVING) < smaller.peak_bytes < plan.peak_bytes
        found = levers(here, plan)
        assert found and not any("training.token_budget" in change.names for change in found)
        assert all(change.plan.peak_bytes <= plan.peak_bytes * (1 - LEAST_SAVING) for change in found)
        for change in found:
            parts = [other for other in found if other.names < change.names]
            assert all(change.plan.peak_bytes < part.plan.peak_bytes for part in parts)

    def test_what_figures_would_not_show_is_left_out(self) -> None:
        """Of a tiny model recomputing saves 2% of the peak, and both figures read 0.11 GiB."""
        tiny = replace(
            EIGHT,
            text=TextShape(64, 2, 128, 4, 2, 16, 512, tied=True),
            vision=VisionShape(2, 64, 128, 4, 16, 64),
        )
        here = replace(situation(8), model=tiny)
        plan, recomputed = (here.plan(recipe("training.token_budget=2048"), policy) for policy in ("none", "full"))
        assert recomputed.peak_bytes < plan.peak_bytes * (1 - LEAST_SAVING)
        assert levers(here, plan) == []


class TestSettingsThatContradict:
    """Completions need room in a pack, and images a lower limit of pixels: what goes against it is no candidate."""

    asked = recipe("grpo.num_generations=4", "rewards=exact_match", "rollout.max_completion_length=4096", "data.min_pixels=600000")

    def test_are_no_levers(self) -> None:
        here = situation(24)
        with pytest.raises(RecipeError, match=r"with training.token_budget=4096: 1 setting.*\n.*leaves no room for a prompt"):
            with_settings(self.asked, {"training.token_budget": 4096})
        names = {name for change in levers(here, choose_policy(here, self.asked)) for name in change.names}
        assert "model.load_in_4bit" in names and not {"training.token_budget", "data.max_pixels"} & names

    @pytest.mark.parametrize("policy", ["auto", "full"])
    def test_are_not_searched(self, policy: str) -> None:
        asked = with_settings(self.asked, {"training.gradient_checkpointing": policy})
        found = fit(situation(16), asked)
        assert found is not None and found.plan.fits(16 * GIB) and found.recipe.training.token_budget > 4096
        assert fit(situation(2), asked) is None


class TestSpeed:
    def seconds(self, *overrides: str, policy: str = "none", gpu: str = "H200") -> float:
        asked = recipe(*overrides)
        (pack, *_), *_ = filled(asked).steps
        return pack_seconds(EIGHT, asked, pack, policy, find_gpu(gpu), Execution())

    def test_orders_what_was_measured(self) -> None:
        """Everything kept is faster than computing again, a float8 base faster than bf16, full tuning slower than an adapter."""
        assert self.seconds() < self.seconds(policy="selective") < self.seconds(policy="full")
        assert self.seconds("model.load_in_fp8=true") < self.seconds()
        assert self.seconds() < self.seconds("tuning.method=full")
        assert self.seconds() < self.seconds("model.load_in_4bit=true")
        assert self.seconds() < self.seconds(gpu="RTX 4090")

    def test_near_the_measured_step(self) -> None:
        """H200, chart, selective, two packs of 12,616 tokens: 1.65 s a step (bench/results/chart_bf16.json, step 15)."""
        from finesight.planner.sizes import PackSizes

        pack = PackSizes(12616, 93, (1336,) * 32, segments=32, samples=32)
        step = 2 * pack_seconds(EIGHT, recipe(), pack, "selective", find_gpu("H200"), Execution())
        assert step == pytest.approx(1.65, rel=0.15)
