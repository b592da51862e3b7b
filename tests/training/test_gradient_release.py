"""Gradient release: the same weights to the bit, fewer gradients at once, and no update from a loss that is not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finesight.errors import RecipeError, TrainingError
from finesight.training.checkpoint import list_checkpoints
from finesight.training.prepare import prepare
from finesight.training.processes import start_accelerator
from finesight.training.run import train
from finesight.training.session import Session
from finesight.training.sft import SupervisedFineTuning
from tiny_runs import tiny_recipe
from training.test_loop import distance, weights
from training.test_resume import all_weights, interrupted


def full_recipe(checkpoint, rows, folder, release, model=None, tuning=None, **training):
    settings = {"max_steps": 3, "learning_rate": 1e-3, "max_grad_norm": 0, "save_strategy": "no", "token_budget": 4096}
    return tiny_recipe(
        checkpoint, rows, folder, model=model or {}, tuning={"method": "full", **(tuning or {})},
        training={**settings, "gradient_release": release, **training},
    )  # fmt: skip


BF16 = {"dtype": "bfloat16"}
EVERYTHING = {"finetune_vision_layers": True, "finetune_merger": True}


@pytest.mark.parametrize(
    ("model", "tuning", "training"),
    [
        ({}, {}, {}),
        # several packs in a step, one of them of text alone: the tower's gradients are of earlier packs only
        ({}, EVERYTHING, {"token_budget": 100, "optim": "muon", "shuffle": False, "train_batch_size": 9}),
        (BF16, EVERYTHING, {"token_budget": 100, "gradient_checkpointing": "none"}),
        (BF16, {"bf16_updates": "stochastic_rounding"}, {"vision_learning_rate": 1e-4}),
        ({}, {}, {"optim": "adamw_8bit"}),
        (BF16, {"bf16_updates": "stochastic_rounding"}, {"optim": "paged_adamw_8bit", "token_budget": 128}),
    ],
    ids=["float32", "muon-tower-packs", "bf16-masters", "bf16-rounding", "8bit", "paged-8bit-rounding"],
)
def test_weights_are_the_same_to_the_bit(checkpoint, rows, tmp_path, model, tuning, training):
    if "8bit" in training.get("optim", ""):
        pytest.importorskip("bitsandbytes")
    results = [
        train(full_recipe(checkpoint, rows, tmp_path / str(release), release, model, tuning, **training)) for release in (False, True)
    ]
    a, b = (weights(result) for result in results)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for plain, released in zip(results[0].history, results[1].history, strict=True):
        for name in ("loss", "grad_norm", "learning_rate"):
            assert plain[name] == released[name], name
    assert results[1].history[0]["grad_norm"] > 0


def peak_gradient_bytes(recipe) -> int:
    session = Session(prepare(recipe), start_accelerator(recipe, Path(recipe.training.output_dir), torch.device("cpu")))
    weights = [parameter for parameter in session.model.parameters() if parameter.requires_grad]
    stepped = [p for optimizer in session.optimizer.optimizers for group in optimizer.param_groups for p in group["params"]]
    carriers = {*weights, *stepped}
    peak = 0

    def measure(parameter):
        nonlocal peak
        peak = max(peak, sum(carrier.grad.nbytes for carrier in carriers if carrier.grad is not None))

    for weight in weights:
        weight.register_post_accumulate_grad_hook(measure)  # before those of the release
    session.run()
    return peak


@pytest.mark.parametrize("model", [{}, BF16], ids=["float32", "bf16-masters"])
def test_fewer_gradients_live_at_once(checkpoint, rows, tmp_path, model):
    """In a step of one pack never more than the largest few: here the embedding's and the vocabulary matrix's are most of all."""
    whole, released = (
        peak_gradient_bytes(full_recipe(checkpoint, rows, tmp_path / str(release), release, model)) for release in (False, True)
    )
    assert released < 0.25 * whole, (released, whole)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_resumed_run_ends_with_the_same_bits(checkpoint, rows, tmp_path, optim):
    def recipe(name, **more):
        return full_recipe(checkpoint, rows, tmp_path / name, True, BF16, max_steps=5, save_strategy="epoch", optim=optim, **more)

    whole = train(recipe("whole"))
    assert interrupted(recipe("parts"), 2).state.step == 2
    second = train(recipe("parts", resume=True))
    a, b = all_weights(whole.weights_dir), all_weights(second.weights_dir)
    assert second.state.step == 5 and all(torch.equal(a[name], b[name]) for name in a)


def test_a_loss_that_is_not_finite_updates_nothing(checkpoint, rows, tmp_path):
    class Spoiled(SupervisedFineTuning):
        def loss(self, logprobs, batch, step):
            loss = super().loss(logprobs, batch, step)
            return loss * float("nan") if step.index == 1 else loss

    recipe = full_recipe(checkpoint, rows, tmp_path / "run", True, save_strategy="steps", save_steps=1)
    session = Session(prepare(recipe), start_accelerator(recipe, tmp_path / "run", torch.device("cpu")), algorithm=Spoiled())
    with pytest.raises(TrainingError, match="loss of step 2"):
        session.run()
    (saved,) = list_checkpoints(tmp_path / "run")
    now = {name: parameter.detach() for name, parameter in session.model.named_parameters()}
    saved_weights = all_weights(saved / "model")
    assert saved_weights.keys() <= now.keys() and distance({name: now[name] for name in saved_weights}, saved_weights) == 0


def test_out_of_memory_after_the_first_update_is_told(checkpoint, rows, tmp_path):
    """Before it the step is begun again as ever."""
    recipe = full_recipe(checkpoint, rows, tmp_path / "run", True)
    session = Session(prepare(recipe), start_accelerator(recipe, tmp_path / "run", torch.device("cpu")))

    def no_room(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    session.packed.base.lm_head.weight.register_hook(no_room)  # the first gradient to be complete
    with pytest.raises(TrainingError, match=r"row \d+ alone"):  # no pack is small enough
        session.run()
    again = full_recipe(checkpoint, rows, tmp_path / "again", True)
    session = Session(prepare(again), start_accelerator(again, tmp_path / "again", torch.device("cpu")))
    session.packed.base.model.language_model.embed_tokens.weight.register_hook(no_room)  # the last one
    with pytest.raises(TrainingError, match=r"(?s)some weights were updated already.*training\.token_budget: \d+.*--resume"):
        session.run()


def test_float16_is_refused(checkpoint, rows, tmp_path):
    with pytest.raises(RecipeError, match=r"gradient_release.*float16.*model\.dtype"):
        train(full_recipe(checkpoint, rows, tmp_path / "run", True, {"dtype": "float16"}))


def test_several_processes_are_refused(checkpoint, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=r"gradient_release.*single process"):
        train(full_recipe(checkpoint, rows, tmp_path / "run", True))
