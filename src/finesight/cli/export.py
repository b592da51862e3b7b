"""What `finesight export` does: finds what was trained, hands it over, says what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from rich.console import Console

from finesight.cli.progress import task_progress
from finesight.cli.weights import model_settings, require_weights, run_folder
from finesight.data.conversation import Conversation
from finesight.data.formats import read_source
from finesight.data.tables import open_table
from finesight.errors import ExportError, FinesightError
from finesight.export.card import README, base_licence, model_card, read_run_facts
from finesight.export.companions import local_checkpoint
from finesight.export.export import Export, ExportSettings, Kind, check_output, export
from finesight.export.gguf import convert, find_converter
from finesight.export.hub import check_repo, upload
from finesight.export.merge import Merged
from finesight.export.verify import drawn_prompts
from finesight.recipe import Recipe
from finesight.recipe_files import RECIPE_FILE, load_recipe
from finesight.wording import counted

Target = Literal["adapter", "merged", "merged-4bit", "gguf", "hub"]
MERGED = "merged"  # the folder, in that of a GGUF export, which the converter reads
_ROWS_LOOKED_AT = 32


@dataclass(frozen=True)
class Handover:
    """What is needed for some targets only."""

    llama_cpp: Path | None = None  # gguf: llama.cpp's folder, or its converter
    repo: str | None = None  # hub: user/name
    content: Kind = "adapter"  # hub: what is uploaded
    public: bool = False
    licence: str | None = None  # None: that of the base's card


def export_to(
    given: Path,
    target: Target,
    output: Path,
    settings: ExportSettings,
    handover: Handover,
    *,
    model: str | None = None,
    prompts: int = 3,
    drawn: bool = False,
    device: str | None = None,
    console: Console,
) -> Path:
    """Exports what a folder holds; returns where it is.

    Args:
        given: folder of a run, an adapter or a fully tuned model.
        settings: `to` is replaced by what the target needs.
        model: the base; None: the one that the adapter names.
        prompts: how many rows, or drawn images, the verification asks about.
        drawn: ask about drawn images also where the run's data is there.

    Raises:
        ExportError: from :func:`finesight.export.export.export`, the converter or the upload; what is missing is said before work begins.
        ModelError: nothing was trained there.
    """
    weights = require_weights(given)
    run = run_folder(given if weights == given else weights)
    kind: Kind = handover.content if target == "hub" else "merged" if target == "gguf" else target
    _check_target(target, output, handover)
    asked = [] if drawn else rows_of_run(run, weights, prompts, console)
    base = model_settings(model, weights, unquantized=True)  # export brings it to what the adapter knew by itself
    folder = output / MERGED if target == "gguf" else output
    output.parent.mkdir(parents=True, exist_ok=True)
    if target == "gguf":
        output.mkdir(exist_ok=True)
    with task_progress(console) as report:
        done = export(
            base,
            folder,
            replace(settings, to=kind),
            prompts=asked or drawn_prompts(prompts),
            device=device,
            on_progress=lambda at, of: report("tensors", at, of),
        )
    asked_about = f"{counted(len(asked), 'row')} of the run's data" if asked else "drawn images"
    for line in report_lines(done, asked_about):
        _say(console, line)
    if target == "gguf":
        convert(folder, output, run.absolute().name, settings.dtype, handover.llama_cpp, lambda text: _say(console, text))
    if target == "hub" and handover.repo is not None:
        licence = handover.licence or base_licence(local_checkpoint(base))
        name = base.name_or_path if done.metadata is None else done.metadata.base
        card = model_card(handover.repo.rpartition("/")[2], done, name, read_run_facts(run, weights), licence)
        (folder / README).write_text(card, encoding="utf-8")
        _say(console, f"Uploaded: {upload(folder, handover.repo, private=not handover.public)}")
    return folder


def _check_target(target: Target, output: Path, handover: Handover) -> None:
    """What is missing for a target, or in its way, is said before work begins."""
    if target == "hub":
        if handover.repo is None:
            raise ExportError("--to hub needs --repo USER/NAME.")
        check_repo(handover.repo)
    if target == "gguf":
        find_converter(handover.llama_cpp)
    check_output(output)


def rows_of_run(run: Path, weights: Path, count: int, console: Console) -> list[Conversation]:
    """The first rows with images of the data that a run was trained on; empty, with a note, where it is not here."""
    recipe = next((path for path in (run / RECIPE_FILE, weights / RECIPE_FILE) if path.is_file()), None)
    if recipe is None:
        return []
    try:
        found = _first_rows(load_recipe(recipe), count)
    except (FinesightError, OSError) as error:
        _say(console, f"Note: the run's data cannot be read from here ({str(error).splitlines()[0]}).")
        return []
    if not found:
        _say(console, "Note: none of the first rows of the run's data has an image.")
    return found


def _first_rows(recipe: Recipe, count: int) -> list[Conversation]:
    found: list[Conversation] = []
    for source in recipe.data.train:
        here = Path.cwd()
        if Path(source.path).is_dir():  # its description may name several files
            result = read_source(source, data=recipe.data, base_dir=here, require_answer=False)
        else:
            table = open_table(source.path, base_dir=here, hub=source.hub, split=source.split, name=source.name)
            table = replace(table, rows=islice(table.rows, _ROWS_LOOKED_AT))
            result = read_source(source, data=recipe.data, base_dir=here, require_answer=False, table=table)  # prompts alone will do
        found += [conversation for conversation in result.conversations if conversation.media]
        if len(found) >= count:
            break
    return found[:count]


def report_lines(done: Export, asked_about: str) -> Sequence[str]:
    """What a user should know of an export, `asked_about` being what the models were asked about."""
    lines = [f"Verified on {asked_about}: {done.agreement}."]
    if done.merged is not None:
        files = f"{done.merged.num_shards} file{'s' if done.merged.num_shards > 1 else ''}"
        lines.insert(0, f"Written: {done.merged.num_bytes / 2**30:.3g} GiB in {files}.")
        if done.merged.updates:
            lines.append(_rounding(done.merged, done.to))
            if done.merged.survived < 0.9 and done.to == "merged":
                lines.append("The update is small against the grid of the weights: use --rounding stochastic, or --dtype float32.")
    return [*lines, *(f"Note: {note}" for note in done.notes)]


def _rounding(merged: Merged, to: Kind) -> str:
    """What rounding left of the adapter's update. To 4 bits it is far larger than the update, of whose share nothing can be said then."""
    if to == "merged-4bit":
        return (
            f"Rounding to 4 bits changes the weights {merged.strayed:,.1f} times as much as the adapter does: measure the export as well."
        )
    return (
        f"Of the adapter's update {100 * merged.survived:.1f}% arrived; rounding added {100 * merged.strayed:.1f}% of its size beside it."
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
