"""Runs that are sampled by a server, against the project's own one: equal to those that the model in training samples."""

from __future__ import annotations

import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from rich.console import Console

from finesight.data_settings import DataSettings
from finesight.errors import DataError, EngineError, RecipeError
from finesight.recipe import ModelSettings
from finesight.recipe_files import parse_recipe
from finesight.sampling.forking_sampler import ForkingSampler
from finesight.sampling.types import SamplingSettings
from finesight.sampling.vllm_sampler import prompt_seed
from finesight.serve.models import ModelShelf
from finesight.training.grpo import GRPO
from finesight.training.prepare import prepare
from finesight.training.processes import start_accelerator
from finesight.training.run import train
from finesight.training.run_sizes import rollout_sizes
from finesight.training.session import Session
from serve.conftest import Running, running
from tiny import FAMILIES, tiny_checkpoint
from tiny_runs import MAX_PIXELS, MIN_PIXELS, tiny_recipe
from training.test_loop import distance, weights

REWARD = """
def letters(completions, **kwargs):
    return [min(1.0, completion[0]["content"].count("e") / 5) for completion in completions]
"""
PIXELS = DataSettings(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
# So large an epsilon makes the update proportional to the gradient: Adam would else blow up the rounding of tiny entries.
STEPS = {
    "train_batch_size": 12,
    "max_steps": 3,
    "save_strategy": "no",
    "lr_scheduler_type": "constant",
    "adam_epsilon": 1.0,
    "learning_rate": 0.5,
}
MEAN, SHARE = "sampling/importance_sampling_ratio/mean", "sampling/importance_sampling_ratio/truncated"


def shelf_of(checkpoint: Path, **options) -> ModelShelf:
    return ModelShelf(
        ModelSettings(name_or_path=str(checkpoint), dtype="float32"), {}, data=options.pop("data", PIXELS), device="cpu", **options
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def server(checkpoint, root):
    with running(shelf_of(checkpoint), adapter_dirs=(root,)) as found:
        yield found


@pytest.fixture
def recipe_of(checkpoint, rows, root, server, request):
    (root / "own.py").write_text(REWARD, encoding="utf-8")

    def make(name: str = "run", *, rollout=None, training=None, url: str | None = None, prompts=None, model=checkpoint, **sections):
        engine = {} if rollout is not None and rollout.get("engine") == "builtin" else {"engine": "vllm", "url": url or server.address}
        return tiny_recipe(
            model,
            prompts or rows,
            root / request.node.name / name,
            grpo={"num_generations": 4, "image_ablation_steps": 2},
            rollout={"max_completion_length": 10, **engine, **(rollout or {})},
            training={**STEPS, **(training or {})},
            rewards=[f"{root / 'own.py'}:letters"],
            **sections,
        )

    return make


def session_of(recipe, algorithm=None) -> Session:
    return Session(prepare(recipe), start_accelerator(recipe, Path(recipe.training.output_dir), torch.device("cpu")), algorithm=algorithm)


def steps_of(result) -> list[dict]:
    return [line for line in result.history if "loss" in line]


def served(server: Running) -> list[str]:
    return [card["id"] for card in httpx.get(f"{server.address}/v1/models", trust_env=False).json()["data"]]


class OneByOne:
    """The model in training, asked for one prompt at a time under the seeds that a server is sent; log-probabilities may be shifted."""

    def __init__(self, session: Session, shift: float = 0.0) -> None:
        self.inner, self.shift = ForkingSampler(session.packed, session.prepared.processor), shift
        self.forbidden = self.inner.forbidden

    def refresh(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass

    def generate_samples(self, samples, settings, on_progress=None):
        found = []
        for place, sample in enumerate(samples):
            for completion in self.inner.generate_samples([sample], replace(settings, seed=prompt_seed(settings.seed, place))):
                found.append(replace(completion, logprobs=tuple(value + self.shift for value in completion.logprobs)))
        return found


def builtin_run(recipe, algorithm=None, shift: float = 0.0):
    session = session_of(recipe, algorithm)
    session.engine = OneByOne(session, shift)
    return session.run()


def test_a_share_of_the_prompts_is_answered_as_in_the_whole(recipe_of):
    """As each of several processes asks for its share."""
    session = session_of(recipe_of())
    engine, samples = session.engine, list(session.prepared.samples[:3])
    settings = SamplingSettings(8, 1.0, num_generations=2, seed=3)
    try:
        engine.refresh(0)
        whole = engine.generate_samples(samples, settings)
        share = engine.generate_samples(samples[1:], replace(settings, first_place=1))
    finally:
        engine.close()
    assert len({completion.token_ids for completion in whole}) > 1
    assert [completion.token_ids for completion in share] == [completion.token_ids for completion in whole[2:]]


@pytest.mark.parametrize("rollout", [{}, {"temperature": 0.8, "top_k": 40}], ids=["plain", "narrowed"])
def test_a_run_is_the_one_that_the_model_itself_samples(recipe_of, server, rollout):
    """Completions, losses, gradients and the adapter at the end; the adapter changes at the server with every update."""
    result = train(recipe_of("served", rollout=rollout))
    same = builtin_run(recipe_of("builtin", rollout={**rollout, "engine": "builtin"}))
    for ours, theirs in zip(steps_of(result), steps_of(same), strict=True):
        # Of the order of float32's rounding of log-probabilities, which are about -6.
        assert ours["sampling/sampling_logp_difference/max"] < 1e-5
        assert ours[MEAN] == pytest.approx(1, abs=1e-6) and ours[SHARE] == 0
        assert MEAN not in theirs  # the model itself needs no correction
        for name in ("reward", "entropy", "grad_norm", "completions/mean_length", "image_ablation/reward/without_image"):
            assert (name in ours) == (name in theirs)
            assert name not in ours or ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert {line["step"] for line in steps_of(result)} == {1, 2, 3} and steps_of(result)[0]["grad_norm"] > 0
    for number in (1, 2, 3):
        tables = [parquet.read_table(run.output_dir / "completions" / f"step-{number:06d}.parquet") for run in (result, same)]
        assert tables[0]["completion"].to_pylist() == tables[1]["completion"].to_pylist()
    assert distance(weights(result), weights(same)) < 1e-5
    assert served(server) == ["qwen3_vl"]  # the last adapter has been unloaded
    assert not (result.output_dir / "rollout-adapters").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_log_probabilities_follow_the_adapter(family, recipe_of, tmp_path_factory, root):
    checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("families") / family, family)
    pixels = DataSettings(min_pixels=28 * 28 * 4, max_pixels=32 * 32 * 9)
    with running(shelf_of(checkpoint, data=pixels), adapter_dirs=(root,)) as server:
        limits = {"min_pixels": 28 * 28 * 4, "max_pixels": 32 * 32 * 9}
        tuning = {"finetune_experts": True} if family == "qwen3_vl_moe" else {}
        session = session_of(recipe_of(url=server.address, model=checkpoint, data=limits, tuning=tuning))
        engine, own = session.engine, OneByOne(session)
        settings = SamplingSettings(max_completion_length=8, temperature=1.0, num_generations=3, seed=7)
        prompts = session.prepared.samples[:3]
        with pytest.raises(EngineError, match="no adapter yet"):
            engine.generate_samples(prompts, settings)
        found, told = [], []
        for step in (0, 1):
            engine.refresh(step)
            told.clear()
            answers = engine.generate_samples(prompts, settings, lambda *done: told.append(done))
            assert told == [(1, 3), (2, 3), (3, 3)]
            expected = own.generate_samples(prompts, settings)
            assert [(one.token_ids, one.text, one.finish_reason) for one in answers] == [
                (one.token_ids, one.text, one.finish_reason) for one in expected
            ]
            for one, other in zip(answers, expected, strict=True):
                assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
            found.append(answers)
            names = served(server)
            assert len(names) == 2 and names[1].startswith("finesight-") and names[1].endswith(f"-step-{step}")
            with torch.no_grad():
                for name, parameter in session.model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        assert max(abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(*found, strict=True)) > 0.01
        engine.close()
        assert served(server) == [checkpoint.name]


def test_weights_correct_what_the_engine_believes(recipe_of):
    """A sampler that calls every token less likely by a factor has all its terms weighed by that factor, up to the cap."""

    def first(factor: float | None) -> dict:
        recipe = recipe_of(f"factor-{factor}", rollout={"engine": "builtin"}, training={"max_steps": 1})
        algorithm = GRPO(recipe.grpo, recipe.rollout.max_completion_length, corrects_sampler=factor is not None)
        shift = 0.0 if factor is None else -float(torch.tensor(factor).log())
        return steps_of(builtin_run(recipe, algorithm, shift))[0]

    plain = first(None)
    for factor, weight, truncated in ((1.5, 1.5, 0), (8.0, 2.0, 1), (0.5, 0.5, 0)):
        line = first(factor)
        assert (line[MEAN], line[SHARE]) == (pytest.approx(weight, rel=1e-5), truncated)
        assert line["grad_norm"] == pytest.approx(weight * plain["grad_norm"], rel=1e-4)
        assert line["sampling/sampling_logp_difference/mean"] == pytest.approx(abs(torch.tensor(factor).log().item()), rel=1e-4)


def test_a_run_goes_on_at_another_address(recipe_of, checkpoint, root):
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = train(recipe_of("whole", training=saving))
    folder = root / "again"
    shutil.copytree(whole.output_dir / "checkpoint-1", folder / "checkpoint-1")
    with running(shelf_of(checkpoint, name="policy"), adapter_dirs=(root,)) as other:
        recipe = recipe_of(url=other.address, rollout={"model": "policy"}, training={**saving, "output_dir": str(folder), "resume": True})
        again = train(recipe)
    assert [line["step"] for line in steps_of(again)] == [2]
    assert steps_of(again)[0]["loss"] == pytest.approx(steps_of(whole)[1]["loss"], abs=1e-6)
    assert distance(weights(again), weights(whole)) < 1e-6


def test_the_plan_has_no_rollouts_in_memory(recipe_of):
    recipe = recipe_of()
    assert rollout_sizes(prepare(recipe)) is None
    held_out = recipe.model_copy(update={"training": recipe.training.model_copy(update={"eval_strategy": "epoch"})})
    assert rollout_sizes(replace(prepare(recipe), recipe=held_out)) is not None  # answered by the model in training


def test_an_adapter_in_the_tower(recipe_of):
    """The project's own server applies it; vLLM does so only where it is told to, which a run cannot see."""
    out = io.StringIO()
    recipe = recipe_of(tuning={"finetune_vision_layers": True, "finetune_merger": True})
    lines = steps_of(train(recipe, console=Console(file=out, width=300)))
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-5 for line in lines) and lines[1]["grad_norm"] > 0
    assert "unless it was started with --enable-tower-connector-lora" in out.getvalue()


class TestWhatIsRefused:
    """Before the model is loaded where that can be, and with what to do."""

    def refused(self, recipe, error=EngineError) -> str:
        with pytest.raises(error) as raised:
            train(recipe)
        return str(raised.value)

    def test_no_server(self, recipe_of):
        message = self.refused(recipe_of(url="http://127.0.0.1:9"))
        assert "http://127.0.0.1:9 (rollout.url) cannot be reached" in message
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve" in message and "--enable-lora --max-lora-rank 8 " in message

    def test_a_server_without_runtime_adapters(self, recipe_of, checkpoint):
        with running(shelf_of(checkpoint)) as closed:
            assert "takes no adapters at run time. Start it with: VLLM_ALLOW" in self.refused(recipe_of(url=closed.address))

    def test_a_folder_that_the_server_does_not_see(self, recipe_of, checkpoint, tmp_path):
        with running(shelf_of(checkpoint), adapter_dirs=(tmp_path,)) as elsewhere:
            message = self.refused(recipe_of(url=elsewhere.address))
            assert "No adapter found" in message and "must see the folder of the run under the same path" in message

    def test_another_model(self, recipe_of, server):
        assert "has no model other (rollout.model); it serves qwen3_vl" in self.refused(recipe_of(rollout={"model": "other"}))

    def test_a_name_of_its_own(self, recipe_of, checkpoint, root):
        with running(shelf_of(checkpoint, name="policy"), adapter_dirs=(root,)) as named:
            message = self.refused(recipe_of(url=named.address))
            assert f"The run trains {checkpoint}, the engine's server serves policy" in message and "set rollout.model" in message

    def test_room(self, recipe_of, checkpoint, root):
        with running(shelf_of(checkpoint), adapter_dirs=(root,), max_length_tokens=60) as short:
            message = self.refused(recipe_of(url=short.address))
            assert "more than the 60 that the server" in message and "--max-model-len" in message

    def test_an_api_key(self, recipe_of, checkpoint, root, monkeypatch):
        with running(shelf_of(checkpoint), adapter_dirs=(root,), api_key="secret") as closed:
            recipe = recipe_of(url=closed.address, rollout={"api_key_env": "ENGINE_KEY"}, training={"max_steps": 1})
            assert "wants an API key" in self.refused(recipe) and "rollout.api_key_env" in self.refused(recipe)
            monkeypatch.setenv("ENGINE_KEY", "secret")
            assert train(recipe).state.step == 1

    def test_an_image_of_another_size_there(self, recipe_of, checkpoint, root):
        larger = DataSettings(min_pixels=64 * 64, max_pixels=96 * 96)  # go before those that the adapter was trained with
        with running(shelf_of(checkpoint, data=larger), adapter_dirs=(root,)) as blind:
            message = self.refused(recipe_of(url=blind.address))
        assert re.search(
            r"image 0 \(.*image-\d.png\) has \d visual tokens in training, at \d\d × \d\d pixels, and \d at the server", message
        )
        assert "--mm-processor-kwargs" in message and "data.min_pixels" in message

    def test_another_template(self, recipe_of, checkpoint, root, tmp_path):
        other = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
        template = (other / "chat_template.jinja").read_text(encoding="utf-8")
        (other / "chat_template.jinja").write_text(template.replace("assistant", "system"), encoding="utf-8")
        with running(shelf_of(other), adapter_dirs=(root,)) as there:
            message = self.refused(recipe_of(url=there.address))
        assert re.search(
            r"the prompt is not the same at the server: token \d+ is \d+ \('.*'\) there and \d+ \('.*'\) in training, after '", message
        )
        assert "<|im_end|>\\n<|im_start|>" in message and "with its own chat template" in message

    def test_videos(self, recipe_of, tmp_path):
        Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
        row = '{"messages": [{"role": "user", "content": [{"type": "video", "video": ["a.png", "a.png"]}, {"type": "text", "text": "what?"}]}]}\n'
        (tmp_path / "videos.jsonl").write_text(row * 3, encoding="utf-8")
        assert "videos cannot be sent to rollout.engine: vllm" in self.refused(recipe_of(prompts=tmp_path / "videos.jsonl"), DataError)

    @pytest.mark.parametrize(
        ("rollout", "tuning", "message"),
        [
            ({"engine": "vllm"}, {}, "engine: vllm needs url"),
            ({"url": "http://127.0.0.1:8000"}, {}, "set engine: vllm"),
            ({"engine": "vllm", "url": "localhost:8000"}, {}, "no address of a server"),
            ({"engine": "vllm", "url": "http://me:secret@host:8000"}, {}, "holds a password"),
            ({"engine": "vllm", "url": "http://host:8000"}, {"method": "full"}, "set tuning.method: lora"),
            ({"engine": "vllm", "url": "http://host:8000"}, {"bias": "all"}, "tuning.bias: none"),
        ],
    )
    def test_recipes(self, rollout, tuning, message):
        content = {"model": {"name_or_path": "x"}, "data": {"train": "rows.jsonl"}, "grpo": {}, "rewards": ["math"]}
        with pytest.raises(RecipeError, match=message):
            parse_recipe({**content, "rollout": rollout, "tuning": tuning, "training": {"output_dir": "run"}})
