"""The figures of `finesight check`, on small data whose answers are known."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from finesight.data.audit import DatasetAudit, Distribution, audit
from finesight.data.audit_settings import AuditSettings, GroupRun
from finesight.data.conversation import Conversation, MediaRef, Part, RowSource, Turn
from finesight.data.formats import read_source
from finesight.data.groups import GroupSizes
from finesight.data.sample import Sample, VisualItem
from finesight.data_settings import DataSettings, SourceSettings
from finesight.errors import BadRow
from finesight.geometry import Grid
from finesight.recipe_files import parse_recipe


def image_part(seed: int, width: int = 64, height: int = 32) -> Part:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Part("image", media=MediaRef(image=Image.fromarray(pixels)))


def row(number: int, image: Part | None, question: str, answer: str | None, weight: float = 1.0) -> Conversation:
    turns = [Turn("user", ((image,) if image else ()) + (Part("text", text=question),))]
    if answer is not None:
        turns.append(Turn("assistant", (Part("text", text=answer),)))
    return Conversation(tuple(turns), RowSource("rows.json", number), weight)


def sample(
    number: int, key: str | None, text_tokens: int, visual_tokens: int = 32, resized: tuple[int, int] = (32, 64), part: Part | None = None
) -> Sample:
    """An image (`visual_tokens`) if there is a key, then tokens of its own; the last two are trained on."""
    items = ()
    if key is not None:
        item = VisualItem("image", part or image_part(0), Grid(1, 2 * visual_tokens, 2), *resized, ((0, visual_tokens),), key)
        items = (item,)
    count = (visual_tokens if key is not None else 0) + text_tokens
    ids = np.concatenate([np.zeros(count - text_tokens, np.int64), 1000 * (number + 1) + np.arange(text_tokens)])
    trained = np.zeros(count, bool)
    trained[-2:] = True
    return Sample(ids, np.tile(np.arange(count), (3, 1)), trained, items, count, RowSource("rows.json", number))


def test_distribution() -> None:
    assert Distribution.of([]) == Distribution(0, 0, 0, 0, 0, 0)
    spread = Distribution.of(range(101))
    assert (spread.count, spread.min, spread.median, spread.p95, spread.max, spread.mean) == (101, 0, 50, 95, 100, 50)


@pytest.fixture
def conversations() -> list[Conversation]:
    first, second = image_part(1), image_part(2, 100, 50)
    return [
        row(0, first, "How many?", "4"),
        row(1, image_part(1), "How many? ", "4 "),  # the same image as an object of its own
        row(2, first, "Which year?", "2014"),
        row(3, second, "Which year?", "2014"),
        row(4, second, "What colour?", "Red"),
        row(5, second, "What colour?", "Blue"),
        row(6, None, "Hi", "Ho", weight=0),
        row(7, None, "Only asked", None),
    ]


class TestContent:
    def test_rows_and_turns(self, conversations: list[Conversation]) -> None:
        bad = [BadRow("rows.json", 8 + i, f"'images/{i}.png' does not exist") for i in range(3)] + [BadRow("rows.json", 20, "empty answer")]
        rows = audit(conversations, bad_rows=bad, formats={"rows.json": "messages"}).rows
        assert (rows.rows, rows.usable, rows.text_only, rows.prompt_only, rows.zero_weight) == (12, 8, 2, 1, 1)
        assert rows.roles == {"user": 8, "assistant": 7}
        assert (rows.turns.min, rows.turns.max) == (1, 2)
        assert [(group.reason, len(group.rows)) for group in rows.bad] == [("'images/0.png' does not exist", 3), ("empty answer", 1)]
        assert rows.bad[0].rows[2].row == 10

    def test_images(self, conversations: list[Conversation]) -> None:
        images = audit(conversations).images
        assert (images.count, images.distinct, images.rows_sharing) == (6, 2, 6)
        assert (images.width.min, images.width.max, images.height.min, images.height.max) == (64, 100, 32, 50)
        assert images.rows_of_one.max == 3
        assert audit(conversations).videos.count == 0

    def test_videos(self, example_data: Path) -> None:
        source = SourceSettings(path="llamafactory_demo/mllm_video_demo.json")
        result = read_source(source, data=DataSettings(train=[source]), base_dir=example_data)
        videos = audit(result.conversations).videos
        assert (videos.count, videos.distinct, videos.frames.min, videos.frames.max) == (3, 3, 146, 270)

    def test_duplicates_and_contradictions(self, conversations: list[Conversation]) -> None:
        found = audit(conversations)
        assert [(group.question, [s.row for s in group.rows]) for group in found.repeated] == [("How many?", [0, 1])]
        (contradiction,) = found.contradictions
        assert (contradiction.question, contradiction.answers, [s.row for s in contradiction.rows]) == (
            "What colour?",
            ("Red", "Blue"),
            [4, 5],
        )

    def test_answers(self, conversations: list[Conversation]) -> None:
        answers = audit([*conversations, row(9, None, "Q", " ")]).answers
        assert [source.row for source in answers.empty] == [9]
        assert [source.row for source in answers.very_short] == [0, 1]
        assert answers.common == (("4", 2), ("2014", 2))

    def test_images_on_both_sides(self, conversations: list[Conversation]) -> None:
        held_out = [row(0, image_part(2, 100, 50), "New?", "Yes"), row(1, image_part(3), "Q", "A")]
        (leak,) = audit(conversations, held_out=held_out).leaks
        assert ([s.row for s in leak.train], [s.row for s in leak.held_out]) == ([3, 4, 5], [0])
        assert audit(conversations).leaks == ()


class TestCost:
    SETTINGS = AuditSettings(train_batch_size=4, token_budget=512)

    def test_tokens(self) -> None:
        samples = [sample(0, "k", 10), sample(1, None, 600), sample(2, "k", 30)]
        tokens = audit([], samples, settings=self.SETTINGS).tokens
        assert tokens is not None
        assert (tokens.tokens.min, tokens.tokens.max, tokens.visual.total, tokens.text.total, tokens.trained.total) == (42, 600, 64, 640, 6)
        assert tokens.histogram == ((64, 2), (128, 0), (256, 0), (512, 0), (1024, 1))
        assert [(long.source.row, long.tokens) for long in tokens.too_long] == [(1, 600)]
        assert not audit([], samples, settings=AuditSettings(token_budget=1000, max_length_tokens=500)).can_train

    def test_sharing_and_padding(self) -> None:
        """Four questions about one image in one step: the image once, and nothing padded."""
        cost = audit([], [sample(i, "k", 10 + i) for i in range(4)], settings=self.SETTINGS).cost
        assert cost is not None
        assert (cost.steps_per_epoch, cost.steps, cost.samples, cost.packs) == (1, 1, 4, 1)
        assert (cost.tokens, cost.shared_tokens, cost.padded_tokens) == (4 * 32 + 46, 32 + 46, 4 * 45)
        assert cost.saved_by_sharing == pytest.approx(96 / 174)
        assert cost.padding == pytest.approx(6 / 180)
        assert cost.times_fewer == pytest.approx(180 / 78)

    def test_without_sharing(self) -> None:
        settings = AuditSettings(train_batch_size=4, token_budget=512, share=False)
        cost = audit([], [sample(i, "k", 10) for i in range(4)], settings=settings).cost
        assert cost is not None
        assert cost.shared_tokens == cost.tokens == cost.padded_tokens == 4 * 42

    def test_many_steps_are_sampled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("finesight.data.audit._MOST_STEPS_PLANNED", 5)
        cost = audit([], [sample(i, str(i), 10) for i in range(100)], settings=self.SETTINGS).cost
        assert cost is not None
        assert (cost.steps_per_epoch, cost.steps, cost.samples, cost.tokens, cost.padded_tokens) == (25, 5, 20, 20 * 42, 20 * 42)

    def test_shrunk_images(self) -> None:
        large, small = image_part(5, 1000, 500), image_part(6, 1000, 500)
        samples = [sample(0, "a", 5, resized=(128, 256), part=large), sample(1, "b", 5, resized=(256, 512), part=small)]
        (shrunk,) = audit([], samples).shrunk
        assert (shrunk.source.row, shrunk.size, shrunk.resized) == (0, (1000, 500), (256, 128))
        assert shrunk.scale == pytest.approx(0.256)


def rendered(result: DatasetAudit) -> str:
    out = io.StringIO()
    result.render(Console(file=out, width=140))
    return " ".join(out.getvalue().split())


class TestResult:
    def full(self, conversations: list[Conversation]) -> DatasetAudit:
        samples = [sample(i, "k", 10 + i) for i in range(4)] + [sample(4, None, 900)]
        bad = [BadRow("rows.json", 8, "[weird] 'x' does not exist")] * 12
        return audit(
            conversations, samples, bad, AuditSettings(token_budget=512), held_out=conversations[:1], formats={"rows.json": "messages"}
        )

    def test_json(self, conversations: list[Conversation]) -> None:
        result = json.loads(json.dumps(self.full(conversations).to_dict()))
        assert result["rows"]["usable"] == 8
        assert result["contradictions"][0]["rows"][0] == {"file": "rows.json", "row": 4}
        assert result["cost"]["times_fewer"] > 1
        assert result["can_train"] is False

    @pytest.mark.parametrize("width", [60, 140])
    def test_render(self, conversations: list[Conversation], width: int) -> None:
        out = io.StringIO()
        self.full(conversations).render(Console(file=out, width=width))
        text = " ".join(out.getvalue().split())
        for expected in (
            "8 of 20 rows can be used",
            "read as messages",
            "12 bad rows: [weird] 'x' does not exist",
            "… and 4 more",
            "different answers",
            "longer than 512 tokens (raise training.token_budget",
            "Training would stop at these data: samples are too long; rows are bad",
        ):
            assert expected in text, expected

    def test_prompts_for_rewards_have_no_trained_tokens_and_a_cost_of_their_own(self, conversations: list[Conversation]) -> None:
        out = io.StringIO()
        samples = [sample(i, "k", 10 + i) for i in range(4)]
        groups = GroupRun(GroupSizes(4, completion_tokens=50), num_train_epochs=3, max_resampling_rounds=2, image_ablation_steps=2)
        result = audit(conversations, samples, settings=AuditSettings(groups=groups, train_batch_size=8))
        result.render(Console(file=out, width=140))
        assert result.cost is None and result.tokens is not None and "tokens of a prompt" in out.getvalue()
        assert not any(line.split()[:1] == ["trained"] for line in out.getvalue().splitlines())
        assert "One epoch" not in out.getvalue() and "single character" not in out.getvalue()
        text = rendered(result)
        for expected in (
            "The run: 6 steps (2 an epoch) a step",
            "prompts 2 12 completions (4 of a prompt) 8 48 images and videos of prompts 2 12",
            "tokens of prompts 87 522 of which visual 64 384 tokens of completions, at most (50 each) 400 2,400",
            "at most 96 completions more in place of",
            "at most 24 completions more with the images blanked",
        ):
            assert expected in text, (expected, text)
        assert json.loads(json.dumps(result.to_dict()))["group_cost"]["completions"] == 48

    def test_a_prompt_must_leave_room_for_its_completion(self) -> None:
        settings = AuditSettings(token_budget=512, groups=GroupRun(GroupSizes(4, completion_tokens=100)))
        result = audit([], [sample(0, None, 412), sample(1, None, 413)], settings=settings)
        assert result.tokens is not None and [(long.source.row, long.tokens) for long in result.tokens.too_long] == [(1, 413)]
        assert not result.can_train and "1 sample longer than 412 tokens" in rendered(result)

    def test_empty(self) -> None:
        out = io.StringIO()
        nothing = audit([])
        nothing.render(Console(file=out))
        assert "0 of 0 rows" in out.getvalue()
        assert "no row can be used" in out.getvalue()
        assert not nothing.can_train
        json.dumps(nothing.to_dict())

    def test_bad_rows_stop_unless_skipped(self, conversations: list[Conversation]) -> None:
        bad = [BadRow("f", 0, "x")]
        assert not audit(conversations, None, bad).can_train
        assert audit(conversations, None, bad, AuditSettings(on_bad_row="skip")).can_train

    def test_settings_of_a_recipe(self) -> None:
        recipe = parse_recipe({
            "model": {"name_or_path": "m"}, "tuning": {"lora_dropout": 0.1}, "data": {"train": "x.json", "max_length_tokens": 100, "on_bad_row": "skip"},
            "training": {"train_batch_size": 3, "token_budget": 1000, "seed": 5},
        })  # fmt: skip
        assert AuditSettings.of(recipe) == AuditSettings(3, 1000, 100, share=False, seed=5, on_bad_row="skip")
        assert AuditSettings.of(recipe).longest == 100 and AuditSettings.of(recipe).supervised
        rewards = parse_recipe({"model": {"name_or_path": "m"}, "grpo": {"num_generations": 4}, "rewards": ["math"]})
        assert not AuditSettings.of(rewards).supervised
        assert AuditSettings.of(rewards).groups == GroupRun(GroupSizes(4, 256), image_ablation_steps=50)
