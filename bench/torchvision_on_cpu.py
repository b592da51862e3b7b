"""Lets the peers import torchvision beside a build of torch without CUDA, where the C++ part of the usual wheel does not load.

Only for trying them on a CPU: two operators that they never call are declared, and Pillow decodes their images. Where
torchvision loads whole, nothing is changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from typing import Any

import numpy as np
import torch
from PIL import Image

_declared: list[torch.library.Library] = []  # a declaration lasts as long as its library


def stand_in() -> None:
    """Makes `import torchvision` work in this process, if it is there at all."""
    if torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    importlib.import_module("torchvision.io").decode_image = _decoded


def _decoded(content: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    image = Image.open(io.BytesIO(content.numpy().tobytes())).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
