"""The measuring scripts: the same samples for everybody, honest counts, claims that survive failures, a document that says what the results say."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from bench import arithmetic, assembly, claim, comparison, merge, models, profile_step, report, rows, workload
from bench.checkpoint import main as make_checkpoint
from bench.checkpoint import write_processor
from bench.claims import NAMES, claim_of
from bench.encoding import encode, patches, supervised_tokens
from bench.tokenizer import SINGLE_BYTES, SPECIALS, read_ranks, tokenizer_of
from torch import nn

from finesight.data.layout import TowerShape
from finesight.data.pack import pack_step
from finesight.data.pixels import visual_patches
from finesight.data.processor import load_processor

CHECKOUT = Path(__file__).resolve().parents[1]
SHARED_BENCH = CHECKOUT / ".." / "shared" / "bench"  # beside the checkout; only some machines have it
TRAINING = ["--device", "cpu", "--batch", "4", "--budget", "1024", "--workers", "0", "--steps", "3", "--warm", "1"]


def run_module(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The rows that a script prints."""
    capsys.readouterr()
    importlib.import_module(f"bench.{name}").main(arguments)
    return [row for line in capsys.readouterr().out.splitlines() if (row := rows.parse(line)) is not None]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with processor and weights for each tiny model."""
    folders = {name: tmp_path_factory.mktemp(name) for name in models.TINY}
    for name, folder in folders.items():
        make_checkpoint([name, str(folder), "--device", "cpu"])
    return folders


class TestWorkload:
    def test_is_the_same_as_ever(self) -> None:
        """Questions, answers and sizes; how text is drawn on the images depends on Pillow."""
        digest = hashlib.sha256()
        for kind in workload.KINDS:
            for per_image in (1, 6):
                for row in workload.rows(kind, 20, per_image=per_image):
                    digest.update(repr((row.question, row.answer, row.image.size)).encode())
        assert digest.hexdigest()[:16] == "81c31b4387ed433a"

    def test_rows_of_one_image_share_it(self) -> None:
        made = workload.rows("chart", 8, per_image=3)
        assert [made[i].image is made[0].image for i in range(4)] == [True, True, True, False]
        assert len(made) == 8

    @pytest.mark.parametrize("kind", workload.KINDS)
    def test_equals_the_shared_one(self, kind: workload.Kind) -> None:
        path = SHARED_BENCH / "workload.py"
        if not path.is_file():
            pytest.skip("the shared workload (shared/bench beside the checkout) is not on this machine")
        theirs = load_file(path).samples(kind, 12, per_image=2)
        for row, other in zip(workload.rows(kind, 12, per_image=2), theirs, strict=True):
            assert (row.question, row.answer) == (other["question"], other["answer"])
            assert row.image.tobytes() == other["image"].tobytes()

    def test_groups_like_lengths(self) -> None:
        made = workload.rows("chart", 16)
        grouped = workload.in_batches_of_like_length(made, 4)
        assert sorted(map(id, grouped)) == sorted(map(id, made))
        pixels = [row.image.width * row.image.height for row in grouped]
        ordered = sorted(pixels)
        assert sorted(tuple(pixels[i : i + 4]) for i in range(0, 16, 4)) == sorted(tuple(ordered[i : i + 4]) for i in range(0, 16, 4))


def load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestTokenizer:
    def test_bytes_and_specials(self) -> None:
        tokenizer = tokenizer_of(SINGLE_BYTES)
        text = "Größe 12,5 %\n你好"
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert tokenizer.convert_tokens_to_ids(list(SPECIALS)) == list(range(256, 256 + len(SPECIALS)))

    def test_merges_in_the_order_of_ranks(self, tmp_path: Path) -> None:
        ranks = {**SINGLE_BYTES, b"he": 256, b"ll": 257, b"hell": 258, b"hello": 259}
        assert tokenizer_of(ranks)("hello hell")["input_ids"] == [259, 32, 258]

    def test_reads_the_published_form(self, tmp_path: Path) -> None:
        (tmp_path / "some.tiktoken").write_bytes(b"IQ== 0\nIg== 1\nISI= 2\n\n")
        assert read_ranks(tmp_path / "some.tiktoken") == {b"!": 0, b'"': 1, b'!"': 2}

    def test_refuses_ranks_with_a_gap(self) -> None:
        with pytest.raises(ValueError, match="not consecutive"):
            tokenizer_of({b"a": 0, b"b": 2})


class TestCheckpoint:
    @pytest.mark.parametrize("name", models.TINY)
    def test_our_loader_reads_it(self, name: str, checkpoints: dict[str, Path]) -> None:
        processor = load_processor(checkpoints[name])
        assert processor.image_token_id == models.configuration(name).image_token_id
        row = workload.rows("chart", 1)[0]
        (sample,) = encode([row], "chart", checkpoints[name])
        # The answer and the end of the turn are supervised.
        trained = processor.tokenizer.decode(sample.token_ids[sample.trained])
        assert trained == row.answer + "<|im_end|>"

    @pytest.mark.parametrize("name", models.TINY)
    def test_weights_are_those_made_in_memory(self, name: str, checkpoints: dict[str, Path]) -> None:
        made = models.build(name, device="cpu", dtype=torch.float32)
        loaded = type(made).from_pretrained(checkpoints[name])
        states = made.state_dict(), loaded.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
        assert all(torch.equal(a, b) for a, b in zip(made.buffers(), loaded.buffers(), strict=True))

    def test_needs_the_vocabulary_it_was_made_for(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"qwen\.tiktoken"):
            write_processor("qwen3-vl-2b", tmp_path, None)
        (tmp_path / "other.tiktoken").write_bytes(b"IQ== 0\nIg== 1\n")
        with pytest.raises(ValueError, match="is not the vocabulary"):
            write_processor("qwen3-vl-2b", tmp_path, tmp_path / "other.tiktoken")


class TestArithmetic:
    @pytest.mark.parametrize("name", ["tiny-qwen3-vl", "tiny-qwen2.5-vl", "qwen3-vl-8b", "qwen2.5-vl-7b", "qwen2.5-vl-72b"])
    def test_matrices_are_those_of_the_model(self, name: str) -> None:
        config = models.configuration(name, layers=2)
        model = models.outline(name, layers=2).model

        def weights(module: nn.Module) -> int:
            return sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv3d)))

        matrices = arithmetic.layer_matrices(config.text_config)
        assert sum(a * b for a, b in matrices.values()) == weights(model.language_model.layers[0])
        tower = arithmetic.tower_matrices(config.vision_config)
        visual = model.visual
        mergers = nn.ModuleList([visual.merger, *getattr(visual, "deepstack_merger_list", [])])
        assert tower["token"] == weights(mergers)
        assert tower["patch"] == weights(visual) - weights(mergers)

    @pytest.mark.parametrize("share", [True, False])
    def test_work_is_that_of_the_batch(self, share: bool, checkpoints: dict[str, Path]) -> None:
        name = "tiny-qwen2.5-vl"
        processor = load_processor(checkpoints[name])
        shape = TowerShape.of(models.configuration(name).vision_config)
        samples = encode(workload.rows("chart", 6, per_image=3), "chart", checkpoints[name])
        (plan,) = pack_step(samples, token_budget=10_000, share=share)
        batch = plan.build(lambda item: visual_patches(item, processor), tower=shape)
        work = arithmetic.work_of(plan, shape)
        layout = batch.layout
        causal = [q * (k - q) + q * (q + 1) // 2 for q, k in zip(layout.query_lengths, layout.key_lengths, strict=True)]
        assert work.tokens == batch.num_tokens
        assert work.key_pairs == sum(causal)
        assert work.targets == batch.num_targets
        assert work.patches == len(batch.patches) == 4 * work.visual_tokens
        assert batch.tower is not None and batch.tower.windows is not None
        assert work.frame_pairs == sum(n * n for n in batch.tower.frames.query_lengths)
        assert work.window_pairs == sum(n * n for n in batch.tower.windows.query_lengths)

    def test_counts_by_hand(self) -> None:
        config = models.configuration("tiny-qwen3-vl", layers=1)
        work = arithmetic.Work(tokens=10, key_pairs=55, targets=2, target_pairs=19)
        flop = arithmetic.needed_flop(config, work, r=4)
        # One layer is both first and last: keys and values of all tokens without gradients of their input; the query, too, has
        # nothing that trains below it; the rest on the two rows that are read, forward and backward.
        hidden, queries, keys, mlp = 32, 32, 16, 48
        base = 2 * (10 * 2 * hidden * keys + 2 * hidden * queries) + 4 * 2 * (queries * hidden + 3 * hidden * mlp)
        assert flop["base"] == base
        assert flop["attention"] == 12 * 32 * 19
        assert flop["vocabulary"] == 4 * 2 * 32 * 288
        assert flop["tower"] == 0


class TestOurSide:
    @pytest.mark.parametrize("name", models.TINY)
    def test_trains_and_counts(self, name: str, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        (row,) = run_module("sft", ["--model", name, "--checkpoint", str(checkpoints[name]), *TRAINING, "--per-image", "2"], capsys)
        assert not row.get("failed"), row
        samples = encode(workload.rows("chart", 12, per_image=2), "chart", checkpoints[name])
        assert row["supervised_tokens_per_sample"] == pytest.approx(supervised_tokens(samples) / 12, rel=1e-5)
        assert row["patches_per_sample"] == pytest.approx(patches(samples) / 12, rel=1e-5)
        assert row["sample_tokens_s"] > row["tokens_s"]  # two questions share an image
        assert len(row["step_s"]) == len(row["losses"]) == len(row["wait_s"]) == 3
        assert row["samples_s_wall"] == pytest.approx(8 / sum(row["step_s"][1:]), rel=0.05)
        assert row["since_start_s"]["first_step"] > row["since_start_s"]["model_ready"]
        assert row["machine"]["system"] and row["versions"]["torch"] and row["code"]["sources"]

    def test_loads_weights_as_users_do(self, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        common = ["--model", "tiny-qwen3-vl", "--checkpoint", str(checkpoints["tiny-qwen3-vl"]), *TRAINING]
        (made,) = run_module("sft", common, capsys)
        (loaded,) = run_module("sft", [*common, "--load"], capsys)
        assert loaded["losses"] == made["losses"]

    def test_workers_and_files(self, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        common = ["--model", "tiny-qwen3-vl", "--checkpoint", str(checkpoints["tiny-qwen3-vl"]), *TRAINING]
        (in_memory,) = run_module("sft", common, capsys)
        (from_files,) = run_module("sft", [*common, "--images", "png", "--workers", "1"], capsys)
        assert from_files["losses"] == in_memory["losses"]

    def test_epochs_stand_apart(self, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--model", "tiny-qwen3-vl", "--checkpoint", str(checkpoints["tiny-qwen3-vl"]), *TRAINING, "--steps", "6"]
        (row,) = run_module("sft", [*arguments, "--epochs", "2", "--cache"], capsys)
        assert [(part["epoch"], part["steps"]) for part in row["by_epoch"]] == [(0, 2), (1, 3)]
        assert [part["feature_hit_rate"] for part in row["by_epoch"]] == [0, 1]
        assert "needed_tflop_s" not in row  # part of the tower is not computed

    @pytest.mark.parametrize("wrong", [["--budget", "32"], ["--set", "training.no_such_setting=1"], ["--warm", "3"]])
    def test_a_failure_is_a_row(self, wrong: list[str], checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--model", "tiny-qwen3-vl", "--checkpoint", str(checkpoints["tiny-qwen3-vl"]), *TRAINING, *wrong]
        (row,) = run_module("sft", arguments, capsys)
        assert row["failed"] and row["reason"] and row["token_budget"]

    def test_ends_when_time_is_up(self, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--model", "tiny-qwen3-vl", "--checkpoint", str(checkpoints["tiny-qwen3-vl"]), *TRAINING, "--steps", "40"]
        (row,) = run_module("sft", [*arguments, "--time-limit", "0"], capsys)
        assert 2 <= row["steps_done"] < 6

    def test_weights_shared_by_names_count_once(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        assert assembly.weights_bytes(model) == 64


class TestOtherScripts:
    def test_exactness(self, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        checkpoint = str(checkpoints["tiny-qwen3-vl"])
        (row,) = run_module(
            "exactness", ["--model", "tiny-qwen3-vl", "--checkpoint", checkpoint, "--device", "cpu", "--samples", "2"], capsys
        )
        assert row["gradient_errors"]["ours"] < 1e-5
        assert row["loss_off_plain"] < 1e-5
        assert row["worst_cosines"]["ours"][0] > 1 - 1e-6

    def test_adapter_cost(self, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        checkpoint = str(checkpoints["tiny-qwen3-vl"])
        arguments = ["--model", "tiny-qwen3-vl", "--checkpoint", checkpoint, "--device", "cpu", "--batch", "2", "--budget", "1024"]
        found = {row["what"]: row for row in run_module("adapter_cost", arguments, capsys)}
        assert found["survival"]["shares"]["ours"] > 0.9 > found["survival"]["shares"]["peft_autocast"]
        assert found["adapted"]["median_s"] > 0 and found["frozen_base"]["median_s"] > 0

    def test_roofline(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--model", "tiny-qwen3-vl", "--device", "cpu", "--tokens", "16", "--size", "16", "--copy-bytes", "4096"]
        found = run_module("roofline", [*arguments, "--precisions", "float32", "no_such"], capsys)
        assert [row["row"] for row in found] == ["roofline", "roofline", "copy"]
        assert found[0]["square_tflop_s"] > 0 and len(found[0]["shapes_tflop_s"]) == 5
        assert found[1]["failed"] and "no_such" in found[1]["reason"]

    def test_profile(self, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        checkpoint = str(checkpoints["tiny-qwen3-vl"])
        (row,) = run_module("profile_step", ["--model", "tiny-qwen3-vl", "--checkpoint", checkpoint, *TRAINING], capsys)
        assert not row.get("failed"), row
        assert {"attention", "matrix products", profile_step.OTHER} <= row["groups"].keys()
        assert len(row["largest"]) == 5
        whole = row["gaps"]["share"] + sum(group["share"] for group in row["groups"].values())
        assert whole == pytest.approx(1, abs=0.01)

    @pytest.mark.parametrize(
        ("name", "group", "short"),
        [
            ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNN", "matrix products", "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNN"),
            ("triton_poi_fused_add_cat_index_select_mm_3", profile_step.OTHER, "triton_poi_fused_add_cat_index_select_mm_3"),
            ("void flash_fwd_kernel<Traits<128, 128>>(Params)", "attention", "flash_fwd_kernel"),
            ("Memcpy HtoD (Pinned -> Device)", "copies", "Memcpy HtoD"),
            (
                "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(at::X&)::{lambda()#3}>(int)",
                "copies",
                "at::native::elementwise_kernel (direct_copy_kernel_cuda)",
            ),
            ("aten::addmm_", "matrix products", "aten::addmm_"),
        ],
    )
    def test_kernels_are_told_apart(self, name: str, group: str, short: str) -> None:
        assert profile_step.group_of(name) == group
        assert profile_step.short_name(name) == short

    def test_overlapping_kernels_cover_time_once(self) -> None:
        intervals = [profile_step.Interval("a", 0, 10), profile_step.Interval("b", 5, 10), profile_step.Interval("c", 20, 5)]
        assert profile_step.covered(intervals) == 20

    def test_peers_script_packs_are_bash(self) -> None:
        script = CHECKOUT / "bench" / "prepare_peers.sh"
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
        assert subprocess.run(["bash", str(script)], capture_output=True).returncode == 2


class TestPeers:
    @pytest.mark.parametrize("system", ["unsloth", "trl"])
    def test_says_what_is_missing(self, system: str, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        if importlib.util.find_spec(system):
            pytest.skip(f"{system} is installed here")
        (row,) = run_module(
            "peers", [system, str(checkpoints["tiny-qwen3-vl"]), "--cpu", "--no-gc", "--batch", "2", "--steps", "2"], capsys
        )
        assert row["failed"] and system in row["reason"]
        assert (row["system"], row["recompute"], row["samples_per_step"]) == (system, "none", 16)

    def test_the_line_feed_behind_an_answer_is_not_supervised(self) -> None:
        from bench.peers import without_final_line_feed

        class Plain:
            __slots__ = ()

            def __call__(self, examples: list[list[int]]) -> dict[str, torch.Tensor]:
                ids = torch.tensor(examples)
                return {"input_ids": ids, "labels": ids.clone()}

        collate = without_final_line_feed(Plain, end_id=7, line_feed_id=3)()
        assert isinstance(collate, Plain)
        assert collate([[3, 5, 7, 3, 3]])["labels"].tolist() == [[3, 5, 7, -100, 3]]

    def test_each_sample_is_seen_once(self) -> None:
        from bench import peers

        seen: list[Any] = []
        original = peers.trl_trainer
        try:
            peers.trl_trainer = lambda a, made: seen.append(made) or (_ for _ in ()).throw(RuntimeError("enough"))  # type: ignore[func-returns-value]
            peers.main(["trl", "nowhere", "--cpu", "--batch", "2", "--accumulation", "3", "--steps", "4", "--grouped"])
        finally:
            peers.trl_trainer = original
        assert len(seen[0]) == 24


def tiny_arguments(checkpoints: dict[str, Path], results: Path, *further: str) -> list[str]:
    return ["--tiny", "--checkpoint", str(checkpoints["tiny-qwen3-vl"]), "--results", str(results), *further]


# Of claims with many settings, those that are tried; the others differ in no more than names of settings.
TRIED = {
    "memory": ("30b-a3b", "8b-tuned"),
    "grpo_step": ("ours", "trl-8"),
    "serve": ("ours",),
    "chart_memory": ("unsloth-8-checkpointing", "ours-offload-4096", "ours-fp8-all-full-13312", "ours-fp8-selective-2048"),
}


# Claims whose one setting runs a peer beside ours, which the machine of the tests may lack.
PEERS_NEEDED = ("serve_cpu",)


@pytest.fixture(scope="module")
def tried(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all claims, tried on the CPU in the order in which they are to be measured."""
    results = tmp_path_factory.mktemp("results")
    for name in NAMES:
        only = ("--only", *TRIED[name]) if name in TRIED else ()
        claim.main(claim_of(name), tiny_arguments(checkpoints, results, *only))
    return results


