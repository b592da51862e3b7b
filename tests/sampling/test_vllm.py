"""The protocol of a vLLM server: what is asked, what is understood, and what is said where something is wrong."""

from __future__ import annotations

import base64
import io
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finesight.data.conversation import Conversation, MediaRef, Part, RowSource, Turn
from finesight.data.encode import Encoder
from finesight.data.processor import Processor, load_processor
from finesight.data.sample import Sample
from finesight.data_settings import DataSettings
from finesight.errors import EngineError
from finesight.grpo_settings import RolloutSettings
from finesight.sampling import vllm_server
from finesight.sampling.types import SamplingSettings
from finesight.sampling.vllm_protocol import ChatAnswer, Choice, ModelCard, base_card, chat_request, check_prompt, completion_of, data_url
from finesight.sampling.vllm_sampler import VllmSampler, prompt_seed
from finesight.sampling.vllm_server import VllmServer, start_command
from sampling.recorded_server import recording, replaying
from tiny import tiny_checkpoint

START = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve Qwen/Q --enable-lora --max-lora-rank 32 --logprobs-mode processed_logprobs"
SOURCE = RowSource("rows.jsonl", 3)


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("model") / "qwen3_vl", "qwen3_vl")
    return load_processor(checkpoint, data=DataSettings(min_pixels=1024, max_pixels=4096))


@pytest.fixture(scope="module")
def prompt() -> Conversation:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    image = Part("image", media=MediaRef(image=Image.fromarray(pixels)))
    return Conversation((Turn("user", (Part("text", text="the number"), image, Part("text", text="is what?"))),), SOURCE)


def exchange(method: str, path: str, status: int, body: Any, **headers: str) -> dict[str, Any]:
    return {"request": {"method": method, "path": path}, "response": {"status": status, "body": body, "headers": headers}}


def client(url: str, **options) -> VllmServer:
    return VllmServer(url, start=START, **options)


def recorded_chat() -> dict[str, Any]:
    return next(one["response"]["body"] for one in recording("run") if one["request"]["path"] == "/v1/chat/completions")


def test_everything_that_shapes_draws_is_said():
    """What a request leaves open, vLLM takes from generation_config.json: for Qwen-VL top_k 20 and top_p 0.8."""
    settings = SamplingSettings(max_completion_length=9, temperature=0.7, top_k=5, min_p=0.1, num_generations=4)
    body = chat_request("m", [], settings, seed=3, stop_ids={2, 0}, forbidden=(6, 7))
    assert body == {
        "model": "m", "messages": [], "n": 4, "seed": 3, "max_tokens": 9, "temperature": 0.7, "top_p": 1.0, "top_k": 5, "min_p": 0.1,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop_token_ids": [0, 2],
        "logit_bias": {"6": -100.0, "7": -100.0}, "logprobs": True, "top_logprobs": 0, "return_token_ids": True,
    }  # fmt: skip


def test_images_lose_nothing_on_the_way():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8)
    kind, _, content = data_url(Image.fromarray(pixels)).partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == "data:image/png;base64" and np.array_equal(np.asarray(image), pixels)


def test_seeds_of_prompts_differ_and_fit():
    seeds = {prompt_seed(seed, place) for seed in (0, 1) for place in range(100)}
    assert len(seeds) == 200 and all(0 <= seed < 2**63 for seed in seeds)


def test_answers(processor):
    answer = ChatAnswer.model_validate(recorded_chat())
    found = [completion_of(choice, processor, stop_ids={2, 0}, forbidden=(6, 7), source=SOURCE) for choice in answer.choices]
    assert [(one.text, one.finish_reason) for one in found] == [
        ("the value is 3", "stop"),
        ("read the number in the image the value", "length"),
    ]
    assert found[0].token_ids[-1] == 2 and len(found[0].logprobs) == len(found[0].token_ids) and found[0].logprobs[:2] == (-5.8125, -7.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": None}, "answer 0 has not token ids"),
        ({"logprobs": None}, "has not log-probabilities"),
        ({"token_ids": [265]}, "one log-probability for each token"),
        ({"finish_reason": "abort"}, "broke off answer 0"),
        ({"token_ids": [265, 314, 6, 268, 90, 228, 26, 2]}, r"drew <\|image_pad\|> although logit_bias forbids"),
        ({"logprobs": {"content": [{"token": "x", "logprob": 3.5}] * 8}}, "no log-probabilities .3.5 is above 0.*processed_logprobs"),
    ],
)
def test_answers_that_cannot_be_trained_on(processor, change, message):
    choice = Choice.model_validate({**recorded_chat()["choices"][0], **change})
    with pytest.raises(EngineError, match="rows.jsonl, row 3: .*" + message):
        completion_of(choice, processor, stop_ids={2, 0}, forbidden=(6, 7), source=SOURCE)


