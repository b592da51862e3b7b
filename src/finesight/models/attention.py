"""The one attention function, for packed trees of text and for the vision tower alike.

On a GPU that has it, it runs on torch's variable-length attention; everywhere else on scaled_dot_product_attention over
groups of segments of equal shape. transformers' vision attention reaches it through the public attention registry; what
a block must know of the batch arrives as the argument `forest`.

Shapes: T queries, K gathered keys, H heads, G key-value heads, D head size.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from finesight.data.layout import AttentionLayout
from finesight.errors import ModelError
from finesight.models.gathered import gather_rows

# transformers' vision modules hand over the whole packed sequence at once only to implementations named "flash".
TOWER_ATTENTION = "finesight_forest_flash"

try:
    from torch.nn.attention.varlen import varlen_attn

    _HAS_VARLEN, _VARLEN_HAS_GQA = True, "enable_gqa" in inspect.signature(varlen_attn).parameters
except ImportError:  # torch built without it
    _HAS_VARLEN, _VARLEN_HAS_GQA = False, False


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
    index, uses, cu_uses = layout.key_index, layout.key_uses, layout.cu_key_uses
    if index is not None:
        if uses is None or cu_uses is None:
            raise ValueError("the layout lacks the inverse of its key_index; AttentionLayout.of_lengths makes both")
        key, value = gather_rows(key, index, uses, cu_uses), gather_rows(value, index, uses, cu_uses)
    if _runs_on_varlen(query):
        return _varlen_attention(query, key, value, layout, causal, scale)
    return _grouped_attention(query, key, value, layout, causal, scale)


@torch.compiler.assume_constant_result
def supports_varlen(device: torch.device | str) -> bool:
    """Whether a device has variable-length attention: an NVIDIA GPU from Ampere on."""
    device = torch.device(device)
    return _HAS_VARLEN and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


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
    out: Any = varlen_attn(query, key, value, layout.cu_queries, layout.cu_keys, layout.max_queries, layout.max_keys, **options)
    return out


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


def _tower_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    forest: AttentionLayout | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' vision attention calls: query, key and value (1, H, P, D) -> (1, P, H, D).

    Without a forest the call comes from transformers' own forward or generate, with the lengths of its frames.
    """
    if forest is None:
        if cu_seq_lens_q is None:
            raise ModelError(
                "The vision tower called its attention without the lengths of its frames; this transformers version is not supported."
            )
        forest = AttentionLayout.of_lengths(cu_seq_lens_q.diff().tolist()).to(query.device)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return forest_attention(q, k, v, forest, causal=False, scale=scaling).unsqueeze(0), None


AttentionInterface.register(TOWER_ATTENTION, _tower_attention)


def use_forest_attention_in_tower(visual: PreTrainedModel) -> None:
    """Lets a vision tower attend through :func:`forest_attention`.

    The language model needs no such thing: its layers are called module by module. The tower gets a copy of its
    configuration, so that the model's own stays as it was, to be saved or to build another model from.
    """
    shared = visual.config
    own = copy.copy(shared)
    # Written past the checking setter, which takes a name with "flash" in it for a kernel to be fetched from the hub.
    own._attn_implementation_internal = TOWER_ATTENTION
    for module in visual.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
