"""bench: the scripts that measure reinforcement, tried with tiny models; and the closed forms that they compare with."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench import decode, group_prompts, group_update, memory_report, report, rows
from bench.checkpoint import write_processor
from bench.claims import claim_of
from bench.workload import TINY_GROUP, GroupSetting

from finesight.data.processor import Processor, load_processor


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return load_processor(write_processor("tiny-qwen3-vl", tmp_path_factory.mktemp("processor"), None))


def run_module(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[rows.Row]:
    importlib.import_module(f"bench.{name}").main(arguments)
    return [row for line in capsys.readouterr().out.splitlines() if (row := rows.parse(line)) is not None]


class TestPrompts:
    def test_are_as_long_as_asked_for(self, processor: Processor) -> None:
        prompts = group_prompts.encoded(processor, group_prompts.conversations(processor, TINY_GROUP, 3))
        assert {len(prompt) for prompt in prompts} == {TINY_GROUP.prompt_tokens}
        assert len({prompt.visual_items[0].key for prompt in prompts}) == 3

    def test_a_text_shorter_than_the_template_is_refused(self, processor: Processor) -> None:
        with pytest.raises(ValueError, match="fewer than the chat template"):
            group_prompts.conversations(processor, GroupSetting(visual_tokens=16, text_tokens=10), 1)

    def test_an_image_of_other_tokens_is_refused(self, processor: Processor) -> None:
        with pytest.raises(ValueError, match="tokens, 16 of them"):  # what fits the pixel limit of the tiny processor
            group_prompts.conversations(processor, GroupSetting(visual_tokens=36, text_tokens=60), 1)

    def test_completions_are_fixed_and_private(self, processor: Processor) -> None:
        (prompt,) = group_prompts.encoded(processor, group_prompts.conversations(processor, TINY_GROUP, 1))
        once, again = (group_prompts.completions(TINY_GROUP, prompt, seed=1) for _ in range(2))
        assert [list(a.token_ids) for a in once] == [list(b.token_ids) for b in again]
        assert {int(sample.trained.sum()) for sample in once} == {TINY_GROUP.completion_tokens}
        assert len(once) == TINY_GROUP.generations


class TestDecode:
    def test_live_tokens_count_a_prompt_s_whole_blocks_once(self) -> None:
        # 70 tokens: two blocks of 32 in common, 6 tokens in each of 3 rows, and 5 of its own.
        assert decode.live_tokens(70, 3, 5) == 64 + 3 * (6 + 5)
        assert decode.live_tokens(64, 3, 5) == 64 + 3 * 5
        assert decode.live_tokens(70, 0, 5) == 0

    def test_measures_every_part_in_every_form(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = run_module("decode", ["--device", "cpu", "--tiny"], capsys)
        assert not [row for row in found if row.get("failed")]
        parts = [(row.get("adapter"), row["what"]) for row in found]
        each = ("sampler", "step", "forward", "drawing")
        names = {False: (*each, "attention", "products", "profile"), True: (*each, "profile")}
        assert parts == [(None, "copy"), *((adapter, name) for adapter in names for name in names[adapter])]
        by_part = dict(zip(parts, found, strict=True))
        sampler, with_adapter = by_part[False, "sampler"], by_part[True, "sampler"]
        assert sampler["completions"] == 4 and sampler["steps"] == TINY_GROUP.completion_tokens - 1
        assert with_adapter["weights_gb"] > sampler["weights_gb"] > 0
        assert by_part[False, "profile"]["largest"]

    def test_a_part_that_fails_leaves_the_others(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*arguments: object) -> None:
            raise RuntimeError("no rollout today")

        monkeypatch.setattr(decode, "roll_out", broken)
        found = run_module("decode", ["--device", "cpu", "--tiny"], capsys)
        assert {row["what"] for row in found if row.get("failed")} == {"sampler"}
        assert all(row["reason"] == "RuntimeError: no rollout today" for row in found if row.get("failed"))
        assert len([row for row in found if row["what"] == "step" and "share_percent" in row]) == 2

    def test_judges_the_better_of_compiled_and_plain(self) -> None:
        def row(adapter: bool, compiled: bool, share: float) -> rows.Row:
            return {"label": "4b", "what": "sampler", "adapter": adapter, "compiled": compiled, "share_percent": share}

        base, adapted = claim_of("decode").findings([row(False, False, 20), row(False, True, 61), {**row(True, True, 50), "failed": True}])
        assert (base.value, base.reached) == (61, True)
        assert adapted.value is None

    def test_without_a_vocabulary_says_so(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = run_module("decode", ["--device", "cpu", "--model", "qwen3-vl-4b"], capsys)
        assert "qwen.tiktoken" in found[-1]["reason"]


UPDATE = {"label": "4b", "row": "grpo_update", "policy": "selective", "compiled": False, "token_budget": 16384, "generations": 8}


@pytest.fixture(scope="module")
def found() -> list[rows.Row]:
    """Rows of `bench.group_update`."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        group_update.main(["--device", "cpu", "--tiny", "--profile"])
    return [row for line in output.getvalue().splitlines() if (row := rows.parse(line)) is not None]


