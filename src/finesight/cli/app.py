"""The commands. Each reads its arguments, calls the library, prints; what it needs is imported inside it."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from finesight.allocator import use_expandable_segments
from finesight.cli.options import (
    AdapterOption,
    DtypeOption,
    EightBitOption,
    Float8Option,
    FourBitOption,
    MaxPixelsOption,
    MinPixelsOption,
    ModelOption,
    QuantizeTowerOption,
    QuantizeVocabularyOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    TopPOption,
    given,
)
from finesight.cli.runs import runs
from finesight.errors import FinesightError

app = typer.Typer(
    name="finesight",
    help="Fine-tune Qwen vision-language models: from a data file to a measurably better model.",
    epilog="Start with `finesight init`. FINESIGHT_DEBUG=1 shows the traceback of an error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.NAME=VALUE]…", help="Settings that go before those of the recipe.", show_default=False),
]
_RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Exits with 0 when done, 1 when a check found something, 2 on any error, 130 when interrupted."""
    debug = os.environ.get("FINESIGHT_DEBUG", "") not in ("", "0")
    _quiet_libraries(debug)
    use_expandable_segments()
    errors = Console(stderr=True)
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="finesight")
    except FinesightError as error:
        if debug:
            raise
        errors.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("[yellow]Interrupted.[/]")
        sys.exit(130)


def _quiet_libraries(debug: bool) -> None:
    """Warnings of Finesight go to stderr; the chatter of libraries only when debugging."""
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=debug, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("finesight").setLevel(logging.DEBUG if debug else logging.INFO)
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def _in_flags() -> Iterator[None]:
    """Messages of errors in the options of the command, in place of the settings of a recipe."""
    try:
        yield
    except FinesightError as error:
        from finesight.cli.predict import in_flags

        error.args = (in_flags(str(error)),)
        raise


