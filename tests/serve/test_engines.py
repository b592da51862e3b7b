"""Other engines: their arguments for what was trained, what they are refused, and the process that is started."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from finesight.cli import main
from finesight.data_settings import DataSettings
from finesight.errors import ModelError
from finesight.models.adapter_metadata import ADAPTER_CONFIG, METADATA
from finesight.recipe import ModelSettings
from finesight.serve.engines import AdapterFacts, EngineCommand, Wanted, engine_command, parse_version
from finesight.serve.settings import ServeSettings
from tiny import tiny_checkpoint
from tiny_adapters import make_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("engines") / "tiny", "qwen3_vl")


@pytest.fixture(scope="module")
def plain(base) -> Path:
    return make_adapter(base, base.parent / "plain", "qwen3_vl", tower=False, tuning={"r": 4})


@pytest.fixture(scope="module")
def tower(base) -> Path:
    return make_adapter(base, base.parent / "tower", "qwen3_vl", tower=True, tuning={"r": 20})


def options(command: EngineCommand) -> dict[str, list[str]]:
    """Values of each option; those without one are empty."""
    found: dict[str, list[str]] = {}
    for argument in command.arguments[2:]:
        if argument.startswith("--"):
            found[argument.removeprefix("--")] = []
        elif found:
            found[list(found)[-1]].append(argument)
    return found


def wanted(base: Path, *folders: Path, data: DataSettings | None = None, **more) -> Wanted:
    data = data or DataSettings()
    facts = tuple(AdapterFacts.read(folder.name, folder, data) for folder in folders)
    limits = more.pop("limits", ServeSettings())
    return Wanted(more.pop("model", ModelSettings(name_or_path=str(base))), limits, facts, data=data, **more)


def test_vllm_serves_a_base_and_adapters(base, plain, tower):
    limits = ServeSettings(port=9000, max_length_tokens=4096, batch_size=12, api_key="secret")
    asked = wanted(base, plain, tower, limits=limits, name="base", tensor_parallel_size=2, images_per_prompt=3)
    command = engine_command("vllm", asked, (0, 33, 0))
    assert command.arguments[:3] == ("vllm", "serve", str(base))
    found = options(command)
    assert found["enable-lora"] == [] and found["enable-tower-connector-lora"] == []
    assert found["max-lora-rank"] == ["32"] and found["max-loras"] == ["2"]  # ranks 4 and 20: the next that its kernels have
    assert found["lora-modules"] == [f"plain={plain}", f"tower={tower}"]
    assert found["tensor-parallel-size"] == ["2"] and found["max-model-len"] == ["4096"] and found["max-num-seqs"] == ["12"]
    assert found["served-model-name"] == ["base"] and found["port"] == ["9000"] and found["host"] == ["127.0.0.1"]
    trained = json.loads((plain / METADATA).read_text())
    processor = json.loads(found["mm-processor-kwargs"][0])
    assert processor["images_kwargs"] == {"size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}
    assert processor["videos_kwargs"]["size"] == {"shortest_edge": trained["video_min_pixels"], "longest_edge": trained["video_max_pixels"]}
    assert json.loads(found["media-io-kwargs"][0]) == {"video": {"fps": trained["fps"], "num_frames": trained["max_frames"]}}
    assert json.loads(found["limit-mm-per-prompt"][0]) == {"image": 3}
    assert found["allowed-media-domains"] == ["none.invalid"]
    # Whoever lists processes does not read the key.
    assert command.environment == {"VLLM_API_KEY": "secret"} and "secret" not in " ".join(command.arguments)


def test_older_versions_of_vllm_have_limits_of_images_alone(base, plain):
    command = engine_command("vllm", wanted(base, plain), (0, 27, 0))
    found = options(command)
    assert json.loads(found["mm-processor-kwargs"][0]) == {"min_pixels": 32 * 32, "max_pixels": 64 * 64}
    assert json.loads(found["limit-mm-per-prompt"][0]) == {"video": 0} and "media-io-kwargs" not in found
    assert "enable-tower-connector-lora" not in found and found["max-lora-rank"] == ["8"]
    assert any("videos are off" in note for note in command.notes)
    assert not any("videos" in note for note in engine_command("vllm", wanted(base, plain), (0, 33, 0)).notes)


def test_a_base_alone(base):
    command = engine_command("vllm", wanted(base), (0, 33, 0))
    found = options(command)
    assert not {"enable-lora", "lora-modules", "mm-processor-kwargs", "limit-mm-per-prompt", "media-io-kwargs"} & set(found)
    limited = options(engine_command("vllm", wanted(base, data=DataSettings(max_pixels=5000)), (0, 33, 0)))
    assert json.loads(limited["mm-processor-kwargs"][0]) == {"images_kwargs": {"size": {"longest_edge": 5000}}}


@pytest.mark.parametrize(("precision", "expected"), [({"load_in_fp8": True}, "fp8"), ({"load_in_4bit": True}, "bitsandbytes")])
def test_quantised_bases(base, precision, expected):
    asked = wanted(base, model=ModelSettings(name_or_path=str(base), **precision))
    assert options(engine_command("vllm", asked, (0, 27, 0)))["quantization"] == [expected]
    assert options(engine_command("sglang", asked, (0, 5, 23)))["quantization"] == [expected]


def test_sglang(base, plain):
    limits = ServeSettings(port=9000, api_key="secret")
    command = engine_command("sglang", wanted(base, plain, limits=limits, tensor_parallel_size=2, images_per_prompt=2), None)
    found = options(command)
    assert command.arguments[:2] == ("sglang", "serve") and found["model-path"] == [str(base)]
    assert found["lora-paths"] == [f"plain={plain}"] and found["max-lora-rank"] == ["4"] and found["max-loras-per-batch"] == ["2"]
    process = json.loads(found["mm-process-config"][0])
    assert process["image"] == {"size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}} and process["video"]["fps"] == 2.0
    assert json.loads(found["limit-mm-data-per-request"][0]) == {"image": 2} and found["tp-size"] == ["2"]
    assert any("not installed" in note for note in command.notes)


def changed(folder: Path, copy: Path, **config) -> Path:
    """A copy of an adapter with another configuration."""
    copy.mkdir(parents=True)
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    path = copy / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return copy


@pytest.mark.parametrize(
    ("engine", "version", "change", "reason"),
    [
        ("vllm", (0, 19, 1), {}, "older than 0.20.0"),
        ("vllm", (0, 33, 0), {"use_dora": True}, "use_dora"),
        ("vllm", (0, 33, 0), {"bias": "all"}, "bias"),
        ("vllm", (0, 33, 0), {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("vllm", (0, 33, 0), {"r": 600}, "ranks up to 512"),
        ("vllm", (0, 27, 0), {"rank_pattern": {"q_proj": 8}}, "would overlook"),
        ("sglang", (0, 5, 23), {"rank_pattern": {"q_proj": 8}}, "ranks or scales"),
        ("sglang", (0, 5, 23), {"target_parameters": ["mlp.experts.down_proj"]}, "fused experts"),
        ("sglang", (0, 5, 22), {}, "older than 0.5.23"),
    ],
)
def test_adapters_that_a_version_cannot_serve(base, plain, tmp_path, engine, version, change, reason):
    with pytest.raises(ModelError, match=reason):
        engine_command(engine, wanted(base, changed(plain, tmp_path / "a", **change)), version)


def test_ranks_of_their_own_are_known_to_newer_versions(base, plain, tmp_path):
    adapter = changed(plain, tmp_path / "a", rank_pattern={"q_proj": 40})
    assert options(engine_command("vllm", wanted(base, adapter), (0, 34, 1)))["max-lora-rank"] == ["64"]
    assert any("checked up to vLLM 0.33.0" in note for note in engine_command("vllm", wanted(base, adapter), (0, 34, 1)).notes)


def test_what_else_cannot_be_served(base, plain, tower, tmp_path):
    with pytest.raises(ModelError, match="matrices of the vision tower"):
        engine_command("sglang", wanted(base, tower), None)
    with pytest.raises(ModelError, match="no 4-bit weights"):
        engine_command("vllm", wanted(base, model=ModelSettings(name_or_path=str(base), load_in_4bit=True)), (0, 33, 0))
    with pytest.raises(ModelError, match="8-bit integers"):
        engine_command("vllm", wanted(base, model=ModelSettings(name_or_path=str(base), load_in_8bit=True)), (0, 33, 0))
    with pytest.raises(ModelError, match=r"4 attention heads .* 3 GPUs"):
        engine_command("vllm", wanted(base, tensor_parallel_size=3), (0, 33, 0))
    with pytest.raises(ModelError, match="--queue-size"):
        engine_command("vllm", wanted(base, limits=ServeSettings(queue_size=3)), (0, 33, 0))
    for engine in ("vllm", "sglang"):
        with pytest.raises(ModelError, match="media-dir"):
            engine_command(engine, wanted(base, limits=ServeSettings(allowed_dirs=(tmp_path, base))), None)
    other = changed(plain, tmp_path / "other")
    (other / METADATA).write_text(json.dumps(json.loads((other / METADATA).read_text()) | {"max_pixels": 9000, "system": "be brief"}))
    with pytest.raises(ModelError, match="plain was trained with max_pixels 4096 and other with 9000"):
        engine_command("vllm", wanted(base, plain, other), None)
    given = engine_command("vllm", wanted(base, plain, other, data=DataSettings(max_pixels=4096)), None)
    assert any("other was trained with a system prompt" in note and "be brief" in note for note in given.notes)
    assert any("data.max_pixels is 4096" in note and "9000" in note for note in given.notes)  # the override is warned about
    open_to_all = engine_command("vllm", wanted(base, limits=ServeSettings(allow_urls=True, allowed_dirs=(tmp_path,))), None)
    assert options(open_to_all)["allowed-local-media-path"] == [str(tmp_path)] and "allowed-media-domains" not in options(open_to_all)


def test_versions():
    assert parse_version("0.33.0\n") == (0, 33, 0) and parse_version("sglang version: 0.5.23.post1") == (0, 5, 23)
    with pytest.raises(ModelError, match="no version"):
        parse_version("command not found")


RECORDER = """#!{python}
import json, os, sys
if sys.argv[1:] in (["--version"], ["version"]):
    print("INFO loading\\n{version}\\ngit revision: 1234567")
