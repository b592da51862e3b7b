"""Settings as keywords of a trainer: by their own names (`learning_rate`), or with their section (`training.learning_rate`)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finesight.errors import RecipeError
from finesight.foreign_names import BATCH_NAMES, FOREIGN_NAMES
from finesight.recipe import answer_to_batch
from finesight.recipe_files import all_setting_names

# Sections whose settings a trainer takes by their own names; of two with one name, the first.
SUPERVISED = ("training", "tuning", "data", "model")
REINFORCEMENT = ("training", "grpo", "rollout", "tuning", "data", "model")
_ARGUMENTS = {"data.train": "train_dataset", "model.name_or_path": "model"}  # what a trainer has arguments for
_NAMED = re.compile(r"\b(?P<path>[a-z]+\.[a-z]\w*)(?:: (?P<value>\w+)(?: or (?P<other>\w+)\b(?!\.))?)?")


def in_sections(settings: Mapping[str, Any], sections: Sequence[str], origin: str) -> dict[str, Any]:
    """Content of a recipe: flat settings, each in its section. `rewards` stays where it is.

    Args:
        origin: whose settings they are, for messages.

    Raises:
        RecipeError: names are unknown, all of them at once.
    """
    places = _places(sections)
    content: dict[str, Any] = {"rewards": settings["rewards"]} if "rewards" in settings else {}
    batch = {key: settings[key] for key in BATCH_NAMES if key in settings}
    wrong = [answer_to_batch(batch, "train_batch_size=")] if batch else []
    for key, value in settings.items():
        if key == "rewards" or key in batch:
            continue
        section, dot, name = key.partition(".")
        if not dot:
            section, name = places.get(key, ""), key
        if section not in sections or (dot and key not in all_setting_names() and key not in _ARGUMENTS):
            wrong.append(f"{key} is no setting; {_hint(key, sections, places)}")
            continue
        content.setdefault(section, {})[name] = str(value) if isinstance(value, Path) else value
    if wrong:
        raise RecipeError(f"{origin}: " + "\n  ".join(wrong))
    return content


def as_keywords(hint: str, sections: Sequence[str]) -> str:
    """What is written for recipes, `training.sharding: full`, as it is written in Python: `sharding="full"`."""
    places = _places(sections)

    def keyword(match: re.Match[str]) -> str:
        path, value, other = match["path"], match["value"], match["other"]
        section, _, name = path.partition(".")
        name = _ARGUMENTS.get(path, name if places.get(name) == section else path)
        if value is None:
            return name
        return f"{name}={_literal(value)}" + (f" or {_literal(other)}" if other else "")

    return _NAMED.sub(keyword, hint)


def _places(sections: Sequence[str]) -> dict[str, str]:
    """Section of each setting that has a name of its own."""
    places = {"train": "data"}
    for section in sections:
        own = [path.split(".")[1] for path in all_setting_names() if path.count(".") == 1 and path.startswith(f"{section}.")]
        places |= {key: section for key in own if key not in places and key not in BATCH_NAMES}
    return places


def _literal(value: str) -> str:
    return {"true": "True", "false": "False"}.get(value, f'"{value}"')


def _hint(key: str, sections: Sequence[str], places: Mapping[str, str]) -> str:
    if key in FOREIGN_NAMES:
        return as_keywords(FOREIGN_NAMES[key], sections)
    elsewhere = [path for path in all_setting_names() if key in (path, path.rsplit(".", 1)[-1])]
    if elsewhere and elsewhere[0].startswith(("grpo.", "rollout.")):
        return f"{elsewhere[0]} is one of GRPOTrainer"
    if elsewhere and elsewhere[0].count(".") == 1:
        return f"{elsewhere[0]} is set in a recipe, which is given as recipe=finesight.load_recipe(…)"
    near = difflib.get_close_matches(key.rsplit(".", 1)[-1], places, n=1)
    return f"did you mean {near[0]!r}?" if near else "docs/settings.md lists those that there are"
