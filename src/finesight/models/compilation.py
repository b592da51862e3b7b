"""Compiled layers: one graph for all layers, kept on disk between runs, and never a reason for a run to fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config

# By default results that only feed a matrix product of the backward pass, or that are used far apart, are kept too. What
# stays kept are operators that the compiler has no reason to think cheap: products and attention.
_KEEP_PRODUCTS_ONLY = {
    "ban_recompute_materialized_backward": False,
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
    "ban_recompute_reductions": False,
}
# Lengths of packs are rounded up to a multiple of this: matrix products then meet few and well-aligned shapes.
STEADY_TOKENS = 128


class CompiledFunction:
    """A function compiled at its first call; where that fails, the function itself, and the reason is told once.

    Args:
        function: of tensors and modules.
        say: is told why compiling failed.
        keep_products_only: let the compiler keep results of costly operations alone for the backward pass and compute the
            rest again: the activation policy selective, which checkpointing inside compiled code would compile anew for
            each layer.
        overlapped: let kernels begin before those ahead of them have ended, on GPUs and with compilers that can. For functions each of whose
            kernels reads something: compiled ones wait at a load, so that one that fills a tensor with a constant waits for nothing, and
            what comes after it may read what the kernel ahead of it has yet to write. Between their calls, too, every kernel must wait
            for the one ahead of it before it lets the next one begin.
        what: names in that report what runs uncompiled.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        say: Callable[[str], None],
        *,
        keep_products_only: bool = False,
        overlapped: bool = False,
        what: str = "Layers",
    ) -> None:
        self.function, self.say, self.overlapped, self.what = function, say, overlapped, what
        self._graph_options = _KEEP_PRODUCTS_ONLY if keep_products_only else {}
        self._kernel_options = {"triton.enable_pdl": True} if overlapped and hasattr(inductor_config.triton, "enable_pdl") else {}
        # Dynamic: the number of tokens differs from pack to pack, and a graph for each would cost seconds every time.
        self._compiled: Callable[..., Any] | None = torch.compile(function, dynamic=True)

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is None:
            return self.function(*arguments)
        try:
            with functorch_config.patch(self._graph_options), inductor_config.patch(self._kernel_options):
                return self._compiled(*arguments)
        except _failures() as error:
            self._compiled = None
            first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            self.say(f"{self.what} run uncompiled, since compiling failed: {type(error).__name__}: {first_line}")
            return self.function(*arguments)


def _failures() -> tuple[type[Exception], ...]:
    """What torch raises when it cannot compile; an error of the computation itself is none of these."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return (TorchDynamoException, InductorError)


def keep_compiled_code() -> Path:
    """Lets compiled code be found again by later runs; returns where it is kept.

    A folder that the user names in TORCHINDUCTOR_CACHE_DIR is left as it is.
    """
    default = Path(os.environ.get("FINESIGHT_CACHE", Path.home() / ".cache" / "finesight")) / "compiled"
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default)))


def compiles_well(device: torch.device) -> str | None:
    """None where compiled layers pay; otherwise why not."""
    if device.type != "cuda":
        return "layers are compiled on NVIDIA GPUs only"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "layers are compiled from compute capability 8.0 (Ampere) on"
    return None
