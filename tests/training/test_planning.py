"""Sizes of packs as they are built, the decision before a run, and what a session makes of a plan."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from finesight.errors import PlanError
from finesight.planner.calibration import GIB
from finesight.planner.catalogue import CATALOGUE
from finesight.planner.fit import Situation
from finesight.planner.gpus import find_gpu
from finesight.planner.plan import plan_memory
from finesight.training.memory_probe import probe_memory
from finesight.training.planning import decide, largest_pack, plan_here, will_compile
from finesight.training.prepare import Prepared, prepare
from finesight.training.processes import start_accelerator
from finesight.training.run import train
from finesight.training.run_sizes import DataSizes, pack_sizes
from finesight.training.session import Session
from tiny_runs import tiny_recipe


@pytest.fixture
def prepared(checkpoint: Path, rows: Path, tmp_path: Path) -> Prepared:
    return prepare(tiny_recipe(checkpoint, rows, tmp_path / "run"))


class TestPackSizes:
    @pytest.mark.parametrize("share", [True, False])
    def test_are_those_of_the_batch(self, prepared: Prepared, share: bool) -> None:
        recipe = prepared.recipe.model_copy(update={"data": prepared.recipe.data.model_copy(update={"share_prefixes": share})})
        feed = replace(prepared, recipe=recipe).feed()
        branched = False
        for step in feed.survey():
            for plan in step.plans:
                sizes, batch = pack_sizes(plan), feed.build_pack(plan)
                layout = batch.layout
                assert (sizes.tokens, sizes.targets) == (batch.num_tokens, batch.num_targets)
                assert sizes.patches == tuple(grid.patches for grid in batch.grids)
                assert sizes.segments == len(layout.query_lengths)
                assert sizes.gathered_keys == (0 if layout.key_index is None else len(layout.key_index) if share else 0)
                assert sizes.key_pairs == sum(
                    q * (k - q) + q * (q + 1) // 2 for q, k in zip(layout.query_lengths, layout.key_lengths, strict=True)
                )
                branched |= layout.key_index is not None
        assert branched is share

    def test_of_the_data(self, prepared: Prepared) -> None:
        sizes = DataSizes(prepared)
        usual = sizes(prepared.recipe)
        assert [sum(pack.samples for pack in step) for step in usual.steps] == [4, 4, 1]
        assert sizes(prepared.recipe) is usual  # looked at once
        tight = prepared.recipe.model_copy(
            update={"training": prepared.recipe.training.model_copy(update={"token_budget": sizes.longest_sample})}
        )  # fmt: skip
        assert max(pack.tokens for pack in sizes(tight).packs) <= sizes.longest_sample
        assert len(sizes(tight).packs) > len(usual.packs)

    def test_of_fewer_pixels(self, prepared: Prepared) -> None:
        sizes = DataSizes(prepared)
        fewer = prepared.recipe.model_copy(update={"data": prepared.recipe.data.model_copy(update={"max_pixels": 32 * 32})})
        assert max(pack.total_patches for pack in sizes(fewer).packs) < max(pack.total_patches for pack in sizes(prepared.recipe).packs)

    def test_of_two_processes(self, prepared: Prepared) -> None:
        alone, both = DataSizes(prepared)(prepared.recipe), DataSizes(prepared, processes=2)(prepared.recipe)
        assert sum(pack.tokens for pack in both.packs) < sum(pack.tokens for pack in alone.packs)

    def test_largest(self, prepared: Prepared) -> None:
        plans = [plan for step in prepared.feed().survey() for plan in step.plans]
        assert largest_pack(plans).num_tokens == max(plan.num_tokens for plan in plans)


def situation(prepared: Prepared, gib: float) -> Situation:
    sizes = DataSizes(prepared)
    return Situation(CATALOGUE["Qwen3-VL-8B"], sizes, find_gpu("4090"), int(gib * GIB), longest_sample=sizes.longest_sample)


class TestDecision:
    def test_refuses_with_three_remedies(self, prepared: Prepared) -> None:
        with pytest.raises(PlanError, match=r"planned to need 1[67]\.\d+ GiB .* and 12\.00 GiB are there") as refused:
            decide(situation(prepared, 12), prepared.recipe)
        lines = str(refused.value).splitlines()
        assert [line.strip()[:2] for line in lines if line.startswith("  ")] == ["1.", "2.", "3."]
        assert all("(peak " in line for line in lines if line.startswith("  "))
        assert "--force" in lines[-1]

    def test_force_goes_on(self, prepared: Prepared) -> None:
        plan = decide(situation(prepared, 12), prepared.recipe, force=True)
        assert not plan.fits(12 * GIB)

    def test_what_fits_may_begin(self, prepared: Prepared) -> None:
        plan = decide(situation(prepared, 24), prepared.recipe)
        assert plan.policy == "none"  # packs are tiny

    def test_nothing_on_a_cpu(self, prepared: Prepared, tmp_path: Path) -> None:
        accelerator = start_accelerator(prepared.recipe, tmp_path, torch.device("cpu"))
        assert plan_here(prepared, accelerator) is None
        assert not will_compile(prepared.recipe, 10_000, torch.device("cpu"))

    def test_a_run_on_a_cpu_says_nothing_of_gpu_memory(self, prepared: Prepared) -> None:
        out = io.StringIO()
        result = train(prepared.recipe.model_copy(update={"training": prepared.recipe.training.model_copy(update={"max_steps": 1})}),
                       console=Console(file=out, width=300))  # fmt: skip
        assert json.loads((result.output_dir / "run.json").read_text())["stop_reason"] == "finished"
        assert "GPU memory" not in out.getvalue()


class TestSession:
    def test_takes_the_planned_policy(self, prepared: Prepared, tmp_path: Path) -> None:
        sizes = DataSizes(prepared)(prepared.recipe)
        plan = plan_memory(CATALOGUE["Qwen3-VL-8B"], prepared.recipe, sizes, policy="selective")
        out = io.StringIO()
        accelerator = start_accelerator(prepared.recipe, tmp_path, torch.device("cpu"))
        session = Session(prepared, accelerator, console=Console(file=out, width=300), memory=plan)
        assert session.packed.policy == "selective"
        assert "activations: selective (chosen: the fastest that fits)" in out.getvalue()
        assert Session(prepared, accelerator).packed.policy == "full"  # nothing was planned

    def test_a_named_policy_goes_before_it(self, prepared: Prepared, tmp_path: Path) -> None:
        training = prepared.recipe.training.model_copy(update={"gradient_checkpointing": False})
        named = replace(prepared, recipe=prepared.recipe.model_copy(update={"training": training}))
        assert Session(named, start_accelerator(named.recipe, tmp_path, torch.device("cpu"))).packed.policy == "none"

    def test_a_probe_needs_a_gpu(self, prepared: Prepared, tmp_path: Path) -> None:
        session = Session(prepared, start_accelerator(prepared.recipe, tmp_path, torch.device("cpu")))
        with pytest.raises(PlanError, match="no GPU"):
            probe_memory(session)