@app.command()
def init(
    model: Annotated[str, typer.Option(help="Checkpoint: a folder, or a name on the hub.")] = "Qwen/Qwen3-VL-8B-Instruct",
    data: Annotated[str, typer.Option(help="File, folder or hub name with the rows to train on.")] = "data/train.jsonl",
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe to write; never overwritten.")] = Path("recipe.yaml"),
    output_dir: Annotated[str, typer.Option(help="Folder of the run.")] = "runs/first",
    method: Annotated[Literal["lora", "full"], typer.Option(help="An adapter, or the weights themselves.")] = "lora",
    eval_split: Annotated[str, typer.Option(help="Hold-out: '5%', 'last 4', a file, or 'none'.")] = "5%",
    grader: Annotated[str, typer.Option(help="How held-out answers are graded (`finesight eval --graders`).")] = "exact_match",
    column: Annotated[
        list[str] | None, typer.Option(help="For a table: role=name, e.g. --column image=image --column answer=label.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="For a table: template of the question, {column} is replaced.")] = None,
    media_dir: Annotated[str | None, typer.Option(help="Second folder that image paths are resolved against.")] = None,
) -> None:
    """Write a commented recipe with every setting in it."""
    from finesight.cli.init import chosen_settings, commented_recipe, write_new

    source = {"path": data, "columns": column, "prompt": prompt, "media_dir": media_dir}
    chosen = chosen_settings(model=model, source=source, output_dir=output_dir, method=method, eval_split=eval_split, grader=grader)
    write_new(output, commented_recipe(chosen, name=str(output)))
    Console().print(f"Wrote {output}. Next: finesight check {output}", highlight=False, soft_wrap=True)


@app.command()
def check(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE_OR_DATA", help="A recipe, or a data file, folder or hub name.", show_default=False)
    ],
    overrides: _OverridesArgument = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint whose tokens are counted; goes before the recipe's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead.")] = False,
) -> None:
    """Look through the data: what it holds, what is wrong with it, what training on it costs.

    Every row is read and encoded as training would. Exits with 1 when rows cannot be used.
    """
    from finesight.cli.check import check_recipe, target_recipe

    recipe, with_model = target_recipe(target, model, overrides or ())
    result = check_recipe(recipe, with_model=with_model, console=Console(stderr=True))
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2, ensure_ascii=False, default=str))
    else:
        result.render(Console())
    if result.rows.bad or not result.can_train:
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: _RecipeArgument,
    overrides: _OverridesArgument = None,
    gpu: Annotated[str | None, typer.Option(help="Memory to fit, such as 16GiB.", show_default=False)] = None,
    gpu_name: Annotated[str | None, typer.Option(help="Card to fit, such as 'RTX 4090'.", show_default=False)] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that train together; the plan is that of each.")] = 1,
    search: Annotated[bool, typer.Option("--fit", help="Search for the fastest settings that fit.")] = False,
    write: Annotated[Path | None, typer.Option(help="With --fit: recipe to write; never overwritten.", show_default=False)] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the largest pack, without reading data.", show_default=False)] = None,
    pixels: Annotated[int | None, typer.Option(min=1024, help="Pixels of each image, without reading data.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead.")] = False,
) -> None:
    """Plan the GPU memory of a run before anything is loaded; no GPU is needed.

    Exits with 1 when the run does not fit the GPU that is named.
    """
    from finesight.cli.plan import Target, plan_recipe, write_fitted
    from finesight.planner.text import heading, show, to_dict, verdict
    from finesight.recipe_files import load_recipe

    if write is not None and not search:
        raise typer.BadParameter("goes with --fit", param_hint="--write")
    console = Console()
    outcome = plan_recipe(
        load_recipe(recipe, overrides or ()),
        Target.of(gpu, gpu_name),
        tokens=tokens,
        pixels=pixels,
        search=search,
        gpus=gpus,
        console=Console(stderr=True),
    )
    available, fitted = outcome.target.available_bytes, outcome.fitted
    if write is not None and fitted is not None:
        write_fitted(write, fitted, recipe.name)
    if as_json:
        content = to_dict(outcome.plan, available, outcome.changes)
        if fitted is not None:
            content["fitted"] = {"settings": dict(fitted.settings), **to_dict(fitted.plan, available)}
        typer.echo(json.dumps(content, indent=2))
    else:
        show(console, outcome.plan, available, outcome.changes, gpu_name or "", outcome.more_gpus)
        if fitted is not None:
            console.print(f"\nFastest that fits: {fitted}", highlight=False, markup=False, soft_wrap=True)
            for line in (*heading(fitted.plan)[1:], str(verdict(fitted.plan, available, gpu_name or ""))):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
        if write is not None:
            console.print(f"Wrote {write}. Next: finesight train {write}", highlight=False, markup=False, soft_wrap=True)
    if fitted is None and available is not None and not outcome.plan.fits(available):
        raise typer.Exit(1)


