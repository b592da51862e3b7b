"""What a GPU holds of a model that several share, against numbers worked out by hand for Qwen3-VL-8B."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finesight.errors import RecipeError
from finesight.planner.calibration import GIB
from finesight.planner.catalogue import CATALOGUE
from finesight.planner.fit import Situation, fit, gpus_that_fit, levers, remedies
from finesight.planner.gpus import find_gpu
from finesight.planner.moments import MemoryPlan, Policy
from finesight.planner.plan import plan_memory
from finesight.planner.sizes import PackSizes, RunSizes, filled_run
from finesight.planner.text import heading, refusal, to_dict
from finesight.recipe import Recipe
from finesight.recipe_files import load_recipe

EIGHT, TWO = CATALOGUE["Qwen3-VL-8B"], CATALOGUE["Qwen3-VL-2B"]
# Attention: q and o of 4,096 × 4,096, k and v of 1,024 × 4,096; three matrices of 12,288 × 4,096; two norms of 4,096, two of 128.
LAYER = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 12288 * 4096 + 2 * 4096 + 2 * 128
TABLE = 151_936 * 4096  # embedding, and once more lm_head
NORM = 4096  # after the last layer: the root
PACK = PackSizes(tokens=8064, targets=64, patches=(1280,) * 21, segments=21, samples=21)
RUN = RunSizes(((PACK,),))
FULL, SHARDED = "tuning.method=full", "training.sharding=full"


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, ["model.name_or_path=x", *overrides])


def plan(*overrides: str, processes: int = 4, policy: Policy = "offload", model=EIGHT) -> MemoryPlan:
    return plan_memory(model, recipe(*overrides), RUN, policy=policy, processes=processes)


def parts(planned: MemoryPlan, name: str) -> dict[str, int]:
    return next(moment.parts for moment in planned.moments if moment.name == name)


def filled(changed: Recipe) -> RunSizes:
    return filled_run(EIGHT, changed.training.token_budget, changed.data.max_pixels or 2**20, changed.training.train_batch_size)


def situation(gib: float, processes: int) -> Situation:
    return Situation(EIGHT, filled, find_gpu("H100"), int(gib * GIB), longest_sample=1088, pixels=2**20, processes=processes)


class TestFullTuning:
    def test_weights_gradients_and_state_take_a_quarter_on_each_of_four(self) -> None:
        at = parts(plan(FULL, SHARDED), "update")
        trained = 36 * LAYER + 2 * TABLE + NORM
        assert at["weights: language model"] == 2 * (36 * LAYER + NORM) // 4
        assert at["weights: embeddings"] == at["weights: lm_head"] == 2 * TABLE // 4
        assert at["optimizer state"] == 8 * trained // 4
        assert at["float32 copies of weights"] == at["gradients"] == 4 * trained // 4  # gradients, too, are added up in float32
        assert "gradient buckets" not in at and "gathered weights" not in at

    def test_a_frozen_tower_stays_whole(self) -> None:
        whole, shared = plan(FULL, processes=1), plan(FULL, SHARDED)
        for name in ("weights: vision tower", "weights: merger"):
            assert shared.peak.parts[name] == whole.peak.parts[name]
        trained = plan(FULL, SHARDED, "tuning.finetune_vision_layers=true")
        assert trained.peak.parts["weights: vision tower"] == whole.peak.parts["weights: vision tower"] // 4

    def test_a_layer_while_it_is_computed(self) -> None:
        """In bf16 its weights, the buffer they came in and the next one's; its gradients, and two buffers of them in float32."""
        at = parts(plan(FULL, SHARDED), "backward, upper layer")
        assert at["gathered weights"] == 3 * 2 * LAYER + 2 * NORM
        assert at["gradients on their way"] == (2 + 2 * 4) * LAYER
        assert at["gradients"] == 2 * TABLE // 4  # lm_head's, divided by then

    def test_lm_head_while_it_is_computed(self) -> None:
        at = parts(plan(FULL, SHARDED), "log-probabilities")
        assert at["gathered weights"] == 2 * 2 * TABLE + 2 * LAYER + 2 * NORM
        assert "gradients on their way" not in at

    def test_the_embedding_comes_last(self) -> None:
        at = parts(plan(FULL, SHARDED), "gradients of the embedding")
        assert at["gathered weights"] == 2 * 2 * TABLE + 2 * LAYER + 2 * NORM
        assert at["gradients on their way"] == (2 + 4) * TABLE + 4 * LAYER
        all_gradients = 2 * (36 * LAYER + 2 * TABLE + NORM)
        assert at["gradients"] == (all_gradients - 2 * NORM) // 4 + 2 * NORM

    def test_a_shared_matrix_is_there_from_beginning_to_end(self) -> None:
        """Qwen3-VL-2B: one matrix of 151,936 × 2,048 for embedding and lm_head, the root's with the last norm."""
        root = 2 * (151_936 * 2048 + 2048)
        layer = 2 * (2 * 2048 * 2048 + 2 * 1024 * 2048 + 3 * 6144 * 2048 + 2 * 2048 + 2 * 128)
        at = parts(plan(FULL, SHARDED, model=TWO), "backward, upper layer")
        assert at["gathered weights"] == root + 3 * layer
        assert at["gradients"] == 2 * 151_936 * 2048  # not divided before the pass ends
        assert parts(plan(FULL, SHARDED, model=TWO), "gradients of the root")["gradients on their way"] == 2 * (root + layer)