class TestUpdate:
    def test_both_forms_have_the_same_loss_and_gradients(self, found: list[rows.Row]) -> None:
        (compared,) = (row for row in found if row["row"] == "grpo_compared")
        assert compared["loss_apart"] < 1e-6 and compared["gradients_apart"] < 1e-5
        assert compared["gradient_norm"] > 0 and compared["loss_shared"] != 0

    def test_no_form_goes_on_from_where_another_trained_to(self, found: list[rows.Row]) -> None:
        one, other = (row["losses"] for row in found if row["row"] == "grpo_update")
        assert one == pytest.approx(other, abs=1e-6) and one[0] != one[1]

    def test_features_that_are_kept_change_no_loss(self, tmp_path: Path) -> None:
        a = argparse.Namespace(model="tiny-qwen3-vl", device="cpu", setting=TINY_GROUP)
        recipe = group_update.recipe_of(write_processor(a.model, tmp_path, None), a.setting)
        bench = group_update.UpdateBench(a, load_processor(str(tmp_path), data=recipe.data), recipe, {})
        forms = [group_update.Form(True, "selective", False, kept_features=kept) for kept in (False, True)]
        one, other = (bench.measured(form, 0, 2)["losses"] for form in forms)
        assert one == pytest.approx(other, abs=1e-6)

    def test_a_profile_tells_parts_of_a_step_and_operators(self, found: list[rows.Row]) -> None:
        profiles = [row for row in found if row["row"] == "grpo_profile"]
        assert [row["shared"] for row in profiles] == [True, False]
        for row in profiles:
            assert set(row["parts_s"]) == set(group_update.PARTS) and min(row["parts_s"].values()) > 0
            assert row["groups"]["matrix products"]["seconds"] > 0 and len(row["largest"]) == group_update.KERNELS

    def test_a_prompt_is_computed_once_or_for_each_completion(self, found: list[rows.Row]) -> None:
        tokens = {row["shared"]: row["tokens"] for row in found if row["row"] == "grpo_update"}
        own = 8 * TINY_GROUP.completion_tokens
        assert tokens == {True: TINY_GROUP.prompt_tokens + own, False: 8 * TINY_GROUP.prompt_tokens + own}

    def test_large_groups_are_measured_split_and_whole(self, found: list[rows.Row]) -> None:
        packs = {(row["generations"], row["token_budget"] == 16384): row["packs"] for row in found if row["row"] == "grpo_memory"}
        assert packs == {(4, False): 1, (32, False): 4, (4, True): 1, (32, True): 1}

    def test_what_there_is_no_time_for_is_noted(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = run_module("group_update", ["--device", "cpu", "--tiny", "--time-limit", "-1"], capsys)
        assert found and all("not measured" in row["reason"] for row in found)

    def test_own_share_is_the_layers_inputs(self) -> None:
        config = SimpleNamespace(num_hidden_layers=36, hidden_size=2560)
        assert group_update.own_share_bytes(config, 28 * 256, 2) == 28 * 256 * 36 * 2560 * 2

    def test_speed_compares_the_fastest_and_memory_like_with_like(self) -> None:
        measured = [
            {**UPDATE, "shared": True, "step_s": 0.5, "activations_gib": 4.0},
            {**UPDATE, "shared": False, "step_s": 1.6, "activations_gib": 12.0},
            {**UPDATE, "label": "4b-compiled", "shared": True, "compiled": True, "groups": 4, "step_s": 0.4, "activations_gib": 7.0},
            {**UPDATE, "label": "4b-compiled", "shared": False, "compiled": True, "groups": 4, "step_s": 1.4, "activations_gib": 10.0},
        ]
        speed, memory, *other = claim_of("grpo_update").findings(measured)
        assert (speed.value, speed.reached, memory.value, memory.reached) == (3.5, True, 33.3, True)
        assert all(finding.value is None for finding in other)

    def test_growth_is_judged_where_groups_are_split(self) -> None:
        def row(generations: int, budget: int, activations: float, own: float) -> rows.Row:
            update = {**UPDATE, "row": "grpo_memory", "generations": generations, "token_budget": budget}
            return {**update, "activations_gib": activations, "own_share_gib": own}

        measured = [row(4, 3172, 2.0, 0.2), row(32, 3172, 2.7, 1.6), row(4, 16384, 2.0, 0.2), row(32, 16384, 9.0, 1.6)]
        finding, missing = claim_of("grpo_memory").findings(measured)
        assert (finding.value, finding.reached) == (0.5, True)
        assert missing.value is None


class TestMemoryOfReinforcement:
    def test_rows_tell_the_rollout_and_the_planner_is_asked_about_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        found = run_module("memory", ["4b-grpo", "--tiny", "--device", "cpu", "--folder", str(tmp_path)], capsys)
        assert len(found) == 2 and not [row for row in found if row.get("failed")]
        for row in found:
            assert row["rollout"] == {"groups": 2, "completions": 2, "prompt_tokens": 76, "completion_tokens": 8, "prompt_patches": 64}
            assert {"rollout: prompts", "rollout: sampling"} <= set(row["planned"]["moments_gib"])
            assert max(step["sampling/sampling_logp_difference/max"] for step in row["rollouts"]) < 1e-4
            assert row["steps_done"] == 2

    def test_a_capped_group_of_8_is_judged(self) -> None:
        def row(generations: int, reserved: float) -> rows.Row:
            name = f"8b-grpo-16gib-{generations}"
            return {"label": "8b-grpo", "name": name, "cap_gib": 16, "peak_reserved_gib": reserved, "group": {"generations": generations}}

        (finding,) = claim_of("grpo_cap").findings([row(8, 11.5), row(32, 15.0)])
        assert (finding.value, finding.reached) == (11.5, True)

    def test_a_recipe_of_a_row_is_read_again(self) -> None:
        settings = {"grpo.num_generations": 4, "training.train_batch_size": 8, "rewards": [{"name": "length"}]}
        recipe = memory_report.recipe_for("Qwen3-VL-4B", settings)
        assert recipe.grpo is not None and recipe.grpo.num_generations == 4 and recipe.rollout is not None


def test_the_report_has_a_table_of_each_kind(found: list[rows.Row], tmp_path: Path) -> None:
    """Rows of the new kinds, failed ones among them, appear in the document."""
    stamp = {"measured_at": "2026-01-01T00:00:00Z", "model": "qwen3-vl-4b", "label": "4b"}
    step = {**stamp, "row": "decode", "what": "sampler", "adapter": False, "compiled": True, "step_ms": 5.5, "share_percent": 47.0}
    cost = {"name": "some_kernel", "group": "attention", "seconds": 0.002, "share": 0.4, "calls": 36}
    profile = {**step, "what": "profile", "largest": [cost], "launches": 1800, "step_s": 0.005}
    copy = {**stamp, "row": "decode", "what": "copy", "gb_s": 4000.0}
    contents = {
        "decode": [step, profile, copy, rows.failed(step, "why")],
        "grpo_update": [{"label": "4b", **row} for row in found if row["row"] != "grpo_memory"]
        + [rows.failed({**UPDATE, "shared": True}, "no memory")],
        "grpo_memory": [{"label": "4b", **row} for row in found if row["row"] == "grpo_memory"],
    }
    for name, measured in contents.items():
        content = {"claim": name, "model": "qwen3-vl-8b", "rows": measured}
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    text = report.rows(report.Results(tmp_path))
    for part in (
        "| 5.5 |",
        "| 47 |",
        "failed: why",
        "`some_kernel`",
        "Copy on the GPU: 4000 GB/s",
        "failed: no memory",
        "packs of 140 tokens",
    ):
        assert part in text
