"""A claim: which settings of whom are measured side by side, and what the results must show.

Each setting runs in a process of its own, one after another on one machine, so that none inherits memory or compiled code
from another. Results are written after each; a setting that fails is kept with its reason, and the others go on. What was
measured for another claim on the same machine since it was started, with the same code and settings, is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import rows as results
from bench.machine import CHECKOUT, provenance
from bench.rows import Row

RESULTS = CHECKOUT / "bench" / "results"
DEFAULT_MODEL = "qwen3-vl-8b"
TINY_MODEL = "tiny-qwen3-vl"
PEERS = ("bench.peers", "bench.grpo_peers")  # run with all of the peers' archive
_READ_WEIGHTS = (*PEERS, "bench.serving")
# Seconds that one setting may take, and all of a call: what runs longer is recorded as failed, the rest as not measured.
RUN_LIMIT_S = 300.0
CALL_LIMIT_S = 570.0

_TINY_STEP = ("--prompts", "2", "--generations", "4", "--image-tokens", "16", "--completion-tokens", "8", "--steps", "3", "--warm", "1")
_TINY_TRAINING = ("--device", "cpu", "--batch", "4", "--budget", "2048", "--workers", "0", "--steps", "2", "--warm", "1")
# Appended to the arguments of a script where it is only tried, on a CPU.
TINY_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "bench.sft": _TINY_TRAINING,
    "bench.profile_step": (*_TINY_TRAINING, "--steps", "3"),
    "bench.peers": ("--cpu", "--batch", "2", "--accumulation", "2", "--steps", "2", "--warm", "1", "--workers", "0"),
    "bench.grpo_step": ("--device", "cpu", *_TINY_STEP),
    "bench.grpo_peers": ("--cpu", "--batch", "4", *_TINY_STEP),
    "bench.serving": ("--device", "cpu", "--streams", "1", "2", "--image-tokens", "16", "--answer-tokens", "8", "--requests", "2"),
    "bench.roofline": ("--device", "cpu", "--tokens", "32", "--size", "32", "--copy-bytes", "65536"),
    "bench.exactness": ("--device", "cpu", "--samples", "2", "--budget", "2048"),
    "bench.adapter_cost": ("--device", "cpu", "--batch", "4", "--budget", "2048"),
    "bench.memory": ("--device", "cpu", "--tiny"),
    "bench.decode": ("--device", "cpu", "--tiny"),
    "bench.group_update": ("--device", "cpu", "--tiny"),
}
_NOT_TINY = {"--compile"}  # takes longer on a CPU than all else together


@dataclass(frozen=True)
class Run:
    """One setting, or several that a script measures in one process.

    Arguments may name `{model}`, `{checkpoint}` (folder, with weights), `{scratch}` (emptied before the claim) and `{bpe}`
    (an argument with it is left out where no vocabulary was given). Without `{model}` a script names models itself.
    """

    label: str
    module: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    repeats: bool = False  # measured anew even if an equal setting was measured before: its state, or chance, is the point
    tiny: tuple[str, ...] = ()  # further arguments where it is only tried
    packages: tuple[str, ...] = ()  # of the peers' archive, that our side needs too; the rest of it stays out of reach

    @property
    def needs_weights(self) -> bool:
        return self.module in _READ_WEIGHTS or "--load" in self.arguments


def ours(label: str, *arguments: str, **options: Any) -> Run:
    """A run of our side."""
    return Run(label, "bench.sft", ("--model", "{model}", "--checkpoint", "{checkpoint}", *arguments), **options)


def peer(label: str, system: str, *arguments: str) -> Run:
    """A run of Unsloth or TRL."""
    return Run(label, "bench.peers", (system, "{checkpoint}", "--model", "{model}", *arguments))


@dataclass(frozen=True)
class Finding:
    """What the rows say of one thing that is to be reached."""

    what: str
    reach: float
    value: float | None  # None: not measured
    unit: str = "×"
    at_most: bool = False  # whether less is better
    reason: str = ""  # why there is no value
    compared: tuple[str, ...] = ()  # labels of the rows that it rests on

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.reach if self.at_most else self.value >= self.reach


Rows = Mapping[str, Sequence[Row]]  # label -> rows that were measured; failed ones are left out


@dataclass(frozen=True)
class Claim:
    """What is measured, and what is to be seen in it."""

    name: str
    title: str
    runs: tuple[Run, ...]
    judge: Callable[[Rows], list[Finding]]
    note: str = ""  # what a reader must know of how it was measured
    model: str = DEFAULT_MODEL  # that it is about

    def findings(self, rows: Sequence[Row]) -> list[Finding]:
        """What rows say; failed ones count as missing."""
        measured: dict[str, list[Row]] = {}
        for row in rows:
            if not row.get("failed"):
                measured.setdefault(row["label"], []).append(row)
        return self.judge(measured)


class Runner:
    """Measures the settings of a claim and keeps the results."""

    def __init__(self, claim: Claim, a: argparse.Namespace) -> None:
        self.claim, self.a = claim, a
        self.model = TINY_MODEL if a.tiny else a.model or claim.model
        self.stop_at = time.monotonic() + a.time_limit
        work = Path(tempfile.gettempdir())
        self.checkpoint = a.checkpoint or work / f"finesight-bench-{self.model}"
        self.scratch = work / f"finesight-bench-scratch-{os.getpid()}"
        self.path = results_path(a.results, claim, self.model)
        self.rows: list[Row] = json.loads(self.path.read_text(encoding="utf-8"))["rows"] if self.path.exists() else []

    def run(self) -> list[Finding]:
        """Measures what is asked for and writes the results."""
        chosen = [run for run in self.claim.runs if not self.a.only or run.label in self.a.only]
        if self.a.dry_run:
            for run in chosen:
                say(shlex.join(["python", "-m", run.module, *self.arguments(run)]))
            return []
        self.scratch.mkdir(parents=True)
        try:
            for run in chosen:
                self._measure(run)
        finally:
            shutil.rmtree(self.scratch)
        return self._write()

    def arguments(self, run: Run) -> list[str]:
        """The arguments of a run as they are given to its script."""
        places = {"{model}": self.model, "{checkpoint}": str(self.checkpoint), "{scratch}": str(self.scratch), "{bpe}": str(self.a.bpe)}
        further = shlex.split(self.a.ours) if run.module not in PEERS else shlex.split(self.a.theirs)
        given = [*run.arguments, *further]
        if self.a.tiny:
            given = [argument for argument in given if argument not in _NOT_TINY] + [*TINY_ARGUMENTS[run.module], *run.tiny]
        return [_filled(argument, places) for argument in given if self.a.bpe or "{bpe}" not in argument]

    def _measure(self, run: Run) -> None:
        key = {
            "module": run.module,
            "arguments": [*run.arguments, *shlex.split(self.a.theirs if run.module in PEERS else self.a.ours)],
        }
        found = None if run.repeats or self.a.fresh else self._measured_before(run, key)
        if found is not None:
            say(f"{run.label}: measured before on this machine")
            rows = found
        elif time.monotonic() > self.stop_at:
            rows = [results.failed({}, "not measured: the time of this call was used up")]
        else:
            say(f"{run.label}: {shlex.join([run.module, *self.arguments(run)])}")
            try:
                self._prepare(run)
                rows = self._in_this_process(run) if self.a.tiny else self._in_a_process(run)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                rows = [results.failed({}, error)]
        if time.monotonic() > self.stop_at and any("not measured" in row.get("reason", "") for row in rows) and self._has(run.label):
            return  # a result of an earlier call is worth more than this refusal
        self.rows = [row for row in self.rows if row["label"] != run.label]
        for row in rows:
            stamp = {} if "machine" in row else provenance()
            self.rows.append({"label": run.label, "model": self.model, **row, **stamp, **key})
        for row in rows:
            say(f"{run.label}: {_gist(row)}")
        self._write()

    def _has(self, label: str) -> bool:
        return any(row["label"] == label and not row.get("failed") for row in self.rows)

    def _measured_before(self, run: Run, key: Mapping[str, Any]) -> list[Row] | None:
        """Rows of this or another claim with the same settings, machine and (of ours) code; None: there are none."""
        here = provenance()
        model = self.model if any("{model}" in argument for argument in run.arguments) else None
        for path in sorted(self.a.results.glob("*.json")):
            rows = json.loads(path.read_text(encoding="utf-8")).get("rows", [])  # other results may lie beside
            found = next((row for row in rows if "module" in row and _is_same(row, key, model, here, theirs=run.module in PEERS)), None)
            if found is None:
                continue
            same = [row for row in rows if row["label"] == found["label"]]
            if not any(row.get("failed") for row in same):  # of several that a script measures, all
                return same
        return None

    def _prepare(self, run: Run) -> None:
        """Processor and, where they are needed, weights in the checkpoint's folder."""
        if not any("{checkpoint}" in argument for argument in run.arguments):
            return
        weights = any(self.checkpoint.glob("*.safetensors"))
        if (self.checkpoint / "config.json").exists() and (weights or not run.needs_weights):
            return
        say(f"writing {self.checkpoint}{' with weights' if run.needs_weights else ''}")
        command = [self.model, str(self.checkpoint), *([] if run.needs_weights else ["--no-weights"])]
        command += ["--bpe", str(self.a.bpe)] if self.a.bpe else []
        if self.a.tiny:
            importlib.import_module("bench.checkpoint").main([*command, "--device", "cpu"])
            return
        subprocess.run([sys.executable, "-m", "bench.checkpoint", *command], check=True, env=self._environment(run), cwd=CHECKOUT)

    def _environment(self, run: Run) -> dict[str, str]:
        site = []
        if self.a.peers and (run.module in PEERS or run.packages):
            whole = _site(self.a.peers)
            site = [str(whole if run.module in PEERS else _part_of_site(whole, run.packages))]
        path = [*site, str(CHECKOUT), str(CHECKOUT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        places = {"{scratch}": str(self.scratch)}
        own = {name: _filled(value, places) for name, value in run.environment.items()}
        return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **own}

    def _in_a_process(self, run: Run) -> list[Row]:
        limit = max(1.0, min(self.a.run_limit, self.stop_at - time.monotonic()))
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", run.module, *self.arguments(run)], stdout=subprocess.PIPE, stderr=errors, text=True,
                errors="replace", env=self._environment(run), cwd=CHECKOUT,
            )  # fmt: skip
            late = threading.Timer(limit, process.kill)
            late.start()
            try:
                rows = [row for line in process.stdout or () if (row := _shown(line)) is not None]
                code = process.wait()
            finally:
                timed_out = not late.is_alive()
                late.cancel()
            errors.seek(0)
            told = errors.read()
        if any(row.get("failed") for row in rows) or not rows:
            sys.stderr.write(told[-4000:])
        if timed_out:  # of several that a script measures, some may be done
            return [*rows, results.failed({}, f"stopped after {limit:.0f} s")]
        if rows:
            return rows
        last = next((line for line in reversed(told.splitlines()) if line.strip()), "it said nothing")
        return [results.failed({}, f"ended with status {code}: {last.strip()}")]

    def _in_this_process(self, run: Run) -> list[Row]:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            importlib.import_module(run.module).main(self.arguments(run))
        return [row for line in output.getvalue().splitlines() if (row := _shown(line)) is not None]

    def _write(self) -> list[Finding]:
        return write_results(self.path, self.claim, self.model, self.rows)


