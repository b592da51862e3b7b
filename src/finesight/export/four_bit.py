"""Matrices in NF4 as bitsandbytes serialises them, so that transformers loads the checkpoint by itself.

So does vLLM up to 0.27 at least; 0.33 has no weights of bitsandbytes any more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from finesight.export.stored import dequantize_matrix
from finesight.models.quantize import Scheme
from finesight.models.quantized_linear import BLOCK, require_bitsandbytes

# Which matrices are written in 4 bits: the linear layers of the language model. bitsandbytes knows no fused experts.
FOUR_BIT = Scheme("4bit")


def packed_matrix(name: str, value: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(the tensors of one matrix in a file, the values they stand for).

    Args:
        name: in the file, "….weight".
        value: (O, I), in 16 or 32 bits.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    require_bitsandbytes("--to merged-4bit")
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(value.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    parts = {f"{name}.{part}": tensor.contiguous() for part, tensor in state.as_dict(packed=True).items()}
    # The code is a table that bitsandbytes shares between matrices; a file holds each by itself.
    parts[f"{name}.quant_map"] = parts[f"{name}.quant_map"].clone()
    return {name: packed, **parts}, dequantize_matrix(packed, state)


def quantization_config(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """The `quantization_config` of config.json for a checkpoint whose matrices :func:`packed_matrix` wrote.

    Args:
        model: the transformers model, on the meta device.
        dtype: in which products are computed.
    """
    whole = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and FOUR_BIT.layer_of(name, module) is None}
    # The vision part by its name as a whole, under both names that libraries give it.
    skipped = [*sorted(name for name in whole if ".visual." not in f".{name}"), "model.visual", "visual"]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }
