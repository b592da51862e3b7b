"""The report is one offline file, says the measured figures, and is not hurt by hostile data."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from finesight.errors import EvaluationError
from finesight.evaluation.plots import read_loss_curve
from finesight.evaluation.report import write_report
from finesight.evaluation.results import EvaluationResult, ProbeSummary, Record, TaskSummary

HOSTILE = '<script>alert("x")</script><img src="http://example.invalid/x.png" onerror=alert(1)>$\\frac{'


def _record(row: int, score: float, image: str, task: str, answer: str = "seven") -> Record:
    return Record(task, "eval.jsonl", row, f"Read the number {row}. {HOSTILE}", (image,), answer, ("7", HOSTILE), score)


def _result(scores, image, task=f"reading {HOSTILE}", **more) -> EvaluationResult:
    records = tuple(_record(row, score, image, task, f"answer-{row}-{score}") for row, score in enumerate(scores))
    return EvaluationResult(records, (TaskSummary.of(task, "exact_match", records, 2.0),), **more)


class _Page(HTMLParser):
    """Collects tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def image(tmp_path) -> str:
    path = tmp_path / "digit.png"
    Image.new("RGB", (320, 200), "orange").save(path)
    return str(path)


def _metrics(tmp_path, steps: int = 300):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 3 / step, "learning_rate": 1e-4}) for step in range(1, steps + 1)]
    path.write_text("\n".join([*lines, json.dumps({"step": steps, "eval_loss": 0.5}), '{"step": 30']))
    return path


def test_before_and_after(tmp_path, image):
    probe = dict(num_questions=2, num_tokens=9, low=0.0, high=1.0, wall_s=0.1)
    before = _result(
        [0] * 8 + [1], image, probe=ProbeSummary(loss=1.5, accuracy=1.0, **probe), probe_records=(_record(0, 1, image, "text probe"),)
    )
    after = _result([1] * 8 + [0], image, probe=ProbeSummary(loss=1.25, accuracy=1.0, **probe), probe_records=(_record(0, 1, image, "text probe"),),
                    versions={"torch": "2.13"}, settings={"temperature": 0.0})  # fmt: skip
    path = write_report(
        tmp_path / "report.html", after, before=before, recipe="model: {name_or_path: x}", metrics=_metrics(tmp_path), notes=[HOSTILE]
    )
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    for shown in (
        "11.1%",
        "88.9%",
        "+77.8",
        "fixed",
        "Broken: right before",
        "1.5000",
        "1.2500",
        "name_or_path",
        "2.13",
        "better, beyond noise",
        "answer-0-0",
        "answer-0-1",
    ):
        assert shown in page.text, shown
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and tags.count("svg") == 2
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 10 and all(source.startswith("data:image/jpeg;base64,") for source in pictures)


def test_nothing_comes_from_elsewhere(tmp_path, image):
    path = write_report(tmp_path / "report.html", _result([0, 1], image), metrics=_metrics(tmp_path), title=HOSTILE)
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:", "#")), (tag, name, value)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    assert "default-src 'none'" in text
    assert HOSTILE in page.text  # shown as text


def test_pictures_that_cannot_be_opened_are_named(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for image in (str(broken), str(tmp_path / "gone.png"), "image inside the data"):
        page = _Page(write_report(tmp_path / "report.html", _result([1], image)).read_text(encoding="utf-8"))
        assert image in page.text and not [tag for tag, _ in page.tags if tag == "img"]


def test_many_examples_are_cut_and_counted(tmp_path, image):
    page = _Page(write_report(tmp_path / "report.html", _result([1] * 30, image), max_examples=5).read_text(encoding="utf-8"))
    assert "The first 5 of 30 are shown" in page.text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 5


def test_loss_curves_are_read_leniently_only_at_the_end(tmp_path):
    curve = read_loss_curve(_metrics(tmp_path, 3))
    assert curve.steps == (1, 2, 3) and curve.losses == (3.0, 1.5, 1.0) and curve.eval_losses == (0.5,)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 1, "loss": 3}\n{"step": 2, "loss": NaN}\n')
    assert read_loss_curve(tmp_path / "metrics.jsonl").losses == (3.0,)  # a step written again after resuming counts once
    (tmp_path / "metrics.jsonl").write_text('{"step"\n{"step": 1, "loss": 3}\n')
    with pytest.raises(EvaluationError, match="line 1"):
        read_loss_curve(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_loss_curve(tmp_path / "metrics.jsonl") is None
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_loss_curve(tmp_path / "none.jsonl")
