"""What a plan needs to know of the data: how large packs are, in integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from finesight.errors import RecipeError
from finesight.planner.shapes import ModelShape
from finesight.recipe import Recipe
from finesight.wording import counted

# Of a sample where there is no data to look at.
PROMPT_TEXT_TOKENS, ANSWER_TOKENS = 48, 16


@dataclass(frozen=True)
class PackSizes:
    """One packed forward and backward pass."""

    tokens: int  # computed by the language model, filling included
    targets: int  # records: rows that reach the vocabulary matrix
    patches: tuple[int, ...] = ()  # of each distinct image or video, before merging; kept features left out
    segments: int = 1
    gathered_keys: int = 0  # keys of all segments, ancestors' included, where segments branch; 0: none branch
    key_pairs: int = 0  # pairs of a token and one that it attends to; 0: not known, taken from tokens and segments
    samples: int = 1

    @property
    def total_patches(self) -> int:
        return sum(self.patches)

    def visual_tokens(self, model: ModelShape) -> int:
        return self.total_patches // model.vision.merge_size**2

    @property
    def attended(self) -> float:
        """Key pairs, estimated from the segments' mean length where they are not known."""
        return self.key_pairs or self.tokens * (self.tokens / max(self.segments, 1) + 1) / 2


@dataclass(frozen=True)
class RolloutSizes:
    """Answers sampled for reinforcement: `groups` prompts at a time, each with `completions` answers."""

    groups: int
    completions: int  # of one prompt
    prompt_tokens: int
    completion_tokens: int
    prompt_patches: int = 0  # of one prompt's images

    def __post_init__(self) -> None:
        if min(self.groups, self.completions, self.prompt_tokens, self.completion_tokens) < 1:
            raise RecipeError(f"A rollout needs at least one prompt, completion and token of each; {self} has none of some.")


@dataclass(frozen=True)
class RunSizes:
    """The packs that a run will compute, or an even choice of them.

    Attributes:
        steps: the packs of each optimizer step, of one process.
        source: what they were taken from, for people.
        rollout: answers that are sampled between updates.
        note: what in them is not as it was asked for.
    """

    steps: tuple[tuple[PackSizes, ...], ...]
    source: str = ""
    rollout: RolloutSizes | None = None
    note: str = ""

    @property
    def packs(self) -> tuple[PackSizes, ...]:
        return tuple(pack for step in self.steps for pack in step)

    @property
    def most_packs(self) -> int:
        """Of one step."""
        return max(len(step) for step in self.steps)


def visual_tokens_of(model: ModelShape, pixels: int) -> int:
    """Of an image of so many pixels, whose sides are whole visual tokens already; at least one."""
    return max(1, pixels // (model.vision.patch_size * model.vision.merge_size) ** 2)


def filled_pack(
    model: ModelShape,
    tokens: int,
    pixels: int,
    *,
    text_tokens: int = PROMPT_TEXT_TOKENS + ANSWER_TOKENS,
    answer_tokens: int = ANSWER_TOKENS,
) -> PackSizes:
    """A pack of so many tokens, filled with images of `pixels` pixels and short texts: where there is no data to look at.

    Args:
        pixels: of one image after resizing; rounded down to whole visual tokens, at least one.
        text_tokens: of a sample beside its image, the answer included.
        answer_tokens: supervised ones among them.
    """
    merge = model.vision.merge_size
    visual = visual_tokens_of(model, pixels)
    length = visual + text_tokens
    samples = max(1, tokens // length)
    return PackSizes(
        tokens=max(tokens, length),
        targets=samples * answer_tokens,
        patches=(visual * merge**2,) * samples,
        segments=samples,
        key_pairs=samples * length * (length + 1) // 2,
        samples=samples,
    )


def sampled_with(rollout: RolloutSizes | None, recipe: Recipe) -> RolloutSizes | None:
    """The same completions, no more of them at once than `rollout.batch_size` of the recipe allows (whole groups)."""
    if rollout is None or recipe.rollout is None:
        return None
    return replace(rollout, groups=min(rollout.groups, -(-recipe.rollout.batch_size // rollout.completions)))


def filled_run(model: ModelShape, token_budget: int, pixels: int, samples_per_step: int) -> RunSizes:
    """Steps of filled packs, as many as `samples_per_step` samples need."""
    pack = filled_pack(model, token_budget, pixels)
    count = -(-samples_per_step // pack.samples)
    side = round(pixels**0.5)
    return RunSizes(
        ((pack,) * count,),
        source=f"no data: packs of {pack.tokens:,} tokens, filled with images of about {side} × {side} pixels",
        note=note_of_larger_packs(token_budget, pack.tokens, "one image with its text"),
    )


def note_of_larger_packs(token_budget: int, tokens: int, least: str) -> str:
    """Of packs that could not be kept to their budget; empty where they were.

    Args:
        tokens: of the largest pack.
        least: what every pack must hold.
    """
    if tokens <= token_budget:
        return ""
    return f"{counted(token_budget, 'token')} a pack are less than {least}; packs of {tokens:,} are planned"


def largest(packs: Sequence[PackSizes]) -> PackSizes:
    """A pack with the most of everything: none of them needs more memory."""
    widest = max(packs, key=lambda pack: pack.total_patches)
    return PackSizes(
        tokens=max(pack.tokens for pack in packs),
        targets=max(pack.targets for pack in packs),
        patches=widest.patches,
        segments=max(pack.segments for pack in packs),
        gathered_keys=max(pack.gathered_keys for pack in packs),
        samples=max(pack.samples for pack in packs),
    )
