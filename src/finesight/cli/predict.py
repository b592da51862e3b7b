"""What `finesight predict` does: images, folders and data files in, one JSON object an answer out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from finesight.cli.flags import in_flags
from finesight.cli.predict_output import check_free, dependencies, opened
from finesight.cli.progress import task_progress
from finesight.data.conversation import Conversation, MediaRef, Part, RowSource, Turn
from finesight.data.encode import Encoder
from finesight.data.formats import accept, read_source
from finesight.data.media_policy import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from finesight.data.pixels import visual_patches
from finesight.data.tables import FILE_SUFFIXES
from finesight.data_settings import DataSettings, SourceSettings
from finesight.errors import BadRow, DataError, FinesightError, RecipeError
from finesight.evaluation.results import media_label, prompt_text
from finesight.models.adapter_metadata import read_metadata, restore_data_settings
from finesight.models.load import LoadedModel, load_model
from finesight.recipe import ModelSettings
from finesight.sampling.engine import stop_ids
from finesight.sampling.forking_sampler import ForkingSampler
from finesight.sampling.grammar import GrammarCompiler, check_schema, read_schema
from finesight.sampling.types import Completion, SamplingSettings

_BATCHES_PER_CHUNK = 16  # answers are written after so many batches, so that little is lost when the run is stopped


def read_inputs(
    paths: Sequence[str], question: str | None, *, data: DataSettings, source: SourceSettings, console: Console
) -> list[Conversation]:
    """One conversation for each image, video or row.

    Args:
        question: asked about each image or video; rows of data files ask their own.
        source: how data files are read (its path is replaced), and the system prompt where a row has none.
        console: for notes.

    Raises:
        DataError: an input is an address or cannot be read, or rows cannot be used and `data.on_bad_row` is stop.
        RecipeError: images without a question.
    """
    conversations: list[Conversation] = []
    for path in paths:
        if re.match(r"https?://", path, re.IGNORECASE):
            raise DataError(
                f"{path} is an address, which is no input. Download it, or name it in a row of a data file and add --allow-urls."
            )
        media = _media_files(Path(path))
        if media:
            if question is None:
                raise RecipeError(f"{path} is an image, a video or a folder of them: say with --question what to ask about it.")
            conversations += [_about(file, number, path, question, source.system) for number, file in enumerate(media)]
            continue
        result = read_source(source.model_copy(update={"path": path}), data=data, base_dir=Path.cwd(), require_answer=False)
        for note in result.notes:
            console.print(f"Note: {note}", markup=False, highlight=False)
        conversations += accept(result, data.on_bad_row, say=lambda text: console.print(in_flags(text), markup=False, highlight=False))
    return conversations


def _media_files(path: Path) -> list[Path]:
    """The image or video itself, or those of a folder without data files in the natural order of their names; empty for data."""
    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    if path.is_dir():
        names = sorted(path.iterdir(), key=lambda name: _natural(name.name))
        if any(name.suffix.lower() in FILE_SUFFIXES for name in names):
            return []
        return [name for name in names if name.suffix.lower() in known]
    if path.suffix.lower() not in known:
        return []
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give images, videos, folders of them, or data files.")
    return [path]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `10.png` after `9.png`."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _about(file: Path, number: int, given: str, question: str, system: str | None) -> Conversation:
    kind: Any = "video" if file.suffix.lower() in VIDEO_SUFFIXES else "image"
    turns = [Turn("user", (Part(kind, media=MediaRef(path=str(file.resolve()))), Part("text", text=question)))]
    if system:
        turns.insert(0, Turn("system", (Part("text", text=system),)))
    return Conversation(tuple(turns), RowSource(given, number))


def answer_all(
    loaded: LoadedModel,
    conversations: Sequence[Conversation],
    settings: SamplingSettings,
    *,
    image_first: bool,
    first: int = 0,
    schema: Mapping[str, Any] | None = None,
    on_bad: Callable[[BadRow], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Records of the answers, in the order of the conversations, chunk by chunk.

    Images are decoded once before their chunk is answered, so that a damaged one costs no other its answer. An answer depends on
    its conversation's place among all of them, not on which others are answered in this call.

    Args:
        first: conversation to begin with; those before it are answered already.
        schema: JSON schema that answers follow.
        on_bad: told each row that cannot be encoded or decoded, which is left out; None: such a row is an error, once
            the rows before it are answered.

    Raises:
        DataError: a row cannot be used, and there is no `on_bad`.
        GrammarError: the schema cannot be used.
        ModelError: from answering.
    """
    encoder = Encoder(loaded.processor, image_first=image_first)
    grammar = None
    if schema is not None:
        vocabulary = loaded.base.config.text_config.vocab_size
        grammar = GrammarCompiler(loaded.processor.tokenizer, vocabulary, stop_ids(loaded.processor)).compile(schema)
    sampler = ForkingSampler(loaded.model, loaded.processor, image_first=image_first, grammar=grammar)
    chunk = settings.batch_size * _BATCHES_PER_CHUNK
    for start in range(first, len(conversations), chunk):
        part, bad = _usable(conversations[start : start + chunk], encoder, loaded, on_bad)
        report = None if on_progress is None else _shifted(on_progress, start, len(conversations))
        prompts, places = [c.prompt() for _, c in part], [start + place for place, _ in part]
        completions = sampler.generate(prompts, settings, report, places=places) if part else []
        yield from (prediction(c, completion) for (_, c), completion in zip(part, completions, strict=True))
        if bad is not None:
            raise DataError(f"{bad}. Correct it, or set data.on_bad_row: skip to go on without it.", [bad])


