"""Reading and writing recipes. Imports no torch.

A recipe is read from YAML; `section.name=value` overrides are applied on top; whatever is unknown is refused with the
nearest known name.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from finesight.errors import RecipeError
from finesight.foreign_names import FOREIGN_NAMES
from finesight.recipe import Recipe, Settings

RECIPE_FILE, RUN_FILE = "recipe.yaml", "run.json"  # in the folder of a run; the first also beside the weights that it left
# Lists whose entries may be written as a text, which means this setting of the entry; one entry may stand for the list.
_SHORT_FORMS = {"data.train": "path", "rewards": "name"}


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply dotted overrides such as ``training.learning_rate=2e-5``.

    A file that a reward or grader names and that lies beside the recipe is named from the present folder from here on, as all
    other paths of a recipe are; so is it in what a run saves. The same holds for rows and `media_dir` that are not in the present
    folder.

    Raises:
        RecipeError: the file is missing or no YAML, a name is unknown, or a value does not fit.
    """
    content: Any = {}
    if path is not None:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise RecipeError(
                f"Recipe {path} cannot be read: {error.strerror}. Give the path of a YAML file (`finesight init` writes one)."
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"Recipe {path} is not valid YAML: {error}") from None
        if not isinstance(content, dict):
            raise RecipeError(f"Recipe {path} must hold sections (model, data, training, …), not a {type(content).__name__}.")
    for override in overrides:
        _apply_override(content, override)
    recipe = parse_recipe(content, origin=str(path) if path is not None else "the settings given")
    return recipe if path is None else _with_files_beside(recipe, Path(path).parent)


def _with_files_beside(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with what lies beside it, in `folder`, named from the present folder: code, and rows."""
    if folder.resolve() == Path.cwd():
        return recipe
    train = [
        source.model_copy(update={name: _data_beside(getattr(source, name), folder) for name in ("path", "media_dir")})
        for source in recipe.data.train
    ]
    data = recipe.data.model_copy(update={"train": train, "eval_split": _data_beside(recipe.data.eval_split, folder)})
    rewards = [reward.model_copy(update={"name": _found_beside(reward.name, folder)}) for reward in recipe.rewards]
    tasks = [task.model_copy(update={"grader": _found_beside(task.grader, folder)}) for task in recipe.evaluation.tasks]
    return recipe.model_copy(update={"data": data, "rewards": rewards, "evaluation": recipe.evaluation.model_copy(update={"tasks": tasks})})


def _data_beside(path: str | None, folder: Path) -> str | None:
    """A path as it is called from the present folder where it is not there but in `folder`; others, also hub names, as they are."""
    if path is None or Path(path).exists() or not (folder / path).exists():
        return path
    return os.path.relpath(folder / path)


def _found_beside(name: str, folder: Path) -> str:
    """`file.py:function` or `file.py` with the file as it is called from the present folder; other names as they are."""
    file = name if name.endswith(".py") else name.rpartition(":")[0]
    if not file.endswith(".py") or Path(file).is_absolute() or not (folder / file).is_file():
        return name
    return os.path.relpath(folder / file) + name[len(file) :]


def parse_recipe(content: Mapping[str, Any], origin: str = "the settings given") -> Recipe:
    """A nested dict to a recipe; every problem is reported at once, unknown names with the nearest known one.

    Raises:
        RecipeError: as in :func:`load_recipe`.
    """
    try:
        sections = {name: section for name, section in content.items() if section is not None}  # all its settings commented out
        return Recipe.model_validate(_yaml_numbers(sections))
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise RecipeError(f"{origin}: {len(lines)} setting(s) cannot be used:\n  " + "\n  ".join(lines)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that :func:`load_recipe` reads back with the same meaning.

    What a default resolved to is written as resolved: `share_prefixes` is false under adapter dropout, where a written
    true would be refused.
    """
    content = recipe.model_dump(mode="json")
    content["data"]["share_prefixes"] = recipe.shares_prefixes
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _apply_override(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise RecipeError(f"Override {override!r} is not of the form section.name=value, for example training.learning_rate=2e-5.")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    names = name.strip().split(".")
    sections = names[:-1]
    node: Any = content
    for position, key in enumerate(names):
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise RecipeError(
                    f"Override {override!r}: {'.'.join(sections[:position])} is a list of {len(node)}; {key!r} is no entry of it."
                )
            if position == len(sections):
                node[int(key)] = value
                return
            node[int(key)] = _long_form(names[: position + 1], node[int(key)], names[position + 1])
            node = node[int(key)]
            continue
        if not isinstance(node, dict):
            raise RecipeError(f"Override {override!r}: {'.'.join(sections[:position])} is a single value and has no {key!r}.")
        if position == len(sections):
            node[key] = value
            return
        if node.get(key) is None:
            node[key] = {}
        node[key] = _long_form(names[: position + 1], node[key], names[position + 1])
        node = node[key]


def _long_form(place: Sequence[str], value: Any, wanted: str) -> Any:
    """What the short form at a place of a recipe stands for, so that an override can name `wanted` in it."""
    list_name, entry_name = ".".join(place), ".".join(place[:-1])
    if list_name in _SHORT_FORMS and isinstance(value, (str, dict)) and value:
        entry = {_SHORT_FORMS[list_name]: value} if isinstance(value, str) else value
        return [entry] if wanted.isdigit() else entry
    if entry_name in _SHORT_FORMS and isinstance(value, str):
        return {_SHORT_FORMS[entry_name]: value}
    return value


def _yaml_numbers(value: Any) -> Any:
    """YAML 1.1 reads `2e-5` (no dot) as text; people mean the number."""
    if isinstance(value, Mapping):
        return {k: _yaml_numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_yaml_numbers(v) for v in value]
    if isinstance(value, str) and "e" in value.lower() and value[:1] in "+-.0123456789":
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(problem: Any) -> str:
    """One line for one pydantic problem, in the words of a recipe."""
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _known_names(location[:-1])
        if location[-1] in FOREIGN_NAMES:
            return f"{name}: unknown setting; {FOREIGN_NAMES[location[-1]]}"
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        elsewhere = [path for path in all_setting_names() if path.rsplit(".", 1)[-1] == location[-1]]
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        if elsewhere and not (near and near[0] == location[-1]):
            hint = f"did you mean {elsewhere[0]!r}?"
        return f"{name}: unknown setting; {hint}"
    if problem["type"] == "missing":
        return f"{name}: must be given"
    message = problem["msg"].removeprefix("Value error, ")
    shown = problem.get("input")
    if isinstance(shown, (str, int, float, bool)) or shown is None:
        message += f" (got {shown!r})"
    return f"{name}: {message}" if name else message


def section_class(annotation: Any) -> type[Settings] | None:
    """The settings class inside an annotation such as `list[SourceSettings] | None`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    for argument in get_args(annotation):
        if (found := section_class(argument)) is not None:
            return found
    return None


def _known_names(location: Sequence[str]) -> list[str]:
    section: type[Settings] = Recipe
    for key in location:
        if key.isdigit() or key not in section.model_fields:
            continue
        section = section_class(section.model_fields[key].annotation) or section
    return list(section.model_fields)


def all_setting_names(section: type[Settings] = Recipe, prefix: str = "") -> list[str]:
    """Dotted names of all settings, sections opened."""
    names: list[str] = []
    for key, info in section.model_fields.items():
        inner = section_class(info.annotation)
        names += all_setting_names(inner, f"{prefix}{key}.") if inner else [f"{prefix}{key}"]
    return names
