"""The architecture: which module may import which, what stays light, how large files grow."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGE = CHECKOUT / "src" / "finesight"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONG_FILE_LINES = 450

# Imports go down this list, or stay within one entry; entries of one line do not know each other.
LAYERS: list[tuple[str, ...]] = [
    ("__main__", "__init__"),
    ("cli",),
    ("demo",),
    ("training", "serve", "export"),
    ("evaluation",),
    ("sampling",),
    ("models", "tasks"),
    ("data", "planner"),
    ("geometry",),
    ("recipe_files",),
    ("families", "recipe"),
    ("data_settings", "grpo_settings", "hub"),
    ("allocator", "errors", "file_modes", "foreign_names", "library_noise", "settings", "wording"),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Modules that must stay importable without torch, and therefore everything that they import.
TORCH_FREE = (
    "__init__", "__main__", "allocator", "errors", "file_modes", "foreign_names", "hub", "library_noise", "settings", "wording", "data_settings", "grpo_settings", "families", "recipe", "recipe_files", "geometry",
    "data.conversation", "data.formats", "data.media", "data.video", "data.processor", "data.rendering", "data.visual", "data.encode",
    "data.sample", "data.split", "data.pack", "data.steps", "data.groups", "data.group_cost", "data.audit", "data.audit_settings",
    "tasks.graders", "tasks.metrics", "tasks.rewards", "models.adapter_metadata", "models.tuning_notes", "training.telemetry", "training.prepare", "training.run_sizes", "training.run_folder",
    "training.run_report", "evaluation.plots", "evaluation.pictures", "evaluation.reinforcement", "evaluation.report",
    "cli", "cli.app", "cli.check", "cli.flags", "cli.init", "cli.options", "cli.plan", "cli.preview", "cli.reference", "cli.runs", "cli.version",
)  # fmt: skip
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "matplotlib", "sklearn")


def module_name(path: Path) -> str:
    """Dotted name below `finesight`, for example `data.pack`; packages without their `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def unit(name: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    return name.split(".", 1)[0]


def imported_modules(path: Path, *, module_level_only: bool = False) -> list[tuple[int, str]]:
    """(line, dotted module) of every import, those of finesight itself as absolute names."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    found: list[tuple[int, str]] = []
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["finesight", *path.relative_to(PACKAGE).parent.parts]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            if base == "finesight":  # `from finesight import data` names a module, `from finesight import __version__` does not
                found += [(node.lineno, f"finesight.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, base))
        if module_level_only and (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_type_checking(node)):
            continue
        pending += list(ast.iter_child_nodes(node))
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def test_every_module_has_a_layer() -> None:
    unknown = sorted({unit(module_name(path)) for path in MODULES} - RANK.keys())
    assert not unknown, f"{unknown}: give each a place in LAYERS and in the design"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    here = unit(module_name(path))
    wrong = []
    for line, name in imported_modules(path):
        if not name.startswith("finesight.") or name == "finesight.__version__":
            continue
        there = unit(name.removeprefix("finesight."))
        assert there in RANK, f"{path.name}:{line} imports {name}, which has no layer"
        if there != here and RANK[there] <= RANK[here]:
            wrong.append(f"{path.relative_to(CHECKOUT)}:{line} ({here}) imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_light_modules_import_nothing_heavy(path: Path) -> None:
    """Imports inside functions are free to be heavy; those at the top of a light module are not."""
    name = module_name(path)
    if name not in TORCH_FREE and unit(name) != "planner" and not name.startswith("cli.commands"):
        return
    heavy = [
        f"{path.name}:{line} {module}" for line, module in imported_modules(path, module_level_only=True) if module.split(".")[0] in HEAVY
    ]
    assert not heavy, heavy


@pytest.mark.parametrize(
    "module",
    [
        "finesight",
        "finesight.recipe",
        "finesight.recipe_files",
        "finesight.families",
        "finesight.geometry",
        "finesight.data.steps",
        "finesight.training.prepare",
        "finesight.cli",
        "finesight.cli.check",
        "finesight.cli.preview",
    ],
)
def test_import_leaves_torch_out(module: str) -> None:
    """In a fresh process, since this one has long imported torch."""
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & {set(HEAVY)!r}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom finesight.cli import main\nsys.argv = ['finesight', '--help']\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
        f"loaded = sorted(set(sys.modules) & {set(HEAVY)!r})\nassert not loaded, loaded"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout


def test_no_grab_bag_modules() -> None:
    bags = [module_name(path) for path in MODULES if path.stem in {"utils", "util", "helpers", "misc", "common"}]
    assert not bags, f"{bags}: name a module after what it does"


def test_long_files_are_pointed_out() -> None:
    """A warning, not a failure: a file past this length asks to be split."""
    long = {module_name(path): lines for path in MODULES if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONG_FILE_LINES}
    if long:
        warnings.warn(f"files past {LONG_FILE_LINES} lines: {long}", stacklevel=1)
    assert all(lines < 2 * LONG_FILE_LINES for lines in long.values()), f"{long}: split these"


def tracked_files() -> list[Path]:
    """Files of the project as git sees them (new ones included), or all sources where there is no git."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=CHECKOUT,
            capture_output=True,
            check=True,
            text=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return [
            path for folder in ("src", "tests", "recipes", "examples", "docs") for path in (CHECKOUT / folder).rglob("*") if path.is_file()
        ]
    return [CHECKOUT / name for name in listed.split("\0") if name and (CHECKOUT / name).is_file()]


def test_nothing_names_a_machine() -> None:
    """No absolute paths of somebody's machine, and no package index, in any file of the project."""
    machine = re.compile(r"(?<![\w.])/(?:work|home|root|Users)/\w|extra-index-url\s*=|--index-url|find-links")
    found = []
    for path in tracked_files():
        if path == Path(__file__).resolve() or path.suffix in {".png", ".jpg", ".mp4", ".ttf"}:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if machine.search(line):
                found.append(f"{path.relative_to(CHECKOUT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_public_modules_have_docstrings() -> None:
    """Every module says what it is for; empty package markers may stay empty."""
    bare = [
        module_name(path) for path in MODULES if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not bare, bare


# What is imported, where the distribution is called otherwise or comes with one that is declared.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
    "pydantic_core": "pydantic",
    "markupsafe": "jinja2",
    "sklearn": "scikit-learn",
    "prometheus_client": "prometheus-client",
    "math_verify": "math-verify",
    "latex2sympy2_extended": "math-verify",
}
# Used where a machine or a user has them; looked for at run time, with a message where they are missing.
OPTIONAL = {"triton", "modelscope"}


def test_imports_are_declared() -> None:
    """Every library that the sources import is a dependency, or of an extra; those of extras are imported inside functions."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = {re.split(r"[<>=\[; ]", line)[0].lower() for line in project["dependencies"]}
    extras = {re.split(r"[<>=\[; ]", line)[0].lower() for lines in project["optional-dependencies"].values() for line in lines}
    missing = []
    for path in MODULES:
        for module_level_only, declared in ((True, core), (False, core | extras)):
            for line, name in imported_modules(path, module_level_only=module_level_only):
                top = name.split(".")[0]
                if top in sys.stdlib_module_names or top in ("finesight", *OPTIONAL):
                    continue
                if DISTRIBUTIONS.get(top, top).lower() not in declared:
                    missing.append(f"{path.relative_to(CHECKOUT)}:{line} {top}")
    assert not missing, missing


def test_validation_is_not_by_assert() -> None:
    """`python -O` removes asserts; a wrong input must be refused all the same."""
    found = [
        f"{path.relative_to(CHECKOUT)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert not found, found


def test_constraints_are_exact_and_portable() -> None:
    """Exact versions only: no local labels (+cpu), no paths, no hosts, and torch as the Makefile installs it."""
    lines = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    wrong = [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", pin)]
    assert not wrong, wrong
    torch_pin = next(pin for pin in pins if pin.startswith("torch=="))
    assert f"pip install {torch_pin}\n" in (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    assert not any(pin.startswith("torchvision") for pin in pins)  # its compiled part does not load beside a CPU build of torch