def _usable(
    conversations: Sequence[Conversation], encoder: Encoder, loaded: LoadedModel, on_bad: Callable[[BadRow], None] | None
) -> tuple[list[tuple[int, Conversation]], BadRow | None]:
    """Those that can be encoded and decoded, with their places; without `on_bad` those before the first that cannot, and that one."""
    good: list[tuple[int, Conversation]] = []
    for place, conversation in enumerate(conversations):
        try:
            for item in encoder.encode_prompt(conversation.prompt()).visual_items:
                visual_patches(item, loaded.processor)
        except FinesightError as error:
            where = conversation.source
            bad = BadRow(where.file, where.row, str(error).removeprefix(f"{where}: ").rstrip("."))
            if on_bad is None:
                return good, bad
            on_bad(bad)
        else:
            good.append((place, conversation))
    return good, None


def _shifted(on_progress: Callable[[int, int], None], start: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: on_progress(start + done, total)


def prediction(conversation: Conversation, completion: Completion) -> dict[str, Any]:
    """One answer as it is written: where it comes from, what was asked, what was answered."""
    record: dict[str, Any] = {
        "file": conversation.source.file,
        "row": conversation.source.row,
        "images": [media_label(part) for part in conversation.media],
        "question": prompt_text(conversation),
        "answer": completion.text,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.token_ids),
    }
    if conversation.turns[-1].role == "assistant":
        record["expected"] = conversation.answer
    return record


def predict_to(
    output: Path | None,
    model: ModelSettings,
    paths: Sequence[str],
    question: str | None,
    settings: SamplingSettings,
    *,
    data: DataSettings,
    source: SourceSettings,
    schema: Path | None = None,
    overwrite: bool = False,
    console: Console,
) -> int:
    """Answers everything, one JSON object a line; returns how many answers there are.

    Args:
        output: file to write, which appears (or with `overwrite` is replaced) once all is answered; None: stdout. What a run that was stopped has
            answered is not answered again.
        data: what goes before the pixel limits and frame sampling that an adapter was trained with.
        source: how data files are read, and the system prompt that goes before the adapter's.
        schema: file with a JSON schema that answers follow.
        console: for progress and notes.

    Raises:
        DataError, GrammarError, ModelError, RecipeError: from reading, loading and answering.
    """
    trained = read_metadata(model.adapter or model.name_or_path)
    image_first = data.image_first
    if trained is not None:
        image_first = trained.image_first
        source = source if source.system else source.model_copy(update={"system": trained.system})
    form = None if schema is None else _schema(schema)
    conversations = read_inputs(paths, question, data=data, source=source, console=console)
    if not overwrite:
        check_free(output, conversations)
    console.print(f"Loading {model.name_or_path}{f' with {model.adapter}' if model.adapter else ''}", markup=False, highlight=False)
    loaded = load_model(model, data=data)
    seen = data if trained is None else restore_data_settings(model.adapter or model.name_or_path, data)[0]
    cut = 0
    with (
        opened(output, dependencies(model, settings, seen, form, conversations), conversations, console) as (out, earlier),
        task_progress(console) as report,
    ):
        written, left_out = earlier.answers, list(earlier.left_out)
        answers = answer_all(
            loaded,
            conversations,
            settings,
            image_first=image_first,
            first=earlier.next_index,
            schema=form,
            on_bad=left_out.append if data.on_bad_row == "skip" else None,
            on_progress=lambda done, total: report("answers", done, total),
        )
        for record in answers:
            out(json.dumps(record, ensure_ascii=False) + "\n")
            written += 1
            cut += form is not None and record["finish_reason"] == "length"
        if left_out and not written:
            raise DataError("None of the rows can be used:\n" + "\n".join(f"  {row}" for row in left_out), left_out)
    if left_out:
        listing = in_flags("\n".join(f"  {row}" for row in left_out))
        console.print(f"Left out {len(left_out)} of {len(conversations)} rows:\n{listing}", markup=False, highlight=False, soft_wrap=True)
    if cut:
        text = f"{cut} answers were cut off at {settings.max_completion_length} tokens and do not follow the schema; raise --max-completion-length."
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return written


def _schema(path: Path) -> dict[str, Any]:
    try:
        schema = read_schema(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The schema {path} cannot be read: {error}.") from None
    check_schema(schema)
    return schema
