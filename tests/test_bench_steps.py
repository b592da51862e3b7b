"""Measuring whole steps of reinforcement and servers: prompts to the token, rows that are compared only where the work was the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench import grpo_step, rows, serving, steps_report
from bench.checkpoint import write_processor
from bench.claims import claim_of
from bench.prompts import as_conversation, data_url, prompts, special_ids
from bench.rewards import share_of_even_tokens
from bench.rows import significant

from finesight.data.encode import Encoder
from finesight.data.processor import load_processor
from finesight.serve.messages import MediaAccess, to_conversation
from finesight.serve.schema import ChatRequest

STEP = ["--prompts", "2", "--generations", "3", "--image-tokens", "16", "--completion-tokens", "5", "--steps", "2", "--warm", "1"]


@pytest.fixture(scope="module")
def processor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_processor("tiny-qwen3-vl", tmp_path_factory.mktemp("processor"), None)


class TestPrompts:
    def test_have_as_many_tokens_as_asked_for(self, processor_folder: Path) -> None:
        encoder = Encoder(load_processor(processor_folder))
        for row in prompts(3, processor_folder, image_tokens=16, text_tokens=77):
            sample = encoder.encode_prompt(as_conversation(row))
            assert sum(count for item in sample.visual_items for _, count in item.runs) == 16
            assert len(sample) == 16 + 77

    def test_are_the_same_each_time_and_differ(self, processor_folder: Path) -> None:
        first, second = (prompts(2, processor_folder, image_tokens=16, text_tokens=90) for _ in range(2))
        assert [row.question for row in first] == [row.question for row in second]
        assert first[0].image.tobytes() == second[0].image.tobytes() != first[1].image.tobytes()

    @pytest.mark.parametrize(
        ("image_tokens", "text_tokens", "told"), [(15, 100, "no square"), (16, 20, "leaves"), (400, 100, "pixel limits")]
    )
    def test_refuse_what_cannot_be(self, processor_folder: Path, image_tokens: int, text_tokens: int, told: str) -> None:
        with pytest.raises(ValueError, match=told):
            prompts(1, processor_folder, image_tokens=image_tokens, text_tokens=text_tokens)

    def test_reach_our_server_as_they_are(self, processor_folder: Path) -> None:
        (row,) = prompts(1, processor_folder, image_tokens=16, text_tokens=80)
        content = [{"type": "image_url", "image_url": {"url": data_url(row)}}, {"type": "text", "text": row.question}]
        chat = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": content}]})
        conversation = to_conversation(chat.messages, MediaAccess(False, (), 10**7, 5.0), None)
        encoder = Encoder(load_processor(processor_folder))
        assert encoder.encode_prompt(conversation).token_ids.tolist() == encoder.encode_prompt(as_conversation(row)).token_ids.tolist()


def test_the_reward_differs_between_completions() -> None:
    assert share_of_even_tokens(completion_ids=[[2, 4], [1, 2], [3]], prompts=["a"]) == [1.0, 0.5, 0.0]


def test_a_step_of_ours_has_completions_of_full_length(processor_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grpo_step.main(["--model", "tiny-qwen3-vl", "--device", "cpu", "--checkpoint", str(processor_folder), *STEP])
    (row,) = [row for line in capsys.readouterr().out.splitlines() if (row := rows.parse(line)) is not None]
    assert not row.get("failed"), row
    assert row["figures"]["completions/min_length"] == row["figures"]["completions/max_length"] == 5
    assert row["figures"]["sampling/sampling_logp_difference/max"] < 1e-5 and row["figures"]["reward_std"] > 0


def step_row(label: str, samples_s: float, **values: Any) -> dict[str, Any]:
    return {
        "label": label, "row": "grpo_step", "model": "qwen3-vl-4b", "prompts_per_step": 8, "generations": 8, "image_tokens": 1024, "text_tokens": 100,
        "completion_tokens": 256, "r": 16, "samples_s": samples_s, "samples_s_wall": samples_s, "machine": {"boot": "a"}, "trainable": 1000,
        "figures": {"sampling/sampling_logp_difference/mean": 0.01}, "precision": "bf16", "recompute": "none", "token_budget": 4096, **values,
    }  # fmt: skip


def serve_row(label: str, system: str, streams: int, tokens_s: float, **values: Any) -> dict[str, Any]:
    return {
        "label": label, "row": "serve", "system": system, "model": "qwen3-vl-4b", "image_tokens": 1024, "text_tokens": 100, "answer_tokens": 128,
        "streams": streams, "tokens_s": tokens_s, "machine": {"boot": "a"}, "answers": 2, "asked": 2, "first_token_s": 0.1, "answer_s": 1.0, **values,
    }  # fmt: skip


class TestFindings:
    def test_a_peer_counts_at_its_best(self) -> None:
        measured = [step_row("ours", 60.0), step_row("trl-8", 10.0), step_row("trl-16", 12.0), step_row("unsloth-8", 30.0, failed=True)]
        over_trl, over_unsloth, apart = claim_of("grpo_step").findings(measured)
        assert (over_trl.value, over_trl.reached) == (5.0, True)
        assert over_unsloth.value is None and apart.value == 0.01

    @pytest.mark.parametrize("values", [{"completion_tokens": 128}, {"machine": {"boot": "b"}}])
    def test_unlike_steps_are_not_compared(self, values: dict[str, Any]) -> None:
        finding = claim_of("grpo_step").findings([step_row("ours", 60.0), step_row("trl-8", 10.0, **values)])[0]
        assert finding.value is None and "differs" in finding.reason

    def test_servers_are_compared_stream_by_stream(self) -> None:
        measured = [serve_row("ours", "ours", 16, 900.0), serve_row("transformers", "transformers", 16, 200.0)]
        one, sixteen, sixty_four = claim_of("serve").findings(measured)
        assert (sixteen.value, sixteen.reached) == (4.5, True)
        assert one.value is None and sixty_four.value is None


def test_tables_have_a_line_for_each_row() -> None:
    failed = step_row("trl-8", 0.0, failed=True, reason="out of memory", batch=8, accumulation=8)
    head, lines = steps_report.grpo_steps([step_row("ours", 32.0), {key: value for key, value in failed.items() if key != "token_budget"}])
    assert all(len(line) == len(head) for line in lines)
    assert lines[0][2] == "2" and "out of memory" in lines[1][2]
    head, lines = steps_report.serving(
        [serve_row("ours", "ours", 1, 50.0), serve_row("t", "transformers", 1, 0.0, failed=True, reason="late")]
    )
    assert all(len(line) == len(head) for line in lines)


def test_rates_are_over_what_was_answered() -> None:
    answers = [serving.Answered(0.0, 0.5, 2.0, 10), serving.Answered(1.0, 2.0, 5.0, 10)]
    assert serving.figures([answers[:1], answers[1:]], 3)["tokens_s"] == significant(20 / 6)
    assert serving.figures([answers], 3)["tokens_s"] == 4.0


def test_special_tokens_are_told_from_text(processor_folder: Path) -> None:
    processor = load_processor(processor_folder)
    assert {processor.image_token_id, processor.video_token_id, processor.tokenizer.eos_token_id} <= set(special_ids(processor))
    assert min(special_ids(processor)) == 256
