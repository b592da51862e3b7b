"""docs/memory.md says what planner and measurements say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import memory_report

PACK = {"tokens": 8000, "targets": 64, "patches": [1280] * 21, "segments": 21, "gathered_keys": 0}
ROW = {
    "label": "8b-plain",
    "name": "8b-bf16-full-8192",
    "model": "qwen3-vl-8b",
    "method": "LoRA, bf16",
    "settings": {"training.gradient_checkpointing": "full"},
    "compiled": True,
    "torch": "2.11.0+cu130",
    "dtype": "bfloat16",
    "packs": [PACK, PACK],
    "cap_gib": None,
    "peak_allocated_gib": 20.0,
}


def write(folder: Path, *rows: dict) -> None:
    (folder / "memory.json").write_text(json.dumps({"claim": "memory", "model": "qwen3-vl-8b", "rows": rows}), encoding="utf-8")


def test_the_document_is_up_to_date() -> None:
    assert memory_report.DOCUMENT.read_text(encoding="utf-8") == memory_report.document(memory_report.read_rows()), (
        "run python -m bench.memory_report"
    )
    assert memory_report.PLOT.read_text(encoding="utf-8").startswith("<?xml")


def test_rows(tmp_path: Path) -> None:
    rollout = {"groups": 8, "completions": 8, "prompt_tokens": 1124, "completion_tokens": 256}
    sampled = {**ROW, "method": "GRPO", "rollout": {**rollout, "prompt_patches": 4096}, "settings": {"model.load_in_4bit": True}}
    failed = {"label": "8b-plain", "model": "qwen3-vl-8b", "failed": True}
    write(tmp_path, ROW, sampled, failed)
    first, second = memory_report.read_rows(tmp_path)
    assert (first.model, first.plan.policy, first.pack.total_patches) == ("Qwen3-VL-8B", "full", 21 * 1280)
    assert first.plan.execution.repeats_keys
    assert first.error_percent == pytest.approx(100 * (first.planned_gib / 20 - 1))
    assert any(moment.name == "rollout: sampling" for moment in second.plan.moments)


def test_misses_are_listed(tmp_path: Path) -> None:
    write(tmp_path, ROW)
    (row,) = memory_report.read_rows(tmp_path)
    write(tmp_path, *({**ROW, "peak_allocated_gib": factor * row.planned_gib} for factor in (1.0, 1.2, 0.8)))
    text = memory_report.summary(memory_report.read_rows(tmp_path))
    assert text.count("missed") == 4  # all of them
    assert "median error | at most 3% |" in text


def test_measured_methods_are_marked(tmp_path: Path) -> None:
    write(tmp_path, ROW)
    table = memory_report.model_table(memory_report.read_rows(tmp_path))
    marked = [line for line in table.splitlines() if "†" in line]
    assert len(marked) == 1 and marked[0].startswith("| Qwen3-VL-8B | LoRA, bf16 † |")
    assert len(table.splitlines()) == 2 + 10 * len(memory_report.METHODS)


def test_draws(tmp_path: Path) -> None:
    write(tmp_path, ROW)
    memory_report.draw(memory_report.read_rows(tmp_path), tmp_path / "plot.svg")
    assert "measured peak, GiB" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


def test_capped_runs_and_what_is_to_be_reached(tmp_path: Path) -> None:
    capped = {**ROW, "name": "30b-a3b-least", "model": "qwen3-vl-30b-a3b", "cap_gib": 20.0, "peak_reserved_gib": 20.5, "out_of_memory": 1}
    write(tmp_path, ROW, {**capped, "label": "30b-a3b"})
    (line,) = memory_report.cap_table(memory_report.read_rows(tmp_path)).splitlines()[2:]
    assert line == "| Qwen3-VL-30B-A3B | LoRA, bf16 | full | compiled | 20 | 20.00 | 20.50 | 1 |"
    reach = memory_report.reach_table(tmp_path)
    assert "| Qwen3-VL-30B-A3B QLoRA under a cap of 20 GiB: reserved | at most 20 GiB | 20.5 GiB | missed |" in reach
    assert "| QLoRA, our peak over TRL's | at most 1× | not measured |  |" in reach
    assert memory_report.cap_table([]) == "None is measured yet.\n"
