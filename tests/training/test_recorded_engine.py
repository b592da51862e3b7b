"""A run against recorded answers of a vLLM server: what it is asked, in which order, and what becomes of its log-probabilities.

`vllm_recordings` holds requests as they must be and answers in the form of vLLM's `chat_completion/protocol.py`; an engine that rounds
otherwise is stood for by log-probabilities that are not the model's.
"""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from finesight.training.run import train
from sampling.recorded_server import recording, replaying
from tiny_runs import tiny_recipe


def write_prompt(folder: Path) -> Path:
    """One prompt about one image, in a file."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    content = [{"type": "image", "image": "image.png"}, {"type": "text", "text": "read the number in the image"}]
    row = {"messages": [{"role": "system", "content": "answer yes"}, {"role": "user", "content": content}], "answer": "3"}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return folder / "rows.jsonl"


def recipe_for(checkpoint: Path, rows: Path, output_dir: Path, url: str):
    return tiny_recipe(
        checkpoint,
        rows,
        output_dir,
        grpo={"num_generations": 2, "image_ablation_steps": 0},
        rollout={"max_completion_length": 12, "engine": "vllm", "url": url, "model": "Qwen/Qwen3-VL-4B-Instruct"},
        training={"train_batch_size": 2, "max_steps": 2, "num_train_epochs": 9, "save_strategy": "no", "lr_scheduler_type": "constant"},
        rewards=["length"],
    )


def without_what_differs(asked: Any, run: Path) -> Any:
    """A request with the adapter's number, the image's bytes and the folder of the run as they are recorded."""
    text = re.sub(r"finesight-[0-9a-f]{8}-", "finesight-00000000-", json.dumps(asked))
    text = re.sub(r'data:image/png;base64,[^"]*', "data:image/png;base64,…", text)
    return json.loads(text.replace(str(run), "RUN"))


def transformers_logprobs(checkpoint: Path, prompt: list[int], image: Image.Image, tokens: list[int], forbidden: list[int]) -> torch.Tensor:
    """Of each token of a completion, by the plain forward over the image that was sent."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    patches = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)(image, do_resize=False, return_tensors="pt")
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        logits = model(
            input_ids=ids, mm_token_type_ids=(ids == model.config.image_token_id).long(), attention_mask=torch.ones_like(ids), **patches
        ).logits[0]
    logits[:, forbidden] = -torch.inf
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None]).squeeze(1)


@pytest.fixture
def replayed(checkpoint, tmp_path):
    """The run, what was asked, and the recording."""
    exchanges = recording("run")
    with replaying(*exchanges) as server:
        result = train(recipe_for(checkpoint, write_prompt(tmp_path / "rows"), tmp_path / "run", server.url))
    return result, server, exchanges


def test_a_recorded_run(replayed, checkpoint, tmp_path):
    result, server, exchanges = replayed
    asked = [without_what_differs(one, tmp_path / "run") for one in server.asked]
    assert asked == [exchange["request"] for exchange in exchanges] and not server.left
    names = [one["json"]["lora_name"] for one in server.asked if one["path"] == "/v1/load_lora_adapter"]
    assert len(set(names)) == 2  # one for each update: the server keeps keys and values by it
    assert not (tmp_path / "run" / "rollout-adapters").exists()

    (first, answer), *_ = [
        (one["json"], exchange["response"]["body"])
        for one, exchange in zip(server.asked, exchanges, strict=True)
        if one["path"] == "/v1/chat/completions"
    ]
    url = first["messages"][1]["content"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert image.size == (64, 64) and image.format == "PNG"
    differences, weights, cut = [], [], []
    for choice in answer["choices"]:
        own = transformers_logprobs(checkpoint, answer["prompt_token_ids"], image, choice["token_ids"], [6, 7])
        engine = torch.tensor([token["logprob"] for token in choice["logprobs"]["content"]])
        differences.append((own - engine).abs())
        weights.append((own - engine).exp().clamp(max=2.0))
        cut.append(((own - engine).exp() > 2.0).float())
    line = next(line for line in result.history if line.get("step") == 1 and "loss" in line)
    assert line["sampling/sampling_logp_difference/mean"] == pytest.approx(torch.cat(differences).mean().item(), rel=1e-5)
    assert line["sampling/sampling_logp_difference/max"] == pytest.approx(torch.cat(differences).max().item(), rel=1e-5)
    assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(torch.cat(weights).mean().item(), rel=1e-5)
    assert line["sampling/importance_sampling_ratio/truncated"] == pytest.approx(torch.cat(cut).mean().item())
    assert 0 < line["sampling/importance_sampling_ratio/truncated"] < 0.5 < line["sampling/importance_sampling_ratio/mean"] < 1.5
