"""Quantising while a checkpoint is read, and checkpoints that are quantised already.

transformers reads one tensor after the other and hands each to a quantizer; ours, registered through its public hook,
exchanges the layer for a quantised one at once. So a matrix in full precision exists for one tensor at a time, on the
device where it ends up, and the peak of loading is the final size and that one tensor.

Checkpoints that bitsandbytes has quantised (4-bit ones on the hub) are read by transformers' own quantizer; then each of
its layers is exchanged for one of ours around the same tensors. Of a mixture of experts it quantises linear layers only; the
fused experts are as the checkpoint has them, and come to 4 bits after loading where the recipe asks for that.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from finesight.errors import ModelError
from finesight.models.quantize import Precision, Scheme, check, quantize_parameter, tie_vocabulary
from finesight.models.quantized_linear import LARGEST_INT8, FourBitLinear, Int8Linear, format_of, require_bitsandbytes, stored_statistics

_METHOD = "finesight"


@register_quantization_config(_METHOD)
class WhileLoading(QuantizationConfigMixin):
    """The `quantization_config` for `from_pretrained` that carries out a scheme."""

    def __init__(self, scheme: Scheme, device: torch.device) -> None:
        super().__init__(quant_method=cast(Any, _METHOD))
        self.scheme, self.device = scheme, device
        self.problems: list[str] = []  # of matrices that could not be quantised; transformers only says that there were some


@register_quantizer(_METHOD)
class LoadingQuantizer(HfQuantizer):
    """Exchanges layers as their weights arrive."""

    quantization_config: WhileLoading
    is_trainable = True  # beside an adapter

    def is_serializable(self, **_: Any) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        check(model, self.quantization_config.scheme, self.quantization_config.device)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return self.quantization_config.scheme.takes_parameter(model, param_name)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes, for the memory that transformers reserves beforehand."""
        scheme = self.quantization_config.scheme
        if not scheme.takes_parameter(model, param_name):
            return param.element_size()
        path = param_name.rpartition(".")[0]
        return 1.0 if scheme.layer_of(path, model.get_submodule(path)) not in (FourBitLinear, None) else 0.52

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        tie_vocabulary(model)
        self.remove_quantization_config(model)  # from here on it is an ordinary model with layers of other classes


class _Quantize(ConversionOps):
    """Called by transformers with one parameter, after any fusing of its tensors."""

    def __init__(self, loading: WhileLoading) -> None:
        self.loading = loading

    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, **_: Any) -> dict[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            try:
                parameter = quantize_parameter(model, self.loading.scheme, name, tensor)
            except ModelError as error:
                self.loading.problems.append(str(error))
                raise
            if not isinstance(parameter, nn.Parameter):
                parameter = nn.Parameter(parameter, requires_grad=False)
            # A mark that transformers asks for: without it weights are initialised as if they were missing.
            model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = cast(Any, True)
            kept[name] = parameter
        return kept


def stored_precision(config: Any, name: str) -> Precision | None:
    """In what a checkpoint's weights are stored already; None: not quantised.

    Args:
        config: of transformers.
        name: of the checkpoint, for messages.

    Raises:
        ModelError: quantised in a way that cannot be read here, or bitsandbytes is missing.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    given = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(given.get("quant_method", "unknown"))
    if not (given.get("load_in_4bit") or given.get("load_in_8bit")):
        raise ModelError(
            f"{name} is quantised by {method}, which is not read here. Use the checkpoint that it was made from (with "
            "model.load_in_4bit, load_in_8bit or load_in_fp8), or one quantised by bitsandbytes."
        )
    require_bitsandbytes(f"{name}, a checkpoint quantised by bitsandbytes,")
    return "4bit" if given.get("load_in_4bit") else "8bit"


@torch.no_grad()
def adopt_bitsandbytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Exchanges the layers of bitsandbytes for ours, around the same tensors; returns how many.

    Layers that the checkpoint keeps in full precision (its `llm_int8_skip_modules`) stay so, in `dtype`.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, (Linear4bit, Linear8bitLt))]
    for name, module in found:
        shape = (module.out_features, module.in_features)
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            packed = module.weight.data.view(torch.uint8).view(-1, 1)  # some keep the same bytes as another type
            ours: nn.Module = FourBitLinear([packed, *stored_statistics(state)], format_of(state), shape, module.bias, dtype)
        else:
            scale = module.weight.SCB.float().view(-1) / LARGEST_INT8
            ours = Int8Linear([module.weight.data, scale], "int8", shape, module.bias, dtype)
        model.set_submodule(name, ours.train(module.training))
    for parameter in model.parameters():  # transformers leaves some in the precision of the file, beside others in the one asked for
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # peft and accelerate would look for bitsandbytes' layers
        if getattr(model, mark, False):
            setattr(model, mark, False)
    return len(found)