class TestClaims:
    @pytest.mark.parametrize("name", NAMES)
    def test_each_can_be_run(self, name: str, tried: Path) -> None:
        mine = claim_of(name)
        content = json.loads(claim.results_path(tried, mine, claim.TINY_MODEL).read_text(encoding="utf-8"))
        assert {row["label"] for row in content["rows"]} == set(TRIED.get(name, [run.label for run in mine.runs]))
        ours = [row for row in content["rows"] if row["module"] not in claim.PEERS and name not in PEERS_NEEDED]
        assert ours or name.startswith("peer") or name in PEERS_NEEDED
        assert not [row["reason"] for row in ours if row.get("failed")]
        assert [finding["what"] for finding in content["findings"]] == [finding.what for finding in mine.findings([])]

    @pytest.mark.parametrize("name", NAMES)
    def test_each_is_a_script_of_its_own(self, name: str) -> None:
        module = importlib.import_module(f"bench.claims.{name}")
        assert module.__doc__ and module.CLAIM.name == name
        assert 'if __name__ == "__main__":\n    main(CLAIM)' in Path(str(module.__file__)).read_text(encoding="utf-8")

    def test_equal_settings_are_measured_once(self, tried: Path) -> None:
        stamps = set()
        for name in ("chart_bf16", "chart_grouped", "arithmetic_share", "data_wait"):
            content = json.loads((tried / f"{name}-{claim.TINY_MODEL}.json").read_text(encoding="utf-8"))
            stamps |= {tuple(row["step_s"]) for row in content["rows"] if row["label"] == "ours"}
        assert len(stamps) == 1

    def test_a_dry_run_runs_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        claim.main(claim_of("chart_bf16"), ["--dry-run", "--results", str(tmp_path)])
        commands = capsys.readouterr().out.splitlines()
        assert len(commands) == len(claim_of("chart_bf16").runs)
        assert commands[0].startswith("python -m bench.sft --model qwen3-vl-8b")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", NAMES)
    def test_peers_and_ours_take_as_many_samples_a_step(self, name: str) -> None:
        sides: dict[str, set[int]] = {"bench.peers": set(), "bench.sft": set()}
        for run in claim_of(name).runs:
            values = dict(zip(run.arguments, run.arguments[1:], strict=False))
            if run.module in sides:
                sides[run.module].add(int(values["--batch"]) * int(values.get("--accumulation", 1)))
        if sides["bench.peers"]:
            assert sides["bench.peers"] == sides["bench.sft"] and len(sides["bench.sft"]) == 1


