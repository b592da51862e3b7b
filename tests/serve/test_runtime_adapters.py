"""Adapters that come and go while the server runs, and the tokens that a trainer asks for, in vLLM's spelling."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save

from finesight.data.conversation import Conversation, Part, RowSource, Turn
from finesight.errors import RecipeError
from finesight.models.load import load
from finesight.recipe import ModelSettings
from finesight.sampling.forking_sampler import ForkingSampler
from finesight.sampling.types import SamplingSettings
from finesight.serve.models import ModelShelf
from finesight.serve.settings import ServeSettings
from serve.conftest import running

CLIENT = httpx.Client(timeout=60, trust_env=False)
ASK = {"messages": [{"role": "user", "content": "read"}], "max_tokens": 6, "seed": 3, "temperature": 1.0}


@pytest.fixture(scope="module")
def open_folder(folders, tmp_path_factory):
    """Two adapters in a folder that is open, and one outside of it."""
    root = tmp_path_factory.mktemp("adapters")
    for name in ("invoices.v1", "charts"):
        shutil.copytree(folders[name], root / "open" / name)
    shutil.copytree(folders["charts"], root / "closed")
    (root / "open" / "link").symlink_to(root / "closed")
    (root / "open" / "empty").mkdir()
    return root / "open"


@pytest.fixture(scope="module")
def open_server(folders, open_folder):
    """Over a base alone."""
    with running(ModelShelf(ModelSettings(name_or_path=str(folders["base"])), {}, device="cpu"), adapter_dirs=(open_folder,)) as found:
        yield found


def post(server, path: str, body: dict) -> httpx.Response:
    return CLIENT.post(f"{server.address}/v1/{path}", json=body)


def ask(server, model: str, **more) -> httpx.Response:
    return post(server, "chat/completions", {**ASK, "model": model, **more})


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_closed_unless_folders_are_open(server, open_folder):
    for path in ("load_lora_adapter", "unload_lora_adapter"):
        response = post(server, path, {"lora_name": "x", "lora_path": str(open_folder / "charts")})
        assert response.status_code == 404 and response.json()["error"]["code"] == "unknown_url"
    with pytest.raises(RecipeError, match="which adapters are to be loaded from, does not exist"):
        ServeSettings(adapter_dirs=(open_folder / "none",))


def test_adapters_come_and_go(open_server, open_folder, folders):
    """Each answers as it does alone; when the last one has gone, the base answers as before."""
    plain = text_of(ask(open_server, "tiny"))
    answers = {}
    for number, name in enumerate(("invoices.v1", "charts", "invoices.v1")):
        new = f"{name}-{number}"
        response = post(open_server, "load_lora_adapter", {"lora_name": new, "lora_path": str(open_folder / name)})
        assert (response.status_code, response.text) == (200, f"Success: LoRA adapter '{new}' added successfully.")
        answers[new] = text_of(ask(open_server, new, messages=[{"role": "system", "content": "read"}, *ASK["messages"]]))
        card = CLIENT.get(f"{open_server.address}/v1/models/{new}").json()
        assert card["parent"] == "tiny" and card["max_model_len"] == 512
        assert text_of(ask(open_server, "tiny")) == plain
        if number:
            assert post(open_server, "unload_lora_adapter", {"lora_name": list(answers)[number - 1]}).status_code == 200
    assert answers["invoices.v1-0"] == answers["invoices.v1-2"] != answers["charts-1"]
    assert ask(open_server, "charts-1").json()["error"]["code"] == "model_not_found"
    assert post(open_server, "unload_lora_adapter", {"lora_name": "invoices.v1-2"}).text.startswith("Success")
    assert text_of(ask(open_server, "tiny")) == plain
    assert [card["id"] for card in CLIENT.get(f"{open_server.address}/v1/models").json()["data"]] == ["tiny"]


@pytest.mark.parametrize(
    ("path", "name", "folder", "status", "said"),
    [
        ("load", "tiny", "charts", 400, "There is a model tiny already"),
        ("load", "x", "none", 404, "No adapter found"),
        ("load", "x", "empty", 404, "No adapter found"),
        ("load", "x", "../closed", 404, "No adapter found"),
        ("load", "x", "link", 404, "No adapter found"),
        ("load", "", "charts", 400, "lora_name"),
        ("unload", "x", "", 404, "is not served here"),
        ("unload", "tiny", "", 400, "tiny is the base"),
    ],
)
def test_what_is_refused(open_server, open_folder, path, name, folder, status, said):
    body = {"lora_name": name, **({"lora_path": f"{open_folder}/{folder}"} if folder else {})}
    response = post(open_server, f"{path}_lora_adapter", body)
    assert response.status_code == status and said in response.json()["error"]["message"]
    assert text_of(ask(open_server, "tiny"))


@pytest.mark.parametrize("loaded", [False, True], ids=["first", "beside another"])
def test_an_adapter_that_does_not_fit(open_server, open_folder, loaded):
    """Damaged, or of another size: nothing is left of it in the model."""
    if loaded:
        assert post(open_server, "load_lora_adapter", {"lora_name": "whole", "lora_path": str(open_folder / "charts")}).status_code == 200
    before = {name: text_of(ask(open_server, name)) for name in (["tiny", "whole"] if loaded else ["tiny"])}
    other = shutil.copytree(open_folder / "charts", open_folder / "other", dirs_exist_ok=True)
    weights = load_file(other / "adapter_model.safetensors")
    for content in (b"nothing", save({name: torch.zeros(5, 5) for name in weights}), save(dict(list(weights.items())[1:]))):
        (other / "adapter_model.safetensors").write_bytes(content)
        response = post(open_server, "load_lora_adapter", {"lora_name": "other", "lora_path": str(other)})
        assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_adapter", response.text
        assert {name: text_of(ask(open_server, name)) for name in before} == before
        layers = [module for module in open_server.service.shelf.switch.model.modules() if isinstance(module, BaseTunerLayer)]
        assert {len(module.lora_A) for module in layers} == ({1} if loaded else set())
    config = json.loads((other / "adapter_config.json").read_text(encoding="utf-8"))
    (other / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}), encoding="utf-8")
    response = post(open_server, "load_lora_adapter", {"lora_name": "other", "lora_path": str(other)})
    assert response.status_code == 400 and "tuning.bias: all, which changes the base itself" in response.json()["error"]["message"]
    shutil.rmtree(other)
    if loaded:
        assert post(open_server, "unload_lora_adapter", {"lora_name": "whole"}).status_code == 200


def test_answers_under_way_are_finished_first(open_server, open_folder):
    """Requests and changes at once: every request is answered, by the base as ever."""
    expected = text_of(ask(open_server, "tiny", max_tokens=40))
    with ThreadPoolExecutor(9) as pool:
        asked = [pool.submit(ask, open_server, "tiny", max_tokens=40) for _ in range(8)]
        for number in range(3):
            name = f"passing-{number}"
            assert post(open_server, "load_lora_adapter", {"lora_name": name, "lora_path": str(open_folder / "charts")}).status_code == 200
            asked += [pool.submit(ask, open_server, "tiny", max_tokens=40) for _ in range(4)]
            assert post(open_server, "unload_lora_adapter", {"lora_name": name}).status_code == 200
        assert {text_of(one.result()) for one in asked} == {expected}


def test_token_ids(server, folders):
    """Prompt and answers as the sampler has them, the token that ended an answer and its log-probability included."""
    answer = ask(
        server, "tiny", n=8, max_tokens=400, logprobs=True, return_token_ids=True, stop_token_ids=[2], logit_bias={"6": -100.0, "7": -100}
    )
    assert answer.status_code == 200, answer.text
    content = answer.json()
    loaded = load(folders["base"], device="cpu")
    sampler = ForkingSampler(loaded.model, loaded.processor)
    (prompt,) = [sampler._encoder.encode_prompt(conversation("read"))]
    settings = SamplingSettings(max_completion_length=400, temperature=1.0, seed=3, num_generations=8)
    expected = sampler.generate_samples([prompt], settings)
    assert content["prompt_token_ids"] == prompt.token_ids.tolist()
    assert {one.finish_reason for one in expected} >= {"stop"}  # so that there is a token that ended one
    for choice, one in zip(content["choices"], expected, strict=True):
        assert choice["token_ids"] == list(one.token_ids)
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        assert logprobs == pytest.approx(list(one.logprobs), abs=2e-5)
    plain = ask(server, "tiny").json()
    assert "prompt_token_ids" not in plain and "token_ids" not in plain["choices"][0]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"logit_bias": {"6": -50.0}}, "logit_bias"),
        ({"logit_bias": {"26": -100.0}}, "logit_bias"),
        ({"stop_token_ids": [26]}, "stop_token_ids"),
        ({"return_token_ids": True, "stream": True}, "return_token_ids"),
    ],
)
def test_token_fields_that_would_change_answers(server, change, param):
    error = ask(server, "tiny", **change).json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error"


def conversation(text: str) -> Conversation:
    return Conversation((Turn("user", (Part("text", text=text),)),), RowSource("here", 0))


@pytest.mark.parametrize("body", [{"lora_name": "\ud800"}, {"lora_path": "\ud800"}])
def test_names_that_are_no_text_are_refused(open_server, open_folder, body):
    """And leave nothing behind that could not be listed."""
    asked = {"lora_name": "new", "lora_path": str(open_folder / "charts"), **body}
    sent = json.dumps(asked).encode()
    answer = CLIENT.post(f"{open_server.address}/v1/load_lora_adapter", content=sent, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404) and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert [model["id"] for model in CLIENT.get(f"{open_server.address}/v1/models").json()["data"]] == ["tiny"]
