"""The tables of kept tensors against what autograd really keeps of real layers, way by way."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from finesight.data.layout import AttentionLayout
from finesight.families import FAMILIES
from finesight.models import attention
from finesight.models.adapters import apply_tuning
from finesight.models.attention import use_forest_attention_in_tower
from finesight.models.compilation import _KEEP_PRODUCTS_ONLY
from finesight.models.linear import accumulate_adapters
from finesight.models.packed import run_layer
from finesight.models.quantized_linear import Int8Linear
from finesight.models.vision import run_block
from finesight.planner.activations import Execution, Kept, Way, decoder_layer, kept_bytes, mergers, tower_block
from finesight.planner.catalogue import find_shape
from finesight.planner.plan import plan_memory
from finesight.planner.shapes import ModelShape, shape_of
from finesight.planner.sizes import PackSizes, RunSizes
from finesight.recipe import TuningSettings
from finesight.recipe_files import load_recipe

ROWS = 384
LORA = TuningSettings(finetune_vision_layers=True, finetune_merger=True)
FULL = TuningSettings(method="full", finetune_vision_layers=True, finetune_merger=True)


# Variable-length attention runs on GPUs only. To compilers it is an operator that keeps its operands and results, which is all that
# matters for what is kept: this one stands for it.
@torch.library.custom_op("planner_tests::_varlen_attn", mutates_args=())
def _stand_in(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros_like(query), torch.zeros(query.shape[1], query.shape[0])


@_stand_in.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@torch.library.custom_op("planner_tests::_varlen_attn_backward", mutates_args=())
def _stand_in_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, logsumexp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


@_stand_in_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, logsumexp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


_stand_in.register_autograd(lambda ctx, grad, _: _stand_in_backward(grad.contiguous(), *ctx.saved_tensors), setup_context=_keep)


def use_stand_in(monkeypatch: pytest.MonkeyPatch, *, groups: bool) -> None:
    def varlen_attn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *lengths: Any, **options: Any) -> torch.Tensor:
        return _stand_in(query.contiguous(), key.contiguous(), value.contiguous())[0]

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn, raising=False)
    monkeypatch.setattr(attention, "_VARLEN_HAS_GQA", groups)
    monkeypatch.setattr(attention, "_runs_on_varlen", lambda query: True)


def small(family: str, tuning: TuningSettings) -> tuple[ModelShape, Any, nn.Module]:
    """A model whose layers have the proportions of real ones: its shape, itself as it trains, and without wrapping."""
    text = dict(hidden_size=256, num_hidden_layers=2, intermediate_size=640, num_attention_heads=4, num_key_value_heads=1, vocab_size=300)
    text |= dict(bos_token_id=None, eos_token_id=None)
    if family == "qwen3_vl":
        rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True, "mrope_section": [12, 10, 10]}
        tower = dict(
            depth=2, hidden_size=96, intermediate_size=320, num_heads=4, patch_size=16, out_hidden_size=256, deepstack_visual_indexes=[0]
        )
        config = transformers.Qwen3VLConfig(
            text_config={**text, "head_dim": 64, "rope_parameters": rope}, vision_config={**tower, "num_position_embeddings": 36}
        )
        model: Any = transformers.Qwen3VLForConditionalGeneration(config)
    else:
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
        tower = dict(
            depth=2, hidden_size=96, intermediate_size=320, num_heads=4, patch_size=14, out_hidden_size=256, fullatt_block_indexes=[1]
        )
        config = transformers.Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=tower)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model = apply_tuning(model.to(torch.bfloat16), tuning, FAMILIES[family], 0)
    accumulate_adapters(model)
    base = model.get_base_model() if tuning.method == "lora" else model
    use_forest_attention_in_tower(base.model.visual)
    return shape_of(config.to_dict(), name=family), model, base


def really_kept(run: Callable[[], Any], model: nn.Module, *, apart: tuple[torch.Tensor, ...] = ()) -> int:
    """Bytes that autograd keeps, each storage once; parameters, their casts and what is shared by all layers left out."""
    passed = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *apart)}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        row_count = tensor.shape[0] if tensor.ndim else 0
        if storage.data_ptr() not in passed and tensor.dtype in (torch.bfloat16, torch.float32) and not _is_cast_adapter(tensor, row_count):
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    del result
    return sum(found.values())


def _is_cast_adapter(tensor: torch.Tensor, rows: int) -> bool:
    """A and B brought to bfloat16: they go with the layer's products and are counted with the adapters' few bytes."""
    return tensor.ndim == 2 and 16 in tensor.shape and ROWS not in tensor.shape and rows not in (128, 256)


def layer_call(base: Any, layout: AttentionLayout, rows: torch.Tensor | None = None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    config = base.config.text_config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hidden = torch.randn(ROWS, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    turns = [torch.randn(ROWS, size, dtype=torch.bfloat16) for _ in range(2)]
    return run_layer, (base.model.language_model.layers[0], hidden, *turns, layout, *(() if rows is None else (rows,)))


def planned(table: tuple[Kept, ...], way: Way, **rows: Any) -> int:
    return kept_bytes(table, way, rows=ROWS, **rows)


@pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
class TestDecoderLayer:
    def test_uncompiled(self, family: str, tuning: TuningSettings) -> None:
        """With attention as a CPU runs it."""
        shape, model, base = small(family, tuning)
        function, arguments = layer_call(base, AttentionLayout.of_lengths([128, 256]))
        kept = really_kept(lambda: function(*arguments), model, apart=arguments[2:4])
        assert planned(decoder_layer(shape, tuning, Execution(grouped=True)), "eager") == pytest.approx(kept, rel=0.02)

    def test_last_layer(self, family: str, tuning: TuningSettings) -> None:
        shape, model, base = small(family, tuning)
        function, arguments = layer_call(base, AttentionLayout.of_lengths([128, 256]), torch.arange(0, ROWS, 8))
        kept = really_kept(lambda: function(*arguments), model, apart=arguments[2:4])
        table = decoder_layer(shape, tuning, Execution(grouped=True))
        assert planned(table, "eager", outputs=ROWS // 8) == pytest.approx(kept, rel=0.02)


def allocated(run: Callable[[], Any]) -> list[int]:
    """Bytes that are there of what a call makes, inside of operators too, after each time that some come or go."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    del result
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_backward_of_an_uncompiled_layer(family: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many rows the gradients around the activation are the most. Dequantised weights and attention's gradients come when some of the
    layer is gone, so that they add nothing to it."""
    monkeypatch.setattr(sys.modules[__name__], "ROWS", 4096)
    use_stand_in(monkeypatch, groups=True)
    shape, _, base = small(family, LORA)
    if bits == 8:
        for module in list(base.model.language_model.layers[0].modules()):
            if isinstance(getattr(module, "base_layer", None), nn.Linear):
                module.base_layer = Int8Linear.of(module.base_layer)
    function, arguments = layer_call(base, AttentionLayout.of_lengths([2048, 2048]))
    gradient = torch.randn(4096, shape.text.hidden, dtype=torch.bfloat16)
    kept = allocated(lambda: function(*arguments))[-1]
    beyond = max(allocated(lambda: function(*arguments).backward(gradient))) - kept + gradient.nbytes

    recipe = load_recipe(None, ["model.name_or_path=x", *(["model.load_in_8bit=true"] if bits == 8 else [])])
    sizes = RunSizes(((PackSizes(tokens=4096, targets=4, segments=2),),))
    plan = plan_memory(shape, recipe, sizes, policy="full", execution=Execution(compiled=False))
    assert next(m for m in plan.moments if m.name == "backward, upper layer").parts["working memory"] == pytest.approx(beyond, rel=0.02)


# Each takes some seconds to trace; what differs is covered once.
COMPILED = [
    ("qwen3_vl", LORA, "selective", True),
    ("qwen3_vl", LORA, "selective", False),
    ("qwen3_vl", LORA, "compiled", False),
    ("qwen3_vl", FULL, "selective", True),
    ("qwen2_5_vl", LORA, "selective", True),
    ("qwen2_5_vl", FULL, "compiled", False),
]


@pytest.mark.parametrize(("family", "tuning", "way", "groups"), COMPILED, ids=lambda value: getattr(value, "method", str(value)))
def test_compiled_layer(family: str, tuning: TuningSettings, way: Way, groups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With keys grouped or repeated: what the compiler's partitioner decides to keep; it decides before any code is generated."""
    import torch._functorch.config as functorch_config

    use_stand_in(monkeypatch, groups=groups)
    shape, model, base = small(family, tuning)
    function, arguments = layer_call(base, AttentionLayout.of_lengths([128, 256]))
    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=True, backend="aot_eager_decomp_partition")
    with functorch_config.patch(_KEEP_PRODUCTS_ONLY if way == "selective" else {}):
        compiled(*arguments)
        kept = really_kept(lambda: compiled(*arguments), model, apart=arguments[2:4])
    table = decoder_layer(shape, tuning, Execution(repeats_keys=not groups))
    assert planned(table, way) == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
