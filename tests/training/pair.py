"""Two processes that train recipes together (gloo, CPU), one after another. Started once: most of their time goes into imports."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from finesight.recipe import Recipe
from finesight.recipe_files import dump_recipe

LIMIT_S = 90
_TRAINED = "trained: "
_SCRIPT = f"""
import sys
sys.path[:0] = {[path for path in sys.path if path]!r}
import torch
torch.set_num_threads(1)
from finesight.recipe_files import load_recipe
from finesight.training.run import train
for line in sys.stdin:
    train(load_recipe(line.strip()))
    print("{_TRAINED}" + line.strip(), flush=True)
torch.distributed.destroy_process_group()
"""


def launch(script: str, *arguments: str, folder: Path | None = None) -> list[subprocess.Popen[str]]:
    """Starts two processes of one group with a script of Python.

    Args:
        folder: what they say on stderr goes to a file in it; None: to a pipe.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE if folder is None else (folder / f"stderr-{rank}").open("w"),
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


class Pair:
    """The two processes.

    Args:
        folder: for recipes and for what the processes say.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._recipes = 0
        self._waiting: list[str] = []
        self.processes: list[subprocess.Popen[str]] = []
        self._said: list[queue.SimpleQueue[str]] = []

    def train(self, recipes: list[Recipe]) -> None:
        """Trains recipes, and fails where a process does."""
        self.begin(recipes)
        self.finish()

    def begin(self, recipes: list[Recipe]) -> None:
        """Hands recipes over; :meth:`finish` waits for them."""
        if not self.processes:
            self._start()
        for recipe in recipes:
            path = self._folder / f"recipe-{self._recipes}.yaml"
            self._recipes += 1
            path.write_text(dump_recipe(recipe), encoding="utf-8")
            self._waiting.append(str(path))
            for process in self.processes:
                assert process.stdin is not None
                process.stdin.write(f"{path}\n")
                process.stdin.flush()

    def finish(self) -> None:
        """Waits until all recipes are trained."""
        until = time.monotonic() + LIMIT_S
        while self._waiting:
            wanted = self._waiting.pop(0)
            for said in self._said:
                while True:
                    try:
                        if said.get(timeout=0.1).strip() == _TRAINED + wanted:
                            break
                    except queue.Empty:
                        ended = [rank for rank, process in enumerate(self.processes) if process.poll() is not None]
                        if ended or time.monotonic() > until:
                            self._fail(wanted, ended)

    def close(self) -> None:
        """Ends both; the next recipes would start others."""
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes, self._said, self._waiting = [], [], []

    def _start(self) -> None:
        self.processes = launch(_SCRIPT, folder=self._folder)
        self._said = [queue.SimpleQueue() for _ in self.processes]
        for process, said in zip(self.processes, self._said, strict=True):
            threading.Thread(target=self._listen, args=(process, said), daemon=True).start()

    @staticmethod
    def _listen(process: subprocess.Popen[str], said: queue.SimpleQueue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.put(line)

    def _fail(self, recipe: str, ended: list[int]) -> None:
        self.close()
        errors = [(self._folder / f"stderr-{rank}").read_text()[-3000:] for rank in ended or (0, 1)]
        raise AssertionError(f"{recipe}: {'a process ended' if ended else f'not trained within {LIMIT_S} s'}\n" + "\n".join(errors))
