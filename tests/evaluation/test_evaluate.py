"""Tasks and probe judged on tiny real models, from data to report."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from finesight.data.conversation import Conversation, MediaRef, Part, RowSource, Turn
from finesight.data.encode import Encoder
from finesight.data_settings import DataSettings
from finesight.errors import DataError, EvaluationError
from finesight.evaluation.compare import compare
from finesight.evaluation.evaluate import evaluate, evaluate_model, sampling_settings
from finesight.evaluation.probe import answer_loss, load_text_probe
from finesight.evaluation.report import write_report
from finesight.evaluation.results import media_label, prompt_text, read_result
from finesight.families import FAMILIES as TABLE
from finesight.models.adapters import apply_tuning
from finesight.models.load import LoadedModel, load
from finesight.recipe import EvaluationSettings, TuningSettings
from finesight.sampling.types import Completion, SamplingSettings
from finesight.tasks.graders import get_grader
from finesight.tasks.task import Task
from tiny import FAMILIES, tiny_checkpoint

SMALL = DataSettings(min_pixels=1024, max_pixels=4096)
SETTINGS = EvaluationSettings(max_completion_length=4, batch_size=4)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory) -> LoadedModel:
    return load(tiny_checkpoint(tmp_path_factory.mktemp("model"), request.param), device="cpu", data=SMALL)


def _task(name: str = "reading", grader: str = "exact_match", rows: int = 5) -> Task:
    conversations = []
    for row in range(rows):
        pixels = np.random.default_rng(row).integers(0, 255, (48, 48, 3), dtype=np.uint8)
        asked = Turn("user", (Part("image", media=MediaRef(image=Image.fromarray(pixels))), Part("text", f"Read number {row}.")))
        conversations.append(Conversation((asked, Turn("assistant", (Part("text", str(row)),))), RowSource("scenes.jsonl", row)))
    return Task(name, tuple(conversations), get_grader(grader), grader)


class Parrot:
    """A sampler that answers with the last word of the question: what the figures must be is known."""

    def generate(self, prompts, settings, on_progress=None):
        if on_progress is not None:
            on_progress(len(prompts), len(prompts))
        return [Completion(prompt.turns[-1].text.split()[-1], (5, 6), "length" if i else "stop") for i, prompt in enumerate(prompts)]


def test_records_and_figures():
    seen = []
    result = evaluate(
        Parrot(), [_task(), _task("strict", "exact_match/strict")], SamplingSettings(), on_progress=lambda *at: seen.append(at)
    )
    assert seen == [("reading", 5, 5), ("strict", 5, 5)]
    lenient, strict = result.task("reading"), result.task("strict")
    assert (lenient.accuracy, strict.accuracy, lenient.num_samples, lenient.truncated) == (1.0, 0.0, 5, 4)
    assert lenient.low == pytest.approx(5 / (5 + 1.959963984540054**2)) and lenient.high == 1.0  # Wilson at 5 of 5
    first = result.records[0]
    assert (first.file, first.row, first.prompt, first.answer, first.expected, first.score) == (
        "scenes.jsonl",
        0,
        "Read number 0.",
        "0.",
        ("0",),
        1.0,
    )
    assert first.images == ("an image object",) and first.num_tokens == 2
    assert {"torch", "transformers", "finesight"} <= result.versions.keys() and result.settings["max_completion_length"] == 128
    with pytest.raises(EvaluationError, match="names of their own"):
        evaluate(Parrot(), [_task(), _task()], SamplingSettings())
    with pytest.raises(EvaluationError, match="no task 'writing'"):
        result.task("writing")


def test_before_and_after_on_a_real_model(loaded, tmp_path):
    probe = load_text_probe("builtin")
    tasks, seen = [_task()], set()
    before = evaluate_model(loaded, tasks, SETTINGS, probe=probe, on_progress=lambda name, done, total: seen.add((name, total)))
    assert seen == {("reading", 5), ("text probe", len(probe.conversations))}
    assert evaluate_model(loaded, tasks, SETTINGS, probe=probe).records == before.records
    assert 0 < before.probe.loss < 12 and before.probe.num_tokens > len(probe.conversations)
    # The task's answers set to what the model says: all become right.
    answered = tuple(
        Conversation((*c.turns[:1], Turn("assistant", (Part("text", record.answer),))), c.source)
        for c, record in zip(tasks[0].conversations, before.records, strict=True)
    )
    after = evaluate_model(loaded, [Task("reading", answered, tasks[0].grader, "exact_match")], SETTINGS, probe=probe)
    assert after.task("reading").accuracy == 1.0
    found = compare(before, after)
    assert found.task("reading").fixed == 5 - sum(r.right for r in before.records) and found.probe.exact.fixed == 0
    assert found.probe.loss_before == found.probe.loss_after
    before.write(tmp_path / "before"), after.write(tmp_path / "after")
    report = write_report(tmp_path / "report.html", read_result(tmp_path / "after"), before=read_result(tmp_path / "before"), tasks=tasks)
    page = report.read_text(encoding="utf-8")
    assert "Writing: the text-only probe" in page and page.count("data:image/png;base64,") == 5


def test_loss_of_reference_answers_equals_the_plain_forward(loaded):
    conversations = load_text_probe("builtin").conversations[8:16]
    encoder, expected, tokens = Encoder(loaded.processor), 0.0, 0
    for conversation in conversations:
        sample = encoder.encode(conversation)
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.from_numpy(sample.token_ids)[None], use_cache=False).logits[0].double()
        places = np.flatnonzero(sample.trained)
        expected -= float(logits.log_softmax(-1)[places - 1, sample.token_ids[places]].sum())
        tokens += len(places)
        assert loaded.processor.tokenizer.decode(sample.token_ids[places]) == conversation.answer + "<|im_end|>"
    loss, counted = answer_loss(loaded.model, loaded.processor, conversations)
    assert counted == tokens and loss == pytest.approx(expected, rel=1e-5)


def test_the_probe_sees_what_an_adapter_unlearns(tmp_path):
    loaded = load(tiny_checkpoint(tmp_path, "qwen3_vl"), device="cpu", data=SMALL)
    conversations = load_text_probe("builtin").conversations[:4]
    before = answer_loss(loaded.model, loaded.processor, conversations)[0]
    model = apply_tuning(loaded.model, TuningSettings(r=2, lora_dropout=0.5), TABLE["qwen3_vl"], seed=0).train()
    assert answer_loss(model, loaded.processor, conversations)[0] == pytest.approx(before)  # B is zero, dropout is off
    assert model.training and all(module.training for module in model.modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
    assert not math.isclose(answer_loss(model, loaded.processor, conversations)[0], before, rel_tol=1e-3)


def test_the_builtin_probe_is_bilingual_and_short():
    probe = load_text_probe("builtin")
    questions = [c.turns[0].text for c in probe.conversations]
    chinese = [q for q in questions if any("\u4e00" <= character <= "\u9fff" for character in q)]
    assert 20 <= len(questions) <= 30 and 10 <= len(chinese) <= 14 and len(set(questions)) == len(questions)
    assert all(len(q) < 100 and len(c.answer) < 20 and not c.media for q, c in zip(questions, probe.conversations, strict=True))
    assert load_text_probe(None) is None


def test_a_probe_of_the_user(tmp_path):
    path = tmp_path / "probe.jsonl"
    path.write_text(
        json.dumps({"question": "1+1?", "answer": "2", "answers": ["2", "two"]}) + "\n\n" + json.dumps({"question": "a", "answer": "b"})
    )
    probe = load_text_probe("probe.jsonl", base_dir=tmp_path)
    assert [c.source.row for c in probe.conversations] == [0, 2] and probe.conversations[0].extra == {"answers": ["2", "two"]}
    for content, message in (
        ('{"question": "a"}', "row 0: KeyError"),
        ("x", "row 0"),
        ('{"question": "a", "answer": 3}', "row 0: TypeError"),
        ("", "is empty"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            load_text_probe(str(path))
    with pytest.raises(DataError, match="cannot be read"):
        load_text_probe(str(tmp_path / "none.jsonl"))


def test_settings_of_a_recipe_reach_the_sampler():
    assert sampling_settings(EvaluationSettings(max_completion_length=9, temperature=0.5, batch_size=3), seed=4) == SamplingSettings(
        9, 0.5, seed=4, batch_size=3
    )


def test_prompts_and_media_are_named_for_people():
    turns = (
        Turn("system", (Part("text", "Be brief."),)),
        Turn("user", (Part("image", media=MediaRef(url="https://e.x/a.png")), Part("text", "Hi"))),
    )
    conversation = Conversation(turns, RowSource("f", 0))
    assert prompt_text(conversation) == "system: Be brief.\nuser: Hi"
    assert [media_label(part) for part in conversation.media] == ["https://e.x/a.png"]
    assert media_label(Part("video", media=MediaRef(frames=(MediaRef(path="a"), MediaRef(path="b"))))) == "2 frames"


def test_graders_of_boxes_know_the_frame_of_the_model(loaded):
    """Boxes in pixels of the picture can be judged only when it is known how the model writes them."""
    task = _task(rows=2)
    rows = tuple(replace(row, extra={"ground_truth": [4, 4, 20, 20]}) for row in task.conversations)
    boxes = Task("boxes", rows, get_grader("iou", {"boxes_in": "image_pixels"}), "iou")
    with pytest.raises(EvaluationError, match="only where the model is known"):
        evaluate(Parrot(), [boxes], SamplingSettings())
    result = evaluate_model(loaded, [boxes], SETTINGS)
    assert [record.expected for record in result.records] == [("[4, 4, 20, 20]",)] * 2
