"""Kept features in whole runs: the same weights, fewer images opened, and a tower that is only there when it is needed."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from finesight.data import feed as feed_module
from finesight.errors import ModelError, TrainingError
from finesight.recipe import Recipe
from finesight.training.prepare import prepare
from finesight.training.processes import start_accelerator
from finesight.training.run import train
from finesight.training.session import RunResult, Session
from finesight.training.sft import SupervisedFineTuning
from tiny_runs import tiny_recipe, write_rows

CPU = torch.device("cpu")


def hit_rates(result: RunResult) -> list[float | None]:
    return [line.get("feature_hit_rate") for line in result.history if "loss" in line]


def weights_of(result: RunResult) -> dict[str, torch.Tensor]:
    return load_file(result.weights_dir / "adapter_model.safetensors")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(found[name], value, rtol=1e-4, atol=1e-6) for name, value in expected.items())


class Watched(Session):
    """A session whose tower may leave, as on a GPU, and which notes in which order the tower moves and is needed.

    Notes: `leave`, `back`; of each pack `pixels` or `kept`, followed by `away` if the tower is.
    """

    def __init__(self, recipe: Recipe, **arguments: Any) -> None:
        self.out = io.StringIO()
        accelerator = start_accelerator(recipe, Path(recipe.training.output_dir), CPU)
        super().__init__(prepare(recipe), accelerator, console=Console(file=self.out, width=400), **arguments)
        self.notes: list[str] = []
        place = self.packed.tower_place
        leave, present = place.leave, place.present

        def noted_leave() -> int:
            self.notes.append("leave")
            return leave()

        def noted_present() -> None:
            self.notes += ["back"] if place.away else []
            present()

        place.leave, place.present = noted_leave, noted_present  # type: ignore[method-assign]
        if self.kept is not None:
            self.kept.tower = place

        def note(what: str) -> None:
            self.notes.append(f"{what} away" if place.away else what)

        self.packed.register_forward_pre_hook(lambda module, inputs: note("pixels" if inputs[0].grids else "kept"))


@pytest.mark.parametrize("workers", [0, 2])
def test_later_epochs_take_features_from_memory_and_learn_the_same(checkpoint: Path, tmp_path: Path, workers: int) -> None:
    rows = write_rows(tmp_path / "rows")
    weights = {}
    for name, gib in (("computed", 0), ("kept", 1.0)):
        recipe = tiny_recipe(
            checkpoint,
            rows,
            tmp_path / name,
            training={"num_train_epochs": 3, "feature_cache_gib": gib, "num_workers": workers, "adam_epsilon": 1e-3},
        )
        result = train(recipe)
        weights[name] = weights_of(result)
        rates = hit_rates(result)
        if gib:
            # from the first step of the second epoch on, although workers were ahead of the loop
            assert rates[0] == 0
            assert rates[3:] == [1.0] * 6
        else:
            assert set(rates) == {None}
    assert same(weights["kept"], weights["computed"])


def test_no_image_is_opened_after_the_step_that_computes_it(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = feed_module.visual_patches
    monkeypatch.setattr(feed_module, "visual_patches", lambda item, processor: opened.append(item.key) or real(item, processor))
    settings = {"num_train_epochs": 3, "feature_cache_gib": 1.0, "train_batch_size": 2}
    train(tiny_recipe(checkpoint, write_rows(tmp_path / "rows"), tmp_path / "run", training=settings))
    assert len(set(opened)) == 4
    assert len(opened) <= 5  # one more where the second step was built before the size of features was known


def test_a_folder_of_features_serves_the_next_run(checkpoint: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    settings = {"num_train_epochs": 1, "feature_cache_gib": 0, "feature_cache_dir": str(tmp_path / "features")}
    first = train(tiny_recipe(checkpoint, rows, tmp_path / "first", training=settings))
    assert hit_rates(first)[0] == 0
    second = Watched(tiny_recipe(checkpoint, rows, tmp_path / "second", training=settings))
    result = second.run()
    assert set(hit_rates(result)) == {1.0}
    assert second.notes == ["leave", *["kept away"] * result.state.step, "back"]
    assert same(weights_of(result), weights_of(first))


def test_the_tower_is_there_when_it_is_needed_and_only_then(checkpoint: Path, tmp_path: Path) -> None:
    rows, held_out = write_rows(tmp_path / "rows"), write_rows(tmp_path / "held_out", images=6, questions=1)
    sections = {
        "data": {"eval_split": str(held_out)},
        "evaluation": {"max_completion_length": 2},
    }
    training = {"num_train_epochs": 3, "eval_strategy": "epoch", "sample_answers": 1, "adam_epsilon": 1e-3}
    plain = train(tiny_recipe(checkpoint, rows, tmp_path / "plain", training={**training, "feature_cache_gib": 0}, **sections))
    session = Watched(tiny_recipe(checkpoint, rows, tmp_path / "kept", training={**training, "feature_cache_gib": 1.0}, **sections))
    result = session.run()
    notes = session.notes
    # Held-out images beyond those trained on are computed by the first evaluation; until then the tower stays.
    first_leave = notes.index("leave")
    assert "pixels" in notes[:first_leave]
    assert "pixels" not in notes[first_leave:]
    assert not {"kept", "pixels away"} & set(notes[first_leave:])
    # away in each later epoch, evaluation and answer, which all take kept features; back in the end
    assert [note for note in notes[first_leave:] if note != "kept away"] == ["leave", "back"]
    assert not session.packed.tower_place.away
    assert session.out.getvalue().count("the vision tower moved to host memory") == 1
    assert same(weights_of(result), weights_of(plain))
    held_out_losses = [[line["eval_loss"] for line in run.history if "eval_loss" in line] for run in (plain, result)]
    assert held_out_losses[1] == pytest.approx(held_out_losses[0], rel=1e-4)


def test_held_out_rows_that_are_never_measured_do_not_hold_the_tower(checkpoint: Path, tmp_path: Path) -> None:
    rows, held_out = write_rows(tmp_path / "rows"), write_rows(tmp_path / "held_out", images=6, questions=1)
    recipe = tiny_recipe(
        checkpoint,
        rows,
        tmp_path / "run",
        data={"eval_split": str(held_out)},
        training={"num_train_epochs": 2, "feature_cache_gib": 1.0},
    )
    session = Watched(recipe)
    session.run()
    assert session.notes.count("leave") == 1


def test_too_little_room_is_told_once_and_the_tower_stays(checkpoint: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    settings = {"num_train_epochs": 3, "adam_epsilon": 1e-3}
    plain = train(tiny_recipe(checkpoint, rows, tmp_path / "plain", training=settings))
    session = Watched(tiny_recipe(checkpoint, rows, tmp_path / "run", training={**settings, "feature_cache_gib": 3e-6}))
    result = session.run()
    assert "leave" not in session.notes
    assert session.out.getvalue().count("of main memory are set aside") == 1
    assert "the vision tower stays on the GPU" in session.out.getvalue()
    rates = hit_rates(result)
    assert any(0 < (rate or 0) < 1 for rate in rates[3:]) and set(rates) != {1.0}
    assert same(weights_of(result), weights_of(plain))


class Stopping(SupervisedFineTuning):
    """Interrupts the run, or lets it fail, at a step."""

    def __init__(self, at: tuple[int, int], error: Exception | None = None) -> None:
        self.at, self.error = at, error

    def loss(self, logprobs: torch.Tensor, batch: Any, step: Any) -> torch.Tensor:
        if (step.epoch, step.index) == self.at:
            if self.error is not None:
                raise self.error
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(logprobs, batch, step)


def test_resume_computes_again_what_memory_held_and_learns_the_same(checkpoint: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")

    def recipe(name: str, **more: Any) -> Recipe:
        settings = {"num_train_epochs": 3, "feature_cache_gib": 1.0, "adam_epsilon": 1e-3, **more}
        return tiny_recipe(checkpoint, rows, tmp_path / name, training=settings)

    whole = train(recipe("whole"))
    first = Watched(recipe("parts"), algorithm=Stopping((1, 1)))
    stopped = first.run()
    assert stopped.interrupted and stopped.state.step == 5
    assert first.notes[-1] == "back" and not first.packed.tower_place.away
    second = train(recipe("parts", resume=True))
    rates = hit_rates(second)[5:]
    assert rates[0] == 0 and rates[-1] == 1
    assert same(weights_of(second), weights_of(whole))


def test_a_run_that_fails_gives_the_tower_back(checkpoint: Path, tmp_path: Path) -> None:
    settings = {"num_train_epochs": 3, "feature_cache_gib": 1.0}
    recipe = tiny_recipe(checkpoint, write_rows(tmp_path / "rows"), tmp_path / "run", training=settings)
    session = Watched(recipe, algorithm=Stopping((1, 1), TrainingError("enough")))
    with pytest.raises(TrainingError, match="enough"):
        session.run()
    assert session.notes[-2:] == ["kept away", "back"]


def test_a_folder_that_cannot_be_written_is_told(checkpoint: Path, tmp_path: Path) -> None:
    """Features that could not be written are asked for by no later step in vain."""
    settings = {"num_train_epochs": 2, "feature_cache_gib": 0, "feature_cache_dir": str(tmp_path / "features")}
    session = Watched(tiny_recipe(checkpoint, write_rows(tmp_path / "rows"), tmp_path / "run", training=settings))
    assert session.kept is not None and session.kept.cache.folder is not None
    session.kept.cache.folder.rmdir()
    with pytest.raises(ModelError, match=r"Features cannot be written to .*Free space"):
        session.run()
