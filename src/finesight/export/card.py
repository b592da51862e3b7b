"""The model card of an export: what it was trained on and how, what was measured, and how images must be sized."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from finesight.errors import ExportError, FinesightError
from finesight.export.export import Export
from finesight.models.adapter_metadata import AdapterMetadata
from finesight.recipe import Recipe
from finesight.recipe_files import RECIPE_FILE, RUN_FILE, dump_recipe, load_recipe
from finesight.wording import counted

SUMMARY = Path("eval") / "after" / "summary.json"
README = "README.md"


@dataclass(frozen=True)
class RunFacts:
    """What the folder of a run says of it; each may be missing."""

    recipe: Recipe | None = None
    run: Mapping[str, Any] = field(default_factory=dict)  # run.json
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # summary.json of the latest evaluation


def read_run_facts(run: Path, weights: Path) -> RunFacts:
    """Reads them from a run's folder; the recipe also from beside the weights.

    Raises:
        RecipeError: the recipe of the run cannot be read by this version.
    """
    recipe = next((path for path in (run / RECIPE_FILE, weights / RECIPE_FILE) if path.is_file()), None)
    return RunFacts(None if recipe is None else load_recipe(recipe), _json(run / RUN_FILE), _json(run / SUMMARY))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path} is damaged: {error}. Restore or delete it.") from None
    return content if isinstance(content, dict) else {}


def base_licence(base: Path) -> str | None:
    """The licence that the card of a base names; None: it has no card, or the card names none."""
    path = base / README
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path).data.to_dict().get("license")
    except (ValueError, FinesightError):
        return None


def model_card(title: str, exported: Export, base: str, facts: RunFacts, licence: str | None) -> str:
    """The card, as Markdown with the hub's metadata in front.

    Args:
        base: name of the base, or its folder.
        licence: identifier as the hub knows it, such as apache-2.0; None: not known, which the card says.
    """
    adapter = exported.to == "adapter"
    metadata = exported.metadata
    data = ModelCardData(
        base_model=None if Path(base).is_absolute() else base,
        base_model_relation="adapter" if adapter else "quantized" if exported.to == "merged-4bit" else "finetune",
        license=licence,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["finesight", *(["lora"] if adapter else [])],
    )
    shown = Path(base).name if Path(base).is_absolute() else base
    sections = [
        f"# {title}",
        f"{'A LoRA adapter of' if adapter else 'Weights fine-tuned from'} {shown}, made with Finesight.",
        *(
            _section(
                "Licence",
                [f"{licence}." if licence else f"Not stated. The licence of the base, {shown}, holds for what is derived from it."],
            )
        ),
        *_section("Images", _pixels(metadata)),
        *_section("Data", _data(facts)),
        *_section("Measured", _measured(facts)),
        *_section("Verified", [f"Against the model as it was trained: {exported.agreement}.", *_arrived(exported)]),
        *_section("Notes", [f"- {note}" for note in exported.notes]),
        *_section("Versions", _versions(facts, metadata)),
        *_section("Recipe", [] if facts.recipe is None else [f"```yaml\n{dump_recipe(_without_paths(facts.recipe)).strip()}\n```"]),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "\n".join(lines)] if lines else []


def _pixels(metadata: AdapterMetadata | None) -> list[str]:
    if metadata is None:
        return ["The pixel limits of training are not known."]
    lines = [
        f"Trained with images of {metadata.min_pixels:,} to {metadata.max_pixels:,} pixels (`min_pixels`, `max_pixels`); use the same.",
        f"Videos: {metadata.video_min_pixels:,} to {metadata.video_max_pixels:,} pixels, {metadata.fps:g} frames a second, at most {metadata.max_frames}.",
    ]
    if metadata.image_first:
        lines.append("Images stand ahead of the text of the first user turn.")
    if metadata.system:
        lines.append(f"System prompt: {json.dumps(metadata.system, ensure_ascii=False)}")
    return lines


def _data(facts: RunFacts) -> list[str]:
    if facts.recipe is None:
        return ["Not stated."]
    lines = [f"- {Path(source.path).name if Path(source.path).is_absolute() else source.path}" for source in facts.recipe.data.train]
    if fingerprint := facts.run.get("data_fingerprint"):
        lines.append(f"- fingerprint of the encoded rows: `{fingerprint}`")
    if samples := facts.run.get("state", {}).get("num_samples"):
        lines.append(f"- samples seen in training: {samples:,}")
    return lines


def _measured(facts: RunFacts) -> list[str]:
    state = facts.run.get("state", {})
    lines = []
    best = "lowest held-out loss" if facts.recipe is None or facts.recipe.grpo is None else "highest held-out reward"
    for label, name in (("last training loss", "last_loss"), (best, "best_metric")):
        if state.get(name) is not None:
            lines.append(f"- {label}: {state[name]:.4f}")
    for task in facts.evaluation.get("tasks", []):
        interval = f"95% interval {task['low']:.3f} to {task['high']:.3f}"
        lines.append(f"- {task['task']} ({task['grader']}): {task['accuracy']:.3f} over {counted(task['num_samples'], 'row')}, {interval}")
    return lines or ["Nothing was measured."]


def _arrived(exported: Export) -> list[str]:
    merged = exported.merged
    if merged is None or not merged.updates:
        return []
    return [f"{100 * merged.survived:.1f}% of the adapter's update arrived in the merged weights."]


def _versions(facts: RunFacts, metadata: AdapterMetadata | None) -> list[str]:
    versions = facts.run.get("versions") or (metadata.versions if metadata is not None else {})
    return [", ".join(f"{name} {version}" for name, version in versions.items())] if versions else []


def _without_paths(recipe: Recipe) -> Recipe:
    """The recipe with no folder of somebody's machine in it."""

    def last(path: str) -> str:
        return Path(path).name if Path(path).is_absolute() else path

    sources = [
        source.model_copy(update={"path": last(source.path), "media_dir": None if source.media_dir is None else last(source.media_dir)})
        for source in recipe.data.train
    ]
    held_out = recipe.data.eval_split
    data = recipe.data.model_copy(
        update={
            "train": sources,
            "allowed_dirs": [last(folder) for folder in recipe.data.allowed_dirs],
            "eval_split": held_out and last(held_out),
        }
    )
    adapter = recipe.model.adapter
    model = recipe.model.model_copy(update={"name_or_path": last(recipe.model.name_or_path), "adapter": adapter and last(adapter)})
    training = recipe.training.model_copy(update={"output_dir": last(recipe.training.output_dir)})
    return recipe.model_copy(update={"data": data, "model": model, "training": training})