class TestPromptsThatDiffer:
    @pytest.fixture
    def sample(self, processor, prompt) -> Sample:
        return Encoder(processor).encode_prompt(prompt)

    def message(self, sample, ids, processor) -> str:
        with pytest.raises(EngineError) as raised:
            check_prompt(sample, ids, processor)
        return str(raised.value)

    def test_equal(self, sample, processor):
        check_prompt(sample, sample.token_ids.tolist(), processor)

    def test_not_told(self, sample, processor):
        assert "did not return the prompt's token ids" in self.message(sample, None, processor)

    def test_the_first_place(self, sample, processor):
        ids = sample.token_ids.tolist()
        place = ids.index(processor.image_token_id) - 2
        ids[place] = 26
        message = self.message(sample, ids, processor)
        ours = int(sample.token_ids[place])
        assert f"token {place} is 26 ('3') there and {ours} ({processor.tokenizer.decode([ours])!r}) in training, after " in message

    def test_one_that_ends_early_or_goes_on(self, sample, processor):
        ids = sample.token_ids.tolist()
        assert f"token {len(ids) - 1} is nothing there and " in self.message(sample, ids[:-1], processor)
        assert f"token {len(ids)} is 26 ('3') there and nothing in training" in self.message(sample, [*ids, 26], processor)

    def test_an_image_resized_again(self, sample, processor):
        ids = sample.token_ids.tolist()
        first = ids.index(processor.image_token_id)
        message = self.message(sample, [*ids[:first], *[processor.image_token_id] * 5, *ids[first:]], processor)
        assert "image 0 (an image object) has 4 visual tokens in training, at 64 × 64 pixels, and 9 at the server" in message
        assert "room for 4,096 pixels" in message and "--mm-processor-kwargs" in message


@pytest.mark.parametrize(
    ("name_or_path", "model", "found"),
    [
        ("Qwen/Q", None, "Qwen/Q"),  # by its name
        ("disk/Q", None, "policy"),  # by where the server loaded it from
        ("elsewhere/Q2/", None, "Q2"),  # by the last part of its path
        ("x", "policy", "policy"),
        ("x", None, "The run trains x, the engine's server serves Qwen/Q, policy .disk/Q., Q2. .*set rollout.model"),
        ("Qwen/Q", "charts", "has no model charts .rollout.model.; it serves Qwen/Q, policy"),  # an adapter, which is no base
    ],
)
def test_which_model_is_asked(name_or_path, model, found):
    cards = [ModelCard(id="Qwen/Q"), ModelCard(id="policy", root="disk/Q"), ModelCard(id="Q2"), ModelCard(id="charts", parent="Q2")]
    if " " not in found:
        assert base_card(cards, name_or_path, model).id == found
        return
    with pytest.raises(EngineError, match=found):
        base_card(cards, name_or_path, model)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("runtime adapters are off", f"takes no adapters at run time. Start it with: {START}"),
        ("started without --enable-lora", f"LoRA is not enabled.). Start it with: {START}"),
        ("rank too large", f"greater than max_lora_rank 16.). Start it with: {START}"),
        ("folder not seen", "must see the folder of the run under the same path"),
        ("name taken", "cannot load the adapter /runs/finesight-0 (400: The lora adapter 'finesight-0' has already been loaded."),
    ],
)
def test_adapters_that_the_server_does_not_load(case, message):
    refusal = recording("refusals")[case]
    with (
        replaying(exchange("POST", "/v1/load_lora_adapter", refusal["status"], refusal["body"])) as server,
        pytest.raises(EngineError) as raised,
    ):
        client(server.url).load_adapter("finesight-0", Path("/runs/finesight-0"))
    assert message in str(raised.value) and server.asked[0]["json"] == {"lora_name": "finesight-0", "lora_path": "/runs/finesight-0"}


def test_an_adapter_that_the_server_forgot():
    """It was started anew: unloading is no error, all others are."""
    refusals = recording("refusals")
    path = "/v1/unload_lora_adapter"
    with replaying(
        *(exchange("POST", path, refusals[case]["status"], refusals[case]["body"]) for case in ("adapter not known", "no key"))
    ) as server:
        client(server.url).unload_adapter("finesight-0")
        with pytest.raises(EngineError, match=r"wants an API key .401: Unauthorized.*rollout.api_key_env"):
            client(server.url).unload_adapter("finesight-0")


