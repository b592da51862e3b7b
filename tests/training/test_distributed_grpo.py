"""Reinforcement by two processes is that of one (gloo, CPU): the same completions, advantages, gradients and figures."""

from __future__ import annotations

import pytest
from pyarrow import parquet
from safetensors.torch import load_file

from finesight.training.rollout_shares import Processes
from finesight.training.run import train
from finesight.training.telemetry import read_metrics
from tiny_runs import tiny_recipe

REWARDS = '''
import os

def some_rows(completions, answer, completion_ids, log_metric, **kwargs):
    """Tells completions apart for every second answer alone, so that other groups are replaced."""
    log_metric("asked", len(completions))
    return [float(sum(ids) % 7) if own.endswith("0") else 1.0 for ids, own in zip(completion_ids, answer)]

def fails(completion_ids, **kwargs):
    if len(completion_ids) > 1:
        raise RuntimeError("too many")
    if sum(completion_ids[0]) % 3 == 0:
        raise ValueError("a third of all")
    return [float(len(completion_ids[0]))]
'''
# Figures that are times, rates or sizes of a process, or count calls.
_OF_PROCESSES = ("seconds", "_per_s", "_s", "share", "memory_gib", "asked", "padding_saved", "sharing_ratio")


@pytest.fixture(scope="module")
def cases(checkpoint, rows, pair, tmp_path_factory):
    """Each kind of rollout, by two processes and by one."""
    folder = tmp_path_factory.mktemp("distributed_grpo")
    (folder / "own.py").write_text(REWARDS, encoding="utf-8")
    kinds = {
        # Three groups a step, for two processes; a reference; groups replaced; images blanked; held-out rewards.
        "replaced": {"beta": 0.05, "scale_rewards": "batch", "max_resampling_rounds": 2, "image_ablation_steps": 2},
        # Updates after the first have log-probabilities of a pass before it. Sequence-level ratios; a step is one group.
        "iterated": {"steps_per_generation": 2, "num_iterations": 2, "loss_type": "gspo", "epsilon": 3e-4, "image_ablation_steps": 0},
    }

    def recipe(kind, name):
        return tiny_recipe(
            checkpoint, rows, folder / f"{kind}-{name}",
            data={"eval_split": "last 3"},
            grpo={"num_generations": 4, **kinds[kind]},
            rollout={"max_completion_length": 10},
            rewards=[f"{folder / 'own.py'}:some_rows", {"name": f"{folder / 'own.py'}:fails", "weight": 0}],
            training={
                "train_batch_size": 12 if kind == "replaced" else 4, "num_train_epochs": 9, "max_steps": 3 if kind == "replaced" else 4, "save_strategy": "no", "token_budget": 160,
                "adam_epsilon": 1.0, "learning_rate": 0.2, "lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 2,
            },
        )  # fmt: skip

    pair.train([recipe(kind, "two") for kind in kinds])
    return {kind: (train(recipe(kind, "one")), folder / f"{kind}-two") for kind in kinds}


@pytest.mark.parametrize("kind", ["replaced", "iterated"])
def test_two_processes_equal_one(cases, kind):
    one, two = cases[kind]
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one.weights_dir, two / "adapter"))
    worst = max(((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-12)).item() for n in a)
    assert worst < 1e-5, worst
    theirs = read_metrics(two / "metrics.jsonl")
    assert len(theirs) == len(one.history)
    compared = set()
    for mine, other in zip(one.history, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            if isinstance(value, float) and not name.endswith(_OF_PROCESSES):
                assert other[name] == pytest.approx(value, rel=1e-4, abs=2e-6), name
                compared.add(name)
        if "event" in mine:
            assert mine == other  # which rewards failed, and why
    wanted = {"reward", "entropy", "ratio_mean", "loss", "grad_norm", "eval_reward", "rewards/some_rows/saturation", "rewards/fails/failed"}
    if kind == "replaced":
        wanted |= {"kl", "resampling/replaced_groups", "image_ablation/reward/without_image"}
        assert sum(line.get("resampling/replaced_groups", 0) for line in one.history) > 0
    assert wanted <= compared
    assert any(line.get("event") == "reward_failed" for line in one.history)


@pytest.mark.parametrize("kind", ["replaced", "iterated"])
def test_one_process_writes_the_completions_of_both(cases, kind):
    one, two = cases[kind]
    files = sorted(path.name for path in (one.output_dir / "completions").iterdir())
    assert files == sorted(path.name for path in (two / "completions").iterdir())
    for name in files:
        mine, other = (parquet.read_table(folder / "completions" / name).to_pylist() for folder in (one.output_dir, two))
        assert [row["completion"] for row in mine] == [row["completion"] for row in other]
        assert [row["advantage"] for row in mine] == pytest.approx([row["advantage"] for row in other], abs=1e-6)
        assert [row["reward"] for row in mine] == [row["reward"] for row in other]


def test_shares_cover_everything_once():
    for number in range(7):
        parts = [Processes(3, index).share(number) for index in range(3)]
        assert [place for part in parts for place in range(number)[part]] == list(range(number))
        sizes = [part.stop - part.start for part in parts]
        assert max(sizes) - min(sizes) <= 1
