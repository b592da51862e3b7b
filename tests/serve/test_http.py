"""What clients get that do not behave: status codes, error objects, limits, and what a request cannot reach."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest

from finesight.data.fetch import fetch_public
from finesight.errors import MediaError, ModelError
from finesight.recipe import ModelSettings
from finesight.serve.models import ModelShelf
from serve.conftest import data_url, png

# Greedy, the tiny model repeats itself and never ends its turn.
ENDLESS = {"model": "tiny", "messages": [{"role": "user", "content": "read"}], "max_tokens": 4000, "temperature": 0}
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "read"}], "max_tokens": 2}


# One client for all: making one reads certificates. What the environment says of proxies is not for it.
CLIENT = httpx.Client(timeout=60, trust_env=False)


def post(server, body, **options) -> httpx.Response:
    return CLIENT.post(f"{server.address}/v1/chat/completions", json=body, **options)


def images(*urls: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {**HELLO, "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it?"}]}]}


def error_of(response: httpx.Response) -> dict:
    """The error object, which is always whole."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"repetition_penalty": 1e-197}, "repetition_penalty"),
        ({"top_k": 2**63}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "messages"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, None),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": 5, "schema": {}}}}, "response_format.json_schema.name"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}]}, "messages[0].content[0].image_url.url"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_with_its_field(server, change, param):
    response = post(server, {**HELLO, **change})
    error = error_of(response)
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stop": ["a", "b", "c", "d", "e"]}, "at most 4 items"),
        ({"max_token": 3}, "max_token: This server knows no such field; did you mean max_tokens?"),
        ({"zebra": 3}, "zebra: This server knows no such field; leave it out."),
        ({"messages": [{"role": "user", "content": "x", "nam": "y"}]}, "messages[0].nam: This server knows no such field; did you mean name?"),
        ({"max_tokens": 100_000}, "--max-length-tokens"),
    ],
)  # fmt: skip
def test_what_is_said_of_it(server, change, said):
    assert said in error_of(post(server, {**HELLO, **change}))["message"]


def test_a_body_that_is_not_json(server):
    for content, place in ((b'{"model":', 9), (b"hello", 0)):
        response = CLIENT.post(f"{server.address}/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        error = error_of(response)
        assert response.status_code == 400 and error["param"] is None
        assert error["message"] == f"The body is not JSON: Expecting value at character {place}."


def test_text_that_is_none(serving):
    """Half of a surrogate pair, wherever it stands, is the client's mistake, in the metrics too."""
    half = "\ud800"
    parts = [
        {"type": "image_url", "image_url": {"url": url}}
        for url in (half, f"data:image/png;base64,{half}", f"data:{half},", f"http://{half}/")
    ]
    changes = [
        *({"messages": [{"role": "user", "content": content}]} for content in (half, [{"type": "text", "text": half}], *([part] for part in parts))),
        {"model": half},
        {half: 1},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": half}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": half, "schema": {half: 1}}}},
    ]  # fmt: skip
    with serving(allow_urls=True) as server:
        for change in changes:
            body = json.dumps({**HELLO, **change}).encode()
            refused = CLIENT.post(f"{server.address}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
            assert refused.status_code in (400, 404) and error_of(refused), change
        stopped = json.dumps({**HELLO, "stop": half}).encode()
        answer = CLIENT.post(f"{server.address}/v1/chat/completions", content=stopped, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400)
        assert 'status="5' not in CLIENT.get(f"{server.address}/metrics").text


def test_statuses(server, serving):
    assert httpx.get(f"{server.address}/health").json() == {"status": "ok"}
    assert post(server, {**HELLO, "model": "other"}).status_code == 404
    missing = httpx.get(f"{server.address}/v1/engines")
    assert missing.status_code == 404 and error_of(missing)["code"] == "unknown_url"
    assert httpx.get(f"{server.address}/v1/chat/completions").status_code == 405
    for body in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
        broken = httpx.post(f"{server.address}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert broken.status_code == 400 and error_of(broken), body[:3]
    # A form of a web page, which browsers send anywhere without asking.
    form = httpx.post(f"{server.address}/v1/chat/completions", content=json.dumps(HELLO), headers={"content-type": "text/plain"})
    assert form.status_code == 400
    rebound = httpx.get(f"{server.address}/v1/models", headers={"host": "evil.example:80"})
    assert rebound.status_code == 403 and error_of(rebound)["code"] == "host_not_allowed"


def test_a_key_is_asked_for(serving):
    with serving(api_key="secret") as server:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "secret"},
            {"authorization": "Bearer secre\u0301t".encode()},
        ):
            refused = post(server, HELLO, headers=headers)
            assert refused.status_code == 401 and error_of(refused)["type"] == "authentication_error"
        assert httpx.get(f"{server.address}/metrics").status_code == 401
        assert httpx.get(f"{server.address}/health").status_code == 200
        assert post(server, HELLO, headers={"authorization": "Bearer secret"}).status_code == 200


