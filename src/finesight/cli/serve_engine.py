"""What `finesight serve --engine` does: hands over to vLLM, or prints how an engine is started."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from finesight.cli.flags import in_flags
from finesight.cli.serve import served
from finesight.cli.weights import QUANTIZED, differing_precision
from finesight.data_settings import DataSettings
from finesight.errors import ModelError
from finesight.models.adapter_metadata import METADATA, restore_data_settings
from finesight.serve.engines import AdapterFacts, EngineCommand, EngineName, Version, Wanted, engine_command, parse_version
from finesight.serve.settings import ServeSettings

_VERSION_ARGUMENTS: Mapping[EngineName, tuple[str, ...]] = {"vllm": ("vllm", "--version"), "sglang": ("sglang", "version")}
_VERSION_S = 300.0  # the engines import torch before they tell it
_KEY_VARIABLE = "FINESIGHT_API_KEY"


def hand_over(
    engine: EngineName,
    model: str | None,
    adapters: Sequence[str],
    limits: ServeSettings,
    *,
    name: str | None,
    data: DataSettings,
    tensor_parallel_size: int,
    images_per_prompt: int | None,
    print_only: bool,
    console: Console,
    dtype: Any = "auto",
    **precision: Any,
) -> None:
    """Becomes the engine's process, or prints its command to stdout.

    Args:
        model, adapters, name: as of :func:`finesight.cli.serve.serve_models`.
        precision: the same; without any bits named, the base is loaded in full precision.
        images_per_prompt: most images of a request; None: as the engine has it.
        console: for notes.

    Raises:
        ModelError: the engine is not installed, or its version cannot serve this, with the reason.
    """
    # Not in the bits that an adapter was trained over: engines quantise in their own ways, and few can under adapters.
    if not any(precision.get(f"load_in_{bits}") for bits in QUANTIZED):
        precision["unquantized"] = True
    settings, folders, name = served(model, adapters, name, dtype, **precision)
    overridden: list[str] = []
    if (Path(settings.name_or_path) / METADATA).is_file():  # a whole model that was trained here
        data, overridden = restore_data_settings(settings.name_or_path, data)
    facts = tuple(AdapterFacts.read(each, folder, data) for each, folder in folders.items())
    wanted = Wanted(settings, limits, facts, name, data, tensor_parallel_size, images_per_prompt)
    executable = shutil.which(engine)
    command = engine_command(engine, wanted, None if executable is None else installed_version(engine))
    for note in (*overridden, *differing_precision(settings, folders.values()), *command.notes):
        console.print(f"Note: {in_flags(note)}", markup=False, highlight=False, soft_wrap=True)
    if print_only:
        sys.stdout.write(printed(command, limits.api_key) + "\n")
        return
    if engine == "sglang":
        raise ModelError("SGLang is not started from here: add --print, and run what it prints.")
    if executable is None:
        raise ModelError("vLLM is not installed: there is no `vllm` on PATH. Install it, or add --print to see its command.")
    console.print(f"Starting {printed(command, limits.api_key)}", markup=False, highlight=False, soft_wrap=True)
    sys.stdout.flush()
    # In place of this process, so that signals reach the engine and its end is that of the command.
    os.execve(executable, command.arguments, {**os.environ, **command.environment})


def installed_version(engine: EngineName) -> Version:
    """Asks the engine on PATH, which need not be in the environment of this process.

    Raises:
        ModelError: it does not tell.
    """
    arguments = _VERSION_ARGUMENTS[engine]
    try:
        told = subprocess.run(arguments, capture_output=True, text=True, timeout=_VERSION_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ModelError(f"`{shlex.join(arguments)}` does not tell the version: {error}.") from None
    lines = [line for line in told.splitlines() if "revision" not in line] or [""]
    return parse_version(lines[-1])


def printed(command: EngineCommand, api_key: str | None) -> str:
    """A line for a shell; the API key stands in it as a variable."""

    def word(text: str) -> str:
        return f'"${_KEY_VARIABLE}"' if api_key is not None and text == api_key else shlex.quote(text)

    variables = [f"{name}={word(value)}" for name, value in command.environment.items()]
    return " ".join([*variables, *map(word, command.arguments)])
