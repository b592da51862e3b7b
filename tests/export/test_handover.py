"""GGUF, model card and upload, as far as they go without llama.cpp and without a network."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard

from finesight.cli.export import report_lines
from finesight.errors import ExportError
from finesight.export.card import RunFacts, base_licence, model_card
from finesight.export.export import Export
from finesight.export.gguf import convert, read_header
from finesight.export.hub import upload
from finesight.export.merge import Merged, Survival
from finesight.export.verify import Agreement
from finesight.models.adapter_metadata import AdapterMetadata
from finesight.recipe_files import parse_recipe

# Stands for llama.cpp's converter: the same arguments, and files with a header of the right form.
CONVERTER = """
import argparse, pathlib, struct, sys
parser = argparse.ArgumentParser()
parser.add_argument("model"); parser.add_argument("--outfile"); parser.add_argument("--outtype"); parser.add_argument("--mmproj", action="store_true")
given = parser.parse_args()
if "refused" in given.model:
    print("Model architecture not known"); sys.exit(3)
out = pathlib.Path(given.outfile)
if given.mmproj and "prefixed" in given.model:
    out = out.with_name("mmproj-" + out.name)
out.write_bytes(b"GGUF" + struct.pack("<IQ", 3, 2 if given.mmproj else 7))
"""


class TestGGUF:
    @pytest.mark.parametrize("model", ["merged", "prefixed"])
    def test_both_parts(self, model: str, tmp_path: Path) -> None:
        script = tmp_path / "convert_hf_to_gguf.py"
        script.write_text(CONVERTER)
        said: list[str] = []
        made = convert(tmp_path / model, tmp_path, "charts", "bfloat16", tmp_path, said.append)
        assert [path.name for path in made] == ["charts-bf16.gguf", "mmproj-charts-bf16.gguf"]
        assert [read_header(path).num_tensors for path in made] == [7, 2]
        assert "--outtype bf16 --outfile" in said[0] and "--mmproj" in said[2]

    def test_its_last_words(self, tmp_path: Path) -> None:
        script = tmp_path / "convert.py"
        script.write_text(CONVERTER)
        with pytest.raises(ExportError, match=r"failed \(3\).*\n.*architecture not known"):
            convert(tmp_path / "refused", tmp_path, "charts", "bfloat16", script, print)

    def test_without_llama_cpp(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ExportError, match=r"was not found(.*\n)+.*git clone(.*\n)+.*--to merged"):
            convert(tmp_path / "merged", tmp_path, "charts", "float16", None, print)
        with pytest.raises(ExportError, match="Give --llama-cpp the folder"):
            convert(tmp_path / "merged", tmp_path, "charts", "float16", tmp_path / "none", print)

    @pytest.mark.parametrize("content", [b"", b"GGUF", b"NOPE" + bytes(12), b"GGUF" + struct.pack("<IQ", 3, 0)])
    def test_files_that_are_none(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(ExportError, match=r"GGUF file|no tensors"):
            read_header(tmp_path / "x.gguf")


def test_an_export_in_4_bits_says_what_its_figures_mean(tmp_path: Path) -> None:
    merged = Merged(tmp_path, (Survival("x", 1.68, 135.4**2, 1.0),), 10, 1)
    parted = Agreement(bound=2.0, largest=0.24, mean=0.13, num_tokens=72, num_answers=3, same_answers=0, widest_parting=0.05)
    said = "\n".join(report_lines(Export(tmp_path, "merged-4bit", parted, merged), "3 rows"))
    assert "prefers its own token to the trained one's by at most 0.05 nats (bound 4)" in said
    assert "135.4 times as much as the adapter" in said and "%" not in said
    said = "\n".join(report_lines(Export(tmp_path, "merged", HELD, merged), "3 rows"))
    assert "part, the" not in said and "168.0% arrived" in said


HELD = Agreement(bound=1e-4, largest=2e-6, mean=1e-6, num_tokens=72, num_answers=3, same_answers=3, widest_parting=0.0)
METADATA = AdapterMetadata("Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl", 65536, 401408, 4096, 8192, 2.0, 768, system="Answer briefly.")


def facts(folder: Path) -> RunFacts:
    recipe = parse_recipe(
        {
            "model": {"name_or_path": str(folder / "models" / "Qwen3-VL-8B")},
            "data": {"train": str(folder / "secret" / "charts.jsonl"), "eval_split": "5%"},
            "training": {"output_dir": str(folder / "runs" / "charts"), "learning_rate": 3e-5},
        }
    )
    run = {
        "data_fingerprint": "abc123",
        "state": {"num_samples": 1234, "last_loss": 0.25, "best_metric": 0.5},
        "versions": {"torch": "2.13.0"},
    }
    task = {"task": "charts", "grader": "relaxed_accuracy", "num_samples": 50, "accuracy": 0.82, "low": 0.7, "high": 0.9}
    return RunFacts(recipe, run, {"tasks": [task]})


class TestCard:
    def test_says_what_was_trained(self, tmp_path: Path) -> None:
        merged = Merged(tmp_path, (Survival("x", 0.5, 0.1, 1.0),), 10, 1)
        text = model_card(
            "charts", Export(tmp_path, "merged", HELD, merged, METADATA, ("a note",)), METADATA.base, facts(tmp_path), "apache-2.0"
        )
        for part in (
            "65,536 to 401,408 pixels", '"Answer briefly."', "charts.jsonl", "`abc123`", "1,234", "0.2500", "0.5000", "0.820 over 50 rows",
            "learning_rate: 3.0e-05", "a note", "50.0% of the adapter's update", "at most 2e-06 nats", "torch 2.13.0",
        ):  # fmt: skip
            assert part in text, part
        assert str(tmp_path) not in text  # nobody's folders
        card = ModelCard(text)
        assert card.data.license == "apache-2.0" and card.data.base_model == METADATA.base and card.data.library_name == "transformers"

    def test_the_best_of_reinforcement_is_a_reward(self, tmp_path: Path) -> None:
        recipe = parse_recipe({"model": {"name_or_path": "m"}, "grpo": {"num_generations": 4}, "rewards": ["math"]})
        for known, label in ((facts(tmp_path), "lowest held-out loss"), (RunFacts(recipe, facts(tmp_path).run), "highest held-out reward")):
            assert f"- {label}: 0.5000" in model_card("x", Export(tmp_path, "adapter", HELD), "m", known, None)

    def test_with_little_known(self, tmp_path: Path) -> None:
        text = model_card("x", Export(tmp_path, "adapter", HELD), str(tmp_path / "base"), RunFacts(), None)
        assert "Not stated. The licence of the base, base, holds" in text and "Nothing was measured." in text
        data = ModelCard(text).data
        assert data.license is None and data.base_model is None and data.library_name == "peft"

    def test_licence_of_the_base(self, tmp_path: Path) -> None:
        assert base_licence(tmp_path) is None
        (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
        assert base_licence(tmp_path) == "apache-2.0"


class TestUpload:
    def test_names_that_cannot_be(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=r"--repo not a name"):
            upload(tmp_path, "not a name")

    def test_no_network(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=r"upload to me/charts failed: .*hf upload me/charts"):
            upload(tmp_path, "me/charts", api=HfApi(endpoint="http://127.0.0.1:9", token="hf_none"))
