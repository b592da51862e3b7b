"""Steps: which samples, in which packs, on which process; pixels from workers; positions that can be resumed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from finesight.data import feed as feed_module
from finesight.data.conversation import MediaRef
from finesight.data.encode import Encoder
from finesight.data.feed import Feed
from finesight.data.formats import read_source
from finesight.data.kept import StoredItems
from finesight.data.processor import load_processor
from finesight.data.steps import plan_packs
from finesight.data_settings import DataSettings, SourceSettings
from finesight.errors import DataError
from tiny import tiny_checkpoint
from tiny_runs import MAX_PIXELS, MIN_PIXELS, write_rows


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "m", "qwen3_vl")
    return load_processor(folder, data=DataSettings(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS))


@pytest.fixture(scope="module")
def samples(tmp_path_factory, processor):
    """Four images with three questions each, and two rows of text."""
    path = write_rows(tmp_path_factory.mktemp("rows"), images=4, questions=3, text_rows=2)
    result = read_source(SourceSettings(path=str(path)), data=DataSettings(), base_dir=path.parent)
    encoder = Encoder(processor)
    return [encoder.encode(conversation) for conversation in result.conversations]


def make(samples, processor, **arguments):
    return Feed(samples, processor, **{"train_batch_size": 4, "token_budget": 128, "seed": 1, **arguments})


def same(a, b):
    """Whether two packed batches hold the same."""
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("input_ids", "position_ids", "patches", "token", "weight", "predict_from")
    )


def test_several_processes_get_smaller_packs_rather_than_none(samples):
    plans, deal = plan_packs(samples, token_budget=10_000, share=True)
    assert len(plans) == 1 and deal == ((0,),)
    plans, deal = plan_packs(samples, token_budget=10_000, share=True, processes=2)
    assert all(pack is not None for hand in deal for pack in hand)
    loads = [sum(plans[pack].num_tokens for pack in hand) for hand in deal]
    assert max(loads) < 0.7 * sum(loads)
    assert sum(len(plan.samples) for plan in plans) == len(samples)


def test_steps_hold_all_samples_and_their_figures(samples, processor):
    feed = make(samples, processor)
    steps = list(feed.steps(0))
    assert [step.num_samples for step in steps] == [4, 4, 4, 2] and feed.steps_per_epoch == 4
    assert sum(step.target_weight for step in steps) == sum(sample.target_weight for sample in samples)
    assert sum(step.unshared_tokens for step in steps) == sum(len(sample) for sample in samples)
    assert sum(step.num_tokens for step in steps) < sum(step.unshared_tokens for step in steps)  # images are shared
    for step in steps:
        assert step.num_tokens == sum(pack.num_tokens for pack in step.packs)
        assert step.target_weight == pytest.approx(sum(pack.weight.sum().item() for pack in step.packs))
        assert all(pack.num_tokens <= 128 for pack in step.packs)
        assert step.padded_tokens >= step.unshared_tokens
        assert len(step.pack_rows) == len(step.packs)
    rows = sorted(row.row for step in steps for pack in step.pack_rows for row in pack)
    assert rows == list(range(len(samples)))


def test_each_image_is_decoded_once_a_step(samples, processor, monkeypatch):
    decoded = []
    real = feed_module.visual_patches
    monkeypatch.setattr(feed_module, "visual_patches", lambda item, p: decoded.append(item.key) or real(item, p))
    # A budget that divides every tree: the same image stands in several packs of a step.
    step = next(iter(make(samples, processor, shuffle=False, train_batch_size=3, token_budget=50).steps(0)))
    assert len(step.packs) > 1 and len(decoded) == 1
    assert sum(len(pack.grids) for pack in step.packs) > 1


def test_a_start_in_the_middle_gives_the_same_steps(samples, processor):
    feed = make(samples, processor)
    whole = [*feed.steps(0), *feed.steps(1)]
    resumed = list(make(samples, processor).stream(0, 3, 4))
    assert [(s.epoch, s.index) for s in resumed] == [(0, 3), (1, 0), (1, 1), (1, 2)]
    for a, b in zip(whole[3:7], resumed, strict=True):
        assert all(same(x, y) for x, y in zip(a.packs, b.packs, strict=True))


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"), [(1, None, 4), (2.5, None, 10), (0.3, None, 2), (0.01, None, 1), (1, 7, 7), (1 / 3 * 3, None, 4)]
)
def test_fractional_epochs(samples, processor, epochs, max_steps, steps):
    assert make(samples, processor).total_steps(epochs, max_steps) == steps


def test_processes_share_a_step(samples, processor):
    alone = list(make(samples, processor, token_budget=100).steps(0))
    hands = [list(make(samples, processor, token_budget=100, processes=3, process=process).steps(0)) for process in range(3)]
    for number, step in enumerate(alone):
        parts = [hand[number] for hand in hands]
        assert len({len(part.packs) for part in parts}) == 1  # DDP waits for as many backward passes on each
        assert {part.target_weight for part in parts} == {step.target_weight}
        assert sum(pack.weight.sum().item() for part in parts for pack in part.packs) == pytest.approx(step.target_weight)
        if step.num_samples < 3:  # somebody repeats a pack without weight
            assert any(pack.weight.sum() == 0 and pack.num_targets > 0 for part in parts for pack in part.packs)


def test_workers_give_what_the_process_itself_gives(samples, processor):
    state = torch.get_rng_state()
    own, theirs = (list(make(samples, processor, num_workers=workers).stream(0, 1, 5)) for workers in (0, 2))
    assert torch.equal(state, torch.get_rng_state())  # the loader must not draw from the generator of dropout
    for a, b in zip(own, theirs, strict=True):
        assert (a.epoch, a.index, a.pack_rows, a.target_weight) == (b.epoch, b.index, b.pack_rows, b.target_weight)
        assert all(same(x, y) for x, y in zip(a.packs, b.packs, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_travel_in_the_precision_asked_for(samples, processor, workers):
    wide = list(make(samples, processor).stream(0, 0, 2))
    narrow = list(make(samples, processor, num_workers=workers, patch_dtype=torch.bfloat16).stream(0, 0, 2))
    for a, b in zip(wide, narrow, strict=True):
        for x, y in zip(a.packs, b.packs, strict=True):
            assert x.patches.dtype == torch.float32 and y.patches.dtype == torch.bfloat16
            assert torch.equal(x.patches.to(torch.bfloat16), y.patches)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_opened_names_its_row(samples, processor, tmp_path, workers):
    broken = tmp_path / "broken.png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(broken)
    broken.write_bytes(broken.read_bytes()[:40])
    item = replace(
        samples[4].visual_items[0], part=replace(samples[4].visual_items[0].part, media=MediaRef(path=str(broken))), key="broken"
    )
    rows = [*samples[:4], replace(samples[4], visual_items=(item,))]
    feed = make(rows, processor, shuffle=False, num_workers=workers)
    stream = feed.steps(0)
    assert next(stream).num_samples == 4
    with pytest.raises(DataError, match=r"rows\.jsonl, row 4: .*broken\.png"):
        next(stream)


def test_no_samples_are_refused(processor):
    with pytest.raises(DataError, match="no samples"):
        make([], processor)


def test_survey_is_spread_over_the_epoch(samples, processor):
    feed = make(samples, processor)
    assert [plan.index for plan in feed.survey()] == [0, 1, 2, 3]
    assert [plan.index for plan in feed.survey(max_steps=2)] == [0, 2]


def images_of(step):
    """Those to be computed and those whose features are kept, over all packs of a step."""
    return {key for pack in step.packs for key in pack.item_keys}, {key for pack in step.packs for key in pack.stored_keys}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 3])
def test_pixels_that_an_earlier_step_computes_are_left_out(samples, processor, workers, start):
    """Nothing is marked as kept here: that an earlier step of the stream has an image is known beforehand."""
    stored = StoredItems(samples)
    stored.promise()
    feed = make(samples, processor, stored=stored, num_workers=workers)
    met = set()
    for step in feed.stream(0, start, 7):
        keys = {item.key for row in feed.rows_of(step.epoch, step.index) for item in samples[row].visual_items}
        assert images_of(step) == (keys - met, keys & met)
        met |= keys
    assert met == set(stored.keys)
    # a stream that begins anew must not count on what another one computed
    again = next(iter(feed.stream(1, 0, 1)))
    assert not images_of(again)[1]


def test_pixels_are_opened_where_nothing_is_sure(samples, processor):
    """Without room for all features, and where another process may be the one that computes an image."""
    stored = StoredItems(samples)
    steps = list(make(samples, processor, stored=stored).stream(0, 0, 8))
    assert all(not images_of(step)[1] for step in steps)
    stored.promise()
    steps = list(make(samples, processor, stored=stored, processes=2).stream(0, 0, 8))
    assert all(not images_of(step)[1] for step in steps)
    stored.add(stored.keys[0])
    steps = list(make(samples, processor, stored=stored, processes=2).stream(0, 0, 8))
    assert {key for step in steps for key in images_of(step)[1]} == {stored.keys[0]}