def test_bodies_are_limited_in_size_and_time(serving):
    with serving(max_body_bytes=2000) as server:
        said = post(server, {**HELLO, "user": "x" * 3000})
        assert said.status_code == 413 and error_of(said)["code"] == "body_too_large"

        def unsaid():
            for _ in range(30):
                yield b" " * 100

        assert httpx.post(f"{server.address}/v1/chat/completions", content=unsaid()).status_code == 413
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:1\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in slow.recv(1000)
        assert post(server, HELLO).status_code == 200


def test_a_full_queue_and_lost_clients(serving):
    """Beyond what is held there is 429; a client that goes makes room, whether it streamed or waited."""
    with serving(batch_size=1, queue_size=1, max_length_tokens=4096) as server:
        address = f"{server.address}/v1/chat/completions"

        def held(count: int) -> None:
            until = time.monotonic() + 20
            while server.service.held != count:
                assert time.monotonic() < until
                time.sleep(0.01)

        async def crowd() -> None:
            async with httpx.AsyncClient(timeout=60) as client:
                waiting = [asyncio.create_task(client.post(address, json=ENDLESS)) for _ in range(2)]
                await asyncio.to_thread(held, 2)
                refused = await client.post(address, json=HELLO)
                assert refused.status_code == 429 and refused.headers["retry-after"] and error_of(refused)["code"] == "queue_full"
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)

        asyncio.run(crowd())
        held(0)
        with httpx.stream("POST", address, json={**ENDLESS, "stream": True}, timeout=60) as stream:
            next(stream.iter_lines())
        held(0)
        assert post(server, HELLO).status_code == 200
        metrics = httpx.get(f"{server.address}/metrics").text
        assert 'finesight_requests_total{model="tiny",status="200"} 1.0' in metrics
        assert (
            'finesight_requests_total{model="tiny",status="499"} 3.0' in metrics
            and "finesight_requests_held 0.0" in metrics
            and "finesight_answers_running 0.0" in metrics
        )


def test_a_request_has_its_time(serving):
    with serving(timeout_s=0.3, max_length_tokens=4096) as server:
        late = post(server, ENDLESS)
        assert late.status_code == 408 and error_of(late)["code"] == "timeout"
        lines = [line for line in post(server, {**ENDLESS, "stream": True}).text.splitlines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_shutdown_answers_what_is_held(serving):
    with serving() as server, ThreadPoolExecutor(4) as pool:
        bodies = [{**ENDLESS, "max_tokens": 200 + seed, "stream": bool(seed % 2)} for seed in range(4)]
        asked = [pool.submit(post, server, body) for body in bodies]
        while server.service.held < 4:
            time.sleep(0.005)
        server.stop()
        answers = [future.result(timeout=30) for future in asked]
        assert [answer.status_code for answer in answers] == [200] * 4
        assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers[1::2])
        with pytest.raises(httpx.ConnectError):
            post(server, HELLO)


def test_a_closing_server_takes_nothing_new(serving):
    with serving() as server:
        server.service.closing = True
        refused = post(server, HELLO)
        assert refused.status_code == 503 and error_of(refused)["type"] == "server_error"
        assert httpx.get(f"{server.address}/health").status_code == 503


def test_a_failed_step_fails_its_requests_alone(serving, monkeypatch):
    with serving() as server:
        engine = server.service.worker._engine
        monkeypatch.setattr(engine, "step", lambda: 1 / 0)
        failed = post(server, HELLO)
        assert failed.status_code == 500 and "division" not in failed.text and error_of(failed)["code"] == "engine_failure"
        assert post(server, HELLO).status_code == 200 and server.service.held == 0