@app.command()
def train(
    recipe: _RecipeArgument,
    overrides: _OverridesArgument = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show recipe, token counts and samples; train nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest valid checkpoint of the run, if there is one.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Begin also where the GPU's memory is planned not to suffice.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Compute the largest pack first, and compare its memory with the plan.")] = False,
) -> None:
    """Train as a recipe says.

    On a GPU the run's memory is planned first: what cannot fit is not begun, and the cheapest remedies are named.

    Ctrl-C (or SIGTERM) stops after the present step and saves a checkpoint; --resume goes on from it.
    """
    from finesight.recipe_files import load_recipe

    settings = load_recipe(recipe, [*(overrides or ()), *(["training.resume=true"] if resume else [])])
    console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of several processes the first one speaks
    if dry_run:
        from finesight.cli.preview import show_dry_run

        show_dry_run(settings, console)
        return
    from finesight.training.run import train as run_training

    result = run_training(settings, console=console, force=force, probe=probe)
    again = " ".join(shlex.quote(argument) for argument in (str(recipe), *(overrides or ())))
    if result.interrupted:
        console.print(f"Stopped. To go on: finesight train {again} --resume", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(130)
    console.print(f"Next: finesight eval {again}", highlight=False, markup=False, soft_wrap=True)


@app.command(name="eval")
def evaluate(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)] = None,
    overrides: _OverridesArgument = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter, fully tuned model or run to judge.", show_default="those of the recipe's output_dir")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the results.", show_default="eval in the run's folder")
    ] = None,
    before: Annotated[Path | None, typer.Option(help="Results of the base from an earlier evaluation, not to judge it again.")] = None,
    skip_before: Annotated[bool, typer.Option("--skip-before", help="Do not judge the base.")] = False,
    base_only: Annotated[bool, typer.Option("--base-only", help="Judge the base alone; nothing need be trained.")] = False,
    graders: Annotated[bool, typer.Option("--graders", help="List the graders.")] = False,
) -> None:
    """Judge before and after: the tasks of a recipe, and a text-only probe.

    Writes every answer, summaries and report.html, which opens without a network.
    """
    from finesight.cli.evaluate import evaluate_recipe, graders_table, outcome_table
    from finesight.cli.weights import require_trained, require_weights, run_folder
    from finesight.recipe_files import load_recipe

    console = Console()
    if graders:
        console.print(graders_table())
        return
    if recipe is None:
        raise typer.BadParameter("a recipe is needed", param_hint="RECIPE")
    settings = load_recipe(recipe, overrides or ())
    if base_only and (adapter is not None or before is not None or skip_before):
        raise typer.BadParameter("goes with none of --adapter, --before and --skip-before", param_hint="--base-only")
    run = Path(settings.training.output_dir) if adapter is None else run_folder(adapter)
    trained = None if base_only else require_trained(run) if adapter is None else require_weights(adapter)
    folder = output or run / "eval"
    outcome = evaluate_recipe(
        settings, trained, folder, run=run, before=before, skip_before=skip_before, console=Console(stderr=True)
    )  # fmt: skip
    console.print(outcome_table(outcome))
    console.print(f"Answers: {outcome.folder}\nReport: {outcome.report}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def predict(
    inputs: Annotated[list[str], typer.Argument(help="Images, videos, folders of them, or data files with questions.", show_default=False)],
    model: ModelOption = None,
    adapter: AdapterOption = None,
    question: Annotated[str | None, typer.Option("--question", "-q", help="What to ask about each image or video.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL file to write, or to replace once all is answered.", show_default="stdout")
    ] = None,
    system: SystemOption = None,
    max_completion_length: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts answered side by side.")] = 8,
    min_pixels: MinPixelsOption = None,
    max_pixels: MaxPixelsOption = None,
    media_dir: Annotated[str | None, typer.Option(help="For data files: second folder that image paths are resolved against.")] = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch http(s) images that rows name.")] = False,
    on_bad_row: Annotated[Literal["stop", "skip"], typer.Option(help="What to do about rows that cannot be used.")] = "stop",
    dtype: DtypeOption = "auto",
    load_in_4bit: FourBitOption = False,
    load_in_8bit: EightBitOption = False,
    load_in_fp8: Float8Option = False,
    quantize_vocabulary: QuantizeVocabularyOption = False,
    quantize_tower: QuantizeTowerOption = False,
) -> None:
    """Answer questions about images: one JSON object a line.

    With an adapter, pixel limits, frame rate and system prompt are those that it was trained with.
    """
    from finesight.cli.predict import predict_to
    from finesight.cli.weights import model_settings
    from finesight.recipe import DataSettings, SourceSettings
    from finesight.sampling.types import SamplingSettings

    precision = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit, "load_in_fp8": load_in_fp8}
    precision |= {"quantize_vocabulary": quantize_vocabulary, "quantize_tower": quantize_tower}
    with _in_flags():
        count = predict_to(
            output,
            model_settings(model, adapter, dtype, **precision),
            inputs,
            question,
            SamplingSettings(max_completion_length, temperature, top_p, seed=seed, batch_size=batch_size),
            data=DataSettings(**given(min_pixels=min_pixels, max_pixels=max_pixels), allow_urls=allow_urls, on_bad_row=on_bad_row),
            source=SourceSettings(path=inputs[0], media_dir=media_dir, system=system),
            console=Console(stderr=True),
        )
    if output is not None:
        Console().print(f"{count:,} answers: {output}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def export(
    trained: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a run, an adapter or a fully tuned model.")],
    to: Annotated[
        Literal["adapter", "merged", "merged-4bit", "gguf", "hub"],
        typer.Option(help="A peft folder; a whole checkpoint; the same in 4 bits; files for llama.cpp; an upload to the Hugging Face hub."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder to write to.")],
    model: Annotated[str | None, typer.Option(help="Base: a folder, or a name on the hub.", show_default="the adapter's base")] = None,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="Precision of merged weights.")] = "bfloat16",
    rounding: Annotated[
        Literal["nearest", "stochastic"], typer.Option(help="How sums become bfloat16; stochastic keeps small updates on average.")
    ] = "nearest",
    base: Annotated[
        Literal["trained", "stored"],
        typer.Option(help="Of an adapter trained over fewer bits: merge into the values it knew, or into the checkpoint's."),
    ] = "trained",
    bound: Annotated[
        float | None, typer.Option(help="Largest difference of a log-probability that is let pass, in nats.", show_default="by precision")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Rows, or drawn images, that the verification asks about.")] = 3,
    drawn: Annotated[bool, typer.Option("--drawn", help="Ask about drawn images also where the run's data is there.")] = False,
    device: Annotated[str | None, typer.Option(help="Of the verification.", show_default="the GPU, or else the CPU")] = None,
    llama_cpp: Annotated[Path | None, typer.Option(help="gguf: folder of llama.cpp, or its convert_hf_to_gguf.py.")] = None,
    repo: Annotated[str | None, typer.Option(help="hub: USER/NAME of the repository.")] = None,
    content: Annotated[Literal["adapter", "merged", "merged-4bit"], typer.Option(help="hub: what is uploaded.")] = "adapter",
    public: Annotated[bool, typer.Option("--public", help="hub: make a new repository public.")] = False,
    licence: Annotated[str | None, typer.Option("--license", help="hub: licence for the model card.", show_default="the base's")] = None,
) -> None:
    """Hand a trained model over, verified: greedy answers and log-probabilities must agree with what was trained.

    Merging reads and writes one shard at a time. An export that does not agree is not left behind; it is said where they part.
    """
    from finesight.cli.export import Handover, export_to
    from finesight.export.export import ExportSettings

    folder = export_to(
        trained,
        to,
        output,
        ExportSettings("merged", dtype, rounding, base, bound=bound),
        Handover(llama_cpp, repo, content, public, licence),
        model=model,
        prompts=prompts,
        drawn=drawn,
        device=device,
        console=Console(stderr=True),
    )
    Console().print(f"{folder}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def chat(
    model: ModelOption = None,
    adapter: AdapterOption = None,
    system: SystemOption = None,
    max_completion_length: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 1024,
    max_length_tokens: Annotated[int, typer.Option(help="Most tokens of a conversation, images and the next answer included.")] = 16384,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    min_pixels: MinPixelsOption = None,
    max_pixels: MaxPixelsOption = None,
    dtype: DtypeOption = "auto",
    load_in_4bit: FourBitOption = False,
    load_in_8bit: EightBitOption = False,
    load_in_fp8: Float8Option = False,
    quantize_vocabulary: QuantizeVocabularyOption = False,
    quantize_tower: QuantizeTowerOption = False,
) -> None:
    """Talk to a model in the terminal; images and videos are named, dropped or pasted by path.

    With an adapter, pixel limits, frame rate and system prompt are those that it was trained with.
    """
    from finesight.cli.chat import chat_with
    from finesight.cli.weights import model_settings
    from finesight.recipe import DataSettings
    from finesight.sampling.types import SamplingSettings

    precision = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit, "load_in_fp8": load_in_fp8}
    precision |= {"quantize_vocabulary": quantize_vocabulary, "quantize_tower": quantize_tower}
    with _in_flags():
        chat_with(
            model_settings(model, adapter, dtype, **precision),
            SamplingSettings(max_completion_length, temperature, top_p, seed=seed),
            data=DataSettings(**given(min_pixels=min_pixels, max_pixels=max_pixels)),
            system=system,
            max_length_tokens=max_length_tokens,
            console=Console(),
        )


