"""The documents: the two READMEs are twins, their links and settings exist, their example recipes parse."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from finesight.data.formats import read_source
from finesight.data_settings import DataSettings, SourceSettings
from finesight.recipe import Recipe
from finesight.recipe_files import all_setting_names
from finesight.tasks.graders import GRADERS

CHECKOUT = Path(__file__).resolve().parents[1]
ENGLISH, CHINESE = CHECKOUT / "README.md", CHECKOUT / "README.zh-CN.md"
DOCUMENTS = [ENGLISH, CHINESE, CHECKOUT / "CONTRIBUTING.md", CHECKOUT / "CHANGELOG.md", *sorted((CHECKOUT / "docs").glob("*.md"))]


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def without_comments(code: str) -> list[str]:
    """Lines of a block as far as they are commands; comments are in the language of the document."""
    return [re.sub(r"(^|\s+)# .*$", "", line).rstrip() for line in code.splitlines()]


def headings(text: str) -> list[int]:
    return [len(marks) for marks in re.findall(r"^(#+) ", without_code(text), flags=re.MULTILINE)]


def named_settings(text: str) -> set[str]:
    """Dotted names of settings in `code` spans and blocks, such as training.learning_rate."""
    sections = "|".join(Recipe.model_fields)
    return set(re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z_][a-z0-9_.]*[a-z0-9_])(?![\w(/-])", text))


class TestTwins:
    def test_same_headings(self) -> None:
        assert headings(ENGLISH.read_text(encoding="utf-8")) == headings(CHINESE.read_text(encoding="utf-8"))

    def test_same_code(self) -> None:
        english, chinese = (code_blocks(path.read_text(encoding="utf-8")) for path in (ENGLISH, CHINESE))
        assert [language for language, _ in english] == [language for language, _ in chinese]
        for (language, one), (_, other) in zip(english, chinese, strict=True):
            if language in ("sh", "python", "yaml"):
                assert without_comments(one) == without_comments(other)

    def test_same_settings_and_links(self) -> None:
        english, chinese = (path.read_text(encoding="utf-8") for path in (ENGLISH, CHINESE))
        assert named_settings(english) == named_settings(chinese)
        links = [set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.md", "README.zh-CN.md"} for text in (english, chinese)]
        assert links[0] == links[1]

    def test_same_tables(self) -> None:
        english, chinese = (
            [len(table.splitlines()) for table in re.findall(r"(?:^\|.*\n)+", path.read_text(encoding="utf-8"), flags=re.MULTILINE)]
            for path in (ENGLISH, CHINESE)
        )
        assert english == chinese

    def test_the_two_commands_come_first(self) -> None:
        for path in (ENGLISH, CHINESE):
            first = without_comments(code_blocks(path.read_text(encoding="utf-8"))[0][1])
            assert first == ["make demo", "make test"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
class TestEachDocument:
    def test_links_lead_somewhere(self, path: Path) -> None:
        links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", without_code(path.read_text(encoding="utf-8")))
        broken = [link for link in links if not link.startswith("https://") and not (path.parent / link).exists()]
        assert not broken

    def test_settings_exist(self, path: Path) -> None:
        if path.name in ("CONTRIBUTING.md", "CHANGELOG.md"):
            return  # they name modules, which look alike
        known = all_setting_names()
        named = {re.sub(r"\.\d+", "", name) for name in named_settings(path.read_text(encoding="utf-8"))}
        unknown = {name for name in named if not any(f"{setting}.".startswith(f"{name}.") for setting in known)}
        assert not {name for name in unknown if not name.endswith((".md", ".py", ".jsonl"))}

    def test_python_is_python(self, path: Path) -> None:
        for language, code in code_blocks(path.read_text(encoding="utf-8")):
            if language == "python":
                ast.parse(code)


def json_examples(text: str) -> list[dict]:
    """Every object of the `json` blocks, whether on one line or several."""
    found = []
    for language, code in code_blocks(text):
        rest = code.strip() if language == "json" else ""
        while rest:
            value, end = json.JSONDecoder().raw_decode(rest)
            found.append(value)
            rest = rest[end:].strip()
    return found


@pytest.mark.parametrize("path", [ENGLISH, CHECKOUT / "docs" / "data.md"], ids=lambda path: path.name)
def test_example_rows_can_be_read(path: Path, tmp_path: Path) -> None:
    (tmp_path / "charts").mkdir()
    for name in ("1.png", "0001.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / "charts" / name)
    examples = json_examples(path.read_text(encoding="utf-8"))
    assert examples
    for number, row in enumerate(examples):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps(row) + "\n", encoding="utf-8")
        result = read_source(SourceSettings(path=str(file)), data=DataSettings(), base_dir=tmp_path)
        assert not result.bad_rows, (row, result.bad_rows)
        assert result.conversations[0].answer == "38"
        assert len(result.conversations[0].media) == 1


def test_recipes_named_in_the_readme_exist() -> None:
    named = set(re.findall(r"`(\w+\.yaml)`", ENGLISH.read_text(encoding="utf-8"))) - {"recipe.yaml"}
    assert named == {path.name for path in (CHECKOUT / "recipes").glob("*.yaml")}


def test_every_grader_and_option_is_documented() -> None:
    text = (CHECKOUT / "docs" / "graders.md").read_text(encoding="utf-8")
    table = text[text.index("## Every grader") : text.index("## What is right")]
    assert set(re.findall(r"`([^`]+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))) == set(
        GRADERS
    )
    options = {option for grader in GRADERS.values() for option in grader.options()}
    assert {option for option in options if f"`{option}`" not in text} == set()
