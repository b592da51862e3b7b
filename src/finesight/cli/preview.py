"""What `finesight train --dry-run` shows: the whole recipe, how many tokens there are, and a few samples as trained."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.text import Text

from finesight.data.audit import audit
from finesight.data.audit_settings import AuditSettings
from finesight.data.sample import Sample, VisualItem
from finesight.geometry import PatchLayout
from finesight.models.tuning_notes import thinking_warning, tuning_notes
from finesight.recipe import Recipe
from finesight.recipe_files import dump_recipe
from finesight.training.prepare import prepare

TRAINED_STYLE = "bold green"
VISUAL_STYLE = "magenta"
_SAMPLES_SHOWN = 3


def show_dry_run(recipe: Recipe, console: Console) -> None:
    """Does everything that training does before it reads weights, and prints it.

    Raises:
        FinesightError: as :func:`finesight.training.prepare.prepare`.
    """
    prepared = prepare(recipe, console=console)
    recipe = prepared.recipe
    console.rule("recipe")
    console.print(Syntax(dump_recipe(recipe).rstrip(), "yaml", background_color="default", word_wrap=True))
    console.rule("data")
    figures = audit(
        prepared.conversations,
        prepared.samples,
        prepared.bad_rows,
        AuditSettings.of(recipe),
        held_out=prepared.held_out_conversations,
        formats=dict(prepared.formats),
    )
    figures.render(console)
    console.rule("samples")
    processor = prepared.processor
    for place in spread(len(prepared.samples), _SAMPLES_SHOWN):
        console.print(sample_panel(prepared.samples[place], processor.tokenizer, processor.layout))
    trained = Text.assemble(("trained on", TRAINED_STYLE), ", ") if recipe.grpo is None else Text()
    console.print(Text.assemble(trained, ("image or video, columns x rows of visual tokens", VISUAL_STYLE)))
    console.rule("run")
    thinking = thinking_warning(recipe.model.name_or_path, processor.chat_template, prepared.conversations)
    for note in (*prepared.notes, *tuning_notes(recipe.tuning, processor.family), *([thinking] if thinking else [])):
        console.print(f"Note: {note}", markup=False, highlight=False)
    for line in prepared.plan().lines():
        console.print(line, markup=False, highlight=False)


def spread(total: int, count: int) -> list[int]:
    """At most `count` places of `total`, at even distances, the first one included."""
    return [i * total // count for i in range(count)] if total > count else list(range(total))


def sample_panel(sample: Sample, tokenizer: Any, layout: PatchLayout) -> Panel:
    """One sample with its trained tokens coloured."""
    visual = sum(count for item in sample.visual_items for _, count in item.runs)
    trained = int(sample.trained.sum())
    subtitle = f"{len(sample):,} tokens, {visual:,} visual" + (
        f", {trained:,} trained on" if trained else ""
    )  # none of a prompt for rewards
    return Panel(sample_text(sample, tokenizer, layout), title=Text(str(sample.source)), subtitle=subtitle, title_align="left")


def sample_text(sample: Sample, tokenizer: Any, layout: PatchLayout) -> Text:
    """The sample's tokens as text: trained ones coloured, each run of visual tokens as `<image 12x9>` (columns x rows)."""
    runs = sorted(((start, count, item) for item in sample.visual_items for start, count in item.runs), key=lambda run: run[0])
    text, position = Text(), 0
    for start, count, item in runs:
        _append_tokens(text, sample, tokenizer, position, start)
        text.append(_visual_label(item, layout), style=VISUAL_STYLE)
        position = start + count
    _append_tokens(text, sample, tokenizer, position, len(sample))
    return text


def _append_tokens(text: Text, sample: Sample, tokenizer: Any, start: int, stop: int) -> None:
    """Tokens start to stop, divided where training begins or ends."""
    trained = sample.trained
    while start < stop:
        end = start + 1
        while end < stop and trained[end] == trained[start]:
            end += 1
        piece = tokenizer.decode(sample.token_ids[start:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text.append(piece, style=TRAINED_STYLE if trained[start] else None)
        start = end


def _visual_label(item: VisualItem, layout: PatchLayout) -> str:
    """Columns x rows in visual tokens; for a video in one run, times its pairs of frames."""
    size = f"{item.grid.w // layout.merge_size}x{item.grid.h // layout.merge_size}"
    frames = f"x{item.grid.t}" if item.kind == "video" and len(item.runs) == 1 else ""
    return f"<{item.kind} {size}{frames}>"