class TestAdapters:
    def test_a_frozen_base_is_divided_and_adapters_with_it(self) -> None:
        at = parts(plan(SHARDED), "backward, lowest layer")
        # r = 16: A and B of seven matrices.
        sides = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288)
        adapters = 16 * sides
        assert at["weights: language model"] == 2 * (36 * LAYER + NORM) // 4
        assert at["adapters"] == 36 * 4 * adapters // 4
        assert at["gathered weights"] == 3 * (2 * LAYER + 4 * adapters) + 2 * NORM
        assert at["gradients on their way"] == (4 + 2 * 4) * adapters

    def test_less_than_all_of_the_model_on_each(self) -> None:
        peaks = [plan(processes=8).peak_bytes, *(plan(SHARDED, processes=n).peak_bytes for n in (2, 4, 8))]
        assert peaks == sorted(peaks, reverse=True)


class TestSeveralGpusWithoutSharing:
    def test_gradients_pass_through_buckets(self) -> None:
        one, two = (plan(processes=n) for n in (1, 2))
        gradients = parts(one, "backward, lowest layer")["gradients"]
        assert two.peak_bytes - one.peak_bytes == parts(two, "update")["gradient buckets"] == gradients


class TestAdvice:
    def test_it_is_a_lever_and_a_remedy_where_there_are_several(self) -> None:
        here = situation(80, 4)
        names = [change.names for change in levers(here, here.plan(recipe(FULL), "full"))]
        assert frozenset({"training.sharding"}) in names
        assert any("training.sharding" in change.names for change in remedies(here, recipe(FULL), count=20))
        alone = situation(80, 1)
        assert not any("training.sharding" in change.names for change in remedies(alone, recipe(FULL), count=20))

    def test_a_search_finds_it_and_the_recipe_says_it_all(self) -> None:
        here = situation(48, 8)
        found = fit(here, recipe(FULL, "training.optim=adamw"))
        assert found is not None and found.plan.fits(here.available_bytes)
        assert here.plan(found.recipe, found.plan.policy).peak_bytes == found.plan.peak_bytes

    def test_of_a_recipe_that_shares_already_nothing_contradictory_is_tried(self) -> None:
        for change in remedies(situation(30, 4), recipe(FULL, SHARDED), count=20):
            assert not change.names & {"training.optim", "tuning.bf16_updates", "model.load_in_4bit"}

    def test_how_many_gpus_it_takes(self) -> None:
        count = gpus_that_fit(situation(80, 1), recipe(FULL))
        assert count is not None
        shared = replace(situation(80, count), available_bytes=80 * GIB)
        assert shared.plan(recipe(FULL, SHARDED), "offload").fits(80 * GIB)
        assert not shared.plan(recipe(FULL), "offload").fits(80 * GIB)
        assert gpus_that_fit(situation(4, 1), recipe(FULL)) is None
        assert gpus_that_fit(situation(4, 1), recipe("model.load_in_4bit=true")) is None  # is not divided
        assert f"On {count} such GPUs" in refusal(shared.plan(recipe(FULL)), 80 * GIB, (), count)

    def test_a_plan_says_how_many_share_it(self) -> None:
        assert any("4 GPUs, which share the model" in line for line in heading(plan(SHARDED)))
        assert any("2 GPUs, which have all of the model each" in line for line in heading(plan(processes=2)))
        said = to_dict(plan(SHARDED), None)
        assert (said["gpus"], said["sharding"]) == (4, "full")


def test_what_cannot_be_shared_is_refused_by_the_recipe() -> None:
    with pytest.raises(RecipeError, match="sharding: full cannot be used together with model"):
        recipe(SHARDED, "model.load_in_4bit=true")
