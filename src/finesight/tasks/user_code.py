"""Functions of the user, named as `module:function` or `file.py:function` in a recipe. Nothing else loads code: no row can."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from finesight.errors import EvaluationError


def is_user_function(name: str) -> bool:
    """Whether a name of a recipe means code of the user, not something of the library."""
    return ":" in name or name.endswith(".py")


def load_function(name: str, *, kind: str, signature: str, base_dir: Path) -> Callable[..., Any]:
    """The function that `module:function`, `file.py:function`, or a file with one public function names.

    Args:
        kind: what it is wanted as, for messages: Grader, Reward.
        signature: how to define it, for messages.
        base_dir: folder that modules are looked up in first, and files are named from.

    Raises:
        EvaluationError: there is no such module, file or function, or it cannot be imported.
    """
    module_name, colon, function_name = name.rpartition(":")
    if not colon:
        module_name, function_name = name, ""
    module = _import_module(module_name, f"{kind} {name!r}", base_dir)
    public = {key: f for key, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__ and key[0] != "_"}
    listed = ", ".join(public) or "none"
    if not function_name:
        if len(public) != 1:
            raise EvaluationError(f"{kind} {name!r}: the file must have one public function, it has {listed}. Name it: {name}:function.")
        return next(iter(public.values()))
    found = getattr(module, function_name, None)
    if not callable(found):
        raise EvaluationError(
            f"{kind} {name!r}: {module_name} has no function {function_name!r}; it has {listed}. Define it as {function_name}{signature}."
        )
    return found


def _import_module(module: str, wanted: str, base_dir: Path) -> ModuleType:
    try:
        if module.endswith(".py"):
            if not (base_dir / module).is_file():
                looked = "" if Path(module).is_absolute() else f", neither beside the recipe nor in {base_dir.absolute()}"
                raise EvaluationError(f"{wanted}: there is no file {module}{looked}.")
            return _import_file(base_dir / module, wanted)
        sys.path.insert(0, str(base_dir))
        try:
            return importlib.import_module(module)
        finally:
            sys.path.remove(str(base_dir))
    except EvaluationError:
        raise
    except Exception as error:
        hint = ""
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            hint = f". A file, beside the recipe or in {base_dir.absolute()}, is named as {module.replace('.', '/')}.py:function"
        raise EvaluationError(f"{wanted}: {module} cannot be imported: {type(error).__name__}: {error}{hint}") from error


def _import_file(path: Path, wanted: str) -> ModuleType:
    name = f"finesight_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise EvaluationError(f"{wanted}: {path} is not read as Python.")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # dataclasses and pickle look their module up there
    spec.loader.exec_module(loaded)
    return loaded
