"""bench: the scripts that measure reinforcement, tried with tiny models; and the closed forms that they compare with."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from bench import decode, group_prompts, rows
from bench.checkpoint import write_processor
from bench.claims import claim_of
from bench.group_prompts import TINY, GroupSetting

from finesight.data.processor import Processor, load_processor


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return load_processor(write_processor("tiny-qwen3-vl", tmp_path_factory.mktemp("processor"), None))


def run_module(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[rows.Row]:
    importlib.import_module(f"bench.{name}").main(arguments)
    return [row for line in capsys.readouterr().out.splitlines() if (row := rows.parse(line)) is not None]


class TestPrompts:
    def test_are_as_long_as_asked_for(self, processor: Processor) -> None:
        prompts = group_prompts.encoded(processor, group_prompts.conversations(processor, TINY, 3))
        assert {len(prompt) for prompt in prompts} == {TINY.prompt_tokens}
        assert len({prompt.visual_items[0].key for prompt in prompts}) == 3

    def test_a_text_shorter_than_the_template_is_refused(self, processor: Processor) -> None:
        with pytest.raises(ValueError, match="fewer than the chat template"):
            group_prompts.conversations(processor, GroupSetting(visual_tokens=16, text_tokens=10), 1)

    def test_an_image_of_other_tokens_is_refused(self, processor: Processor) -> None:
        with pytest.raises(ValueError, match="tokens, 16 of them"):  # what fits the pixel limit of the tiny processor
            group_prompts.conversations(processor, GroupSetting(visual_tokens=36, text_tokens=60), 1)

    def test_completions_are_fixed_and_private(self, processor: Processor) -> None:
        (prompt,) = group_prompts.encoded(processor, group_prompts.conversations(processor, TINY, 1))
        once, again = (group_prompts.completions(TINY, prompt, seed=1) for _ in range(2))
        assert [list(a.token_ids) for a in once] == [list(b.token_ids) for b in again]
        assert {int(sample.trained.sum()) for sample in once} == {TINY.completion_tokens}
        assert len(once) == TINY.generations


class TestDecode:
    def test_live_tokens_count_a_prompt_s_whole_blocks_once(self) -> None:
        # 70 tokens: two blocks of 32 in common, 6 tokens in each of 3 rows, and 5 of its own.
        assert decode.live_tokens(70, 3, 5) == 64 + 3 * (6 + 5)
        assert decode.live_tokens(64, 3, 5) == 64 + 3 * 5
        assert decode.live_tokens(70, 0, 5) == 0

    def test_measures_every_part_in_every_form(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = run_module("decode", ["--device", "cpu", "--tiny"], capsys)
        assert not [row for row in found if row.get("failed")]
        parts = [(row.get("adapter"), row["what"]) for row in found]
        names = ("sampler", "step", "forward", "drawing", "attention", "products", "profile")
        assert parts == [(None, "copy"), *((adapter, name) for adapter in (False, True) for name in names)]
        by_part = dict(zip(parts, found, strict=True))
        sampler, with_adapter = by_part[False, "sampler"], by_part[True, "sampler"]
        assert sampler["completions"] == 4 and sampler["steps"] == TINY.completion_tokens - 1
        assert with_adapter["weights_gb"] > sampler["weights_gb"] > 0
        assert by_part[False, "profile"]["largest"]

    def test_a_part_that_fails_leaves_the_others(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*arguments: object) -> None:
            raise RuntimeError("no rollout today")

        monkeypatch.setattr(decode, "roll_out", broken)
        found = run_module("decode", ["--device", "cpu", "--tiny"], capsys)
        assert {row["what"] for row in found if row.get("failed")} == {"sampler"}
        assert all(row["reason"] == "RuntimeError: no rollout today" for row in found if row.get("failed"))
        assert len([row for row in found if row["what"] == "step" and "share_percent" in row]) == 2

    def test_judges_the_better_of_compiled_and_plain(self) -> None:
        def row(adapter: bool, compiled: bool, share: float) -> rows.Row:
            return {"label": "4b", "what": "sampler", "adapter": adapter, "compiled": compiled, "share_percent": share}

        base, adapted = claim_of("decode").findings([row(False, False, 20), row(False, True, 61), {**row(True, True, 50), "failed": True}])
        assert (base.value, base.reached) == (61, True)
        assert adapted.value is None

    def test_without_a_vocabulary_says_so(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = run_module("decode", ["--device", "cpu", "--model", "qwen3-vl-4b"], capsys)
        assert "qwen.tiktoken" in found[-1]["reason"]


def test_the_report_has_a_table_of_each_kind(tmp_path: Path) -> None:
    """Rows of the new kinds, failed ones among them, appear in the document."""
    report = importlib.import_module("bench.report")
    stamp = {"measured_at": "2026-01-01T00:00:00Z", "machine": {}, "versions": {}, "code": {}}
    share = {"label": "4b", "row": "decode", "model": "qwen3-vl-4b", "what": "sampler", "adapter": False, "compiled": True, **stamp}
    content = {
        "claim": "decode",
        "model": "qwen3-vl-8b",
        "rows": [{**share, "step_ms": 5.5, "share_percent": 47.0}, {**share, "failed": True, "reason": "why"}],
    }
    (tmp_path / "decode.json").write_text(json.dumps(content), encoding="utf-8")
    text = report.rows(report.Results(tmp_path))
    assert "5.5" in text and "47" in text and "failed: why" in text
