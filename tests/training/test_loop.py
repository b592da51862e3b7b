"""The loop: steps are samples whatever the packing; precision; stopping; what is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finesight.errors import RecipeError, TrainingError
from finesight.training.checkpoint import list_checkpoints
from finesight.training.loop import StopSignals
from finesight.training.prepare import prepare
from finesight.training.processes import start_accelerator
from finesight.training.session import RunResult, Session
from finesight.training.sft import SupervisedFineTuning
from finesight.training.telemetry import read_metrics
from tiny_runs import tiny_recipe


def run(recipe, algorithm=None) -> RunResult:
    accelerator = start_accelerator(recipe, Path(recipe.training.output_dir), torch.device("cpu"))
    return Session(prepare(recipe), accelerator, algorithm=algorithm).run()


def weights(result: RunResult) -> dict[str, torch.Tensor]:
    file = "adapter_model.safetensors" if result.adapter_dir else "model.safetensors"
    return load_file(result.weights_dir / file)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest relative distance of any tensor."""
    assert a.keys() == b.keys()
    return max(((a[name].double() - b[name].double()).norm() / b[name].double().norm().clamp(min=1e-12)).item() for name in a)


# So large an epsilon makes the update proportional to the gradient: Adam would else blow up the rounding of tiny entries.
THREE_STEPS = {"max_steps": 3, "save_strategy": "no", "adam_epsilon": 1.0, "learning_rate": 0.2}


@pytest.fixture(scope="module")
def one_big_batch(checkpoint, rows, tmp_path_factory):
    """Three steps of four samples, each step one pack, nothing shared."""
    recipe = tiny_recipe(
        checkpoint, rows, tmp_path_factory.mktemp("runs") / "reference",
        training={**THREE_STEPS, "token_budget": 4096}, data={"share_prefixes": False},
    )  # fmt: skip
    result = run(recipe)
    assert result.plan.packs_per_step == 1
    return result


