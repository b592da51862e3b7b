"""Shows a dataset's figures on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.markup import escape
from rich.table import Table

from finesight.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

    from finesight.data.audit import CostFigures, DatasetAudit, Distribution, DuplicateGroup, MediaFigures, TokenFigures
    from finesight.data.audit_settings import GroupRun
    from finesight.data.conversation import RowSource
    from finesight.data.group_cost import GroupCostFigures

T = TypeVar("T")

_LISTED = 8  # entries of a list that are shown; all of them are in the JSON
_BAR_WIDTH = 32


def show(audit: DatasetAudit, console: Console) -> None:
    """Prints all figures: what the data are, what is wrong, what training will cost."""
    rows = audit.rows
    console.print(
        f"[bold]{rows.usable:,} of {rows.rows:,} rows can be used[/bold]"
        + (f", {audit.held_out:,} are held out besides" if audit.held_out else "")
    )
    for file, format_ in rows.formats.items():
        console.print(f"  {escape(file)}: read as {format_}")
    _show_content(audit, console)
    if audit.tokens is not None:
        _show_tokens(audit.tokens, console, supervised=audit.settings.supervised)
    if audit.cost is not None:
        _show_cost(audit.cost, console)
    if audit.group_cost is not None and audit.settings.groups is not None:
        _show_group_cost(audit.group_cost, audit.settings.groups, console)
    _show_problems(audit, console)


def _show_content(audit: DatasetAudit, console: Console) -> None:
    rows = audit.rows
    roles = ", ".join(f"{count:,} {role}" for role, count in rows.roles.items())
    console.print(f"  turns: {roles or 'none'} ({_spread(rows.turns)} a row)")
    for count, what in (
        (rows.text_only, "text only"),
        (rows.prompt_only, "without an answer"),
        (rows.zero_weight, "of weight 0 (not trained on)"),
    ):
        if count:
            console.print(f"  {counted(count, 'row')} {what}")
    if audit.images.count or audit.videos.count:
        table = _table("", "all", "distinct", "width", "height", "rows of one", "rows that share one", "frames")
        for name, media in (("images", audit.images), ("videos", audit.videos)):
            if media.count:
                table.add_row(name, *_media_cells(media))
        console.print(table)
    answers = audit.answers
    if answers.characters.count:
        console.print(f"  answers: {_spread(answers.characters)} characters")
    if answers.common:
        console.print("  most frequent: " + ", ".join(f"{escape(_short(text, 30))!s} ({count:,}×)" for text, count in answers.common))


def _media_cells(media: MediaFigures) -> list[str]:
    cells = [
        f"{media.count:,}",
        f"{media.distinct:,}",
        _spread(media.width),
        _spread(media.height),
        _spread(media.rows_of_one),
        f"{media.rows_sharing:,}",
    ]
    return [*cells, _spread(media.frames) if media.frames.count else "–"]


def _show_tokens(tokens: TokenFigures, console: Console, *, supervised: bool) -> None:
    table = _table("tokens of a sample" if supervised else "tokens of a prompt", "min", "median", "95%", "max", "all")
    rows = [
        ("all", tokens.tokens),
        ("text", tokens.text),
        ("visual", tokens.visual),
        *([("trained", tokens.trained)] if supervised else []),
    ]
    for name, figures in rows:
        table.add_row(name, *(f"{value:,.0f}" for value in (figures.min, figures.median, figures.p95, figures.max, figures.total)))
    console.print(table)
    largest = max((count for _, count in tokens.histogram), default=1)
    for bound, count in tokens.histogram:
        bar = "█" * max(1 if count else 0, round(_BAR_WIDTH * count / largest))
        console.print(f"  up to {bound:>7,}  {bar:<{_BAR_WIDTH}} {count:,}")


def _show_cost(cost: CostFigures, console: Console) -> None:
    measured = "" if cost.steps == cost.steps_per_epoch else f", from {cost.steps:,} of them"
    console.print(f"[bold]One epoch[/bold]: {counted(cost.steps_per_epoch, 'step')}{measured}")
    table = _table("tokens computed", "tokens", "")
    table.add_row("padded batches", f"{cost.padded_tokens:,}", f"{cost.padding:.0%} of it padding")
    table.add_row("packed", f"{cost.tokens:,}", "no padding")
    table.add_row(
        "packed and shared",
        f"{cost.shared_tokens:,}",
        f"{cost.saved_by_sharing:.0%} saved by sharing; {cost.times_fewer:.1f}× fewer than padded",
    )
    console.print(table)


def _show_group_cost(cost: GroupCostFigures, run: GroupRun, console: Console) -> None:
    sizes = run.sizes
    sampled = "" if cost.rollouts == cost.steps else f", {counted(cost.rollouts, 'rollout')}"
    console.print(f"[bold]The run[/bold]: {counted(cost.steps, 'step')} ({cost.steps_per_epoch:,} an epoch){sampled}")
    table = _table("", "a step", "the run")
    table.add_row("prompts", f"{cost.prompts_per_step:,}", f"{cost.prompts:,}")
    table.add_row(f"completions ({sizes.num_generations} of a prompt)", f"{cost.completions_per_step:,}", f"{cost.completions:,}")
    if cost.updated_completions != cost.completions:
        table.add_row("completions trained on, over all passes", f"{cost.completions_per_step:,}", f"{cost.updated_completions:,}")
    means = [("images and videos of prompts", cost.images_per_step), ("tokens of prompts", cost.prompt_tokens_per_step)]
    if cost.images_per_step:
        means.append(("  of which visual", cost.visual_tokens_per_step))
    for name, of_step in means:
        table.add_row(name, f"{of_step:,.0f}", f"{of_step / cost.prompts_per_step * cost.prompts:,.0f}")
    table.add_row(
        f"tokens of completions, at most ({sizes.completion_tokens:,} each)",
        f"{cost.most_completion_tokens_per_step:,}",
        f"{cost.most_completion_tokens:,}",
    )
    for name, tokens in (
        ("tokens of updates, at most (a prompt once for its group)", cost.most_update_tokens_per_step),
        ("  if each completion had a prompt of its own", cost.most_unshared_tokens_per_step),
    ):
        table.add_row(name, f"{tokens:,.0f}", f"{tokens / cost.completions_per_step * cost.updated_completions:,.0f}")
    console.print(table)
    for count, what in (
        (cost.most_resampled_completions, "in place of groups that all earn the same (grpo.max_resampling_rounds)"),
        (cost.most_ablated_completions, "with the images blanked (grpo.image_ablation_steps)"),
    ):
        if count:
            console.print(f"  and at most {counted(count, 'completion')} more {what}")


def _show_problems(audit: DatasetAudit, console: Console) -> None:
    for group in audit.rows.bad:
        _listing(console, "red", f"{_count(group.rows, 'bad row')}: {group.reason}", group.rows, lambda bad: f"{bad.file}, row {bad.row}")
    if audit.tokens is not None:
        title = (
            f"{_count(audit.tokens.too_long, 'sample')} longer than {audit.tokens.longest_allowed:,} tokens "
            "(raise training.token_budget, and data.max_length_tokens where it is set; lower data.max_pixels; "
            "or set data.too_long: shrink_pixels)"
        )
        longest = sorted(audit.tokens.too_long, key=lambda sample: -sample.tokens)
        _listing(console, "red", title, longest, lambda sample: f"{sample.source}: {sample.tokens:,} tokens")
    _listing(console, "red", f"{_count(audit.leaks, 'image')} in training and held-out rows alike", audit.leaks, lambda leak: (
        f"{leak.media}: {_rows(leak.train)}; held out: {_rows(leak.held_out)}"
    ))  # fmt: skip
    contradictions = f"{_count(audit.contradictions, 'question')} with different answers for the same images"
    _listing(console, "yellow", contradictions, audit.contradictions, lambda group: (
        f"{_short(group.question)!r} -> {' | '.join(_short(a, 30) for a in group.answers)} ({_rows(group.rows)})"
    ))  # fmt: skip
    _listing(
        console,
        "yellow",
        f"{_count(audit.repeated, 'question')} more than once in the data, with the same answer",
        audit.repeated,
        _repeated,
    )
    _listing(console, "yellow", f"{_count(audit.shrunk, 'image')} shrunk to less than half the side; small print may be lost (raise data.max_pixels)", audit.shrunk, lambda s: (
        f"{s.media}: {s.size[0]} × {s.size[1]} -> {s.resized[0]} × {s.resized[1]}"
    ))  # fmt: skip
    _listing(console, "yellow", _count(audit.answers.empty, "empty answer"), audit.answers.empty, str)
    if audit.answers.very_short and audit.settings.supervised:
        console.print(
            f"[dim]{_count(audit.answers.very_short, 'answer')} of a single character, for example {escape(str(audit.answers.very_short[0]))}[/dim]"
        )
    if not audit.can_train:
        console.print(f"[red]Training would stop at these data: {_obstacles(audit)}.[/red]")


def _obstacles(audit: DatasetAudit) -> str:
    """What stands in the way of training, in words: colours do not reach a file or a pipe."""
    found = []
    if audit.tokens is not None and audit.tokens.too_long:
        found.append("samples are too long")
    if audit.rows.bad and audit.settings.on_bad_row == "stop":
        found.append("rows are bad (correct them, or set data.on_bad_row: skip)")
    if not audit.rows.usable:
        found.append("no row can be used")
    return "; ".join(found)


def _count(entries: Sequence[object], what: str) -> str:
    return counted(len(entries), what)


def _repeated(group: DuplicateGroup) -> str:
    return f"{_short(group.question)!r} ({_rows(group.rows)})"


def _listing(console: Console, style: str, title: str, entries: Sequence[T], text: Callable[[T], str]) -> None:
    if not entries:
        return
    console.print(f"[{style}]{escape(title)}[/{style}]")
    for entry in entries[:_LISTED]:
        console.print(f"  {escape(text(entry))}")
    if len(entries) > _LISTED:
        console.print(f"  … and {len(entries) - _LISTED:,} more")


def _table(*headers: str) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=True)
    for place, header in enumerate(headers):
        table.add_column(header, justify="right" if place else "left")
    return table


def _spread(figures: Distribution) -> str:
    """One number where all are equal, else from the smallest over the median to the largest."""
    if figures.min == figures.max:
        return f"{figures.min:,.0f}"
    return f"{figures.min:,.0f} – {figures.median:,.0f} – {figures.max:,.0f}"


def _rows(sources: Sequence[RowSource]) -> str:
    shown = "; ".join(str(source) for source in sources[:3])
    return shown + (f"; … {len(sources) - 3} more" if len(sources) > 3 else "")


def _short(text: str, length: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
