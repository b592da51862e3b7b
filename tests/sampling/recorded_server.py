"""A server that answers as a recording says, and takes note of what it was asked."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

RECORDINGS = Path(__file__).parent / "vllm_recordings"


def recording(name: str) -> Any:
    return json.loads((RECORDINGS / f"{name}.json").read_text(encoding="utf-8"))


class RecordedServer:
    """Gives the answers of exchanges in their order.

    An answer's `body` is sent as JSON, or as it is where it is text. A request whose method or path is another than the recorded
    one gets status 599.
    """

    def __init__(self, exchanges: Sequence[dict[str, Any]]) -> None:
        self.left = list(exchanges)
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body: Any) -> None:
                outer.asked.append({"method": self.command, "path": self.path, "json": body})
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                status, content, more = outer.next(self.command, self.path, body)
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **more}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *about: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def next(self, method: str, path: str, body: Any) -> tuple[int, bytes, dict[str, str]]:
        expected = self.left.pop(0) if self.left else {"request": {"method": "nothing", "path": "more"}}
        if (method, path) != (expected["request"]["method"], expected["request"]["path"]):
            return 599, f"asked {method} {path}, recorded {expected['request']}".encode(), {}
        response = expected["response"]
        content = response["body"]
        # Adapters have names that are drawn anew for each run; a server repeats the one that it was asked for.
        name = (body or {}).get("model") or (body or {}).get("lora_name")
        text = content if isinstance(content, str) else json.dumps(content)
        text = text if name is None else re.sub(r"finesight-[0-9a-f]{8}-\d+-step-\d+", name, text)
        return response["status"], text.encode(), response.get("headers", {})


@contextmanager
def replaying(*exchanges: dict[str, Any]) -> Iterator[RecordedServer]:
    server = RecordedServer(exchanges)
    try:
        yield server
    finally:
        server.server.shutdown()
        server.server.server_close()
