"""The one attention function, for packed trees of text and for the vision tower alike.

On a GPU that has it, it runs on torch's variable-length attention; everywhere else on scaled_dot_product_attention over
groups of segments of equal shape. transformers' attention modules reach it through their public attention registry;
what a layer must know of the batch arrives as the argument `forest`.

Shapes: T queries, K gathered keys, H heads, G key-value heads, D head size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finesight.data.layout import AttentionLayout

TEXT_ATTENTION = "finesight_forest"
# transformers' vision modules hand over the whole packed sequence at once only to implementations named "flash".
TOWER_ATTENTION = "finesight_forest_flash"

try:
    from torch.nn.attention.varlen import varlen_attn

    _VARLEN_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
except ImportError:  # torch built without it
    varlen_attn, _VARLEN_HAS_GQA = None, False


def forest_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: AttentionLayout, *, causal: bool, scale: float | None = None
) -> torch.Tensor:
    """Attention of each segment's queries to the keys that the layout gives it.

    Args:
        query: (T, H, D).
        key, value: (T, G, D); G divides H.
        layout: on the same device as the tensors.
        causal: the last query of a segment sees all its keys, each earlier one a key less (aligned bottom-right).
        scale: of the scores; none: 1 / sqrt(D).

    Returns:
        (T, H, D).
    """
    if layout.key_index is not None:
        key, value = key.index_select(0, layout.key_index), value.index_select(0, layout.key_index)
    if _runs_on_varlen(query):
        return _varlen_attention(query, key, value, layout, causal, scale)
    return _grouped_attention(query, key, value, layout, causal, scale)


@torch.compiler.assume_constant_result
def supports_varlen(device: torch.device | str) -> bool:
    """Whether a device has variable-length attention: an NVIDIA GPU from Ampere on."""
    device = torch.device(device)
    return varlen_attn is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _runs_on_varlen(query: torch.Tensor) -> bool:
    return query.dtype in (torch.bfloat16, torch.float16) and query.is_cuda and supports_varlen(query.device)


def _varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: AttentionLayout, causal: bool, scale: float | None
) -> torch.Tensor:
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0) if causal else (-1, -1)}
    if query.shape[1] != key.shape[1]:
        if _VARLEN_HAS_GQA:
            options["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    return varlen_attn(query, key, value, layout.cu_queries, layout.cu_keys, layout.max_queries, layout.max_keys, **options)


def _grouped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: AttentionLayout, causal: bool, scale: float | None
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    outputs, places = [], []
    for queries, keys, query_rows, key_rows in layout.shape_groups:
        mask = None
        if causal and queries != keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        q, k, v = (x[rows].transpose(1, 2) for x, rows in ((query, query_rows), (key, key_rows), (value, key_rows)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        places.append(query_rows.flatten())
    if len(outputs) == 1:  # one group holds every query, in order
        return outputs[0]
    return torch.empty_like(query).index_copy(0, torch.cat(places), torch.cat(outputs))


def _attention_interface(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    forest: AttentionLayout | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention modules call: query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D).

    Without a forest the call comes from transformers' own forward or generate, and is answered as its SDPA would.
    """
    causal = bool(getattr(module, "is_causal", True))
    if forest is None and cu_seq_lens_q is not None and not causal:
        forest = AttentionLayout.of_lengths(cu_seq_lens_q.diff().tolist()).to(query.device)
    if forest is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return forest_attention(q, k, v, forest, causal=causal, scale=scaling).unsqueeze(0), None


for _name in (TEXT_ATTENTION, TOWER_ATTENTION):
    AttentionInterface.register(_name, _attention_interface)
    AttentionMaskInterface.register(_name, sdpa_mask)


def use_forest_attention(model: PreTrainedModel) -> None:
    """Lets the language model and the tower of a Qwen-VL model attend through :func:`forest_attention`.

    The top-level configuration keeps its implementation, so that `generate` and `save_pretrained` behave as before.
    """
    # Written past the checking setter, which takes a name with "flash" in it for a kernel to be fetched from the hub.
    model.model.language_model.config._attn_implementation_internal = TEXT_ATTENTION
    model.model.visual.config._attn_implementation_internal = TOWER_ATTENTION