@app.command()
def serve(
    model: ModelOption = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Adapter or run, as folder or NAME=folder; may be given several times.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the base.", show_default="its folder or name on the hub")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: every one of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="FINESIGHT_API_KEY", help="What clients must present.", show_default="none is asked for")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Answers drawn side by side, for each model.")] = 16,
    max_length_tokens: Annotated[int, typer.Option(help="Most tokens of a prompt and its answer, images included.")] = 8192,
    max_completion_length: Annotated[int, typer.Option(help="Tokens of an answer where the request says nothing.")] = 1024,
    queue_size: Annotated[int, typer.Option(help="Requests held beyond those that are being answered; then 429.")] = 128,
    max_body_mib: Annotated[int, typer.Option(help="Largest body of a request, in MiB; then 413.")] = 32,
    timeout_s: Annotated[float, typer.Option(help="Longest time that a request takes, in seconds; then 408.")] = 300.0,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch media from public http(s) addresses that requests name.")] = False,
    media_dir: Annotated[list[Path] | None, typer.Option(help="Folder that requests may name files in.", show_default="none")] = None,
    min_pixels: MinPixelsOption = None,
    max_pixels: MaxPixelsOption = None,
    dtype: DtypeOption = "auto",
    load_in_4bit: FourBitOption = False,
    load_in_8bit: EightBitOption = False,
    load_in_fp8: Float8Option = False,
    quantize_vocabulary: QuantizeVocabularyOption = False,
    quantize_tower: QuantizeTowerOption = False,
) -> None:
    """Serve a base and adapters on it over OpenAI's interface (/v1/chat/completions); needs the extra `serve`.

    Ctrl-C (or SIGTERM) takes no more requests and answers those that are held.
    """
    from finesight.cli.serve import serve_models
    from finesight.recipe import DataSettings
    from finesight.serve.settings import ServeSettings

    precision = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit, "load_in_fp8": load_in_fp8}
    precision |= {"quantize_vocabulary": quantize_vocabulary, "quantize_tower": quantize_tower}
    limits = ServeSettings(
        host=host,
        port=port,
        api_key=api_key,
        batch_size=batch_size,
        max_length_tokens=max_length_tokens,
        max_completion_length=max_completion_length,
        queue_size=queue_size,
        max_body_bytes=max_body_mib * 2**20,
        timeout_s=timeout_s,
        allow_urls=allow_urls,
        allowed_dirs=tuple(media_dir or ()),
    )
    data = DataSettings(**given(min_pixels=min_pixels, max_pixels=max_pixels))
    with _in_flags():
        serve_models(model, adapter or [], limits, name=name, data=data, console=Console(stderr=True), dtype=dtype, **precision)


app.add_typer(runs)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder that everything is written to.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of scenes, weights and the order of rows.")] = 0,
) -> None:
    """See the whole path in minutes, on a CPU, without a network.

    A tiny Qwen3-VL learns to read real scans of digits; an adapter then teaches it new questions. Measured before and after.
    The extra `demo` (scikit-learn, which carries the scans) must be installed.
    """
    from finesight.demo import run_demo

    run_demo(output, seed=seed, console=Console())


@app.command()
def version() -> None:
    """Show the versions of Finesight and of the libraries underneath, and the device."""
    from finesight.cli.version import versions

    table = Table.grid(padding=(0, 2))
    for name, value in versions().items():
        table.add_row(name, value)
    Console().print(table)
