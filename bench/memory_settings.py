"""The configurations whose memory is measured, in groups: one group is one model and one process.

Within a group those come first that say most, and those that can share a model in memory stand side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.workload import TINY_GROUP, GroupSetting

POLICIES = ("selective", "full", "offload", "none")
# What a base is kept in: settings of a recipe's section `model`.
BF16: tuple[str, ...] = ()
FP8 = ("load_in_fp8",)
EIGHT_BIT = ("load_in_8bit",)
FOUR_BIT = ("load_in_4bit",)
ALL = ("quantize_vocabulary", "quantize_tower")
FOUR_BIT_ALL = (*FOUR_BIT, *ALL)
_METHODS = {
    BF16: "LoRA, bf16",
    FP8: "LoRA, 8-bit float base",
    EIGHT_BIT: "LoRA, 8-bit base",
    FOUR_BIT: "QLoRA, 4-bit base",
    FOUR_BIT_ALL: "QLoRA, vocabulary and tower too",
}
ADAM_8BIT = "training.optim=adamw_8bit"
PAGED_ADAM = "training.optim=paged_adamw_8bit"
CHUNKED_MLP = "training.mlp_chunk_tokens=256"
# 8-bit Adam, and no second copy of the weights.
FULL_TUNING = ("tuning.method=full", "tuning.bf16_updates=stochastic_rounding", ADAM_8BIT)
GRADIENT_RELEASE = ("training.gradient_release=true", "training.max_grad_norm=0")
SQUARE_448 = 448 * 448  # pixels


@dataclass(frozen=True)
class Configuration:
    """One setting whose memory is measured."""

    name: str
    model: str
    kept: tuple[str, ...] = BF16  # settings of section `model` that are true
    activations: str = "full"
    budget: int = 8192  # most tokens of a pack
    settings: tuple[str, ...] = ()  # further ones of a recipe, section.name=value
    max_pixels: int | None = None  # of an image; None: native
    compiled: bool = False
    cap_gib: float | None = None  # most memory that torch may reserve, to stand for a smaller card
    packs: int = 2  # of a step: gradients of the first are there while the second computes
    steps: int = 3  # optimizer steps; the first one is not measured
    group: GroupSetting | None = None  # reinforcement: `packs` groups in each step; None: supervised training

    @property
    def kind(self) -> str:
        """The workload."""
        return "chart" if self.group is None else "group"

    @property
    def method(self) -> str:
        """What trains, over what."""
        if "tuning.method=full" in self.settings:
            return "full, stochastic rounding, 8-bit Adam"
        return _METHODS[self.kept]

    @property
    def overrides(self) -> tuple[str, ...]:
        """Everything that differs from the recipe of `bench.assembly`."""
        pixels = () if self.max_pixels is None else (f"data.max_pixels={self.max_pixels}",)
        kept = (f"model.{setting}=true" for setting in self.kept)
        return (*kept, *self.settings, *pixels, *self._reinforcement, "training.shuffle=false")

    @property
    def _reinforcement(self) -> tuple[str, ...]:
        if self.group is None:
            return ()
        return (
            f"grpo.num_generations={self.group.generations}",
            "grpo.image_ablation_steps=0",  # the first step would sample twice
            f"rollout.max_completion_length={self.group.completion_tokens}",
            "rewards=[bench.group_prompts:first_token_is_even]",
        )

    @property
    def base(self) -> tuple[object, ...]:
        """Configurations with equal ones can share a model in memory."""
        tuning = tuple(setting for setting in self.settings if setting.startswith("tuning."))
        return (self.model, self.kept, tuning, self.cap_gib)

    def tiny(self, model: str) -> Configuration:
        """The same with a tiny model, to be tried on a CPU."""
        pixels = None if self.max_pixels is None else 192 * 192
        group = None if self.group is None else TINY_GROUP
        return replace(self, model=model, budget=512, compiled=False, cap_gib=None, max_pixels=pixels, steps=2, group=group)


def _every_policy(prefix: str, kept: tuple[str, ...]) -> Iterator[Configuration]:
    """All policies with small packs, then with large ones."""
    for budget in (2048, 8192):
        for policy in POLICIES:
            yield Configuration(f"{prefix}-{policy}-{budget}", "qwen3-vl-8b", kept, policy, budget)


def _least(
    prefix: str, model: str, *, max_pixels: int | None = None, cap_gib: float | None = None, first: int = 1024
) -> tuple[Configuration, ...]:
    """What should take least memory, with more levers each time: layers' inputs in main memory, small packs, 8-bit Adam; then the
    MLP in chunks; then Adam's state paged, and no more samples in a step than one pack holds."""
    plain = Configuration(f"{prefix}-least", model, FOUR_BIT_ALL, "offload", first, (ADAM_8BIT,), max_pixels=max_pixels, cap_gib=cap_gib)
    # A sample of `chart` takes up to about 700 tokens.
    smaller = replace(plain, name=f"{prefix}-least-chunked", budget=768, settings=(ADAM_8BIT, CHUNKED_MLP))
    return plain, smaller, replace(smaller, name=f"{prefix}-least-paged", settings=(PAGED_ADAM, CHUNKED_MLP), packs=1)


