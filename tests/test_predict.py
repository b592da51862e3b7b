"""`finesight predict`: stopped and started again, and answers in a schema."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from finesight.cli import main
from test_cli import write_charts
from tiny import tiny_checkpoint

Predict = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen3_vl")


@pytest.fixture
def arguments(tmp_path, monkeypatch, checkpoint) -> list[str]:
    """20 rows, at a temperature: what is drawn depends on a row's place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_charts(tmp_path / "data", count=10)
    settings = "--temperature 1.0 --seed 5 --max-pixels 4096 --min-pixels 1024 --max-completion-length 6 --batch-size 1"
    return ["predict", "data/train.jsonl", "--model", str(checkpoint), *settings.split(), "-o", "a.jsonl"]


@pytest.fixture
def predict(capsys) -> Predict:
    def run(*words: str) -> tuple[int, str]:
        try:
            main(list(words))
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, capsys.readouterr().err

    return run


def lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


def test_a_run_that_was_killed_goes_on(arguments, predict):
    slow = [*arguments, "--max-completion-length", "60"]  # so that it is still busy when it is killed
    process = subprocess.Popen(
        [sys.executable, "-m", "finesight", *slow], stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    until = time.monotonic() + 60
    partial = Path("a.jsonl.partial")
    while not (partial.exists() and partial.read_text().count("\n") >= 16):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    kept = lines("a.jsonl.partial")
    assert 16 <= len(kept) < 20 and not Path("a.jsonl").exists()
    status, said = predict(*slow)
    assert status == 0 and f"holds {len(kept)} of 20 answers" in said
    assert lines("a.jsonl")[: len(kept)] == kept  # as they were, nothing answered twice
    assert [json.loads(line)["row"] for line in lines("a.jsonl")] == list(range(20))
    assert sorted(path.name for path in Path().glob("a.jsonl*")) == ["a.jsonl"]


def test_what_is_missing_is_drawn_as_in_one_run(arguments, predict):
    """Wherever it was stopped, also in the middle of a line, and with another number of answers side by side."""
    assert predict(*arguments)[0] == 0
    whole = lines("a.jsonl")
    assert len({json.loads(line)["answer"] for line in whole}) > 15
    for answers in (1, 17):
        Path("a.jsonl").unlink()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("finesight.cli.predict_output._write", stop_writing(answers))
            assert predict(*arguments)[0] == 2
        with Path("a.jsonl.partial").open("a") as partial:
            partial.write('{"file": "data/tr')
        status, said = predict(*arguments, "--batch-size", "4")
        assert status == 0 and f"holds {answers} of 20 answers" in said and lines("a.jsonl") == whole


def test_a_changed_image_begins_anew(arguments, predict):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finesight.cli.predict_output._write", stop_writing(3))
        assert predict(*arguments)[0] == 2
    Path("data/images/5.png").write_bytes(Path("data/images/7.png").read_bytes())
    status, said = predict(*arguments)
    assert status == 0 and "other questions or images" in said and len(lines("a.jsonl")) == 20


def stop_writing(after: int):
    """A disk that is full after so many lines."""
    from finesight.errors import DataError

    count = 0

    def write(stream, line: str) -> None:
        nonlocal count
        if count == after:
            raise DataError("Answers cannot be written: No space left on device.")
        count += 1
        stream.write(line)

    return write


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (["--seed", "6"], "other sampling settings"),
        (["--max-pixels", "2048"], "other pixel limits or frame sampling"),
        (["--load-in-8bit"], "another model"),
        (["--system", "be brief"], "other questions or images"),
    ],
)
def test_another_command_begins_anew(arguments, predict, change, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finesight.cli.predict_output._write", stop_writing(3))
        status, said = predict(*arguments)
    assert status == 2 and "3 answers so far: a.jsonl.partial; the same command goes on" in said
    answered = lines("a.jsonl.partial")
    status, said = predict(*arguments, *change)
    assert status == 0 and f"was made with {name}: all is answered anew" in said and len(lines("a.jsonl")) == 20
    assert "Its answers (3) are kept in a.earlier-1.jsonl.partial" in said and lines("a.earlier-1.jsonl.partial") == answered


def test_kept_answers_of_another_command_are_taken_up(arguments, predict):
    """By that command, with the name that they were kept under; a second one is kept beside the first."""
    for seed, kept in (("5", 3), ("6", 4)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("finesight.cli.predict_output._write", stop_writing(kept))
            assert predict(*arguments, "--seed", seed)[0] == 2
    assert predict(*arguments, "--seed", "7")[0] == 0
    assert [len(lines(f"a.earlier-{number}.jsonl.partial")) for number in (1, 2)] == [3, 4]
    status, said = predict(*arguments[:-1], "a.earlier-1.jsonl")
    assert status == 0 and "holds 3 of 20 answers; going on from there" in said and not Path("a.earlier-1.jsonl.partial").exists()


def test_rows_that_were_left_out_are_named_again(arguments, predict):
    image = Path("data/images/2.png")
    image.write_bytes(image.read_bytes()[:-40])
    skipping = [*arguments, "--on-bad-row", "skip"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finesight.cli.predict_output._write", stop_writing(10))
        assert predict(*skipping)[0] == 2
    status, said = predict(*skipping)
    assert status == 0 and "Left out 2 of 20 rows" in said and "row 4: left out before the run was stopped" in said
    assert [json.loads(line)["row"] for line in lines("a.jsonl")] == [row for row in range(20) if row not in (4, 5)]


def test_two_runs_do_not_write_one_file(arguments, predict):
    with Path("a.jsonl.partial").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, said = predict(*arguments)
    assert status == 2 and "Another process is writing a.jsonl.partial" in said


def test_answers_are_not_replaced_unless_told_to(arguments, predict):
    assert predict(*arguments)[0] == 0
    answered = lines("a.jsonl")
    status, said = predict(*arguments)
    assert status == 2 and "a.jsonl is there and answers all of this already (20 questions)" in said and "--overwrite" in said
    other = ["predict", "data/images", "-q", "how many?", *arguments[2:]]
    status, said = predict(*other)
    assert status == 2 and "a.jsonl is there and holds something else" in said and "Loading" not in said
    assert lines("a.jsonl") == answered
    status, said = predict(*other, "--overwrite")
    assert status == 0 and len(lines("a.jsonl")) == 10


def test_an_address_is_no_input(arguments, predict):
    status, said = predict("predict", "http://127.0.0.1/x.png", *arguments[2:], "-q", "what is it?")
    assert status == 2 and "http://127.0.0.1/x.png is an address" in said and "--allow-urls" in said and "Loading" not in said


def test_answers_in_a_schema(arguments, predict):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
        "additionalProperties": False,
    }
    Path("schema.json").write_text(json.dumps(schema))
    status, said = predict(*arguments, "--schema", "schema.json", "--max-completion-length", "80")
    assert status == 0 and "cut off" not in said
    for line in lines("a.jsonl"):
        Draft202012Validator(schema).validate(json.loads(json.loads(line)["answer"]))
    status, said = predict(*arguments, "--schema", "schema.json", "--max-completion-length", "2", "--overwrite")
    assert status == 0 and "20 answers were cut off at 2 tokens" in said
    for text, message in (("{", "schema.json is not JSON"), ('{"not": {}}', "Unimplemented keys")):
        Path("schema.json").write_text(text)
        status, said = predict(*arguments, "--schema", "schema.json")
        assert status == 2 and message in said and "Loading" not in said
    assert predict(*arguments, "--schema", "none.json")[0] == 2