class TestTower:
    def test_block(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        use_stand_in(monkeypatch, groups=True)
        shape, model, base = small(family, LORA)
        v = shape.vision
        hidden = torch.randn(ROWS, v.hidden, dtype=torch.bfloat16, requires_grad=True)
        turns = [torch.randn(ROWS, v.hidden // v.heads) for _ in range(2)]
        arguments = (base.model.visual.blocks[0], hidden, *turns, AttentionLayout.of_lengths([128, 256]))
        kept = really_kept(lambda: run_block(*arguments), model, apart=tuple(turns))
        assert planned(tower_block(shape, LORA, Execution()), "eager") == pytest.approx(kept, rel=0.02)

    def test_merger(self, family: str) -> None:
        shape, model, base = small(family, FULL)
        hidden = torch.randn(ROWS, shape.vision.hidden, dtype=torch.bfloat16, requires_grad=True)
        kept = really_kept(lambda: base.model.visual.merger(hidden), model)
        table = mergers(shape, FULL, Execution())
        assert planned(table, "eager") / (1 + shape.vision.deepstack_levels) == pytest.approx(kept, rel=0.02)


def test_one_layer_of_8b_by_hand() -> None:
    """Qwen3-VL-8B, adapters of rank 16, selective: of each token, in bfloat16, input and sum after attention (2 × 4096), queries
    before and after their rotation and attention's result (3 × 4096), keys before and after, and values (3 × 1024), gate and up
    (2 × 12288), x Aᵀ of seven projections (7 × 16), and 32 float32 logsumexps: 96,608 bytes."""
    table = decoder_layer(find_shape("Qwen/Qwen3-VL-8B-Instruct"), TuningSettings(), Execution(repeats_keys=True))
    each = 2 * (2 * 4096 + 3 * 4096 + 3 * 1024 + 2 * 12288 + 7 * 16) + 32 * 4
    assert each == 96_608
    assert kept_bytes(table, "selective", rows=1000) == 1000 * each
