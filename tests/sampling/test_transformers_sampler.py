"""Answers equal repeated full forwards, do not depend on the batch, and leave the model as it was."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from finesight.data.conversation import Conversation, MediaRef, Part, RowSource, Turn
from finesight.data.encode import Encoder
from finesight.data.pixels import visual_patches
from finesight.errors import RecipeError
from finesight.families import FAMILIES as TABLE
from finesight.models.adapters import apply_tuning
from finesight.models.load import LoadedModel, load
from finesight.models.packed import PackedModel
from finesight.recipe import DataSettings, TuningSettings
from finesight.sampling.transformers_sampler import TransformersSampler, _GumbelDraws
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
    found = TransformersSampler(loaded.model, loaded.processor).generate([PROMPTS[kind]], GREEDY)[0]
    assert found.token_ids == full_forward_answer(loaded, loaded.model, PROMPTS[kind], 6)


def test_the_library_alone_would_go_on_elsewhere_after_a_video(tmp_path):
    """Why positions are handed over: without them Qwen2.5-VL generates from the largest position of the prompt."""
    loaded = load(tiny_checkpoint(tmp_path, "qwen2_5_vl"), device="cpu", data=SMALL)
    sampler = TransformersSampler(loaded.model, loaded.processor)
    sample = Encoder(loaded.processor).encode_prompt(PROMPTS["video"])
    assert sample.position_ids.max() > sample.position_ids[:, -1].max()
    inputs = sampler._inputs([sample])
    last = inputs["position_ids"][1:, 0, -1].max()
    positions, delta = loaded.base.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"], second_per_grid_ts=[2.0]
    )
    assert torch.equal(positions, inputs["position_ids"][1:])
    assert len(sample) + int(delta) != last + 1


def test_answers_do_not_depend_on_the_batch(loaded):
    prompts = [*PROMPTS.values(), ask(image(7, 96, 96), "a rather longer question about the value of the year"), ask("no")]
    sampler = TransformersSampler(loaded.model, loaded.processor)
    for settings in (GREEDY, replace(GREEDY, temperature=1.0, top_p=0.9, top_k=40, seed=5)):
        alone = sampler.generate(prompts, replace(settings, batch_size=1))
        assert sampler.generate(prompts, replace(settings, batch_size=3)) == alone
        assert sampler.generate(prompts, replace(settings, batch_size=16)) == alone


def test_draws_follow_the_seed(loaded):
    sampler = TransformersSampler(loaded.model, loaded.processor)
    prompts = [PROMPTS["text"], PROMPTS["text"], PROMPTS["image"]]
    hot = SamplingSettings(max_completion_length=8, temperature=3.0, seed=1)
    first = sampler.generate(prompts, hot)
    assert sampler.generate(prompts, hot) == first
    assert sampler.generate(prompts, replace(hot, seed=2)) != first
    assert first[0] != first[1]  # one prompt twice is drawn twice
    greedy = sampler.generate(prompts, replace(hot, temperature=0.0))
    assert sampler.generate(prompts, replace(hot, top_k=1)) == greedy


def test_visual_tokens_are_never_drawn(loaded):
    head = loaded.base.lm_head.weight
    before = head.detach().clone()
    processor = loaded.processor
    with torch.no_grad():
        hidden = loaded.base.model(input_ids=torch.arange(64, 80)[None]).last_hidden_state[0, -1]
        for token in (processor.image_token_id, processor.video_token_id):
            head[token] = 50 * hidden / hidden.norm()
        try:
            drawn = TransformersSampler(loaded.model, processor).generate(list(PROMPTS.values()), replace(GREEDY, temperature=1.0))
        finally:
            head.copy_(before)
    assert not {processor.image_token_id, processor.video_token_id} & {token for c in drawn for token in c.token_ids}


def test_an_answer_ends_with_its_turn_or_at_the_limit(loaded):
    sampler = TransformersSampler(loaded.model, loaded.processor)
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
    base.generation_config.repetition_penalty = 9.0
    base.generation_config.do_sample = True
    expected = TransformersSampler(model.eval(), loaded.processor).generate([PROMPTS["image"]], GREEDY)
    assert expected[0].token_ids == full_forward_answer(loaded, model, PROMPTS["image"], 6)
    model.train()
    base.model.visual.eval()  # a frozen tower, as a training loop may keep it
    base.gradient_checkpointing_enable()
    modes = {name: module.training for name, module in model.named_modules()}
    state, defaults = torch.random.get_rng_state(), base.generation_config
    hot = TransformersSampler(model, loaded.processor).generate([PROMPTS["image"]], replace(GREEDY, temperature=1.0))
    assert TransformersSampler(model, loaded.processor).generate([PROMPTS["image"]], GREEDY) == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.random.get_rng_state(), state) and base.generation_config is defaults
    assert all(parameter.grad is None for parameter in model.parameters()) and hot[0].token_ids
    assert base.is_gradient_checkpointing


def load_again(loaded: LoadedModel) -> torch.nn.Module:
    model = type(loaded.base)(copy.deepcopy(loaded.base.config))
    model.load_state_dict(loaded.base.state_dict())
    return model.eval()


def test_a_model_prepared_for_packed_training_answers_the_same(loaded):
    model = load_again(loaded)
    expected = TransformersSampler(loaded.model, loaded.processor).generate(list(PROMPTS.values()), GREEDY)
    PackedModel(model)
    assert TransformersSampler(model, loaded.processor).generate(list(PROMPTS.values()), GREEDY) == expected


def test_an_adapter_counts(loaded):
    model = apply_tuning(load_again(loaded), TuningSettings(r=2), loaded.family, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    found = TransformersSampler(model, loaded.processor).generate([PROMPTS["video"]], GREEDY)[0]
    assert found.token_ids == full_forward_answer(loaded, model, PROMPTS["video"], 6)
    assert found != TransformersSampler(loaded.model, loaded.processor).generate([PROMPTS["video"]], GREEDY)[0]


def test_progress_is_reported_and_order_kept(loaded):
    seen: list[tuple[int, int]] = []
    prompts = [ask("a" * n) for n in (3, 40, 9, 20, 1)]
    sampler = TransformersSampler(loaded.model, loaded.processor)
    found = sampler.generate(prompts, replace(GREEDY, batch_size=2), lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert found == [sampler.generate([prompt], GREEDY)[0] for prompt in prompts]
    assert sampler.generate([], GREEDY) == []


def test_noise_of_a_row_draws_from_the_softmax():
    scores = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf])
    generators = [torch.Generator().manual_seed(row) for row in range(20_000)]
    drawn = _GumbelDraws(generators)(None, scores.expand(20_000, -1)).argmax(-1)
    found = torch.bincount(drawn, minlength=5) / 20_000
    torch.testing.assert_close(found, scores.softmax(-1), atol=0.015, rtol=0)
    assert found[4] == 0


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_completion_length": 0}, {"top_k": -1}, {"batch_size": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        SamplingSettings(**wrong)


def test_family_table_is_complete():
    assert set(FAMILIES) == set(TABLE)