class Listener:
    """A server on this machine that counts who comes."""

    def __init__(self, redirect: str | None = None) -> None:
        self.hits = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.hits += 1
                self.send_response(302 if redirect else 200)
                if redirect:
                    self.send_header("Location", redirect)
                self.end_headers()
                self.wfile.write(b"" if redirect else png())

            def log_message(self, *arguments):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def port(self) -> int:
        return self.server.server_port


def private_urls(port: int) -> list[str]:
    hosts = (
        "127.0.0.1",
        "localhost",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "LOCALHOST",
        "a@127.0.0.1",
    )
    return [f"{scheme}://{host}:{port}/a.png" for host in hosts for scheme in ("http", "HTTP")]


def test_addresses_are_closed(server):
    with Listener() as listener:
        for url in (*private_urls(listener.port), f" http://127.0.0.1:{listener.port}/a.png", f"ftp://127.0.0.1:{listener.port}/a.png"):
            refused = post(server, images(url))
            assert refused.status_code == 400, url
            assert error_of(refused)["code"] == "invalid_image"
        assert listener.hits == 0


def test_allowed_addresses_are_public_ones(serving, monkeypatch):
    """Neither by name, nor by number, nor by a proxy or a redirect is a server of this machine reached."""
    with Listener() as listener, serving(allow_urls=True) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{listener.port}")
        for url in (*private_urls(listener.port), "http://example.invalid/a.png", "http:///a.png", "http://[::1/a.png"):
            refused = post(server, images(url))
            assert refused.status_code == 400, url
        assert listener.hits == 0
        monkeypatch.delenv("http_proxy")
        with pytest.raises(MediaError, match="public"):
            fetch_public(f"http://127.0.0.1:{listener.port}/a.png")
        assert listener.hits == 0


def test_files_are_closed(server, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    for name in (
        str(secret),
        f"file://{secret}",
        f"file://localhost{secret}",
        "/etc/passwd",
        "../secret.png",
        "~/.ssh/id_rsa",
        str(tmp_path),
        "\0",
    ):
        refused = post(server, images(name))
        assert refused.status_code == 400 and "opens no files" in error_of(refused)["message"]


def test_files_of_allowed_folders(serving, tmp_path):
    allowed = tmp_path / "media"
    allowed.mkdir()
    (allowed / "a.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    (allowed / "link.png").symlink_to(tmp_path / "secret.png")
    with serving(allowed_dirs=(allowed,)) as server:
        same = [post(server, images(name)).json()["choices"] for name in ("a.png", str(allowed / "a.png"), data_url())]
        assert (
            post(server, {**images("a.png"), "seed": 1}).json()["choices"]
            == post(server, {**images(data_url()), "seed": 1}).json()["choices"]
        )
        assert all(same)
        answers = set()
        for name in (
            str(tmp_path / "secret.png"),
            "../secret.png",
            "link.png",
            "missing.png",
            str(tmp_path / "missing.png"),
            "/etc/passwd",
        ):
            refused = post(server, images(name))
            assert refused.status_code == 400
            answers.add(error_of(refused)["message"])
        assert len(answers) == 1 and str(tmp_path) not in answers.pop()  # whether a file exists elsewhere is not told


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,", "data:image/png;base64,!!!", "data:,", "data:image/png", data_url(b"no image"), data_url(png()[:-40]),
        data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), data_url(png(width=1, height=400)), "hello",
    ],
)  # fmt: skip
def test_images_that_cannot_be_used(server, url):
    refused = post(server, images(url))
    assert refused.status_code == 400 and "/" + "tmp" not in error_of(refused)["message"]


def test_the_pixels_of_a_request_are_limited(server, monkeypatch):
    monkeypatch.setattr("finesight.serve.messages.MOST_PIXELS", 2 * 64 * 64)
    assert post(server, images(data_url(), data_url(png(2)))).status_code == 200
    refused = post(server, images(data_url(), data_url(png(2)), data_url(png(3))))
    assert refused.status_code == 400 and error_of(refused)["param"] == "messages[0].content[2]"


def test_two_models_of_one_name(folders):
    with pytest.raises(ModelError, match=r"both called base.*--name.*NAME=folder"):
        ModelShelf(ModelSettings(name_or_path=str(folders["base"])), {"base": folders["base"]}, name="base", device="cpu")