def _eight_quantised() -> Iterator[Configuration]:
    yield from _least("8b", "qwen3-vl-8b")
    yield from _every_policy("8b-4bit-all", FOUR_BIT_ALL)
    yield Configuration("8b-4bit-all-compiled", "qwen3-vl-8b", FOUR_BIT_ALL, "full", 4096, (ADAM_8BIT,), compiled=True)
    yield from _every_policy("8b-4bit", FOUR_BIT)
    yield Configuration("8b-4bit-448", "qwen3-vl-8b", FOUR_BIT, "full", 4096, (ADAM_8BIT,), SQUARE_448)
    yield Configuration("8b-8bit-full-8192", "qwen3-vl-8b", EIGHT_BIT, "full", 8192)


def _eight_plain() -> Iterator[Configuration]:
    yield from _every_policy("8b-bf16", BF16)
    yield Configuration("8b-bf16-compiled", "qwen3-vl-8b", BF16, "selective", 8192, compiled=True)
    yield from _every_policy("8b-fp8", FP8)
    yield Configuration("8b-fp8-compiled", "qwen3-vl-8b", FP8, "selective", 8192, compiled=True)


def _eight_full_tuning() -> Iterator[Configuration]:
    for name, policy, further in (
        ("8b-tuned", "full", ()),
        ("8b-tuned-offload", "offload", ()),
        ("8b-tuned-release", "full", GRADIENT_RELEASE),
    ):
        yield Configuration(name, "qwen3-vl-8b", BF16, policy, 4096, (*FULL_TUNING, *further), cap_gib=80)


def _others() -> Iterator[Configuration]:
    yield Configuration("2b-bf16-selective", "qwen3-vl-2b", BF16, "selective", 8192)
    yield Configuration("2b-bf16-448", "qwen3-vl-2b", BF16, "full", 8192, max_pixels=SQUARE_448)


def _groups(prefix: str, model: str, kept: tuple[str, ...], *sizes: int, cap_gib: float | None = None) -> Iterator[Configuration]:
    """Reinforcement, one configuration for each group size. A pack takes a group of 8; larger ones are split over several."""
    for size in sizes:
        settings = () if kept == BF16 else (ADAM_8BIT,)
        groups = 1 if size > 8 else 2
        yield Configuration(
            f"{prefix}-{size}",
            model,
            kept,
            "full",
            4096,
            settings,
            cap_gib=cap_gib,
            packs=groups,
            steps=2,
            group=GroupSetting(generations=size),
        )


# In the order in which they are to be measured.
GROUPS: dict[str, tuple[Configuration, ...]] = {
    "8b-quantised": tuple(_eight_quantised()),
    "4b": (
        *_least("4b-448", "qwen3-vl-4b", max_pixels=SQUARE_448)[:2],
        Configuration("4b-448-full", "qwen3-vl-4b", FOUR_BIT_ALL, "full", 4096, (ADAM_8BIT,), SQUARE_448),
        Configuration("4b-448-4bit", "qwen3-vl-4b", FOUR_BIT, "offload", 1024, (ADAM_8BIT,), SQUARE_448),
        Configuration("4b-bf16", "qwen3-vl-4b", BF16, "selective", 8192),
    ),
    "7b": (
        *_least("2.5-7b", "qwen2.5-vl-7b"),
        Configuration("2.5-7b-full", "qwen2.5-vl-7b", FOUR_BIT_ALL, "full", 4096, (ADAM_8BIT,)),
        Configuration("2.5-7b-bf16", "qwen2.5-vl-7b", BF16, "selective", 8192),
    ),
    "30b-a3b": (
        *_least("30b-a3b", "qwen3-vl-30b-a3b", cap_gib=20)[:2],
        Configuration("30b-a3b-full", "qwen3-vl-30b-a3b", FOUR_BIT_ALL, "full", 4096, (ADAM_8BIT,), cap_gib=20),
        Configuration("30b-a3b-4bit", "qwen3-vl-30b-a3b", FOUR_BIT, "offload", 2048, (ADAM_8BIT,)),
    ),
    "8b-grpo": (
        *_groups("8b-grpo-16gib", "qwen3-vl-8b", FOUR_BIT_ALL, 8, 32, cap_gib=16),
        *_groups("8b-grpo-bf16", "qwen3-vl-8b", BF16, 8),
    ),
    "4b-grpo": (
        *_groups("4b-grpo-bf16", "qwen3-vl-4b", BF16, 8, 4, 32),
        *_groups("4b-grpo-4bit", "qwen3-vl-4b", FOUR_BIT, 8),
    ),
    "8b-tuned": tuple(_eight_full_tuning()),
    "72b": _least("2.5-72b", "qwen2.5-vl-72b"),
    "8b-plain": tuple(_eight_plain()),
    "2b": tuple(_others()),
    "32b": (
        Configuration("32b-4bit", "qwen3-vl-32b", FOUR_BIT_ALL, "full", 4096, (ADAM_8BIT,)),
        Configuration("32b-4bit-offload", "qwen3-vl-32b", FOUR_BIT_ALL, "offload", 8192, (ADAM_8BIT,)),
    ),
    "2.5-32b": (Configuration("2.5-32b-4bit", "qwen2.5-vl-32b", FOUR_BIT_ALL, "full", 4096, (ADAM_8BIT,)),),
}