def results_path(folder: Path, claim: Claim, model: str) -> Path:
    """Where the results of a claim lie; those about another model than its own are named after that."""
    return folder / (f"{claim.name}.json" if model == claim.model else f"{claim.name}-{model}.json")


def write_results(path: Path, claim: Claim, model: str, rows: list[Row]) -> list[Finding]:
    """Writes rows, in the order of the claim's settings, with what they say; returns that."""
    findings = claim.findings(rows)
    order = {run.label: place for place, run in enumerate(claim.runs)}
    rows.sort(key=lambda row: order.get(row["label"], len(order)))
    content = {
        "claim": claim.name,
        "title": claim.title,
        "model": model,
        "findings": [{**asdict(finding), "reached": finding.reached} for finding in findings],
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return findings


def _is_same(row: Row, key: Mapping[str, Any], model: str | None, here: Mapping[str, Any], *, theirs: bool) -> bool:
    same_code = theirs or row["code"]["sources"] == here["code"]["sources"]
    same_settings = model in (None, row["model"]) and all(row[name] == value for name, value in key.items())
    return same_settings and same_code and row["machine"]["boot"] == here["machine"]["boot"] and not row.get("failed")


def _filled(text: str, places: Mapping[str, str]) -> str:
    for name, value in places.items():
        text = text.replace(name, value)
    return text


def _shown(line: str) -> Row | None:
    """A line of a script's output as a row, if it is one; printed as it comes."""
    row = results.parse(line)
    if row is not None:
        say(line.rstrip())
    return row


def _site(peers: Path) -> Path:
    """The folder with the peers' packages: as given, or unpacked once from what prepare_peers.sh wrote."""
    if peers.is_dir():
        return peers
    folder = Path(tempfile.gettempdir()) / f"finesight-bench-peers-{peers.stat().st_size}"
    if not folder.exists():
        _unpack(peers, folder)
    return folder


def _unpack(peers: Path, folder: Path) -> None:
    """Unpacks beside the folder and moves into place, so that it is whole once it is there.

    Of several processes at once the first one's folder stays: files may be in use from it already.
    """
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as partial:
        site = Path(partial) / "site"
        with tarfile.open(peers) as archive:
            archive.extractall(site, filter="data")
        try:
            site.rename(folder)
        except OSError:  # a folder that is not empty cannot be replaced
            if not folder.is_dir():
                raise


def _part_of_site(site: Path, packages: Sequence[str]) -> Path:
    """A folder that leads to these packages of the peers' alone."""
    folder = site.with_name(f"{site.name}-{'-'.join(packages)}")
    folder.mkdir(exist_ok=True)
    for package in packages:
        for path in (site / package, *site.glob(f"{package}-*.dist-info")):
            link = folder / path.name
            if path.exists() and not link.exists():
                with contextlib.suppress(FileExistsError):  # another process was faster
                    link.symlink_to(path.resolve())
    return folder


def _gist(row: Row) -> str:
    name = next((f"{row[key]}: " for key in ("name", "what") if key in row), "")
    if row.get("failed"):
        return f"{name}FAILED: {row['reason']}"
    figures = ("samples_s", "samples_s_wall", "peak_gib", "peak_allocated_gib", "wait_share", "step_ms", "share_percent", "activations_gib")
    shown = {figure: row[figure] for figure in figures if figure in row}
    return name + (", ".join(f"{figure} {value}" for figure, value in shown.items()) or "done")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parser_for(description: str) -> argparse.ArgumentParser:
    """The options of every claim."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="in place of the one that the claim is about")
    parser.add_argument("--bpe", type=Path, help="the file qwen.tiktoken")
    parser.add_argument(
        "--checkpoint", type=Path, help="folder for the checkpoint, written where it is missing; default: in the temporary folder"
    )
    parser.add_argument("--peers", type=Path, help="peers.tar.xz of prepare_peers.sh, or a folder with their packages")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="measure these settings alone; results of the others stay")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured on this machine before")
    parser.add_argument(
        "--ours", default="", metavar="ARGUMENTS", help="further arguments of our scripts, in one string; they go before those of the claim"
    )
    parser.add_argument("--theirs", default="", metavar="ARGUMENTS", help="the same for the peers")
    parser.add_argument("--run-limit", type=float, default=RUN_LIMIT_S, help="seconds that one setting may take")
    parser.add_argument("--time-limit", type=float, default=CALL_LIMIT_S, help="seconds for all of this call")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--tiny", action="store_true", help="only try it: a tiny model on the CPU, in this process")
    return parser


def verdict(finding: Finding) -> str:
    """A finding in one line."""
    sign = "at most" if finding.at_most else "at least"
    if finding.value is None:
        reason = f" ({finding.reason})" if finding.reason else ""
        return f"{finding.what}: not measured{reason}; reach: {sign} {finding.reach:g}{finding.unit}"
    outcome = "reached" if finding.reached else "MISSED"
    return f"{finding.what}: {finding.value:g}{finding.unit}, {outcome} (reach: {sign} {finding.reach:g}{finding.unit})"


def main(claim: Claim, arguments: list[str] | None = None) -> list[Finding]:
    """Measures one claim, as its own script does."""
    findings = Runner(claim, parser_for(claim.title).parse_args(arguments)).run()
    for finding in findings:
        say(verdict(finding))
    return findings


def labelled(rows: Rows, *labels: str) -> Iterator[Row]:
    """The rows of these labels that were measured."""
    for label in labels:
        yield from rows.get(label, ())
