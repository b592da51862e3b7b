"""The packed path on a GPU in bfloat16: no worse than transformers' own bfloat16, held against float32."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import transformers
from torch.nn import functional as F

from finesight.data.layout import AttentionLayout
from finesight.data.pack import pack_step
from finesight.models.attention import forest_attention, supports_varlen
from finesight.models.packed import PackedModel
from models.test_attention import forest, written_out
from parity.reference import Builder, gradients, reference_loss
from parity.test_packed_parity import mixed
from tiny import FAMILIES, tiny_config

pytestmark = pytest.mark.gpu


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_attention_kernel(causal: bool, kv_heads: int) -> None:
    torch.manual_seed(0)
    assert supports_varlen("cuda")
    layout = forest()
    q, k, v = (torch.randn(17, h, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (8, kv_heads, kv_heads))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = forest_attention(q, k, v, layout.to("cuda"), causal=causal)
    expected = written_out(*exact, layout.to("cuda"), causal)
    assert relative(out, expected) < 5e-3
    probe = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), probe), torch.autograd.grad(expected, exact, probe.double()), strict=True):
        assert relative(a, b) < 1e-2


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_gradients_of_shared_keys_are_summed_in_float32_and_repeat(kv_heads: int) -> None:
    """A prefix of 40 tokens under 60 branches: adding up in bfloat16 would lose most of it, atomics would not repeat."""
    torch.manual_seed(0)
    paths = [[*range(40), *range(40 + 20 * branch, 60 + 20 * branch)] for branch in range(60)]
    index = torch.tensor([*range(40), *(token for path in paths for token in path)])
    layout = AttentionLayout.of_lengths([40, *[20] * 60], [40, *[60] * 60], index).to("cuda")
    q, k, v = (torch.randn(1240, h, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (8, kv_heads, kv_heads))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    probe = torch.randn_like(q)
    expected = torch.autograd.grad(written_out(*exact, layout, True), exact, probe.double())
    attend = torch.compile(lambda *given: forest_attention(*given, layout, causal=True), dynamic=True)
    for function in (partial(forest_attention, layout=layout, causal=True), attend):
        first, again = (torch.autograd.grad(function(q, k, v), (k, v), probe) for _ in range(2))
        for a, b, c in zip(first, again, expected[1:], strict=True):
            assert torch.equal(a, b)
            assert relative(a, c) < 1e-2


def middle_model(family: str) -> torch.nn.Module:
    """Tiny, but with head sizes and widths that GPU kernels are made for."""
    config = tiny_config(family)
    config.text_config.update(dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2))
    if family == "qwen2_5_vl":
        config.text_config.rope_parameters["mrope_section"] = [8, 12, 12]
    else:
        config.text_config.update(dict(head_dim=64))
        config.text_config.rope_parameters["mrope_section"] = [12, 10, 10]
    config.vision_config.update(dict(hidden_size=128, intermediate_size=256, num_heads=4, out_hidden_size=256))
    torch.manual_seed(0)
    name = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe"}[family]
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_no_worse_than_the_plain_forward(family: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = middle_model(family)
    builder = Builder(model)
    samples = mixed(builder)  # positions come from the CPU model
    exact_loss = reference_loss(model, builder, samples)
    exact = gradients(exact_loss, model)

    plain = copy.deepcopy(model).to("cuda", torch.bfloat16)
    plain_loss = plain_loss_on_gpu(plain, builder, samples)
    plain_gradients = gradients(plain_loss, plain)

    packed = PackedModel(copy.deepcopy(plain), gradient_checkpointing=True)
    loss = packed_loss_on_gpu(packed, builder, samples)
    found = gradients(loss, packed.model)

    def distance(grads: dict[str, torch.Tensor]) -> float:
        difference = sum((grads[n].double().cpu() - e.double()).norm() ** 2 for n, e in exact.items()) ** 0.5
        return float(difference / sum(e.double().norm() ** 2 for e in exact.values()) ** 0.5)

    ours, theirs = distance(found), distance(plain_gradients)
    print(
        f"{family}: loss float32 {exact_loss.item():.5f} plain bf16 {plain_loss.item():.5f} packed bf16 {loss.item():.5f}; "
        f"gradient error against float32: plain {theirs:.4f} packed {ours:.4f}"
    )
    assert abs(loss.item() - exact_loss.item()) < 0.01 * exact_loss.item()
    assert ours < 1.2 * theirs


def plain_loss_on_gpu(model: torch.nn.Module, builder: Builder, samples: list) -> torch.Tensor:
    total, denominator = 0.0, sum(s.target_weight for s in samples)
    for sample in samples:
        inputs = {k: v.to("cuda", model.dtype if k.startswith("pixel") else v.dtype) for k, v in builder.inputs(sample).items()}
        logits = model(**inputs, use_cache=False).logits[0].float()
        places = torch.from_numpy(sample.trained.nonzero()[0]).cuda()
        labels = torch.from_numpy(sample.token_ids).cuda()[places]
        total = total + sample.weight * F.cross_entropy(logits[places - 1], labels, reduction="sum")
    return total / denominator


def packed_loss_on_gpu(packed: PackedModel, builder: Builder, samples: list) -> torch.Tensor:
    total, denominator = 0.0, sum(s.target_weight for s in samples)
    for plan in pack_step(samples, token_budget=4096, share=True):
        batch = plan.build(builder.pixels_of).to("cuda")
        total = total - (batch.weight * packed(batch)).sum()
    return total / denominator


def test_float32_on_a_gpu_takes_the_exact_path() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = middle_model("qwen3_vl")
    builder = Builder(model)
    samples = mixed(builder)
    expected = reference_loss(model, builder, samples)
    packed = PackedModel(model.cuda())
    assert abs(packed_loss_on_gpu(packed, builder, samples).item() - expected.item()) < 1e-5 * expected.item()


def test_layout_lengths_match_the_device_copy() -> None:
    layout = AttentionLayout.of_lengths([3, 4]).to("cuda")
    assert layout.cu_queries.tolist() == [0, 3, 7]
