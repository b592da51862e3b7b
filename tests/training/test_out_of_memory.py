"""Running out of memory: the step is computed again in smaller packs with the same result, and the run goes on."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finesight.errors import TrainingError
from finesight.models.memory import is_out_of_memory
from finesight.training.ahead import StepsAhead
from finesight.training.out_of_memory import updating_weights
from finesight.training.prepare import prepare
from finesight.training.processes import start_accelerator
from finesight.training.session import RunResult, Session
from finesight.training.sft import SupervisedFineTuning
from finesight.training.telemetry import read_metrics
from tiny_runs import tiny_recipe
from training.test_loop import THREE_STEPS, distance, weights

ROOM = 120  # tokens that "fit"
LATE = "layers.0.self_attn.q_proj.lora_A.default.weight"  # its gradient comes after those of the layers above


class SmallMemory(SupervisedFineTuning):
    """Packs past `ROOM` tokens run out of memory: when their loss is formed, or in the middle of their backward pass."""

    def __init__(self, where: str, room: int = ROOM) -> None:
        self.where, self.room = where, room
        self.failures, self.packs, self.half_done, self.graphs = 0, [], 0, []
        self.armed = False

    def watch(self, session: Session) -> None:
        named = dict(session.model.named_parameters())
        late = next(parameter for name, parameter in named.items() if name.endswith(LATE))

        def hook(gradient):
            if self.armed:
                self.half_done += any(parameter.grad is not None for parameter in named.values())
                self._fail()

        late.register_hook(hook)

    def _fail(self):
        self.failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    def loss(self, logprobs, batch, step):
        assert all(graph() is None for graph in self.graphs)  # nothing of a failed try is held on to
        self.armed = self.where == "backward" and batch.num_tokens > self.room
        if self.where == "forward" and batch.num_tokens > self.room:
            self.graphs.append(weakref.ref(logprobs))
            self._fail()
        self.packs.append((step.epoch, step.index, batch.num_tokens))
        return super().loss(logprobs, batch, step)


def run(recipe, algorithm=None, resume_from=None) -> RunResult:
    session = Session(
        prepare(recipe), start_accelerator(recipe, Path(recipe.training.output_dir), torch.device("cpu")), algorithm=algorithm
    )
    if isinstance(algorithm, SmallMemory):
        algorithm.watch(session)
    return session.run(resume_from)


def events(result: RunResult) -> list[dict]:
    return [line for line in result.history if "event" in line]


@pytest.fixture(scope="module")
def recipe(checkpoint, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out-of-memory")
    return lambda name, **training: tiny_recipe(checkpoint, rows, folder / name, training={**THREE_STEPS, "token_budget": 4096, **training})


@pytest.fixture(scope="module")
def undisturbed(recipe):
    return run(recipe("undisturbed"))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_step_is_computed_again_with_the_same_result(recipe, undisturbed, where):
    gc.collect()
    algorithm = SmallMemory(where)
    result = run(recipe(where), algorithm)
    assert algorithm.failures >= 1 and (where == "forward" or algorithm.half_done == algorithm.failures)
    assert distance(weights(result), weights(undisturbed)) < 1e-6
    lines = [line for line in result.history if "event" not in line]
    for a, b in zip(lines, undisturbed.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    # Told as a line of metrics before that of its step, and counted in run.json.
    first = result.history[0]
    assert (first["step"], first["event"], len(first["rows"])) == (1, "out_of_memory", 4) and first["pack_tokens"] > ROOM
    assert len(events(result)) == result.state.out_of_memory == algorithm.failures
    written = json.loads((result.output_dir / "run.json").read_text())["state"]
    assert (written["out_of_memory"], written["token_limit"]) == (algorithm.failures, events(result)[-1]["token_limit"])
    assert [line for line in read_metrics(result.output_dir / "metrics.jsonl") if "event" in line] == events(result)


def test_what_was_learned_holds_for_later_steps_and_workers(recipe):
    """All failures are in the first step or two, and steps that workers had planned before are planned again."""
    results = {}
    for workers in (0, 2):
        algorithm = SmallMemory("forward")
        result = run(recipe(f"learned-{workers}", num_train_epochs=4, max_steps=None, num_workers=workers), algorithm)
        limit = result.state.token_limit
        assert limit <= ROOM and result.state.step == 12 and {line["step"] for line in events(result)} <= {1, 2}
        assert max(tokens for epoch, _, tokens in algorithm.packs if epoch > 0) <= ROOM
        results[workers] = result, algorithm.packs
    (alone, packs), (with_workers, packs_with_workers) = results.values()
    assert packs == packs_with_workers and distance(weights(alone), weights(with_workers)) == 0


def test_a_resumed_run_keeps_what_was_learned(recipe):
    class Stopping(SmallMemory):
        def loss(self, logprobs, batch, step):
            if (step.epoch, step.index) == (1, 0):
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(logprobs, batch, step)

    settings = {"num_train_epochs": 2, "max_steps": None, "save_strategy": "steps", "save_steps": 100}
    whole = run(recipe("whole", **settings), SmallMemory("backward"))
    first = run(recipe("parts", **settings), Stopping("backward"))
    assert first.interrupted and first.state.step == 4 and first.state.out_of_memory == whole.state.out_of_memory > 0
    again = SmallMemory("backward")
    second = run(recipe("parts", **settings), again, resume_from=first.output_dir / "checkpoint-4")
    assert again.failures == 0 and second.state.out_of_memory == whole.state.out_of_memory
    assert second.state.token_limit == whole.state.token_limit
    assert distance(weights(second), weights(whole)) == 0
    assert [line["loss"] for line in second.history if "loss" in line] == [line["loss"] for line in whole.history if "loss" in line]


def test_a_single_sample_that_does_not_fit_is_named(recipe):
    with pytest.raises(
        TrainingError, match=r"(?s)rows\.jsonl, row \d+ alone, \d+ tokens long.*CUDA out of memory.*max_pixels.*offload"
    ) as error:
        run(recipe("single"), SmallMemory("forward", room=10))
    assert error.value.__cause__ is None
    assert not any("loss" in line for line in read_metrics(Path(recipe("single").training.output_dir) / "metrics.jsonl"))


def test_other_errors_are_not_taken_for_it(recipe):
    class Broken(SupervisedFineTuning):
        def loss(self, logprobs, batch, step):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(recipe("broken"), Broken())


def test_held_out_packs_are_divided_too(checkpoint, rows, tmp_path):
    common = dict(data={"eval_split": "last 5"}, training={"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "token_budget": 4096})
    expected = run(tiny_recipe(checkpoint, rows, tmp_path / "a", **common))
    recipe = tiny_recipe(checkpoint, rows, tmp_path / "b", **common)
    session = Session(prepare(recipe), start_accelerator(recipe, tmp_path / "b", torch.device("cpu")))
    failed = []

    def no_room(module, arguments):
        if not module.training and arguments[0].num_tokens > ROOM:
            failed.append(arguments[0].num_tokens)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    session.packed.register_forward_pre_hook(no_room)
    result = session.run()
    found, wanted = ([line["eval_loss"] for line in each.history if "eval_loss" in line] for each in (result, expected))
    assert found == pytest.approx(wanted, rel=1e-6) and len(found) == 2
    assert [line["event"] for line in events(result)] == ["out_of_memory_in_evaluation"] * len(failed)
    assert {line["step"] for line in events(result)} == {1}  # learned at the first evaluation
    assert result.state.out_of_memory == 0 and result.state.token_limit is None  # of no concern to training


@dataclass
class Crowded:
    """Stands for a pack that finds room only once the pack before it is done."""

    name: str
    room_from: int = 0  # how many moves fail before
    moves: int = 0
    stored_keys: tuple[str, ...] = ()
    item_keys: tuple[str, ...] = ()

    def to(self, device, non_blocking=False):
        self.moves += 1
        if self.moves <= self.room_from:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self


def test_a_pack_that_cannot_be_moved_ahead_is_moved_when_its_turn_comes():
    steps = [
        SimpleNamespace(packs=[Crowded("a"), Crowded("b", room_from=1)], device_s=0.0),
        SimpleNamespace(packs=[Crowded("c", room_from=1), Crowded("d")], device_s=0.0),
    ]
    ahead = StepsAhead(iter(steps), torch.device("cpu"))
    arrived = []
    for step in ahead:
        arrived += [pack.name for pack in ahead.packs(step)]
        ahead.prefetch()
    assert arrived == ["a", "b", "c", "d"]
    full = StepsAhead(iter([SimpleNamespace(packs=[Crowded("a", room_from=2)], device_s=0.0)]), torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError):  # there is nothing else to wait for
        list(full.packs(next(full)))


def test_the_words_of_other_allocators_are_known():
    known = [
        torch.OutOfMemoryError("any"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
        ),
    ]
    assert all(is_out_of_memory(error) for error in known)
    unknown = [RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("out of memory"), KeyError("memory")]
    assert not any(is_out_of_memory(error) for error in unknown)
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(real.value)


def test_an_optimizer_without_room_is_told_as_such():
    with pytest.raises(TrainingError, match=r"updating the weights.*paged_adamw_8bit"), updating_weights():
        torch.empty(2**60, dtype=torch.uint8)
