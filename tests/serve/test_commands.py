"""`finesight serve` as a process that ends on a signal, and `finesight chat` on lines from a pipe."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from finesight.cli import main
from finesight.cli.chat import ChatSession, parts_of
from finesight.cli.serve import named_adapters
from finesight.data.conversation import Conversation, RowSource, Turn
from finesight.errors import DataError, ModelError
from finesight.models.load import load
from finesight.sampling.forking_sampler import ForkingSampler
from finesight.sampling.types import SamplingSettings
from serve.conftest import png

ENDLESS = {"model": "charts", "messages": [{"role": "user", "content": "read"}], "max_tokens": 300, "temperature": 0}


def start(*arguments: object, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "finesight", *map(str, arguments)]
    settings = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=settings)


def test_serve_answers_what_it_holds_after_a_signal(folders):
    process = start(
        "serve", "--adapter", f"charts={folders['charts']}", "--port", "0", "--max-length-tokens", "2048", FINESIGHT_API_KEY="secret"
    )
    try:
        lines = iter(process.stderr.readline, "")
        said = next(line for line in lines if line.startswith("Serving"))
        assert "Serving tiny, charts at " in said
        address = re.search(r"http://\S+/v1", said)[0]
        with httpx.Client(trust_env=False, timeout=60, headers={"authorization": "Bearer secret"}) as client:
            assert httpx.get(f"{address}/models", trust_env=False).status_code == 401
            assert [model["id"] for model in client.get(f"{address}/models").json()["data"]] == ["tiny", "charts"]
            found: list[httpx.Response] = []
            asked = threading.Thread(target=lambda: found.append(client.post(f"{address}/chat/completions", json=ENDLESS)))
            asked.start()
            metrics = address.replace("/v1", "/metrics")
            until = time.monotonic() + 20
            with httpx.Client(trust_env=False, headers=client.headers) as other:
                while "finesight_requests_held 1.0" not in other.get(metrics).text:
                    assert time.monotonic() < until
            process.send_signal(signal.SIGTERM)
            asked.join(30)
        assert found[0].status_code == 200 and found[0].json()["usage"]["completion_tokens"] == 300
        process.wait(30)
    finally:
        process.kill()
        process.communicate()


def test_serve_loads_adapters_from_folders_that_are_open(folders):
    process = start(
        "serve", "--model", folders["base"], "--adapter-dir", folders["base"].parent, "--port", "0", "--max-length-tokens", "2048"
    )
    try:
        said = next(line for line in iter(process.stderr.readline, "") if line.startswith("Serving"))
        address = re.search(r"http://\S+/v1", said)[0]
        with httpx.Client(trust_env=False, timeout=60) as client:
            loaded = client.post(f"{address}/load_lora_adapter", json={"lora_name": "charts", "lora_path": str(folders["charts"])})
            assert loaded.status_code == 200, loaded.text
            assert [model["id"] for model in client.get(f"{address}/models").json()["data"]] == ["tiny", "charts"]
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    finally:
        process.kill()
        process.communicate()


def test_serve_refuses_what_cannot_be_served(folders, tmp_path, capsys):
    with pytest.raises(ModelError, match="Two adapters are called a"):
        named_adapters([f"a={folders['charts']}", f"a={folders['charts']}"])
    with pytest.raises(ModelError, match="does not exist"):
        named_adapters([str(tmp_path / "none")])
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--model", str(folders["base"]), "--max-length-tokens", "100", "--max-completion-length", "100"])
    assert ended.value.code == 2 and "leave no room for a prompt" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as ended:
        main(["serve", "--model", str(folders["base"]), "--port", str(taken.getsockname()[1])])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "cannot be listened on" in said and "Loading" not in said


@pytest.mark.parametrize("named", ["a b.png", "'a b.png'", "plain.jpg"])
def test_paths_in_a_line(tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / named.strip("'")
    file.write_bytes(png())
    for word in (shlex.quote(str(file)), str(file).replace(" ", "\\ "), f"'file://{file}'"):
        parts = parts_of(f"look at {word} and it's value.png")
        assert [part.type for part in parts] == ["text", "image", "text"]
        assert Path(parts[1].media.path) == file.resolve() and parts[2].text == "and it's value.png"
    assert [part.type for part in parts_of("how is it?")] == ["text"]
    with pytest.raises(DataError, match="no file"):
        parts_of(f"{tmp_path}/missing.png what?")


def test_a_session_goes_on_from_turn_to_turn(folders, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    loaded = load(folders["base"], folders["charts"], device="cpu")
    settings = SamplingSettings(max_completion_length=8, temperature=1.0, seed=3)
    session = ChatSession(loaded, settings, 512, system=loaded.metadata.system)
    for text in (f"{tmp_path}/a.png what is it?", "and now?"):
        shown: list[str] = []
        before = list(session.turns)
        reply = session.ask(parts_of(text), shown.append)
        asked = Conversation((*before, Turn("user", tuple(parts_of(text)))), RowSource("here", 0))
        (expected,) = ForkingSampler(loaded.model, loaded.processor).generate([asked], settings)
        assert "".join(shown) == reply.text == expected.text and reply.tokens == len(expected.token_ids) and reply.whole
        assert reply.image_tokens == 1 and "1 of images" in str(reply)  # the adapter's pixel limit
    assert [turn.role for turn in session.turns] == ["system", "user", "assistant", "user", "assistant"]

    def interrupt(text: str) -> None:
        if text:
            signal.raise_signal(signal.SIGINT)

    stopped = session.ask(parts_of("go on"), interrupt)
    assert not stopped.whole and stopped.tokens < 8 and not session.engine.busy


def test_chat_reads_lines(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "a.png").write_bytes(png())
    lines = [str(tmp_path / "a.png"), "what is it?", "/none", str(tmp_path / "b.png"), "/clear", "again", "/quit", "never"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    with pytest.raises(SystemExit) as ended:
        main(["chat", "--adapter", str(folders["charts"]), "--max-completion-length", "4"])
    out = capsys.readouterr().out
    assert not ended.value.code
    assert "1 file; what about it?" in out and "There is no file" in out and "There is no command /none. " in out
    assert len(re.findall(r"tokens in \((\d+) of images\), \d+ out", out)) == 2 and "(1 of images)" in out and "(0 of images)" in out
