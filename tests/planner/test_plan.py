"""Plans of whole runs: against measured peaks, against one another, and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench.memory_report import REACH, Measured, read_rows

from finesight.errors import RecipeError
from finesight.planner.activations import Execution
from finesight.planner.calibration import GIB
from finesight.planner.catalogue import CATALOGUE
from finesight.planner.fit import corrected
from finesight.planner.moments import MemoryPlan, Policy
from finesight.planner.plan import plan_memory, policy_of
from finesight.planner.rollouts import cache_bytes, rollout_bytes
from finesight.planner.sizes import PackSizes, RolloutSizes, RunSizes, filled_pack, filled_run
from finesight.recipe import Recipe
from finesight.recipe_files import load_recipe

EIGHT = CATALOGUE["Qwen3-VL-8B"]
PACK = PackSizes(tokens=8064, targets=64, patches=(1280,) * 21, segments=21, samples=21)
RUN = RunSizes(((PACK, PACK),))


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, ["model.name_or_path=x", *overrides])


def plan(*overrides: str, policy: Policy = "full", sizes: RunSizes = RUN, compiled: bool = True) -> MemoryPlan:
    return plan_memory(EIGHT, recipe(*overrides), sizes, policy=policy, execution=Execution(compiled=compiled))


class TestAgainstMeasurement:
    @pytest.mark.parametrize("row", read_rows(), ids=lambda row: row.row["name"])
    def test_peak(self, row: Measured) -> None:
        _, under, over = REACH
        assert -under <= row.error_percent <= over


class TestPolicies:
    @pytest.mark.parametrize("compiled", [True, False])
    def test_each_keeps_less_than_the_one_before(self, compiled: bool) -> None:
        peaks = [plan(policy=policy, compiled=compiled).peak_bytes for policy in ("none", "selective", "full", "offload")]
        assert peaks == sorted(peaks, reverse=True)
        assert len(set(peaks)) == 4

    def test_full_keeps_one_input_a_layer(self) -> None:
        """36 layers, the last among them: 36 × 8064 × 4096 numbers in bf16 while the log-probabilities are computed."""
        moment = next(m for m in plan().moments if m.name == "log-probabilities")
        final_norm = 64 * 4096 * 6
        rotary = 2 * 8064 * 128 * 2
        assert moment.parts["activations: language model"] == 36 * 8064 * 4096 * 2 + final_norm + rotary

    def test_uncompiled_packs_are_not_filled_up(self) -> None:
        odd = RunSizes(((replace(PACK, tokens=8001),),))
        filled, bare = (plan(sizes=odd, compiled=compiled) for compiled in (True, False))
        even = RunSizes(((replace(PACK, tokens=8064),),))
        # 28 bytes of the pack itself for each token more; the rest is of the filled size.
        assert filled.peak_bytes <= plan(sizes=even).peak_bytes
        assert bare.peak_bytes < plan(sizes=even, compiled=False).peak_bytes

    def test_named_by_the_recipe(self) -> None:
        assert policy_of(recipe("training.gradient_checkpointing=true")) == "full"
        assert policy_of(recipe("training.gradient_checkpointing=none")) == "none"
        assert policy_of(recipe()) is None
        assert plan_memory(EIGHT, recipe("training.gradient_checkpointing=selective"), RUN).policy == "selective"


class TestMoments:
    def test_parts_add_up_to_the_peak(self) -> None:
        p = plan()
        assert p.peak.total == sum(p.peak.parts.values()) == p.peak_bytes == max(m.total for m in p.moments)
        assert p.needed_bytes == p.peak_bytes + p.context_bytes + p.slack_bytes
        assert p.fits(p.needed_bytes) and not p.fits(p.needed_bytes - 1)

    def test_log_probabilities_by_hand(self) -> None:
        """1,024 rows of 151,936 logits: three float32 tensors, and from the second chunk on a bf16 gradient of the one before."""
        many = RunSizes(((replace(PACK, targets=4000),),))
        parts = next(m for m in plan(sizes=many).moments if m.name == "log-probabilities").parts
        assert parts["working memory"] == 1024 * 151_936 * 14

    def test_a_step_of_several_packs_holds_the_next_one_and_gradients(self) -> None:
        one, two, three = (
            next(m for m in plan(sizes=RunSizes(((PACK,) * count,))).moments if m.name == "log-probabilities").parts for count in (1, 2, 3)
        )
        assert [parts["gradients"] for parts in (one, two, three)] == [0, 4 * 43_646_976, 4 * 43_646_976]
        # Beside the gradients of the first pack the second one of two computes, and no further one is there.
        assert [parts.get("packs moved ahead", 0) for parts in (one, two, three)] == [0, 0, one["packs"]]

    def test_a_pack_larger_than_the_gradients_counts_as_the_first(self) -> None:
        """Rank 1 on attention: 36 × (2 × 4096 + 2 × 1024 + 3 × 4096 + 4096) float32 numbers, less than a pack of 64 images."""
        large = replace(PACK, patches=(1280,) * 64)
        p = plan("tuning.r=1", "tuning.finetune_mlp_modules=false", sizes=RunSizes(((large, large),)))
        parts = next(m for m in p.moments if m.name == "tower, forward").parts
        assert parts["gradients"] == 0 and parts["packs moved ahead"] == parts["packs"] > 4 * 36 * 26_624

    def test_backward_of_an_uncompiled_layer_by_hand(self) -> None:
        """Qwen3-VL-8B, MLP of 12,288, hidden size 4,096, in bytes beyond what is kept of the layer.

        Many tokens: gradients of the activation's two operands, beside that of the layer's output. Few: a weight in bf16 (in 4 bits with
        the scales of its blocks of 64 in float32) beside one gradient of the MLP's width. Of float8 with few tokens both transposed
        weights and the quantised gradients of gate and up, by which time four tensors of the MLP's width are gone and two come.
        """

        def working(tokens: int, *overrides: str) -> int:
            sizes = RunSizes(((replace(PACK, tokens=tokens, segments=1),),))
            moments = plan(*overrides, sizes=sizes, compiled=False).moments
            return next(m for m in moments if m.name == "backward, upper layer").parts["working memory"]

        many = 8064 * 2 * (2 * 12_288 + 4096)
        assert [working(8064, *how) for how in ((), ("model.load_in_4bit=true",), ("model.load_in_fp8=true",))] == [many] * 3
        four_bit = 512 * 2 * (12_288 + 4096) + 12_288 * 4096 * 2 + 12_288 * 4096 // 64 * 4
        assert working(512, "model.load_in_4bit=true") == four_bit
        assert working(512, "model.load_in_fp8=true") == 512 * 2 * 4096 - 2 * 512 * 2 * 12_288 + 2 * 12_288 * (512 + 4096)

    def test_gradient_release_updates_the_head_under_all_that_layers_keep(self) -> None:
        settings = ("tuning.method=full", "tuning.bf16_updates=stochastic_rounding", "training.max_grad_norm=0")
        head = 151_936 * 4096
        for packs, gradients in ((1, 2 * head), (2, 2 * (6_946_075_648 + 2 * head))):
            p = plan(*settings, "training.gradient_release=true", sizes=RunSizes(((PACK,) * packs,)))
            moments = {moment.name: moment.parts for moment in p.moments}
            update = moments["update of the head, backward"]
            assert (update["gradients"], update["working memory"]) == (gradients, 2 * 4 * head)
            assert update["activations: language model"] == moments["log-probabilities"]["activations: language model"]
        tied = plan_memory(CATALOGUE["Qwen3-VL-4B"], recipe(*settings, "training.gradient_release=true"), RUN, policy="full")
        assert "update of the head, backward" not in {moment.name for moment in tied.moments}  # the embedding is updated at the end

    def test_the_largest_pack_decides(self) -> None:
        small = replace(PACK, tokens=512, patches=(1280,))
        assert plan(sizes=RunSizes(((small, PACK), (small, small)))).peak_bytes == plan().peak_bytes
        answers = replace(small, targets=300)
        mixed = plan(sizes=RunSizes(((PACK, answers),)))
        assert mixed.peak_bytes == plan().peak_bytes

    def test_training_the_tower_keeps_its_blocks(self) -> None:
        frozen, trained = plan(policy="selective"), plan("tuning.finetune_vision_layers=true", policy="selective")
        patches = 21 * 1280
        # At least input, queries, keys, values, result and sum of 27 blocks, and what goes into the last product.
        assert trained.peak_bytes - frozen.peak_bytes > 27 * patches * (6 * 1152 + 4304) * 2

    def test_gradient_release_and_masters(self) -> None:
        masters = plan("tuning.method=full")
        rounding = plan("tuning.method=full", "tuning.bf16_updates=stochastic_rounding")
        released = plan(
            "tuning.method=full", "tuning.bf16_updates=stochastic_rounding", "training.gradient_release=true", "training.max_grad_norm=0"
        )
        assert masters.peak_bytes > rounding.peak_bytes
        # Only the last pack of a step releases. The first weights are then brought to float32 beside the gradients of the packs before it
        # and what the layers below keep; with a single pack gradients never stand side by side.
        assert released.peak_bytes >= rounding.peak_bytes
        one = RunSizes(((PACK,),))
        settings = ("tuning.method=full", "tuning.bf16_updates=stochastic_rounding", "training.max_grad_norm=0")
        kept, gone = (plan(*settings, f"training.gradient_release={release}", sizes=one) for release in ("false", "true"))
        lowest = [next(m for m in p.moments if m.name == "backward, lowest layer").parts["gradients"] for p in (kept, gone)]
        assert lowest == [2 * (6_946_075_648 + 2 * 151_936 * 4096), 2 * 151_936 * 4096]
        assert gone.peak_bytes < kept.peak_bytes

    def test_an_mlp_in_chunks(self) -> None:
        """None of gate, up and what follows them is kept; a chunk of 1,024 rows is computed again."""
        whole, chunked = (plan(f"training.mlp_chunk_tokens={chunk}", policy="selective") for chunk in ("null", "1024"))
        kept = [
            next(m for m in p.moments if m.name == "backward, upper layer").parts["activations: language model"] for p in (whole, chunked)
        ]
        assert kept[0] - kept[1] == 35 * 8064 * 2 * (2 * 12288 + 3 * 16)
        full = [plan(f"training.mlp_chunk_tokens={chunk}").peak_bytes for chunk in ("null", "1024")]
        assert full[1] < full[0]

    def test_experts_are_not_divided(self) -> None:
        whole, chunked = (
            plan_memory(
                CATALOGUE["Qwen3-VL-30B-A3B"], recipe(f"training.mlp_chunk_tokens={chunk}"), RUN, policy="full", execution=Execution()
            )
            for chunk in ("null", "1024")
        )
        assert whole.peak_bytes == chunked.peak_bytes

    def test_patches_in_the_precision_of_the_base(self) -> None:
        half, single = (
            plan_memory(EIGHT, recipe(), RUN, policy="full", execution=Execution(patch_width=width)).peak.parts["packs"]
            for width in (None, 4)
        )
        assert single - half == 21 * 1280 * 1536 * 2

    def test_a_probe_corrects(self) -> None:
        p = plan()
        better = corrected(p, p.peak_bytes + GIB)
        assert better.peak_bytes == p.peak_bytes + GIB
        assert better.needed_bytes > p.needed_bytes + GIB


class TestRollouts:
    def test_cache_by_hand(self) -> None:
        """36 layers × keys and values × 8 heads × 128 × 2 bytes: 144 KiB a token."""
        assert cache_bytes(EIGHT, 1, 2) == 147_456
        parts = rollout_bytes(EIGHT, RolloutSizes(4, 8, 1124, 256), 2)
        assert parts["sampling"]["key-value cache"] == (4 * 1124 + 4 * 8 * 256) * 147_456

    def test_grows_with_completions_alone(self) -> None:
        few, many = (rollout_bytes(EIGHT, RolloutSizes(1, g, 1124, 256), 2)["sampling"]["key-value cache"] for g in (4, 32))
        assert many - few == 28 * 256 * 147_456

    def test_is_a_moment_of_the_plan(self) -> None:
        with_rollout = plan_memory(EIGHT, recipe(), RUN, policy="offload", rollout=RolloutSizes(64, 8, 1124, 256))
        assert with_rollout.peak.name == "rollout: sampling"

    def test_refuses_nothing_to_sample(self) -> None:
        with pytest.raises(RecipeError, match="at least one"):
            RolloutSizes(1, 0, 10, 10)


class TestFilledPacks:
    def test_by_hand(self) -> None:
        # 448 × 448 pixels: 14 × 14 visual tokens of 32 × 32 pixels; with 64 tokens of text 260 a sample, 31 samples in 8,192.
        pack = filled_pack(EIGHT, 8192, 448 * 448)
        assert (pack.samples, pack.patches[0], pack.targets, pack.tokens) == (31, 4 * 196, 31 * 16, 8192)

    def test_steps_hold_their_samples(self) -> None:
        (step,) = filled_run(EIGHT, 8192, 448 * 448, 64).steps
        assert len(step) == 3

    def test_an_image_larger_than_the_budget(self) -> None:
        assert filled_pack(EIGHT, 512, 1024 * 1024).tokens == 1024 + 64
