"""The report of a run of reinforcement: completions with their pictures and rewards, curves, offline and unhurt by hostile text."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from finesight.cli import main
from finesight.data.conversation import Conversation, MediaRef, Part, RowSource, Turn
from finesight.errors import EvaluationError
from finesight.sampling.types import Completion
from finesight.training.completion_files import RolloutLog
from finesight.training.rollouts import Group, Position, Rollout
from finesight.training.run_report import COMPLETIONS, RUN_REPORT, write_run_report
from finesight.training.telemetry import METRICS, Telemetry

HOSTILE = '<script>alert("x")</script><img src="http://example.invalid/x.png" onerror=alert(1)>'
FORMULA = "$\\frac{"


class Page(HTMLParser):
    """Collects tags with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def conversation(row: int, media: MediaRef | None) -> Conversation:
    parts = (Part("text", text=f"What is in picture {row}? {HOSTILE}"),)
    if media is not None:
        parts = (Part("image", media=media), *parts)
    return Conversation((Turn("user", parts),), RowSource("rows.jsonl", row))


def encoded_image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def write_run(folder: Path, *, steps: int, generations: int = 3) -> Path:
    """Rollouts through the log that runs use, and the metrics of their steps; no row's image is a file that is there."""
    rows = [conversation(0, MediaRef(data=encoded_image())), conversation(1, MediaRef(path="gone.png")), conversation(2, None)]
    names = ("right", FORMULA)
    with Telemetry(folder, total_steps=steps, console=Console(quiet=True)) as telemetry:
        log = RolloutLog(folder, rows, telemetry)
        for step in range(steps):
            completions = tuple(Completion(f"answer {step}.{n} {HOSTILE}", (5, 6), "length", (-1.0, -2.0)) for n in range(generations))
            values = {name: (None, *(float(n) for n in range(1, generations))) for name in names}
            failures = {0: f"right: ValueError {HOSTILE}"}
            groups = tuple(Group(row, completions, values, (None, *range(1, generations)), failures) for row in range(3))
            log(Position(0, step, step), Rollout(groups), [[0.0, -1.0, *[0.5] * (generations - 2)]] * 3)
            figures = {"reward": 1.5, "entropy": 2.0, "frac_reward_zero_std": 0.0}
            figures |= {f"rewards/{name}/{kind}": 0.5 for name in names for kind in ("mean", "saturation")}
            telemetry._record({"step": step + 1, "loss": 0.1, **figures}, "train")
        telemetry.evaluation(steps, {"eval_reward": 1.75})
        telemetry.event(1, "reward_failed", {"count": 3, "failures": []}, "three failed")
    return folder


def test_completions_stand_with_pictures_and_rewards(tmp_path):
    path = write_run_report(write_run(tmp_path / "run", steps=9, generations=10))
    assert path == tmp_path / "run" / RUN_REPORT
    page = Page(path)
    for shown in (
        HOSTILE,
        "answer 0.0",
        "answer 8.7",
        "+0.50",
        "-1.00",
        "cut off",
        "rows.jsonl, row 2",
        FORMULA,
        "3 times a reward failed",
        "failed: right: ValueError",
    ):
        assert shown in page.text, shown
    assert "answer 0.8" not in page.text and "The first 8 of 10 completions are shown" in page.text
    assert [step for step in range(1, 10) if f"Completions of step {step}:" in page.text] == [1, 3, 6, 9]
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == 5 and "script" not in tags  # reward, single rewards, shares, saturation, entropy
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 4 and all(source.startswith("data:image/png;base64,") for source in pictures)  # the other file is gone
    assert page.text.count("gone.png") == 4
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed") and not any(name.startswith("on") for name in attributes)
    assert "default-src 'none'" in path.read_text(encoding="utf-8") and "held-out prompts" in page.text


def test_what_a_resumed_run_will_sample_again_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", steps=3)
    lines = (run / METRICS).read_text().splitlines()
    (run / METRICS).write_text("\n".join(line for line in lines if json.loads(line)["step"] < 3))
    assert "Completions of step 3" not in Page(write_run_report(run)).text


def test_a_damaged_file_is_named(tmp_path):
    run = write_run(tmp_path / "run", steps=1)
    (run / COMPLETIONS / "step-000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(EvaluationError, match="step-000001"):
        write_run_report(run)


def test_the_command_needs_a_run_with_rewards(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=1)
    (run / "recipe.yaml").write_text("model: {name_or_path: x}\n")
    with pytest.raises(SystemExit) as ended:
        main(["runs", "report", str(run)])
    assert not ended.value.code
    assert capsys.readouterr().out.strip() == str(run / RUN_REPORT) and "name_or_path" in Page(run / RUN_REPORT).text
    (run / METRICS).write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(SystemExit) as ended:
        main(["runs", "report", str(run)])
    assert ended.value.code == 2 and "it is no run of reinforcement" in capsys.readouterr().err
    (run / "recipe.yaml").write_text("model: {name_or_path: x}\ngrpo: {num_generations: 4}\nrewards: [math]\n")
    with pytest.raises(SystemExit):
        main(["runs", "report", str(run)])
    assert "has not made a step yet" in capsys.readouterr().err
