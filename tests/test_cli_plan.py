"""`finesight plan`: plans of real data and of none, for cards by name, the search, and what it imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finesight.cli import main
from finesight.cli.plan import Target, plan_recipe
from finesight.planner.moments import MemoryPlan
from finesight.planner.text import heading
from finesight.recipe_files import load_recipe
from tiny import tiny_checkpoint
from tiny_runs import MAX_PIXELS, MIN_PIXELS, write_rows

RECIPE = """\
# A recipe without data.
model: {name_or_path: Qwen/Qwen3-VL-8B-Instruct}
training: {output_dir: runs/planned, token_budget: 8192}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as done:
        status = int(done.code or 0)
    return status, *capsys.readouterr()


class TestPlan:
    def test_fits(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = run(capsys, "plan", recipe, "--gpu-name", "RTX 4090")
        assert status == 0
        assert "the catalogue of published models (Qwen3-VL-8B)" in out
        assert "weights: language model      12.94 GiB" in out
        assert "█" in out and "peak allocated" in out and "CUDA context" in out and "allocator slack" in out
        assert "Fits: " in out and "of RTX 4090" in out
        assert "What would change it most:" in out and "model.load_in_4bit=true" in out

    def test_does_not_fit(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = run(capsys, "plan", recipe, "--gpu", "12GiB")
        assert status == 1
        assert "Does not fit" in out and "12.00 GiB are there" in out

    def test_a_card_with_other_memory(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """--gpu-name says how fast the card is and what it can do, --gpu what memory there is of it."""
        _, out, _ = run(capsys, "plan", recipe, "--gpu-name", "4090", "--gpu", "12GiB")
        assert "12.00 GiB of RTX 4090 (--gpu; the card itself has 24 GiB) are there" in out
        target = Target.of("12GiB", "4090")
        assert (target.gpu.name, target.available_bytes) == ("RTX 4090", 12 * 2**30)
        assert run(capsys, "plan", recipe, "--gpu", "")[0] == 2 and run(capsys, "plan", recipe, "--gpu-name", "")[0] == 2

    @pytest.mark.parametrize("columns", ["70", "80"])
    def test_changes_are_shown_whole(
        self, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
    ) -> None:
        monkeypatch.setenv("COLUMNS", columns)
        _, out, _ = run(capsys, "plan", recipe, "--gpu-name", "RTX 4090")
        changes = json.loads(run(capsys, "plan", recipe, "--gpu-name", "RTX 4090", "--json")[1])["changes"]
        listed = out.split("What would change it most:")[1]
        assert max(map(len, out.splitlines())) <= int(columns)
        assert [word for word in listed.split() if "=" in word] == [
            f"{name}={str(value).lower()}" for change in changes for name, value in change["settings"].items()
        ]

    @pytest.mark.parametrize(
        ("model", "asked", "kept"),
        [
            ("30B-A3B", ["load_in_8bit"], "8-bit integer: attention; in bfloat16: vocabulary, experts, tower, merger"),
            ("30B-A3B", ["load_in_4bit"], "4-bit (NF4): attention, experts; in bfloat16: vocabulary, tower, merger"),
            (
                "8B",
                ["load_in_4bit", "quantize_vocabulary", "quantize_tower"],
                "4-bit (NF4): attention, MLP, tower, merger; in 8-bit integer: vocabulary",
            ),
        ],
    )
    def test_what_is_quantised_is_said(
        self, recipe: Path, capsys: pytest.CaptureFixture[str], model: str, asked: list[str], kept: str
    ) -> None:
        overrides = [f"model.{name}=true" for name in asked]
        _, out, _ = run(capsys, "plan", recipe, f"model.name_or_path=Qwen/Qwen3-VL-{model}-Instruct", *overrides)
        assert f"\nKept in {kept}\n" in re.sub(r" +\n", "\n", out)
        assert "Kept in" not in run(capsys, "plan", recipe)[1]

    def test_without_a_gpu(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = run(capsys, "plan", recipe)
        assert status == 0 and "Give --gpu 16GiB or --gpu-name" in out

    def test_overrides(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        peaks = []
        for override in ("model.load_in_4bit=false", "model.load_in_4bit=true"):
            _, out, _ = run(capsys, "plan", recipe, override, "--json")
            peaks.append(json.loads(out)["peak_bytes"])
        assert peaks[0] - peaks[1] > 9 * 2**30

    def test_sizes_in_place_of_data(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        _, out, _ = run(capsys, "plan", recipe, "--tokens", "4096", "--pixels", 448 * 448, "--gpu", "80GiB")
        assert "packs of 4,096 tokens, filled with images of about 448 × 448 pixels" in out

    def test_packs_too_small_for_an_image(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        asked = ("plan", recipe, "--pixels", 200704, "--tokens")
        least = "Note: 64 tokens a pack are less than one image with its text; packs of 260 are planned"
        assert least in run(capsys, *asked, 64)[1] and "Note:" not in run(capsys, *asked, 260)[1]
        groups = run(capsys, *asked, 64, "grpo.num_generations=8", "rewards=exact_match")[1]
        assert "Note: 64 tokens a pack are less than one prompt with a completion; packs of 500 are planned" in groups

    def test_another_card_than_was_asked_for(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "of RTX 4090, taken for '4090 Ti', which is not known" in run(capsys, "plan", recipe, "--gpu-name", "4090 Ti")[1]
        assert "which is not known" not in run(capsys, "plan", recipe, "--gpu-name", "4090")[1]
        assert json.loads(run(capsys, "plan", recipe, "--gpu-name", "4090 Ti", "--json")[1])["gpu"].startswith("RTX 4090, taken for")

    def test_several_gpus(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        full = ("tuning.method=full", "--gpu", "80GiB")
        status, out, _ = run(capsys, "plan", recipe, *full, "--gpus", "4")
        assert status == 1 and "On each of 4 GPUs, which have all of the model each" in out and "training.sharding=full" in out
        status, out, _ = run(capsys, "plan", recipe, *full, "--gpus", "4", "training.sharding=full")
        assert status == 0 and "On each of 4 GPUs, which share the model" in out and "gathered weights" in out
        assert "On 4 such GPUs it fits with training.sharding=full" in run(capsys, "plan", recipe, *full)[1]
        status, _, err = run(capsys, "plan", recipe, "training.sharding=full")
        assert status == 2 and "--gpus 2" in err

    def test_errors(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "No GPU 'RX 7900'" in run(capsys, "plan", recipe, "--gpu-name", "RX 7900")[2]
        status, _, err = run(capsys, "plan", recipe, "model.name_or_path=someone/llava")
        assert status == 2 and "neither a folder nor a published model" in err
        assert "--fit needs a GPU" in run(capsys, "plan", recipe, "--fit")[2]


class TestReinforcementWithoutData:
    """Prompts of 200,704 pixels are 196 visual tokens and 48 of text."""

    PROMPT, HEAD = 196 + 48, ("grpo.num_generations=8", "rewards=exact_match", "training.train_batch_size=32")

    def plan(self, recipe: Path, *overrides: str, gpus: int = 1) -> MemoryPlan:
        return plan_recipe(load_recipe(recipe, [*self.HEAD, *overrides]), Target(), pixels=200704, gpus=gpus).plan

    def test_packs_hold_groups_whose_prompt_is_there_once(self, recipe: Path) -> None:
        plan = self.plan(recipe, "rollout.max_completion_length=300", "training.token_budget=5500")
        group = self.PROMPT + 8 * 300
        assert [(pack.tokens, pack.targets, pack.patches) for pack in plan.sizes.packs] == [(2 * group, 2 * 2400, (784, 784))] * 2
        assert max(pack.tokens for pack in self.plan(recipe, "training.token_budget=2000").sizes.packs) <= 2000  # groups are divided
        assert sum(pack.samples for pack in self.plan(recipe, gpus=2).sizes.packs) == 16
        assert {pack.patches for pack in self.plan(recipe, "data.max_pixels=100352").sizes.packs} == {(392, 392)}

    def test_sampling_grows_with_what_is_sampled(self, recipe: Path) -> None:
        def cache(*overrides: str) -> int:
            return next(m.parts["key-value cache"] for m in self.plan(recipe, *overrides).moments if m.name == "rollout: sampling")

        token = 36 * 2 * 8 * 128 * 2  # layers, keys and values, heads, head size, bytes
        assert cache() == 4 * (self.PROMPT + 8 * 256) * token
        assert cache("rollout.max_completion_length=512") == 4 * (self.PROMPT + 8 * 512) * token
        assert cache("rollout.batch_size=16") == 2 * (self.PROMPT + 8 * 256) * token
        assert cache("grpo.num_generations=16") == 2 * (self.PROMPT + 16 * 256) * token
        assert cache("training.train_batch_size=16") == 2 * (self.PROMPT + 8 * 256) * token

    def test_what_is_needed_grows_with_each(self, recipe: Path) -> None:
        least = self.plan(recipe, "rollout.batch_size=8", "rollout.max_completion_length=1024").needed_bytes
        more = ("rollout.batch_size=32", "rollout.max_completion_length=4096", "grpo.num_generations=32")
        for setting in more:
            assert self.plan(recipe, "rollout.batch_size=8", "rollout.max_completion_length=1024", setting).needed_bytes > least

    def test_fewer_at_once_where_sampling_is_the_peak(self, recipe: Path) -> None:
        asked = load_recipe(recipe, [*self.HEAD, "rollout.max_completion_length=2048"])
        large = plan_recipe(asked, Target.of("24GiB", None), pixels=200704, search=True)
        assert large.plan.peak.name == "rollout: sampling" and not large.plan.fits(24 * 2**30)
        assert any(change.settings == (("rollout.batch_size", 16),) for change in large.changes)
        assert large.fitted is not None and "rollout.batch_size" in large.fitted.names and large.fitted.plan.fits(24 * 2**30)
        assert not any(name.startswith(("model.", "data.")) for name in large.fitted.names)
        roomy = plan_recipe(asked, Target.of("80GiB", None), pixels=200704, search=True).fitted
        assert roomy is not None and "rollout.batch_size" not in roomy.names

    def test_says_what_is_planned_and_what_is_not(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        asked = ("plan", recipe, *self.HEAD, "--pixels", 200704, "--gpu", "48GiB")
        status, out, _ = run(capsys, *asked, "grpo.beta=0.1")
        assert (
            status == 0
            and "for 4 prompts of at most 244 tokens 8 completions each, of at most 256" in out
            and "Reference (grpo.beta)" in out
        )
        assert "Not counted" not in out
        _, out, _ = run(capsys, *asked, "rollout={engine: vllm, url: 'http://127.0.0.1:8000'}")
        assert "Not counted: the server of rollout.engine: vllm" in out and "Sampled at once" not in out
        assert json.loads(run(capsys, *asked, "--json")[1])["rollout"]["completions"] == 8


class TestJson:
    def test_parts_add_up(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        _, out, _ = run(capsys, "plan", recipe, "--gpu", "24GiB", "--json")
        plan = json.loads(out)
        assert sum(plan["parts_bytes"].values()) == plan["peak_bytes"] == max(plan["moments_bytes"].values())
        assert plan["fits"] is (plan["needed_bytes"] <= 24 * 2**30)
        assert plan["changes"][0]["peak_bytes"] < plan["peak_bytes"]


class TestFit:
    def test_writes_a_recipe_that_fits(self, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fitted = tmp_path / "fitted.yaml"
        status, out, _ = run(capsys, "plan", recipe, "--gpu", "12GiB", "--fit", "--write", fitted)
        assert status == 0 and "Fastest that fits: model.load_in_" in out and f"Wrote {fitted}" in out
        assert fitted.read_text(encoding="utf-8").startswith("# recipe.yaml, fitted: model.load_in_")
        assert load_recipe(fitted).model.quantization in ("4bit", "8bit")
        assert run(capsys, "plan", fitted, "--gpu", "12GiB")[0] == 0
        status, _, err = run(capsys, "plan", recipe, "--gpu", "12GiB", "--fit", "--write", fitted)
        assert status == 2 and "not overwritten" in err

    def test_the_tokens_that_are_given_stay(self, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fitted = tmp_path / "fitted.yaml"
        sizes = ("--tokens", "4096", "--pixels", "200704", "--gpu", "12GiB")
        status, out, _ = run(capsys, "plan", recipe, *sizes, "--fit", "--write", fitted)
        assert status == 0 and "Fastest that fits: training.token_budget=4096 model.load_in_" in out
        assert load_recipe(fitted).training.token_budget == 4096
        assert "as auto chooses with that memory" in fitted.read_text(encoding="utf-8").splitlines()[1]
        assert run(capsys, "plan", fitted, *sizes[2:])[0] == 0

    def test_nothing_fits(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        status, _, err = run(capsys, "plan", recipe, "--gpu", "2GiB", "--fit")
        assert status == 2 and "Take a smaller model" in err

    def test_write_needs_fit(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(capsys, "plan", recipe, "--write", "x.yaml")[0] == 2


class TestWithData:
    def test_the_packs_of_the_data(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        folder, rows = tiny_checkpoint(tmp_path / "checkpoint", "qwen3_vl"), write_rows(tmp_path / "data")
        recipe = tmp_path / "recipe.yaml"
        content = f"model: {{name_or_path: {folder}}}\ndata: {{train: {rows}, min_pixels: {MIN_PIXELS}, max_pixels: {MAX_PIXELS}}}\n"
        recipe.write_text(content, encoding="utf-8")
        status, out, _ = run(capsys, "plan", recipe, "--gpu", "8GiB")
        assert status == 0
        assert "2 of 2 steps of the data" in out and str(folder / "config.json") in out

    def test_without_the_tokenizer_the_way_without_data_is_named(
        self, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The model's dimensions are known by name; sizes in tokens are not."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        rows = write_rows(tmp_path / "data")
        status, _, err = run(capsys, "plan", recipe, f"data.train={rows}", "--gpu", "24GiB")
        assert status == 2 and "that can be reached. The data's sizes" in err and "--pixels 1000000" in err
        assert run(capsys, "plan", recipe, f"data.train={rows}", "--gpu", "24GiB", "--pixels", "1000000")[0] == 0


def test_planning_without_data_imports_no_torch(recipe: Path) -> None:
    code = (
        "import sys\nfrom finesight.cli import main\ntry:\n"
        f"    main(['plan', {str(recipe)!r}, '--gpu', '24GiB', '--fit'])\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
        "loaded = sorted(set(sys.modules) & {'torch', 'transformers', 'peft', 'accelerate', 'datasets'})\nassert not loaded, loaded"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_checkpoint_in_four_bits_is_planned_so(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name_or_path: unsloth/Qwen3-VL-8B-Instruct-bnb-4bit}\n", encoding="utf-8")
    asked = tmp_path / "asked.yaml"
    asked.write_text("model: {name_or_path: Qwen/Qwen3-VL-8B-Instruct, load_in_4bit: true}\n", encoding="utf-8")
    peaks = [plan_recipe(load_recipe(path), Target(), pixels=200704).plan.peak_bytes for path in (recipe, asked)]
    assert peaks[0] == peaks[1]


def test_experts_of_a_checkpoint_in_four_bits_are_planned_as_they_are(tmp_path: Path) -> None:
    """bitsandbytes quantises linear layers only; the fused experts come to 4 bits where the recipe asks for them."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name_or_path: someone/Qwen3-VL-30B-A3B-Instruct-bnb-4bit}\n", encoding="utf-8")
    stored, asked = (
        plan_recipe(load_recipe(recipe, overrides), Target(), pixels=200704).plan for overrides in ([], ["model.load_in_4bit=true"])
    )
    experts = 48 * 128 * 3 * 2048 * 768
    saved = stored.peak.parts["weights: language model"] - asked.peak.parts["weights: language model"]
    assert saved == pytest.approx(experts * (2 - 0.516), rel=0.01)
    assert "in bfloat16: vocabulary, experts" in heading(stored)[1] and "4-bit (NF4): attention, experts" in heading(asked)[1]


def test_fit_keeps_the_precision_where_that_fits(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name_or_path: Qwen/Qwen3-VL-8B-Instruct}\n", encoding="utf-8")
    found = plan_recipe(load_recipe(recipe), Target.of("24GiB", None), pixels=200704, search=True).fitted
    assert found is not None and not any(name.startswith("model.") for name in found.names)
    tight = plan_recipe(load_recipe(recipe), Target.of("16GiB", None), pixels=200704, search=True).fitted
    assert tight is not None and any(name.startswith("model.") for name in tight.names)