@pytest.mark.parametrize(
    ("budget", "share", "checkpointing", "workers"),
    [(4096, True, True, 0), (100, False, True, 0), (100, True, False, 0), (100, True, True, 2)],
)
def test_any_packing_equals_one_big_batch(checkpoint, rows, tmp_path, one_big_batch, budget, share, checkpointing, workers):
    training = {**THREE_STEPS, "token_budget": budget, "gradient_checkpointing": checkpointing, "num_workers": workers}
    result = run(
        tiny_recipe(checkpoint, rows, tmp_path / "run", training=training, data={"share_prefixes": share, "max_length_tokens": 4096})
    )
    assert (result.plan.packs_per_step > 1) == (budget == 100)
    assert (result.plan.sharing_ratio > 1) == share
    assert distance(weights(result), weights(one_big_batch)) < 1e-6
    for a, b in zip(result.history, one_big_batch.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def test_the_loss_is_the_mean_over_the_tokens_of_the_step(checkpoint, rows, tmp_path, one_big_batch):
    """Against the plain forward of transformers, one sample at a time, on the weights before the first step."""
    recipe = tiny_recipe(checkpoint, rows, tmp_path / "run", training=THREE_STEPS)
    prepared = prepare(recipe)
    session = Session(prepared, start_accelerator(recipe, tmp_path, torch.device("cpu")))
    feed = prepared.feed()
    total = count = 0.0
    from finesight.data.pixels import visual_patches

    for row in feed.rows_of(0, 0):
        sample = prepared.samples[row]
        visual = [torch.from_numpy(visual_patches(item, prepared.processor)) for item in sample.visual_items]
        inputs = (
            {"pixel_values": torch.cat(visual), "image_grid_thw": torch.tensor([i.grid for i in sample.visual_items])} if visual else {}
        )
        ids = torch.from_numpy(sample.token_ids)[None]
        types = (ids == prepared.processor.image_token_id).long()
        with torch.no_grad():
            logits = session.loaded.base(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **inputs).logits[0]
        places = torch.from_numpy(sample.trained).nonzero().squeeze(1)
        total -= torch.log_softmax(logits[places - 1].double(), -1).gather(1, ids[0, places][:, None]).sum().item()
        count += len(places)
    assert one_big_batch.history[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_sample_weights_count(checkpoint, rows, tmp_path):
    """A weight of two equals the row twice in the denominator and the sum; zero leaves it out."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    weighted = rows.parent / "weighted.jsonl"
    weighted.write_text("".join(json.dumps({**line, "w": float(i % 3)}) + "\n" for i, line in enumerate(lines[:4])))
    repeated = rows.parent / "repeated.jsonl"
    repeated.write_text("".join(json.dumps(line) + "\n" for i, line in enumerate(lines[:4]) for _ in range(i % 3)))
    common = {**THREE_STEPS, "max_steps": 1}
    a = run(tiny_recipe(checkpoint, rows, tmp_path / "a", data={"train": {"path": str(weighted), "weight_column": "w"}}, training=common))
    b = run(tiny_recipe(checkpoint, rows, tmp_path / "b", data={"train": str(repeated)}, training=common))
    assert a.history[0]["loss"] == pytest.approx(b.history[0]["loss"], rel=1e-6)
    assert distance(weights(a), weights(b)) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "tuning", "training"),
    [
        ("bfloat16", {}, {}),
        ("float16", {}, {}),
        ("bfloat16", {"method": "full"}, {"learning_rate": 1e-3}),
        ("bfloat16", {"method": "full", "bf16_updates": "stochastic_rounding", "finetune_vision_layers": True}, {"learning_rate": 1e-3}),
        ("float16", {"method": "full"}, {"learning_rate": 1e-3}),
        ("float32", {"method": "full", "finetune_merger": True}, {"optim": "muon", "learning_rate": 1e-3, "muon_learning_rate": 5e-3}),
        ("float32", {"bias": "lora_only", "finetune_vision_layers": True, "finetune_merger": True}, {}),
    ],
)
def test_every_precision_and_optimizer_learns(checkpoint, rows, tmp_path, dtype, tuning, training):
    recipe = tiny_recipe(
        checkpoint, rows, tmp_path / "run", model={"dtype": dtype}, tuning=tuning,
        training={"num_train_epochs": 3, "save_strategy": "no", "token_budget": 128, **training},
    )  # fmt: skip
    result = run(recipe)
    losses = [line["loss"] for line in result.history]
    assert len(losses) == 9 and sum(losses[-3:]) < 0.95 * sum(losses[:3]), losses
    trained = {p.dtype for p in result.model.parameters() if p.requires_grad}
    assert trained == ({torch.float32} if result.adapter_dir else {getattr(torch, dtype)})


def test_overflow_of_float16_skips_the_update(checkpoint, rows, tmp_path):
    class Overflowing(SupervisedFineTuning):
        def loss(self, logprobs, batch, step):
            loss = super().loss(logprobs, batch, step)
            if step.index == 0:  # finite, but its gradient is not
                loss = loss + (logprobs.sum() * 0 + 1e-30).sqrt() * 1e-30
                loss.register_hook(lambda grad: grad * float("inf"))
            return loss

    result = run(tiny_recipe(checkpoint, rows, tmp_path / "run", model={"dtype": "float16"}, training={"max_steps": 3}), Overflowing())
    assert result.state.skipped_updates == 1 and result.state.step == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pixels_come_in_the_precision_of_the_tower(checkpoint, rows, tmp_path, dtype):
    class Watching(SupervisedFineTuning):
        def loss(self, logprobs, batch, step):
            found.add(batch.patches.dtype)
            return super().loss(logprobs, batch, step)

    found: set[torch.dtype] = set()
    run(tiny_recipe(checkpoint, rows, tmp_path / "run", model={"dtype": dtype}, training={"max_steps": 2}), Watching())
    assert found == {getattr(torch, dtype)}


class Spoiled(SupervisedFineTuning):
    """The loss of one pack becomes nan at the second step."""

    def loss(self, logprobs, batch, step):
        loss = super().loss(logprobs, batch, step)
        return loss * float("nan") if step.index == 1 and batch.num_targets else loss


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(checkpoint, rows, tmp_path):
    recipe = tiny_recipe(checkpoint, rows, tmp_path / "run", training={"save_strategy": "steps", "save_steps": 1, "shuffle": False})
    with pytest.raises(TrainingError, match=r"loss of step 2 .*rows\.jsonl, row 4; .*learning_rate") as error:
        run(recipe, Spoiled())
    assert "row 3" not in str(error.value)
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]


def test_evaluation_best_and_early_stopping(checkpoint, rows, tmp_path):
    """A learning rate that ruins the model: the first evaluation stays the best, patience ends the run, the best comes back."""
    recipe = tiny_recipe(
        checkpoint, rows, tmp_path / "run", data={"eval_split": "last 3"},
        training={
            "learning_rate": 0.5, "lr_scheduler_type": "constant", "num_train_epochs": 50, "eval_strategy": "steps", "eval_steps": 2,
            "early_stopping_patience": 2, "load_best_model_at_end": True, "save_total_limit": 1, "sample_answers": 2, "save_strategy": "epoch",
        },
        evaluation={"max_completion_length": 4},
    )  # fmt: skip
    result = run(recipe)
    evaluations = [line for line in result.history if "eval_loss" in line]
    best = min(evaluations, key=lambda line: line["eval_loss"])
    assert result.stop_reason == "early_stopping" and result.state.step < 100
    assert (result.state.best_step, result.state.best_metric) == (best["step"], best["eval_loss"])
    assert [line["step"] for line in evaluations][-1] == best["step"] + 4  # two evaluations without a better one
    kept = {path.name for path in list_checkpoints(tmp_path / "run")}
    assert kept == {f"checkpoint-{best['step']}", f"checkpoint-{result.state.step}"}
    best_weights = load_file(tmp_path / "run" / f"checkpoint-{best['step']}" / "adapter" / "adapter_model.safetensors")
    assert distance(weights(result), best_weights) == 0
    samples = tmp_path / "run" / "samples"
    records = [json.loads(line) for line in (samples / f"step-{best['step']}.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all((samples / name).exists() for record in records for name in record["images"])
    assert {"row", "prompt", "answer", "expected"} <= records[0].keys()


def test_held_out_loss_is_the_token_mean_and_changes_nothing(checkpoint, rows, tmp_path):
    common = dict(data={"eval_split": "last 3"}, tuning={"lora_dropout": 0.2})
    with_eval = run(
        tiny_recipe(checkpoint, rows, tmp_path / "a", training={"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "sample_answers": 1},
                    evaluation={"max_completion_length": 2}, **common)
    )  # fmt: skip
    without = run(tiny_recipe(checkpoint, rows, tmp_path / "b", training={"max_steps": 4}, **common))
    assert distance(weights(with_eval), weights(without)) == 0
    lines = [line for line in with_eval.history if "eval_loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all(line["eval_samples"] == 3 for line in lines)


class Interrupting(SupervisedFineTuning):
    """Sends a signal while a step is computed."""

    def __init__(self, at_step: int, number: int = signal.SIGTERM) -> None:
        self.at_step, self.number, self.seen = at_step, number, 0

    def loss(self, logprobs, batch, step):
        self.seen += 1
        if self.seen == self.at_step:
            os.kill(os.getpid(), self.number)
        return super().loss(logprobs, batch, step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_returns(checkpoint, rows, tmp_path, number):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = run(tiny_recipe(checkpoint, rows, tmp_path / "run", training={"num_train_epochs": 3}), Interrupting(2, number))
    assert result.interrupted and result.state.step == 2
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert result.weights_dir == tmp_path / "run" / "checkpoint-2" / "adapter" and not (tmp_path / "run" / "adapter").exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_sigint_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.name == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({"save_strategy": "steps", "save_steps": 2, "save_total_limit": None}, [2, 4, 6]),
        ({"save_strategy": "epoch", "save_total_limit": None}, [3, 6]),
        ({"save_strategy": "epoch", "save_total_limit": 1}, [6]),
        ({"save_strategy": "steps", "save_steps": 4, "save_total_limit": None}, [4, 6]),  # the end always
        ({"save_strategy": "no"}, []),
    ],
)
def test_save_strategies(checkpoint, rows, tmp_path, settings, saved):
    result = run(tiny_recipe(checkpoint, rows, tmp_path / "run", training={"num_train_epochs": 2, **settings}))
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == [f"checkpoint-{step}" for step in saved]
    assert result.stop_reason == "finished" and result.weights_dir == tmp_path / "run" / "adapter"


def test_save_only_model_leaves_out_the_optimizer(checkpoint, rows, tmp_path):
    run(tiny_recipe(checkpoint, rows, tmp_path / "run", training={"max_steps": 1, "save_only_model": True}))
    names = {p.name for p in (tmp_path / "run" / "checkpoint-1").rglob("*") if p.is_file()}
    assert "adapter_model.safetensors" in names and not any(name.startswith(("optimizer", "random")) for name in names)


def test_rows_of_text_under_a_tower_that_alone_trains(checkpoint, rows, tmp_path):
    """They train nothing and harm nothing; under float16 they would leave a step without a gradient."""
    tuning = {"finetune_language_layers": False, "finetune_vision_layers": True}
    training = {"train_batch_size": 1, "token_budget": 256, "shuffle": False}
    assert run(tiny_recipe(checkpoint, rows, tmp_path / "run", tuning=tuning, training=training)).state.step == 9
    with pytest.raises(RecipeError, match=r"row 8 has no image.*finetune_language_layers"):
        run(tiny_recipe(checkpoint, rows, tmp_path / "half", model={"dtype": "float16"}, tuning=tuning, training=training))
