"""The recipe that `finesight init` writes: chosen settings as they are, all others commented out at their defaults.

Names, defaults, choices and explanations come from the settings classes themselves, so the file cannot go stale.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from finesight.data_settings import ColumnSettings, SourceSettings
from finesight.errors import RecipeError
from finesight.recipe import Recipe, Settings, TaskSettings
from finesight.recipe_files import parse_recipe, section_class
from finesight.tasks.graders import get_grader
from finesight.tasks.user_code import is_user_function

_COMMENT_COLUMN = 48
_HEADER = """\
# A Finesight recipe. Every setting is here; one behind a # stands at its default.
# Paths are relative to the folder in which the command is called.
#   finesight check {name}             is the data all right?
#   finesight train {name} --dry-run   the whole recipe, token counts, what is trained on
#   finesight train {name}
#   finesight eval {name}              before and after, with a report
"""
# Sections that stand inside a list: shown as its first entry.
_ENTRIES: dict[str, type[Settings]] = {"train": SourceSettings, "tasks": TaskSettings}


def commented_recipe(chosen: Mapping[str, Any], *, name: str = "recipe.yaml") -> str:
    """YAML text of a whole recipe.

    Args:
        chosen: nested settings that are to stand in the file as given, for example ``{"tuning": {"r": 8}}``; the
            entries of `data.train` and `evaluation.tasks` are dicts of settings too.
        name: the file name that the header's commands show.

    Raises:
        RecipeError: a chosen setting does not exist or does not fit.
    """
    lines = [_HEADER.format(name=name)]
    for section, info in Recipe.model_fields.items():
        lines += [*_top_lines(section, info, chosen.get(section)), ""]
    return "\n".join(lines)


def _top_lines(section: str, info: FieldInfo, chosen: Any) -> list[str]:
    """One section; one that a recipe may do without is commented out as a whole, unless something in it is chosen."""
    settings = section_class(info.annotation)
    if settings is None or get_origin(info.annotation) is list:
        return [_line(section, info, PydanticUndefined if chosen is None else chosen, "")]
    if settings is info.annotation or chosen is not None:
        return [f"{section}:", *_section_lines(settings, chosen or {}, "  ")]
    heading = _with_comment(f"# {section}:", info.description or "")
    return [heading, *(line.replace("  # ", "#   ", 1) for line in _section_lines(settings, {}, "  "))]


def _section_lines(settings: type[Settings], chosen: Mapping[str, Any], indent: str) -> list[str]:
    unknown = chosen.keys() - settings.model_fields.keys()
    if unknown:
        raise RecipeError(f"{settings.__name__} has no setting {', '.join(sorted(unknown))}.")
    lines: list[str] = []
    for name, info in settings.model_fields.items():
        if (entry := _ENTRIES.get(name)) is not None:
            lines += _entry_lines(name, entry, info, chosen.get(name) or [], indent)
        elif settings is SourceSettings and name == "columns" and chosen.get(name):
            lines += [f"{indent}columns:", *_section_lines(ColumnSettings, chosen[name], indent + "  ")]
        else:
            lines.append(_line(name, info, chosen.get(name, PydanticUndefined), indent))
    return lines


def _entry_lines(name: str, entry: type[Settings], info: FieldInfo, chosen: list[Mapping[str, Any]], indent: str) -> list[str]:
    """A list of sections: each chosen entry in full, or one commented line when none is chosen."""
    if not chosen:
        return [_line(name, info, PydanticUndefined, indent)]
    lines = [_with_comment(f"{indent}{name}:", info.description or "")]
    for values in chosen:
        inner = _section_lines(entry, values, indent + "    ")
        first = next(i for i, line in enumerate(inner) if not line.lstrip().startswith("#"))
        # The dash belongs to the first setting that is not commented out; settings before it would stand outside the entry.
        opening = inner.pop(first)
        lines += [f"{indent}  - {opening.lstrip()}", *inner]
    return lines


def _line(name: str, info: FieldInfo, value: Any, indent: str) -> str:
    mark = ""
    if value is PydanticUndefined:
        mark, value = "# ", info.get_default(call_default_factory=True)
        value = None if value is PydanticUndefined else value
    description = info.description or ""
    choices = _choices(info.annotation)
    if choices and not all(choice in description for choice in choices):
        description += f" One of: {', '.join(choices)}."
    return _with_comment(f"{indent}{mark}{name}: {one_line_yaml(value)}", description)


def _with_comment(setting: str, comment: str) -> str:
    return f"{setting:<{_COMMENT_COLUMN}}  # {comment}" if comment else setting


def one_line_yaml(value: Any) -> str:
    """One value on one line, as YAML reads it back."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _choices(annotation: Any) -> list[str]:
    """The words that a setting may take, when it is a choice between words."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if get_origin(annotation) in (Union, types.UnionType, list):
        return [choice for inner in get_args(annotation) for choice in _choices(inner)]
    return []


def chosen_settings(
    *, model: str, source: Mapping[str, Any], output_dir: str, method: str, eval_split: str, grader: str
) -> dict[str, dict[str, Any]]:
    """The nested settings for the options of `finesight init`; `source["columns"]` is a list of role=name or None.

    Raises:
        RecipeError: the settings contradict each other, or a column is not of the form role=name.
        EvaluationError: there is no such grader in the library, or what it needs is not installed.
    """
    if not is_user_function(grader):  # code of the user may be written later
        get_grader(grader)
    entry = {name: value for name, value in source.items() if value}
    if source.get("columns"):
        entry["columns"] = _columns(source["columns"])
    held_out = None if eval_split.lower() in ("", "none", "null") else eval_split
    chosen: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": model},
        "tuning": {"method": method, **({"r": 16, "lora_alpha": 16} if method == "lora" else {})},
        "data": {"train": [entry], "eval_split": held_out},
        "training": {
            "output_dir": output_dir,
            "train_batch_size": 8,
            "num_train_epochs": 1.0,
            "learning_rate": 1e-4 if method == "lora" else 1e-5,
            "eval_strategy": "epoch" if held_out else "no",
        },
        "evaluation": {"tasks": [{"name": "held out", "data": "eval_split", "grader": grader}] if held_out else []},
    }
    parse_recipe(chosen, origin="the options given")
    return chosen


def _columns(given: Sequence[str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for item in given:
        role, equals, column = item.partition("=")
        if not equals or not column:
            raise RecipeError(f"--column {item!r} is not of the form role=name, for example image=image.")
        columns[role.strip()] = column.strip()
    return columns


def write_new(path: Path, text: str) -> None:
    """Write a file that must not exist yet; its folder is made.

    Raises:
        RecipeError: the file exists, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{path} exists and is not overwritten. Remove it, or give another name with --output.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {error.strerror}. Give another place with --output.") from None
