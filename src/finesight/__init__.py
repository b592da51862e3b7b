"""Fine-tune Qwen vision-language models.

The Python API has the words of the command. Names are loaded when they are first used, so that `import finesight` is
instant and imports no torch::

    recipe = finesight.load_recipe("recipe.yaml", ["training.learning_rate=2e-5"])
    result = finesight.train(recipe)

    trainer = finesight.SFTTrainer("Qwen/Qwen3-VL-4B-Instruct", train_dataset=rows, output_dir="runs/mine", r=16)
    result = trainer.train()

    trainer = finesight.GRPOTrainer("Qwen/Qwen3-VL-4B-Instruct", reward_funcs=["math", brief], train_dataset=rows)  # brief: a function
    result = trainer.train()

    loaded = finesight.load("Qwen/Qwen3-VL-4B-Instruct", adapter="runs/mine/adapter")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from finesight.library_noise import drop_kernel_hint

if TYPE_CHECKING:
    from finesight.models.load import load
    from finesight.recipe_files import load_recipe
    from finesight.training.run import train
    from finesight.training.trainers import GRPOTrainer, SFTTrainer

__version__ = "0.1.0"

__all__ = ["GRPOTrainer", "SFTTrainer", "__version__", "load", "load_recipe", "train"]

_PLACES = {
    "GRPOTrainer": "finesight.training.trainers",
    "SFTTrainer": "finesight.training.trainers",
    "load": "finesight.models.load",
    "load_recipe": "finesight.recipe_files",
    "train": "finesight.training.run",
}


drop_kernel_hint()  # here, since any module below may be the first to import peft


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'finesight' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
