"""Requests drawn from the OpenAPI schema: nothing crashes, nothing of this machine comes back, nobody on it is called.

FINESIGHT_FUZZ_REQUESTS sets how many; `make fuzz` sends 10,000.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finesight.recipe import ModelSettings
from finesight.serve.models import ModelShelf
from serve.conftest import data_url, png, running
from serve.openapi_strategies import Call, calls
from serve.test_http import CLIENT, Listener, error_of, private_urls

REQUESTS = int(os.environ.get("FINESIGHT_FUZZ_REQUESTS", "300"))
CANARY = "canary-7c1f"
# Statuses of mistakes of the client; none says that the server failed.
REFUSALS = {400, 404, 405, 408, 413, 429}
REFUSED = {"invalid_request_error", "timeout_error", "rate_limit_error"}  # of errors that come in a stream


class Servers:
    """One server with everything closed; one that opens a folder, public addresses and adapters; and what must stay out of reach."""

    def __init__(self, closed, opened, listener: Listener, folder) -> None:
        self.closed, self.opened, self.listener, self.folder = closed, opened, listener, folder
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
        adapters = [str(folder / "adapters" / "good")] * 30 + [
            str(folder / "adapters" / name) for name in ("broken", "link", "../media", "")
        ]
        self.folders = st.sampled_from([*adapters, str(folder / "outside"), *near, *named])

    def open_files(self) -> set[str]:
        """Files of the test that this process holds open, where that can be told."""
        held = Path("/proc/self/fd")
        found = {str(entry.readlink()) for entry in held.iterdir() if entry.is_symlink()} if held.is_dir() else set()
        return {path for path in found if path.startswith(str(self.folder))}


@pytest.fixture(scope="module")
def servers(shelf, folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    media = folder / "media"
    media.mkdir()
    (media / "a.png").write_bytes(png())
    (folder / "secret.txt").write_text(CANARY)
    (folder / "secret.png").write_bytes(png(9))
    (media / "link.png").symlink_to(folder / "secret.txt")
    shutil.copytree(folders["charts"], folder / "adapters" / "good")
    shutil.copytree(folders["charts"], folder / "outside")
    shutil.copytree(folders["charts"], folder / "adapters" / "broken")
    (folder / "adapters" / "broken" / "adapter_config.json").write_text("{")
    (folder / "adapters" / "link").symlink_to(folder / "outside")
    (folder / "scratch").mkdir()
    own = {name: path for name, path in folders.items() if name != "base"}
    changing = ModelShelf(ModelSettings(name_or_path=str(folders["base"])), own, device="cpu")
    with (
        pytest.MonkeyPatch.context() as patch,
        Listener() as listener,
        running(shelf, timeout_s=20.0) as closed,
        running(changing, timeout_s=20.0, allow_urls=True, allowed_dirs=(media,), adapter_dirs=(folder / "adapters",)) as opened,
    ):
        patch.setattr(tempfile, "tempdir", str(folder / "scratch"))
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
        assert end == "[DONE]" or json.loads(end)["error"]["type"] in REFUSED, told
        assert all(json.loads(event) for event in events), told
    elif call.path == "/v1/chat/completions":
        answer = json.loads(response.text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON: {told}"))
        body = json.loads(call.body)
        form = body.get("response_format") or {"type": "text"}
        for choice in answer["choices"]:
            if form["type"] != "text" and choice["finish_reason"] == "stop" and not body.get("stop"):
                json.loads(choice["message"]["content"])


@pytest.mark.timeout(max(120, REQUESTS))
def test_no_request_breaks_the_server(servers):
    document = CLIENT.get(f"{servers.opened.address}/openapi.json").json()
    drawn = calls(document, ["tiny", "charts", "invoices.v1"] * 6 + ["one", "two"], servers.urls, servers.folders)
    statuses: Counter[int] = Counter()
    answered: Counter[str] = Counter()  # 200 by path

    @settings(max_examples=REQUESTS, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(call=drawn, opened=st.booleans())
    def send(call: Call, opened: bool) -> None:
        server = servers.opened if opened else servers.closed
        headers = {"content-type": "application/json", **dict(call.headers)}
        response = CLIENT.request(call.method, f"{server.address}{call.path}", content=call.body, headers=headers)
        statuses[response.status_code] += 1
        answered[call.path] += response.status_code == 200
        check(response, call)

    send()
    print(f"{statuses.total()} answers by status: {dict(sorted(statuses.items()))}, hits of the listener: {servers.listener.hits}")
    print(f"answers with status 200 by path: {dict(answered.most_common())}")
    assert answered["/v1/chat/completions"] > REQUESTS // 20 and statuses[400] > 0
    assert servers.listener.hits == 0
    for server in (servers.closed, servers.opened):
        assert server.service.held == 0 and server.service.worker.alive and server.service.worker.running == 0
        assert httpx.get(f"{server.address}/health", trust_env=False).json() == {"status": "ok"}
        metrics = httpx.get(f"{server.address}/metrics", trust_env=False).text
        assert 'status="2' in metrics and 'status="5' not in metrics
    assert not servers.open_files() and not list((servers.folder / "scratch").iterdir())