else:
    with open({out!r}, "w") as file:
        json.dump([sys.argv, os.environ.get("VLLM_API_KEY"), os.getpid()], file)
    sys.exit(7)
"""


@pytest.fixture
def installed(tmp_path):
    """An executable of that name, first on PATH, that writes down how it was started."""

    def install(name: str, version: str) -> Path:
        out = tmp_path / "started.json"
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(RECORDER.format(python=sys.executable, version=version, out=str(out)))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return out

    return install


@pytest.fixture
def serve(tmp_path, monkeypatch, capsys):
    """`finesight serve` in this process, which starts nothing: (status, what it printed, what it said)."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["serve", *map(str, arguments)])
        told = capsys.readouterr()
        return ended.value.code or 0, told.out, told.err

    return run


def test_the_process_becomes_the_engine(base, tower, tmp_path, installed):
    out = installed("vllm", "0.33.0")
    arguments = ("--engine", "vllm", "--adapter", f"charts={tower}", "--api-key", "secret", "--port", "9000")
    process = subprocess.Popen(
        [sys.executable, "-m", "finesight", "serve", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin", "COLUMNS": "200"},
    )
    _, errors = process.communicate(timeout=60)
    started, key, pid = json.loads(out.read_text())
    assert process.returncode == 7 and pid == process.pid and key == "secret"
    expected = engine_command("vllm", wanted(base, tower, limits=ServeSettings(port=9000, api_key="secret")), (0, 33, 0))
    assert started[1:] == [*expected.arguments[1:-1], f"charts={tower}"]
    assert "Starting VLLM_API_KEY=" in errors and "secret" not in errors


def test_print_starts_nothing(tower, plain, installed, serve):
    out = installed("vllm", "0.33.0")
    installed("sglang", "sglang version: 0.5.23")
    status, said, _ = serve("--engine", "vllm", "--adapter", tower, "--print", "--api-key", "secret")
    assert status == 0 and not out.exists()
    assert (
        said.startswith('VLLM_API_KEY="$FINESIGHT_API_KEY" vllm serve ') and "secret" not in said and f"tower={tower}" in shlex.split(said)
    )
    status, said, errors = serve("--engine", "sglang", "--adapter", plain, "--print", "--api-key", "secret")
    assert status == 0 and said.startswith("sglang serve --model-path ") and said.endswith('--api-key "$FINESIGHT_API_KEY"\n')
    assert "not installed" not in errors
    status, said, errors = serve("--engine", "sglang", "--adapter", tower, "--print")
    assert status == 2 and not said and "language model alone" in errors


def test_what_is_not_started(base, installed, serve):
    status, _, errors = serve("--engine", "vllm", "--model", base)
    assert status == 2 and "no `vllm` on PATH" in errors
    installed("vllm", "0.19.0")
    status, _, errors = serve("--engine", "vllm", "--model", base)
    assert status == 2 and "older than 0.20.0" in errors
    status, _, errors = serve("--model", base, "--print")
    assert status == 2 and "--engine vllm or sglang" in errors


def test_the_base_is_not_quantised_unless_it_is_asked_for(base, tmp_path, installed, serve):
    """Whatever an adapter was trained over: an engine quantises in its own ways."""
    installed("vllm", "0.33.0")
    eight = make_adapter(base, tmp_path / "eight", "qwen3_vl", model={"load_in_8bit": True}, tower=False)
    status, said, errors = serve("--engine", "vllm", "--adapter", eight, "--print")
    assert status == 0 and "--quantization" not in said
    assert "trained over a base in 8bit, and the base is loaded in full precision" in errors
    status, said, errors = serve("--engine", "vllm", "--adapter", eight, "--print", "--load-in-fp8")
    assert status == 0 and "--quantization fp8" in said and "trained over a base in 8bit, and the base is loaded in fp8" in errors
    status, said, errors = serve("--engine", "vllm", "--adapter", eight, "--print", "--load-in-8bit")
    assert status == 2 and not said and "8-bit integers" in errors


def test_limits_of_the_own_server_are_refused(base, tmp_path, serve):
    for flag, value in (("--adapter-dir", tmp_path), ("--timeout-s", 5), ("--queue-size", 3)):
        status, said, errors = serve("--engine", "vllm", "--model", base, "--print", flag, value)
        assert status == 2 and not said and f"{flag} is a limit of the server of this project" in errors
