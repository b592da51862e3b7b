"""The official client against the server: what it sends is understood, what it gets parses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from finesight.data.conversation import Conversation, MediaRef, Part, RowSource, Turn
from finesight.models.load import load
from finesight.sampling.forking_sampler import ForkingSampler
from finesight.sampling.types import SamplingSettings
from serve.conftest import data_url, png


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def picture(seed: int = 1, **size) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(png(seed, **size))}}


def question(*parts: str | dict) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]}]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "invoices.v1", "charts"]
    assert client.models.retrieve("charts").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_an_answer_is_that_of_the_sampler(client, folders, server):
    """Base and adapters, each with the pixel limits and the system prompt that it was trained with."""
    answers = set()
    for name in ("tiny", "invoices.v1", "charts"):
        found = client.chat.completions.create(
            model=name, messages=question(picture(), "what is the value?"), temperature=1.0, seed=5, max_tokens=8
        )
        adapter = None if name == "tiny" else folders[name]
        loaded = load(folders["base"], adapter, device="cpu")
        turns = [Turn("user", (Part("image", media=MediaRef(data=png())), Part("text", text="what is the value?")))]
        if name == "charts":
            turns.insert(0, Turn("system", (Part("text", text="read the image"),)))
        settings = SamplingSettings(max_completion_length=8, temperature=1.0, seed=5)
        conversation = Conversation(tuple(turns), RowSource("here", 0))
        sampler = ForkingSampler(loaded.model, loaded.processor)
        (expected,) = sampler.generate([conversation], settings)
        choice = found.choices[0]
        assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
        assert found.usage.completion_tokens == len(expected.token_ids)
        assert found.usage.prompt_tokens == len(sampler._encoder.encode_prompt(conversation))
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
        answers.add(choice.message.content)
    assert len(answers) == 3


def test_a_stream_gives_the_same_in_pieces(client):
    asked = dict(model="tiny", messages=question(picture(), picture(2, width=96), "one or two?"), seed=3, n=2, max_tokens=12, logprobs=True)
    whole = client.chat.completions.create(**asked, top_logprobs=2)
    chunks = list(client.chat.completions.create(**asked, top_logprobs=2, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for index, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(piece.delta.content or "" for piece in own) == choice.message.content
        assert [piece.finish_reason for piece in own if piece.finish_reason] == [choice.finish_reason]
        streamed = [entry for piece in own if piece.logprobs for entry in piece.logprobs.content]
        assert [entry.token for entry in streamed] == [entry.token for entry in choice.logprobs.content]
    assert len(chunks) > 6 and whole.choices[0].message.content != whole.choices[1].message.content


def test_logprobs(client):
    choice = client.chat.completions.create(
        model="tiny", messages=question("read"), temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    ).choices[0]
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token and entry.logprob <= 0
        assert entry.top_logprobs[0].logprob == entry.logprob
    content = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert content.decode(errors="replace") == choice.message.content


def test_stop_texts(client):
    asked = dict(model="tiny", messages=question("read the number"), seed=3, max_tokens=16)
    free = client.chat.completions.create(**asked).choices[0].message.content
    stop = free[3:5]
    cut = client.chat.completions.create(**asked, stop=[stop, "never"]).choices[0]
    assert cut.message.content == free[: free.find(stop)] and cut.finish_reason == "stop"
    pieces = client.chat.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == cut.message.content


def test_several_turns_and_a_video(client):
    frames = [data_url(png(seed)) for seed in range(4)]
    messages = [
        {"role": "system", "content": "yes no"},
        *question({"type": "video", "video": frames, "fps": 2.0}, "the year?"),
        {"role": "assistant", "content": "yes"},
        *question("and now?"),
    ]
    found = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=4, temperature=0)
    assert found.usage.completion_tokens <= 4 and found.usage.prompt_tokens > 20


def test_eight_at_once_are_answered_as_one_at_a_time(client):
    def answer(number: int) -> str:
        model = ("tiny", "invoices.v1", "charts")[number % 3]
        messages = question(picture(number, width=32 * (1 + number % 3)), f"read {number}") if number % 2 else question(f"read {number}")
        found = client.chat.completions.create(model=model, messages=messages, seed=number, max_tokens=10, top_p=0.9 if number % 4 else 1.0)
        return found.choices[0].message.content

    alone = [answer(number) for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, range(16))) == alone


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_guides_request(server, tmp_path):
    """As a reader types it, but for the address."""
    guide = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^curl http://127\.0\.0\.1:8000.*?^```", guide, re.DOTALL | re.MULTILINE)[0].removesuffix("```")
    (tmp_path / "chart.png").write_bytes(png())
    shown = subprocess.run(
        ["bash", "-c", f"set -e; {command.replace('http://127.0.0.1:8000', server.address)}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"], "no_proxy": "127.0.0.1"},
    )  # fmt: skip
    answer = json.loads(shown.stdout)
    assert answer["model"] == "charts" and answer["choices"][0]["message"]["content"] and answer["usage"]["prompt_tokens"] > 5


def test_errors_are_of_the_classes_that_the_client_knows(client, serving):
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="gpt-4o", messages=question("hello"))
    with pytest.raises(openai.BadRequestError, match="presence_penalty") as caught:
        client.chat.completions.create(model="tiny", messages=question("hello"), presence_penalty=1.0)
    assert caught.value.param == "presence_penalty" and caught.value.code == "unsupported_parameter"
    with serving(api_key="secret") as guarded:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{guarded.address}/v1", api_key="wrong", max_retries=0).models.list()
        right = openai.OpenAI(base_url=f"{guarded.address}/v1", api_key="secret", max_retries=0)
        assert len(list(right.models.list())) == 3
