"""Settings as keywords of a trainer, and that what a refusal offers is taken."""

from __future__ import annotations

import re

import pytest

from finesight.errors import RecipeError
from finesight.foreign_names import FOREIGN_NAMES
from finesight.training.flat_settings import REINFORCEMENT, SUPERVISED, as_keywords, in_sections


def test_each_goes_to_its_section_by_either_spelling():
    settings = {"max_length_tokens": 5, "data.fps": 1.0, "training.seed": 2, "r": 4, "rewards": ["json"]}
    assert in_sections(settings, SUPERVISED, "me") == {
        "data": {"max_length_tokens": 5, "fps": 1.0},
        "training": {"seed": 2},
        "tuning": {"r": 4},
        "rewards": ["json"],
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_length", "max_length is no setting; write max_length_tokens$"),
        ("fsdp", 'write sharding="full"$'),
        ("bf16", 'write dtype="bfloat16"$'),
        ("finetuning_type", 'write method="lora" or "full"$'),
        ("quantization_bit", "write load_in_4bit=True or load_in_8bit=True$"),
        ("dataset", "write train_dataset$"),
        ("model_name_or_path", "write model$"),
        ("learning_rte", "did you mean 'learning_rate'"),
        ("training.learning_rte", "did you mean 'learning_rate'"),
        ("beta", "grpo.beta is one of GRPOTrainer"),
        ("tasks", r"docs/settings.md lists"),
        ("evaluation.max_completion_length", "evaluation.max_completion_length is set in a recipe"),
        ("wibble", "docs/settings.md lists"),
    ],
)
def test_an_unknown_name_is_answered_as_python_writes_it(name, message):
    with pytest.raises(RecipeError, match=message):
        in_sections({name: 1}, SUPERVISED, "SFTTrainer")


def test_batch_sizes_are_answered_with_their_product():
    with pytest.raises(RecipeError, match=r"`train_batch_size=8` .*; remove per_device_train_batch_size and gradient_accumulation_steps$"):
        in_sections({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, SUPERVISED, "SFTTrainer")


def test_all_unknown_names_are_told_at_once():
    with pytest.raises(RecipeError, match="max_length_tokens\n  wibble is no setting"):
        in_sections({"max_length": 1, "wibble": 2}, SUPERVISED, "SFTTrainer")


@pytest.mark.parametrize("name", sorted(key for key, hint in FOREIGN_NAMES.items() if hint.startswith("write ")))
def test_what_is_offered_is_taken(name):
    offered = re.match(r"write ([\w.]+)", as_keywords(FOREIGN_NAMES[name], REINFORCEMENT))
    assert offered is not None
    if offered[1] not in ("train_dataset", "model", "rewards"):  # arguments of a trainer
        in_sections({offered[1]: 1}, REINFORCEMENT, "GRPOTrainer")