def test_what_the_server_says_is_passed_on():
    refusal = recording("refusals")["too long"]
    said = pytest.raises(EngineError, match=r"refuses /v1/chat/completions .400.: This model's maximum context length is 4096")
    with replaying(exchange("POST", "/v1/chat/completions", refusal["status"], refusal["body"])) as server, said:
        client(server.url).chat({})


def test_a_busy_server_is_asked_again(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(vllm_server.time, "sleep", waits.append)
    busy = exchange("GET", "/v1/models", 503, {"error": {"message": "busy"}})
    with replaying(busy, busy, recording("run")[0]) as server:
        assert [card.id for card in client(server.url + "/v1/").models()] == ["Qwen/Qwen3-VL-4B-Instruct", "captions"]
    assert waits == [0.5, 1.0]
    with replaying(*[busy] * 6) as server, pytest.raises(EngineError, match=r"refuses /v1/models .503.: busy"):
        client(server.url).models()
    assert len(server.asked) == 6


def test_another_kind_of_server():
    said = pytest.raises(EngineError, match="does not speak vLLM's protocol: data of its answer to /v1/models: Field required")
    with replaying(exchange("GET", "/v1/models", 200, {"models": []})) as server, said:
        client(server.url).models()


def test_nothing_else_is_contacted(monkeypatch):
    """Neither a proxy of the environment nor where an answer leads to; the key goes to the server alone."""
    with replaying() as elsewhere:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, elsewhere.url)
        redirect = exchange("GET", "/v1/models", 307, "", Location=f"{elsewhere.url}/v1/models")
        with replaying(recording("run")[0], redirect) as server:
            one = client(server.url, api_key="secret")
            assert len(one.models()) == 2
            with pytest.raises(EngineError, match=r"refuses /v1/models .307"):
                one.models()
        assert [headers["authorization"] for headers in server.headers] == ["Bearer secret"] * 2
        assert not elsewhere.asked


def test_a_server_that_takes_too_long():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(EngineError, match=r"did not answer /v1/models within rollout.timeout_s"):
            client(url, timeout_s=0.2).models()


@pytest.mark.parametrize("raw", [True, False])
def test_log_probabilities_of_another_temperature(processor, prompt, raw):
    """vLLM returns those of temperature 1 unless told otherwise: seen by asking under two temperatures."""

    def answer(temperature: float) -> dict[str, Any]:
        content = json.loads(json.dumps(recorded_chat()))
        top = [{"token": name, "logprob": value / temperature, "bytes": None} for name, value in (("a", -0.5), ("b", -1.51), ("c", -3.0))]
        content["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = top
        return exchange("POST", "/v1/chat/completions", 200, content)

    rollout = RolloutSettings(engine="vllm", url="http://127.0.0.1:8000", model="Qwen/Qwen3-VL-4B-Instruct", temperature=0.5)
    with replaying(recording("run")[0], answer(1.0 if raw else 0.5), answer(1.0)) as server:
        sampler = VllmSampler(client(server.url), processor, [prompt], folder=Path("none"), save=lambda folder: None, run="0")
        samples = [Encoder(processor).encode_prompt(prompt)]
        if raw:
            with pytest.raises(
                EngineError, match=r"log-probabilities of temperature 1, and rollout.temperature is 0.5.*processed_logprobs"
            ):
                sampler.check("here", rollout, samples)
        else:
            assert sampler.check("here", rollout, samples).max_model_len == 4096
    assert [one["json"]["temperature"] for one in server.asked[1:]] == [0.5, 1.0] and server.asked[1]["json"]["top_logprobs"] == 5


def test_too_few_answers(processor, prompt, tmp_path):
    sample = Encoder(processor).encode_prompt(prompt)
    short = {**recorded_chat(), "prompt_token_ids": sample.token_ids.tolist()}
    loaded = exchange("POST", "/v1/load_lora_adapter", 200, "Success")
    with replaying(loaded, exchange("POST", "/v1/chat/completions", 200, short)) as server:
        sampler = VllmSampler(client(server.url), processor, [prompt], folder=tmp_path, save=lambda folder: folder.mkdir(), run="0")
        sampler.refresh(0)
        with pytest.raises(EngineError, match="3 completions were asked for, the server gave 2"):
            sampler.generate_samples([sample], SamplingSettings(num_generations=3, temperature=1.0))
        with pytest.raises(EngineError, match=r"other.jsonl, row 0 is not a row of the run"):
            sampler.generate_samples([replace(sample, source=RowSource("other.jsonl", 0))], SamplingSettings())


def test_the_rank_that_a_server_is_started_with():
    assert start_command("Qwen/Q", 20) == START and "--max-lora-rank 8 " in start_command("Qwen/Q", 4)
    assert "--enable-tower-connector-lora" in start_command("Qwen/Q", 4, tower=True)
