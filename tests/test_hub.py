"""The hub, where it answers, where it does not, and where nobody knows: real requests to servers of this machine."""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from finesight.data.processor import checkpoint_folder, load_processor
from finesight.data.tables import open_table
from finesight.errors import DataError, ModelError
from finesight.hub import cached_checkpoint, why_unreachable
from tiny import tiny_checkpoint

NAME, COMMIT = "Qwen/Qwen3-VL-tiny", "0123456789abcdef0123456789abcdef01234567"


class LocalHub(BaseHTTPRequestHandler):
    """Answers as the hub does to a client that asks for the files of one repository."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        prefix = f"/{NAME}/resolve/"
        file = self.folder / self.path.removeprefix(prefix).split("/", 1)[-1]
        found = self.path.startswith(prefix) and file.is_file()
        content = file.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


def endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """As in a process started with this HF_ENDPOINT."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("hub") / "model", "qwen3_vl")


@pytest.fixture(autouse=True)
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process started without HF_HUB_OFFLINE, with an empty cache; its hub is a port at which nobody listens."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}")


@pytest.fixture(scope="module")  # transformers keeps the address that it has asked first
def hub(folder: Path) -> Iterator[str]:
    handler = type("Handler", (LocalHub,), {"folder": folder})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_was_fetched_once_serves_without_a_network(
    hub: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as reachable:
        endpoint(reachable, hub)
        assert checkpoint_folder(NAME) == NAME  # the libraries ask the hub, which may have a newer one
        fetched = load_processor(NAME)
        assert why_unreachable() is None
    snapshot = Path(constants.HF_HUB_CACHE) / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT
    assert cached_checkpoint(NAME) == snapshot and not (snapshot / "model.safetensors").exists()
    begin = time.perf_counter()
    assert checkpoint_folder(NAME) == checkpoint_folder(NAME, revision=COMMIT) == str(snapshot)
    kept, there = load_processor(NAME), load_processor(folder)
    assert time.perf_counter() - begin < 3
    assert kept.chat_template == fetched.chat_template == there.chat_template
    assert kept.image_settings == fetched.image_settings == there.image_settings
    assert kept.tokenizer.get_vocab() == fetched.tokenizer.get_vocab() == there.tokenizer.get_vocab()
    assert f"{NAME} is taken as it lies in the cache ({snapshot})" in caplog.text and "cannot be reached" in caplog.text


def test_a_name_that_was_not_fetched_is_refused_at_once() -> None:
    begin = time.perf_counter()
    with pytest.raises(ModelError, match=r"neither a folder here nor in the cache .*127\.0\.0\.1:\d+ cannot be reached .*HF_ENDPOINT"):
        load_processor(NAME)
    assert time.perf_counter() - begin < 2
    with pytest.raises(ModelError, match=r"tiny \(revision v2\) is neither"):
        checkpoint_folder(NAME, revision="v2")


def test_a_network_that_swallows_requests_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        endpoint(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin = time.perf_counter()
        reason = why_unreachable()
    assert reason is not None and "cannot be reached" in reason
    assert 0.9 < time.perf_counter() - begin < 3


def test_a_hub_that_was_forbidden_is_not_asked(hub: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    endpoint(monkeypatch, hub)
    load_processor(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with caplog.at_level(logging.WARNING):
        assert Path(checkpoint_folder(NAME)).name == COMMIT
        with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE .* forbids"):
            checkpoint_folder("Qwen/other")
    assert not caplog.records  # as was asked for


def test_a_mistyped_file_is_told_at_once(tmp_path: Path) -> None:
    begin = time.perf_counter()
    with pytest.raises(DataError, match=r"There is no file or folder nothere here, and .* cannot be reached"):
        open_table("nothere", base_dir=tmp_path)
    assert time.perf_counter() - begin < 3
