"""Rounding to bfloat16 in which small updates are not lost."""

from __future__ import annotations

import torch


def stochastic_round(values: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """float32 to bfloat16, up or down with the probability that makes the mean exact.

    bfloat16 is the upper half of a float32: a random lower half is added and the lower half cut off, so a value that
    lies a share s of the way to the next bfloat16 goes there with probability s. Infinities and nan stay.
    """
    bits = values.float().contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).to(torch.bfloat16)


# Values rounded at a time into weights that exist: what rounding makes is small beside a large matrix.
SLICE_VALUES = 2**24


def stochastic_round_into(target: torch.Tensor, values: torch.Tensor, generator: torch.Generator | None = None) -> None:
    """:func:`stochastic_round` of float32 values into a bfloat16 tensor of their shape, slice by slice."""
    if not (target.is_contiguous() and values.is_contiguous()):
        target.copy_(stochastic_round(values, generator))
        return
    for place, some in zip(target.view(-1).split(SLICE_VALUES), values.view(-1).split(SLICE_VALUES), strict=True):
        place.copy_(stochastic_round(some, generator))
