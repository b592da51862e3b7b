"""Answers equal repeated full forwards, do not depend on the batch, and leave the model as it was."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_inductor_cache

from finesight.data.batch import build_batch
from finesight.data.conversation import Conversation, MediaRef, Part, RowSource, Turn
from finesight.data.encode import Encoder
from finesight.data.pack import pack_step
from finesight.data.pixels import visual_patches
from finesight.data.sample import Sample
from finesight.data_settings import DataSettings
from finesight.errors import RecipeError
from finesight.families import FAMILIES as TABLE
from finesight.models.adapters import apply_tuning
from finesight.models.load import LoadedModel, load
from finesight.models.packed import PackedModel
from finesight.recipe import TuningSettings
from finesight.sampling.forking_sampler import ForkingSampler, _Run
from finesight.sampling.types import SamplingSettings
from tiny import FAMILIES, tiny_checkpoint

SMALL = DataSettings(min_pixels=1024, max_pixels=6144, video_min_pixels=1024, video_max_pixels=16384, fps=1.0)
GREEDY = SamplingSettings(max_completion_length=6, batch_size=8)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory) -> LoadedModel:
    return load(tiny_checkpoint(tmp_path_factory.mktemp("model"), request.param), device="cpu", data=SMALL)


def picture(seed: int, width: int, height: int) -> MediaRef:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return MediaRef(image=Image.fromarray(pixels))


def ask(*parts: str | Part, system: str | None = None) -> Conversation:
    turns = [Turn("system", (Part("text", system),))] if system else []
    turns.append(Turn("user", tuple(Part("text", part) if isinstance(part, str) else part for part in parts)))
    return Conversation(tuple(turns), RowSource("prompts", 0))


def image(seed: int, width: int = 64, height: int = 64) -> Part:
    return Part("image", media=picture(seed, width, height))


def video(seed: int, frames: int = 8) -> Part:
    return Part("video", media=MediaRef(frames=tuple(picture(seed + i, 64, 64) for i in range(frames))), fps=1.0)


PROMPTS = {
    "text": ask("read the number 0123"),
    "image": ask(image(1), "what is the value?"),
    "two images": ask("one", image(2, 96, 64), "two", image(3, 32, 96), "favorable?"),
    # A short text after a video: for Qwen2.5-VL the video's last time position lies beyond that of the last token.
    "video": ask(video(10), "?"),
    "video and image": ask(video(20, 4), "and", image(4), "the year?", system="yes no"),
}


def full_forward_answer(loaded: LoadedModel, model: torch.nn.Module, prompt: Conversation, steps: int) -> tuple[int, ...]:
    """The most likely token after a plain forward of everything so far, positions left to transformers, again and again."""
    processor = loaded.processor
    sample = Encoder(processor).encode_prompt(prompt)
    ids = sample.token_ids.tolist()
    inputs = {}
    for kind, pixels, grids in (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")):
        items = [item for item in sample.visual_items if item.kind == kind]
        if items:
            inputs[pixels] = torch.from_numpy(np.concatenate([visual_patches(item, processor) for item in items]))
            inputs[grids] = torch.tensor([list(item.grid) for item in items])
    if loaded.family.video_time_positions and "video_grid_thw" in inputs:
        inputs["second_per_grid_ts"] = torch.full((len(inputs["video_grid_thw"]),), 2.0)  # pairs of frames at 1 a second
    drawn: list[int] = []
    while len(drawn) < steps:
        tokens = torch.tensor([ids + drawn])
        types = (tokens == processor.image_token_id).int() + 2 * (tokens == processor.video_token_id).int()
        with torch.no_grad():
            logits = model(input_ids=tokens, mm_token_type_ids=types, use_cache=False, **inputs).logits[0, -1]
        logits[[processor.image_token_id, processor.video_token_id]] = -torch.inf
        drawn.append(int(logits.argmax()))
        if drawn[-1] == processor.tokenizer.eos_token_id:
            break
    return tuple(drawn)


@pytest.mark.parametrize("kind", PROMPTS)
def test_greedy_answers_equal_repeated_full_forwards(loaded, kind):
    found = ForkingSampler(loaded.model, loaded.processor).generate([PROMPTS[kind]], GREEDY)[0]
    assert found.token_ids == full_forward_answer(loaded, loaded.model, PROMPTS[kind], 6)


def test_answers_do_not_depend_on_the_batch(loaded):
    prompts = [*PROMPTS.values(), ask(image(7, 96, 96), "a rather longer question about the value of the year"), ask("no")]
    sampler = ForkingSampler(loaded.model, loaded.processor)
    for settings in (GREEDY, replace(GREEDY, temperature=1.0, top_p=0.9, top_k=40, seed=5)):
        alone = sampler.generate(prompts, replace(settings, batch_size=1))
        for batch_size in (3, 16):
            together = sampler.generate(prompts, replace(settings, batch_size=batch_size))
            assert [replace(c, logprobs=()) for c in together] == [replace(c, logprobs=()) for c in alone]
            for a, b in zip(together, alone, strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_draws_follow_the_seed(loaded):
    sampler = ForkingSampler(loaded.model, loaded.processor)
    prompts = [PROMPTS["text"], PROMPTS["text"], PROMPTS["image"]]
    hot = SamplingSettings(max_completion_length=8, temperature=3.0, seed=1)
    first = sampler.generate(prompts, hot)
    assert sampler.generate(prompts, hot) == first
    assert sampler.generate(prompts, replace(hot, seed=2)) != first
    assert first[0] != first[1]  # one prompt twice is drawn twice
    greedy = sampler.generate(prompts, replace(hot, temperature=0.0))
    assert [c.token_ids for c in sampler.generate(prompts, replace(hot, top_k=1))] == [c.token_ids for c in greedy]


def test_visual_tokens_are_never_drawn(loaded):
    head = loaded.base.lm_head.weight
    before = head.detach().clone()
    processor = loaded.processor
    with torch.no_grad():
        hidden = loaded.base.model(input_ids=torch.arange(64, 80)[None]).last_hidden_state[0, -1]
        for token in (processor.image_token_id, processor.video_token_id):
            head[token] = 50 * hidden / hidden.norm()
        try:
            drawn = ForkingSampler(loaded.model, processor).generate(list(PROMPTS.values()), replace(GREEDY, temperature=1.0))
        finally:
            head.copy_(before)
    assert not {processor.image_token_id, processor.video_token_id} & {token for c in drawn for token in c.token_ids}


def test_forbidden_tokens_are_never_drawn(loaded):
    """Where those that end an answer are forbidden, it has its full length."""
    kept = tuple(loaded.processor.tokenizer("ab", add_special_tokens=False)["input_ids"])
    vocabulary = range(loaded.model.config.text_config.vocab_size)
    sampler = ForkingSampler(loaded.model, loaded.processor, forbidden=set(vocabulary) - set(kept))
    settings = SamplingSettings(max_completion_length=20, temperature=1.0, num_generations=3)
    answers = sampler.generate([PROMPTS["text"]], settings)
    assert {token for answer in answers for token in answer.token_ids} == set(kept)
    assert all(len(answer.token_ids) == 20 and answer.finish_reason == "length" for answer in answers)


def test_an_answer_ends_with_its_turn_or_at_the_limit(loaded):
    sampler = ForkingSampler(loaded.model, loaded.processor)
    tokenizer = loaded.processor.tokenizer
    stops = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    found = sampler.generate(list(PROMPTS.values()), replace(GREEDY, temperature=2.0, max_completion_length=2))
    assert any(c.finish_reason == "length" for c in found)
    for completion in found:
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] in stops)
        assert len(completion.token_ids) == 2 or completion.finish_reason == "stop"
        assert not stops & set(completion.token_ids[:-1])
    head = loaded.base.lm_head.weight
    before = head.detach().clone()
    with torch.no_grad():
        head.zero_()  # all tokens tie, and the first one is <|endoftext|>
        stopped = sampler.generate([PROMPTS["text"]], GREEDY)[0]
        head.copy_(before)
    assert (stopped.finish_reason, stopped.text, stopped.token_ids) == ("stop", "", (0,))


def test_a_model_in_training_is_left_as_it_was(loaded):
    model = apply_tuning(load_again(loaded), TuningSettings(r=2, lora_dropout=0.5), loaded.family, seed=0)
    base = model.get_base_model()
    expected = ForkingSampler(model.eval(), loaded.processor).generate([PROMPTS["image"]], GREEDY)
    assert expected[0].token_ids == full_forward_answer(loaded, model, PROMPTS["image"], 6)
    model.train()
    base.model.visual.eval()  # a frozen tower, as a training loop may keep it
    base.gradient_checkpointing_enable()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.random.get_rng_state()
    hot = ForkingSampler(model, loaded.processor).generate([PROMPTS["image"]], replace(GREEDY, temperature=1.0))
    assert ForkingSampler(model, loaded.processor).generate([PROMPTS["image"]], GREEDY) == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters()) and hot[0].token_ids
    assert base.is_gradient_checkpointing


def load_again(loaded: LoadedModel) -> torch.nn.Module:
    model = type(loaded.base)(copy.deepcopy(loaded.base.config))
    model.load_state_dict(loaded.base.state_dict())
    return model.eval()


def test_an_adapter_counts(loaded):
    model = apply_tuning(load_again(loaded), TuningSettings(r=2), loaded.family, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    found = ForkingSampler(model, loaded.processor).generate([PROMPTS["video"]], GREEDY)[0]
    assert found.token_ids == full_forward_answer(loaded, model, PROMPTS["video"], 6)
    assert found != ForkingSampler(loaded.model, loaded.processor).generate([PROMPTS["video"]], GREEDY)[0]


class TestManyAnswers:
    HOT = SamplingSettings(max_completion_length=12, temperature=1.0, num_generations=5, batch_size=4, seed=3)

    def test_they_do_not_depend_on_the_rows(self, loaded):
        sampler, prompts = ForkingSampler(loaded.model, loaded.processor), list(PROMPTS.values())
        few = sampler.generate(prompts, self.HOT)
        many = sampler.generate(prompts, replace(self.HOT, batch_size=64))
        assert len(few) == 25
        assert [c.token_ids for c in few] == [c.token_ids for c in many]
        assert len({c.token_ids for c in few[:5]}) > 1

    def test_a_prompt_is_computed_once(self, loaded, monkeypatch):
        computed: list[int] = []
        packed = PackedModel(loaded.model)
        states = packed.target_states
        monkeypatch.setattr(packed, "target_states", lambda batch, observe: computed.append(batch.num_tokens) or states(batch, observe))
        prompts = list(PROMPTS.values())
        ForkingSampler(packed, loaded.processor).generate(prompts, self.HOT)
        encoder = Encoder(loaded.processor)
        assert sum(computed) == sum(len(encoder.encode_prompt(prompt)) for prompt in prompts)

    def test_log_probabilities_are_those_of_training(self, loaded):
        """The packed forward of prompt and answer gives the sampled tokens the same log-probabilities (temperature 1)."""
        sampler = ForkingSampler(loaded.model, loaded.processor)
        forbidden = [loaded.processor.image_token_id, loaded.processor.video_token_id]
        for prompt in PROMPTS.values():
            sample = Encoder(loaded.processor).encode_prompt(prompt)
            for completion in sampler.generate([prompt], replace(self.HOT, num_generations=2)):
                whole = continued(sample, completion.token_ids)
                (plan,) = pack_step([whole], token_budget=4096, share=True)
                batch = build_batch(plan, lambda item: visual_patches(item, loaded.processor))
                with torch.no_grad():
                    logits = loaded.base.lm_head(sampler.packed.target_states(batch)).index_fill(1, torch.tensor(forbidden), -torch.inf)
                expected = logits.log_softmax(-1).gather(1, batch.token[:, None]).squeeze(1)
                torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)

    def test_the_pool_is_whole_again(self, loaded):
        run = _Run(
            ForkingSampler(loaded.model, loaded.processor), [Encoder(loaded.processor).encode_prompt(p) for p in PROMPTS.values()], self.HOT
        )
        before = run.pool.free_blocks
        with torch.no_grad():
            run.complete(None)
        assert run.pool.free_blocks == before

    def test_a_stop_text_ends_an_answer(self, loaded):
        sampler = ForkingSampler(loaded.model, loaded.processor)
        free = sampler.generate([PROMPTS["text"]], replace(self.HOT, num_generations=1, max_completion_length=30))[0]
        assert len(free.text) > 6
        stop = free.text[3:5]
        cut = sampler.generate([PROMPTS["text"]], replace(self.HOT, num_generations=1, max_completion_length=30, stop=(stop,)))[0]
        assert cut.text == free.text[: free.text.find(stop)] and cut.finish_reason == "stop"
        assert cut.token_ids == free.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < len(free.token_ids)

    def test_a_penalty_against_repetition(self, loaded):
        sampler = ForkingSampler(loaded.model, loaded.processor)
        sample = Encoder(loaded.processor).encode_prompt(PROMPTS["text"])
        settings = SamplingSettings(max_completion_length=12, repetition_penalty=1e6)
        drawn = sampler.generate([PROMPTS["text"]], settings)[0].token_ids
        assert len(set(drawn)) == len(drawn) and not set(drawn) & set(sample.token_ids.tolist())


def continued(sample: Sample, tokens: tuple[int, ...]) -> Sample:
    """Prompt and answer as one sample, the answer trained on."""
    count = len(tokens)
    positions = np.tile(sample.next_position + np.arange(count), (3, 1))
    return replace(
        sample,
        token_ids=np.concatenate([sample.token_ids, np.asarray(tokens)]),
        position_ids=np.concatenate([sample.position_ids, positions], axis=1),
        trained=np.concatenate([np.zeros(len(sample), bool), np.ones(count, bool)]),
    )


def test_progress_is_reported_and_order_kept(loaded):
    seen: list[tuple[int, int]] = []
    prompts = [ask("a" * n) for n in (3, 40, 9, 20, 1)]
    sampler = ForkingSampler(loaded.model, loaded.processor)
    found = sampler.generate(prompts, replace(GREEDY, batch_size=2), lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and seen[-1] == (5, 5)
    assert [c.token_ids for c in found] == [sampler.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
    assert sampler.generate([], GREEDY) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"max_completion_length": 0},
        {"top_k": -1},
        {"batch_size": 0},
        {"min_p": 1.5},
        {"stop": ("",)},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        SamplingSettings(**wrong)


def test_family_table_is_complete():
    assert set(FAMILIES) == set(TABLE)


def test_layers_that_cannot_be_compiled_are_told_of_once(loaded):
    """Without a C++ compiler, and over several calls, each of which has a decoder of its own, as in a run of reinforcement."""
    prompt = Conversation((Turn("user", (Part("text", text="read the number"),)),), RowSource("test", 0))
    packed, told = PackedModel(copy.deepcopy(loaded.model)), []
    (expected,) = ForkingSampler(packed, loaded.processor).generate([prompt], GREEDY)
    sampler = ForkingSampler(packed, loaded.processor, compile_layers=True, say=told.append)
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}), fresh_inductor_cache():
        answers = [sampler.generate([prompt], GREEDY)[0] for _ in range(2)]
    assert [answer.token_ids for answer in answers] == [expected.token_ids] * 2
    what = [text.split(" run uncompiled")[0] for text in told]
    assert sorted(what) == ["Draws", "Layers"]
