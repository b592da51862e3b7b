"""The processes that train together, as a rollout sees them: what each makes, and how all learn of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

Value = TypeVar("Value")


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Processes:
    """Several processes that take the same steps. By default there is one."""

    count: int = 1
    index: int = 0  # of this one
    exchange: Callable[[Any], list[Any]] = _alone  # a value of this process -> those of all, in their order; all must call it

    @staticmethod
    def of(accelerator: Accelerator) -> Processes:
        """Those of a run."""
        if accelerator.num_processes == 1:
            return Processes()
        return Processes(accelerator.num_processes, accelerator.process_index, lambda value: list(gather_object([value])))

    def share(self, number: int) -> slice:
        """Which of so many things are this process's: neighbours, and as many as others have, or one more."""
        return slice(number * self.index // self.count, number * (self.index + 1) // self.count)

    def joined(self, own: list[Value]) -> list[Value]:
        """The shares of all processes, in the order of what was shared."""
        return [value for share in self.exchange(own) for value in share]
