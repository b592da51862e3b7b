"""Before against after, on records made by hand."""

from __future__ import annotations

import json

import pytest

from finesight.errors import EvaluationError
from finesight.evaluation.compare import compare, compare_records
from finesight.evaluation.results import EvaluationResult, ProbeSummary, Record, TaskSummary, read_result


def record(row: int, score: float, task: str = "reading", file: str = "eval.jsonl", **changes) -> Record:
    values = dict(
        task=task,
        file=file,
        row=row,
        prompt=f"Question {row}?",
        images=(f"images/{row}.png",),
        answer=f"answer {row}",
        expected=("x",),
        score=score,
    )
    return Record(**{**values, **changes})


def result(scores: list[float], task: str = "reading", grader: str = "exact_match", **more) -> EvaluationResult:
    records = tuple(record(row, score, task) for row, score in enumerate(scores))
    return EvaluationResult(records, (TaskSummary.of(task, grader, records, 1.5),), **more)


def test_fixed_and_broken_rows():
    before, after = result([0] * 12 + [1] * 8), result([1] * 10 + [0] * 3 + [1] * 7)
    found = compare(before, after).task("reading")
    assert (found.num_pairs, found.fixed, found.broken, found.unpaired) == (20, 10, 1, 0)
    assert (found.before, found.after) == (0.4, 0.85)
    assert found.test == "exact McNemar" and found.p_value == 2 * (1 + 11) / 2**11
    assert found.beyond_noise and found.verdict.startswith("better, beyond noise")
    worse = compare(after, before).task("reading")
    assert worse.verdict.startswith("worse, beyond noise") and worse.low < worse.change < worse.high < 0


def test_a_small_change_is_called_noise():
    found = compare(result([0, 0, 1, 1]), result([0, 1, 1, 1])).task("reading")
    assert not found.beyond_noise and found.verdict == "no change beyond noise (exact McNemar, p = 1.000)"


def test_scores_in_between_are_bootstrapped():
    found = compare(result([0.2] * 15 + [0.4] * 15), result([0.6] * 15 + [0.5] * 15)).task("reading")
    assert found.test == "paired bootstrap" and found.beyond_noise and found.change == pytest.approx(0.25)


def test_rows_are_paired_by_where_they_stand():
    before = (record(1, 1), record(2, 0), record(3, 1))
    after = (record(3, 1), record(1, 0), record(9, 1))
    found = compare_records("reading", before, after)
    assert (found.num_pairs, found.unpaired, found.fixed, found.broken) == (2, 2, 0, 1)
    twice = compare_records("reading", (record(1, 0), record(1, 1)), (record(1, 1), record(1, 1)))
    assert (twice.num_pairs, twice.fixed, twice.broken) == (2, 1, 0)
    with pytest.raises(EvaluationError, match="no row in both"):
        compare_records("reading", (record(1, 1),), (record(2, 1),))


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(EvaluationError, match="no task in common"):
        compare(result([1], task="a"), result([1], task="b"))
    with pytest.raises(EvaluationError, match="graded by exact_match before and by anls after"):
        compare(result([1]), result([1], grader="anls"))
    with pytest.raises(EvaluationError, match="not in both"):
        compare(result([1]), result([1])).task("writing")


def test_the_probe_is_compared_too():
    probe = dict(num_questions=2, num_tokens=9, low=0.0, high=1.0, wall_s=0.1)
    before = result(
        [1], probe=ProbeSummary(loss=1.5, accuracy=1.0, **probe), probe_records=(record(0, 1, "text probe"), record(1, 1, "text probe"))
    )
    after = result(
        [1], probe=ProbeSummary(loss=1.75, accuracy=0.5, **probe), probe_records=(record(0, 1, "text probe"), record(1, 0, "text probe"))
    )
    found = compare(before, after).probe
    assert found is not None and (found.loss_before, found.loss_after, found.exact.broken) == (1.5, 1.75, 1)
    assert compare(before, result([1])).probe is None


def test_results_survive_the_disk(tmp_path):
    probe = ProbeSummary(1, 4, 0.25, 1.0, 0.2, 1.0, 0.1)
    written = result(
        [1, 0, 0.5], probe=probe, probe_records=(record(0, 1, "text probe"),), settings={"temperature": 0.0}, versions={"torch": "2"}
    )
    folder = written.write(tmp_path / "after")
    assert read_result(folder) == written
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert {"row", "prompt", "images", "answer", "expected", "score"} <= lines[0].keys() and lines[0]["row"] == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tasks"][0]["num_samples"] == 3 and summary["tasks"][0]["wall_s"] == 1.5 and summary["text_probe"]["loss"] == 0.25
    with pytest.raises(EvaluationError, match="holds no evaluation result"):
        read_result(tmp_path)
    (folder / "records.jsonl").write_text("{}\n")
    with pytest.raises(EvaluationError, match="damaged"):
        read_result(folder)
