"""Tokens a second of a server under so many streams at once; one line of JSON for each number of streams.

    python -m bench.serving ours CHECKPOINT_DIR --streams 1 16 64
    python -m bench.serving transformers CHECKPOINT_DIR --streams 1 16 64
    python -m bench.serving both CHECKPOINT_DIR --turns 3 --device cpu     # in turns, where other programs share the machine

Either server runs in a process of its own on the same checkpoint: ours, and `transformers serve`. A stream sends one request after
another, each about an image of its own, and reads the answer as it comes. All answers have the same number of tokens: ours never
draws a token that ends one, `transformers serve` is told by `min_new_tokens`. Tokens are those that the server itself counts.

A round ends when all requests are answered, or after --limit seconds: then answers that were whole by then count, over the time
to the last of them.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.machine import versions
from bench.prompts import data_url, prompts, special_ids
from bench.rows import Row, emit, failed, significant
from bench.torchvision_on_cpu import stand_in
from finesight.data.processor import load_processor

SYSTEMS = ("ours", "transformers")
_START_LIMIT_S = 240.0
_WARM_TOKENS = 8
_WARM_LIMIT_S = 240.0  # compiling, capturing graphs


@dataclass(frozen=True)
class Answered:
    """One request that was answered."""

    asked_at: float  # times are perf_counter's
    first_at: float  # the first text came
    ended_at: float
    tokens: int


@dataclass
class Round:
    """What streams have heard so far."""

    answers: list[Answered] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)


class Client:
    """Sends requests to one server.

    Args:
        images: data URLs; texts: the questions, as many.
    """

    def __init__(self, a: argparse.Namespace, system: str, port: int) -> None:
        self.system, self.port = system, port
        self.asked = [(data_url(row), row.question) for row in _prompts(a)]
        self.model = "measured" if system == "ours" else str(a.checkpoint)
        self.special = list(special_ids(load_processor(a.checkpoint)))

    def body(self, number: int, tokens: int) -> dict[str, Any]:
        """Request `number`, in the form that the server takes."""
        url, question = self.asked[number % len(self.asked)]
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "stream": True,
            "max_tokens": tokens,
        }
        if self.system == "ours":
            return {**body, "temperature": 1.0, "stream_options": {"include_usage": True}}
        drawing = {
            "max_new_tokens": tokens, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "suppress_tokens": self.special,
            "eos_token_id": self.special[0], "pad_token_id": self.special[0],
        }  # fmt: skip
        return {**body, "generation_config": json.dumps(drawing)}

    def ask(self, number: int, tokens: int, over: threading.Event) -> Answered | None:
        """One answer, read as it comes; None if the round is over before it is whole.

        Raises:
            ValueError: the server refused or failed, or the answer has another length.
        """
        asked_at = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_WARM_LIMIT_S)
        try:
            content = json.dumps(self.body(number, tokens))
            connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"status {response.status}: {response.read(400).decode(errors='replace')}")
            first_at, counted = 0.0, 0
            for line in response:
                if over.is_set():
                    return None
                if not line.startswith(b"data: {"):
                    continue
                if line.startswith(b'data: {"error"'):  # not always JSON
                    raise ValueError(f"the server failed: {line[6:].decode(errors='replace').strip()}")
                piece = json.loads(line[6:])
                if not first_at and any(choice["delta"].get("content") for choice in piece["choices"]):
                    first_at = time.perf_counter()
                counted = (piece.get("usage") or {}).get("completion_tokens", counted)
        finally:
            connection.close()
        if counted != tokens:
            raise ValueError(f"an answer has {counted} tokens in place of {tokens}")
        ended_at = time.perf_counter()
        return Answered(asked_at, first_at or ended_at, ended_at, counted)

    def round(self, streams: int, requests: int, tokens: int, limit_s: float) -> list[Answered]:
        """Answers to `requests` of each stream, as far as they were whole within the limit.

        Raises:
            ValueError: a request failed, or none was answered.
        """
        heard = Round()

        def stream(place: int) -> None:
            for turn in range(requests):
                if heard.over.is_set():
                    return
                try:
                    answer = self.ask(place + turn * streams, tokens, heard.over)
                except (OSError, ValueError, http.client.HTTPException) as error:
                    with heard.lock:
                        heard.errors.append(str(error))
                    return
                if answer is not None:
                    with heard.lock:
                        heard.answers.append(answer)

        threads = [threading.Thread(target=stream, args=(place,), daemon=True) for place in range(streams)]
        stop_at = time.perf_counter() + limit_s
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, stop_at - time.perf_counter()))
        heard.over.set()
        with heard.lock:
            answers, errors = list(heard.answers), list(heard.errors)
        if errors:
            raise ValueError(errors[0])
        if not answers:
            raise ValueError(f"no request of {streams} streams was answered within {limit_s:.0f} s")
        return answers


def _prompts(a: argparse.Namespace) -> list[Any]:
    return prompts(max(a.streams), a.checkpoint, image_tokens=a.image_tokens, text_tokens=a.text_tokens)


@contextmanager
def server(a: argparse.Namespace, system: str) -> Iterator[int]:
    """The server in a process of its own, listening; its port.

    Raises:
        ValueError: it did not begin to listen.
    """
    port = _free_port()
    if system == "ours":
        command = [
            "-m",
            "bench.endless_server",
            str(a.checkpoint),
            "--port",
            str(port),
            "--rows",
            str(max(a.streams)),
            "--device",
            a.device,
        ]
    else:
        command = ["-m", "bench.transformers_server", str(a.checkpoint), "--host", "127.0.0.1", "--port", str(port), "--device", a.device]
        command += ["--compile"] if a.compile else []
    with subprocess.Popen([sys.executable, *command], stdout=sys.stderr) as process:
        try:
            _wait(process, port)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    stop_at = time.perf_counter() + _START_LIMIT_S
    while time.perf_counter() < stop_at:
        if process.poll() is not None:
            raise ValueError(f"the server ended with status {process.returncode}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.2)
        finally:
            connection.close()
    raise ValueError(f"the server did not listen within {_START_LIMIT_S:.0f} s")


def figures(turns: Sequence[Sequence[Answered]], asked: int) -> Row:
    """Rates and waits over the rounds of one server at one number of streams."""
    seconds = sum(max(answer.ended_at for answer in turn) - min(answer.asked_at for answer in turn) for turn in turns)
    answers = [answer for turn in turns for answer in turn]
    return {
        "tokens_s": significant(sum(answer.tokens for answer in answers) / seconds),
        "answers": len(answers),
        "asked": asked,
        "seconds": round(seconds, 3),
        "first_token_s": significant(statistics.median(answer.first_at - answer.asked_at for answer in answers)),
        "answer_s": significant(statistics.median(answer.ended_at - answer.asked_at for answer in answers)),
    }


def measure(a: argparse.Namespace, systems: Sequence[str]) -> Iterator[Row]:
    """A row for each number of streams and each server, all of which run until the end.

    Raises:
        ValueError: a server did not start, or a request failed.
    """
    with ExitStack() as running:
        clients = [Client(a, system, running.enter_context(server(a, system))) for system in systems]
        for streams in a.streams:
            turns: dict[str, list[list[Answered]]] = {client.system: [] for client in clients}
            for turn in range(a.turns):
                for client in clients:
                    if turn == 0:
                        # Ours captures a graph for each number of rows; the other computes one request after another, however many wait.
                        client.round(streams if client.system == "ours" else 1, 1, _WARM_TOKENS, _WARM_LIMIT_S)
                    turns[client.system].append(client.round(streams, a.requests, a.answer_tokens, a.limit))
            for client in clients:
                about = {"system": client.system, "system_version": versions().get(client.system), "streams": streams, "turns": a.turns}
                yield {**about, **figures(turns[client.system], a.turns * streams * a.requests)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=(*SYSTEMS, "both"))
    parser.add_argument("checkpoint", type=Path, help="folder written by bench.checkpoint, with weights")
    parser.add_argument("--model", help="name of the model, for the result; else the folder's")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--requests", type=int, default=2, help="of each stream, one after another")
    parser.add_argument("--turns", type=int, default=1, help="rounds at each number of streams; the servers take turns")
    parser.add_argument("--image-tokens", type=int, default=1024)
    parser.add_argument("--text-tokens", type=int, default=100, help="of a prompt, what the template writes included")
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds of a round")
    parser.add_argument("--compile", action="store_true", help="transformers serve: static cache and torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(arguments)
    row: Row = {
        "row": "serve",
        "system": a.system,
        "model": a.model or a.checkpoint.name,
        "precision": "float32" if a.device == "cpu" else "bf16",
        "image_tokens": a.image_tokens,
        "text_tokens": a.text_tokens,
        "answer_tokens": a.answer_tokens,
        "compiled": a.compile,
    }
    try:
        stand_in()
        for found in measure(a, SYSTEMS if a.system == "both" else (a.system,)):
            emit({**row, **found})
    except Exception as error:  # one setting of many: the others go on
        emit(failed(row, error))


if __name__ == "__main__":
    main()