def a_claim(*runs: claim.Run) -> claim.Claim:
    return claim.Claim("some", "Some claim", runs, lambda measured: [claim.Finding("rows", 1, float(len(measured)), "")])


ROOFLINE = ("--model", "tiny-qwen3-vl", "--device", "cpu", "--tokens", "16", "--size", "16", "--copy-bytes", "4096")


class TestRunner:
    def test_runs_in_processes_and_survives_failures(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        mine = a_claim(claim.Run("broken", "bench.no_such_script", ()), claim.Run("works", "bench.roofline", ROOFLINE))
        arguments = ["--model", "tiny-qwen3-vl", "--checkpoint", str(checkpoints["tiny-qwen3-vl"]), "--results", str(tmp_path)]
        (finding,) = claim.main(mine, arguments)
        assert finding.value == 1
        content = json.loads((tmp_path / "some-tiny-qwen3-vl.json").read_text(encoding="utf-8"))
        broken, *works = content["rows"]
        assert broken["failed"] and "No module named bench.no_such_script" in broken["reason"]
        assert [row["row"] for row in works] == ["roofline", "copy"]
        assert all(row["machine"] and row["versions"] and row["code"] and row["measured_at"] for row in content["rows"])

    def test_a_setting_that_takes_too_long_is_stopped(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        mine = a_claim(claim.Run("slow", "bench.roofline", ROOFLINE))
        arguments = ["--model", "tiny-qwen3-vl", "--checkpoint", str(checkpoints["tiny-qwen3-vl"]), "--results", str(tmp_path)]
        claim.main(mine, [*arguments, "--run-limit", "0.2"])
        (row,) = json.loads((tmp_path / "some-tiny-qwen3-vl.json").read_text(encoding="utf-8"))["rows"]
        assert row["failed"] and row["reason"] == "stopped after 1 s"

    def test_results_stay_over_calls(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        runs = [claim.Run(label, "bench.roofline", (*ROOFLINE, "--tokens", tokens)) for label, tokens in (("one", "8"), ("two", "16"))]
        mine = a_claim(*runs)
        common = tiny_arguments(checkpoints, tmp_path)
        claim.main(mine, [*common, "--only", "two"])
        first = self.rows(tmp_path)
        assert {row["label"] for row in first} == {"two"}
        claim.main(mine, [*common, "--only", "one"])
        both = self.rows(tmp_path)
        assert [row["label"] for row in both] == ["one", "one", "two", "two"]
        assert both[2:] == first
        # No time left: what was measured before is worth more than the note that nothing was.
        claim.main(mine, [*common, "--fresh", "--time-limit", "-1"])
        assert self.rows(tmp_path) == both

    def test_what_was_not_reached_in_time_is_noted(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        claim.main(a_claim(claim.Run("one", "bench.roofline", ROOFLINE)), tiny_arguments(checkpoints, tmp_path, "--time-limit", "-1"))
        (row,) = self.rows(tmp_path)
        assert row["failed"] and row["reason"].startswith("not measured")

    def test_a_script_of_several_is_measured_again_if_one_of_them_failed(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        mine = a_claim(claim.Run("one", "bench.roofline", (*ROOFLINE, "--precisions", "float32", "no_such")))
        common = tiny_arguments(checkpoints, tmp_path)
        claim.main(mine, common)
        path = tmp_path / f"some-{claim.TINY_MODEL}.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        for row in content["rows"]:
            row["measured_at"] = "2000-01-01T00:00:00Z"
        path.write_text(json.dumps(content), encoding="utf-8")
        claim.main(mine, common)
        assert not any(row["measured_at"].startswith("2000") for row in self.rows(tmp_path))

    def test_our_side_gets_single_packages_of_the_peers(self, tmp_path: Path) -> None:
        for folder in ("bitsandbytes", "bitsandbytes-1.0.dist-info", "peft", "peft-9.dist-info", "unsloth"):
            (tmp_path / "site" / folder).mkdir(parents=True)
        run = claim.ours("one", packages=("bitsandbytes",))
        arguments = claim.parser_for("").parse_args(["--peers", str(tmp_path / "site"), "--results", str(tmp_path)])
        runner = claim.Runner(a_claim(run), arguments)
        site = Path(runner._environment(run)["PYTHONPATH"].split(":")[0])
        assert {path.name for path in site.iterdir()} == {"bitsandbytes", "bitsandbytes-1.0.dist-info"}
        assert "site" not in runner._environment(claim.ours("two"))["PYTHONPATH"]
        assert runner._environment(claim.peer("three", "trl"))["PYTHONPATH"].startswith(f"{tmp_path / 'site'}:")

    def test_the_peers_are_unpacked_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of two claims that begin at the same time the later one takes what the first one has unpacked."""
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        (tmp_path / "trl").mkdir()
        (tmp_path / "trl" / "__init__.py").write_text("")
        archive = tmp_path / "peers.tar.xz"
        with tarfile.open(archive, "w:xz") as file:
            file.add(tmp_path / "trl", "trl")
        site = claim._site(archive)
        mark = site / "in_use"
        mark.touch()
        claim._unpack(archive, site)  # both saw that there was none
        assert mark.exists() and (site / "trl" / "__init__.py").exists()
        assert {path.name for path in tmp_path.iterdir()} == {"trl", archive.name, site.name}
        with pytest.raises(OSError):
            claim._unpack(archive, archive)  # what is in the way is no folder

    def test_the_vocabulary_is_named_where_it_was_given(self, tmp_path: Path) -> None:
        run = claim.Run("one", "bench.memory", ("4b", "--bpe={bpe}"))
        for given, expected in (([], ["4b"]), (["--bpe", "some.tiktoken"], ["4b", "--bpe=some.tiktoken"])):
            runner = claim.Runner(a_claim(run), claim.parser_for("").parse_args([*given, "--results", str(tmp_path)]))
            assert runner.arguments(run) == expected

    def test_other_code_is_measured_anew(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        mine = a_claim(claim.Run("one", "bench.roofline", ROOFLINE))
        common = tiny_arguments(checkpoints, tmp_path)
        claim.main(mine, common)
        path = tmp_path / f"some-{claim.TINY_MODEL}.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        for row in content["rows"]:
            row["code"]["sources"], row["measured_at"] = "other", "2000-01-01T00:00:00Z"
        path.write_text(json.dumps(content), encoding="utf-8")
        claim.main(mine, common)
        assert all(not row["measured_at"].startswith("2000") for row in self.rows(tmp_path))

    @staticmethod
    def rows(folder: Path) -> list[dict[str, Any]]:
        return json.loads((folder / f"some-{claim.TINY_MODEL}.json").read_text(encoding="utf-8"))["rows"]


def made_row(label: str, samples_s: float, **values: Any) -> dict[str, Any]:
    """A row such as a measurement would give."""
    row = {
        "label": label, "row": "sft", "system": "finesight", "model": "qwen3-vl-8b", "kind": "chart", "per_image": 1, "precision": "bf16",
        "recompute": "none", "compiled": True, "token_budget": 8192, "batch": 16, "accumulation": 4, "samples_s": samples_s,
        "samples_s_wall": samples_s, "peak_gib": 60.0, "tokens_per_sample": 370.0, "supervised_tokens_per_sample": 2.9,
        "patches_per_sample": 1250.0, "tokens_s": 370 * samples_s, "padded_tokens_s": 380 * samples_s, "wait_share": 0.01, "module": "bench.sft",
        "machine": {"gpu": "Some GPU", "gpus": 1, "gpu_memory_gib": 139.0, "driver": "1.2", "processors": 16, "boot": "a"},
        "versions": {"torch": "2.11.0"}, "code": {"commit": "abc", "sources": "def"}, "measured_at": "2026-01-02T03:04:05Z",
    }  # fmt: skip
    return {**row, **values}


class TestMerge:
    """Results of calls in folders of their own."""

    @staticmethod
    def row(label: str, day: int, **values: Any) -> dict[str, Any]:
        return {"label": label, "measured_at": f"2026-01-{day:02}T00:00:00Z", **values}

    def test_what_was_measured_last_stays(self) -> None:
        row = self.row
        before = [row("a", 2, value=1), row("b", 2, value=1), row("c", 2, failed=True), row("d", 2, value=1)]
        further = [row("a", 3, value=2), row("b", 1, value=2), row("c", 3, value=2), row("d", 3, failed=True), row("e", 1, failed=True)]
        assert merge.merged(before, further) == [further[0], before[1], further[2], before[3], further[4]]
        assert merge.merged(merge.merged(before, further), further) == merge.merged(before, further)

    def test_configurations_of_a_group_by_name(self) -> None:
        row = self.row
        before = [row("a", 1, name="x", value=1), row("a", 1, name="y", value=1), row("a", 1, name="z", failed=True)]
        further = [row("a", 2, name="x", value=2), row("a", 2, name="y", failed=True), row("a", 2, name="z", failed=True)]
        assert merge.merged(before, further) == [further[0], before[1], further[2]]
        assert merge.merged([row("a", 1, failed=True)], further) == further

    def test_into_the_files_of_the_claims(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        first, second, into = (tmp_path / name for name in ("first", "second", "into"))
        for folder, label in ((first, "4b"), (second, "2b")):
            path = claim.results_path(folder, claim_of("memory"), claim.DEFAULT_MODEL)
            claim.write_results(path, claim_of("memory"), claim.DEFAULT_MODEL, [self.row(label, 1, failed=True, reason="none")])
        merge.main([str(first), str(second), "--into", str(into)])
        content = json.loads((into / "memory.json").read_text(encoding="utf-8"))
        assert [row["label"] for row in content["rows"]] == ["4b", "2b"]  # in the order of the claim
        assert content["findings"] and content["claim"] == "memory"
        assert "not measured" in capsys.readouterr().out
        with pytest.raises(ValueError, match="no results"):
            merge.merge_folder(tmp_path, into)


class TestComparison:
    def test_the_lesser_of_two_ratios_counts(self) -> None:
        row, other = made_row("ours", 40.0, samples_s_wall=30.0), made_row("unsloth", 20.0)
        assert comparison.ratio(row, other) == 1.5

    @pytest.mark.parametrize(
        "values", [{"machine": {"boot": "b"}}, {"supervised_tokens_per_sample": 3.9}, {"kind": "llava"}, {"comparable": False}]
    )
    def test_unlike_rows_are_not_compared(self, values: dict[str, Any]) -> None:
        finding = comparison.compared("speed", 1.0, made_row("ours", 40.0), made_row("peer", 20.0, **values))
        assert finding.value is None and finding.reason

    def test_a_peer_counts_at_its_best_and_failures_do_not(self) -> None:
        found = claim_of("chart_bf16").findings(
            [
                made_row("ours", 50.0),
                made_row("unsloth-16", 20.0),
                made_row("unsloth-32", 25.0),
                made_row("unsloth-8", 100.0, failed=True, reason="not comparable: …"),
            ]
        )
        assert [(finding.value, finding.reached) for finding in found] == [(2.0, True), (None, None)]

    def test_only_what_fits_in_the_peers_memory_counts(self) -> None:
        rows = [
            made_row("unsloth-8-checkpointing", 10.0, peak_gib=17.8),
            made_row("ours-fp8-full-13312", 30.0, peak_gib=18.0),
            made_row("ours-fp8-full-8192", 26.0, peak_gib=16.0),
            made_row("ours-offload-4096", 21.0, peak_gib=17.9),
        ]
        any_precision, bf16 = claim_of("chart_memory").findings(rows)
        assert any_precision.value == 2.6
        assert bf16.value is None and "17.9" in bf16.reason

    def test_share_of_the_measured_rate(self) -> None:
        rows = [made_row("ours", 40.0, needed_tflop_s=560.0), {**made_row("roofline", 1.0), "precision": "bf16", "square_tflop_s": 800.0}]
        assert claim_of("arithmetic_share").findings(rows)[0].value == 70.0

    def test_copies_of_float8_weights(self) -> None:
        weights = dict(projection_weights=2**30)
        for fp8_gib, copies in ((3.0, 1.0), (4.0, 2.0)):
            rows = [
                made_row("ours", 1.0, weights_gib=4.0, losses=[1.0] * 3),
                made_row("ours-fp8", 1.0, weights_gib=fp8_gib, losses=[1.0] * 3, **weights),
            ]
            finding = next(f for f in claim_of("fp8_over_bf16").findings(rows) if "copies" in f.what)
            assert finding.value == copies


class TestReport:
    def test_the_document_says_what_the_results_say(self) -> None:
        text = report.DOCUMENT.read_text(encoding="utf-8")
        assert report.rendered(text, claim.RESULTS) == text, "run python -m bench.report"

    def test_misses_and_failures_are_listed(self, tmp_path: Path) -> None:
        rows = [
            made_row("ours", 40.0),
            made_row("unsloth-16", 30.0, system="unsloth", system_version="1.0"),
            made_row("trl-16", 1.0, system="trl", failed=True, reason="OutOfMemoryError: a | b"),
        ]
        content = {"claim": "chart_bf16", "model": "qwen3-vl-8b", "rows": rows}
        (tmp_path / "chart_bf16.json").write_text(json.dumps(content), encoding="utf-8")
        text = report.rendered(report.DOCUMENT.read_text(encoding="utf-8"), tmp_path)
        assert "| ours over Unsloth | at least 1.8× | 1.33× | missed | 2026-01-02 |" in text
        assert "| ours over TRL | at least 3× | not measured: no row to compare with |" in text
        assert "failed: OutOfMemoryError: a \\| b" in text
        assert "| Unsloth 1.0 | bf16, nothing recomputed, packs of 8,192 tokens, compiled | 30 | 30 | 60 |" in text
        assert "1 × Some GPU, 139.0 GiB, driver 1.2, 16 processor cores, start a" in text
        assert "| second epoch over the first | at least 1.1× | not measured |" in text
        assert report.rendered(text, tmp_path) == text

    def test_of_every_kind_of_row(self, tried: Path) -> None:
        text = report.rendered(report.DOCUMENT.read_text(encoding="utf-8"), tried)
        for name in NAMES:
            assert claim_of(name).title in text or name == "profile"
        assert "five largest costs" in text and "plain float32" in text

    def test_other_blocks_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="must have each of the blocks"):
            report.rendered("<!-- bench:reach -->\n<!-- end -->\n", tmp_path)

    def test_check_tells_without_writing(self, tmp_path: Path) -> None:
        document = tmp_path / "performance.md"
        document.write_text(report.DOCUMENT.read_text(encoding="utf-8").replace("qwen3-vl-8b:", "changed"), encoding="utf-8")
        before = document.read_text(encoding="utf-8")
        assert report.main(["--check", "--document", str(document)]) == 1
        assert document.read_text(encoding="utf-8") == before


class TestRows:
    def test_two_rates(self) -> None:
        found = rows.speeds([1.0, 1.0, 4.0], 10, tokens=600)
        assert found == {"samples_s": 10.0, "samples_s_wall": 5.0, "tokens_s": 100.0}

    def test_lines_of_libraries_are_no_results(self) -> None:
        assert rows.parse("{'loss': '5.6'}") is None
        assert rows.parse("Loading") is None
        assert rows.parse('{"a": 1}') is None
        assert rows.parse('{"row": "sft"}\n') == {"row": "sft"}

    def test_a_failure_keeps_its_settings(self, capsys: pytest.CaptureFixture[str]) -> None:
        row = rows.failed({"row": "sft", "batch": 8}, ValueError("first\nsecond"))
        assert row == {"row": "sft", "batch": 8, "failed": True, "reason": "ValueError: first"}
        assert "ValueError" in capsys.readouterr().err

    def test_rounding(self) -> None:
        assert [rows.significant(value) for value in (123456.0, 0.00012345678)] == [123500.0, 0.0001235]
        assert np.isclose(rows.significant(2 / 3, 2), 0.67)
