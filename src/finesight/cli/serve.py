"""What `finesight serve` does: loads a base and the adapters on it, and serves them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from finesight.cli.weights import differing_precision, is_adapter_folder, model_settings, require_weights, run_folder
from finesight.data_settings import DataSettings
from finesight.errors import FinesightError, ModelError
from finesight.recipe import ModelSettings
from finesight.serve.settings import ServeSettings


def named_adapters(given: Sequence[str]) -> dict[str, Path]:
    """Folders by the names that clients choose them with: `NAME=folder`, or the name of the run or folder itself.

    Raises:
        ModelError: a folder holds no weights, or two have one name.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or "/" in name:
            folder, name = text, ""
        path = require_weights(Path(folder))
        name = name or run_folder(Path(folder).resolve()).name
        if name in found:
            raise ModelError(f"Two adapters are called {name}. Name them: --adapter NAME=folder.")
        found[name] = path
    return found


def served(
    model: str | None, adapters: Sequence[str], name: str | None, dtype: Any, **precision: Any
) -> tuple[ModelSettings, dict[str, Path], str | None]:
    """(The base, folders of the adapters by their names, name of the base).

    Args:
        model: checkpoint; none: the base that the first adapter names, or a fully tuned model that stands in its place.
        adapters: as :func:`named_adapters` takes them.
        precision: load_in_4bit and its siblings.

    Raises:
        ModelError, RecipeError: something does not exist, or does not go together.
    """
    folders = named_adapters(adapters)
    first = next(iter(folders), None)
    settings = model_settings(model, None if first is None else folders[first], dtype, **precision)
    whole = [each for each, folder in folders.items() if not is_adapter_folder(folder)]
    if whole and len(folders) > 1:
        raise ModelError(f"{folders[whole[0]]} is a whole model, not an adapter: it is served alone.")
    return (settings, {}, name or whole[0]) if whole else (settings, folders, name)


def serve_models(
    model: str | None,
    adapters: Sequence[str],
    limits: ServeSettings,
    *,
    name: str | None,
    data: DataSettings,
    console: Console,
    dtype: Any = "auto",
    **precision: Any,
) -> None:
    """Serves until it is told to end.

    Args:
        model, adapters, name: as :func:`served` takes them.
        precision: load_in_4bit and its siblings, as :func:`model_settings` takes them.

    Raises:
        FinesightError: the extra `serve` is missing; from loading; the address cannot be listened on.
    """
    missing = [library for library in ("fastapi", "prometheus_client", "uvicorn") if importlib.util.find_spec(library) is None]
    if missing:
        raise FinesightError(f"The server needs the extra `serve` ({', '.join(missing)} missing). Run `pip install 'finesight[serve]'`.")
    settings, folders, name = served(model, adapters, name, dtype, **precision)
    for warning in differing_precision(settings, list(folders.values())[1:]):  # of the first one loading speaks
        console.print(f"Warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    from finesight.serve.app import check_address, serve
    from finesight.serve.models import ModelShelf

    check_address(limits)
    console.print(f"Loading {settings.name_or_path}", markup=False, highlight=False, soft_wrap=True)
    shelf = ModelShelf(settings, folders, name=name, data=data)
    if not limits.local_only and limits.api_key is None:
        console.print(
            f"Warning: {limits.host} can be reached from other machines and no API key is asked for; give --api-key.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def ready(address: str) -> None:
        console.print(f"Serving {', '.join(shelf.models)} at {address}/v1 (Ctrl-C ends it)", markup=False, highlight=False, soft_wrap=True)

    serve(shelf, limits, ready)
