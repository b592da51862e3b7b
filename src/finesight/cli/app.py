"""The command `finesight`: its commands in the order of its help, and what every one of them is run with."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from finesight.allocator import use_expandable_segments
from finesight.cli.commands.chat import chat
from finesight.cli.commands.check import check
from finesight.cli.commands.demo import demo
from finesight.cli.commands.evaluate import evaluate
from finesight.cli.commands.export import export
from finesight.cli.commands.init import init
from finesight.cli.commands.plan import plan
from finesight.cli.commands.predict import predict
from finesight.cli.commands.serve import serve
from finesight.cli.commands.train import train
from finesight.cli.commands.version import version
from finesight.cli.options import with_groups
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
app.command()(init)
app.command()(check)
app.command()(plan)
app.command()(train)
app.command(name="eval")(evaluate)
app.command()(with_groups(predict))
app.command()(export)
app.command()(with_groups(chat))
app.command()(with_groups(serve))
app.add_typer(runs)
app.command()(demo)
app.command()(version)


def run(arguments: Sequence[str] | None) -> None:
    """What :func:`finesight.cli.main` runs; errors are told in a line and end with 2."""
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


def _quiet_libraries(debug: bool) -> None:
    """Warnings of Finesight go to stderr; the chatter of libraries only when debugging."""
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=debug, markup=False)
    handler.addFilter(lambda record: not record.name.startswith("huggingface_hub."))  # which prints its warnings itself
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("finesight").setLevel(logging.DEBUG if debug else logging.INFO)
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
