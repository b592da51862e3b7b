"""Requests drawn from the OpenAPI schema: nothing crashes, nothing of this machine comes back, nobody on it is called.

FINESIGHT_FUZZ_REQUESTS sets how many; `make fuzz` sends 10,000.
"""

from __future__ import annotations

import json
import os

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.conftest import data_url, png
from serve.openapi_strategies import Call, calls
from serve.test_http import CLIENT, Listener, error_of, private_urls

REQUESTS = int(os.environ.get("FINESIGHT_FUZZ_REQUESTS", "300"))
CANARY = "canary-7c1f"
# Statuses of mistakes of the client; none says that the server failed.
REFUSALS = {400, 404, 405, 408, 413, 429}


class Servers:
    """One server with everything closed and one that opens a folder and public addresses, and what must stay out of reach."""

    def __init__(self, closed, opened, listener: Listener, folder) -> None:
        self.closed, self.opened, self.listener = closed, opened, listener
        secrets = [folder / "secret.txt", folder / "secret.png", "/etc/passwd", "/proc/self/environ"]
        near = [f"{prefix}{path}" for path in secrets for prefix in ("", "file://", "file://localhost", "../..", "media/../")]
        named = [
            "a.png",
            "link.png",
            "../secret.png",
            "..\\secret.png",
            "/",
            ".",
            "\0",
            "~/.bashrc",
            "a.png\0.txt",
            f"{folder}/media/%2e%2e/secret.png",
        ]
        broken = [data_url(png()[:-9]), "data:image/png;base64,AAAA", "data:image/svg+xml,<svg/>", "data:,", "data:;base64", ""]
        reaching = [*near, *named, *broken, *private_urls(listener.port), data_url(), data_url(png(2, 32, 96))]
        self.urls = st.sampled_from([data_url()] * 20 + reaching)


@pytest.fixture(scope="module")
def servers(shelf, tmp_path_factory):
    from serve.conftest import running

    folder = tmp_path_factory.mktemp("fuzz")
    media = folder / "media"
    media.mkdir()
    (media / "a.png").write_bytes(png())
    (folder / "secret.txt").write_text(CANARY)
    (folder / "secret.png").write_bytes(png(9))
    (media / "link.png").symlink_to(folder / "secret.txt")
    with (
        Listener() as listener,
        running(shelf, timeout_s=20.0) as closed,
        running(shelf, timeout_s=20.0, allow_urls=True, allowed_dirs=(media,)) as opened,
    ):
        yield Servers(closed, opened, listener, folder)


def check(response: httpx.Response, call: Call) -> None:
    """An answer as the interface has it, or a refusal that says why."""
    told = f"{response.status_code} to {call}: {response.text[:500]}"
    assert response.status_code == 200 or response.status_code in REFUSALS, told
    assert CANARY not in response.text and "root:" not in response.text and "Traceback" not in response.text, told
    if response.status_code != 200:
        if call.method != "HEAD":
            error_of(response)
    elif call.method == "POST" and response.headers["content-type"].startswith("text/event-stream"):
        *events, end = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert end == "[DONE]" or "error" in json.loads(end), told
        assert all(json.loads(event) for event in events), told
    elif call.method == "POST":
        answer = json.loads(response.text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON: {told}"))
        body = json.loads(call.body)
        form = body.get("response_format") or {"type": "text"}
        for choice in answer["choices"]:
            if form["type"] != "text" and choice["finish_reason"] == "stop" and not body.get("stop"):
                json.loads(choice["message"]["content"])


@pytest.mark.timeout(max(120, REQUESTS))
def test_no_request_breaks_the_server(servers):
    document = CLIENT.get(f"{servers.closed.address}/openapi.json").json()
    drawn = calls(document, ["tiny", "charts", "invoices.v1"], servers.urls)
    statuses: dict[int, int] = {}

    @settings(max_examples=REQUESTS, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(call=drawn, opened=st.booleans())
    def send(call: Call, opened: bool) -> None:
        server = servers.opened if opened else servers.closed
        headers = {"content-type": "application/json", **dict(call.headers)}
        response = CLIENT.request(call.method, f"{server.address}{call.path}", content=call.body, headers=headers)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        check(response, call)

    send()
    print(f"answers by status: {dict(sorted(statuses.items()))}, hits of the listener: {servers.listener.hits}")
    assert statuses.get(200, 0) > REQUESTS // 20 and statuses.get(400, 0) > 0
    assert servers.listener.hits == 0
    for server in (servers.closed, servers.opened):
        assert server.service.held == 0 and server.service.worker.alive and server.service.worker.running == 0
        assert httpx.get(f"{server.address}/health", trust_env=False).json() == {"status": "ok"}
