"""What a plan of memory says: bytes by part at each moment of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from finesight.planner import calibration as measured
from finesight.planner.activations import Execution
from finesight.planner.shapes import ModelShape
from finesight.planner.sizes import RunSizes
from finesight.planner.weights import Precision
from finesight.recipe import Recipe

Policy = Literal["none", "selective", "full", "offload"]


@dataclass(frozen=True)
class Moment:
    """Bytes on the device at one moment of a step."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """What a recipe will take.

    Attributes:
        peak: the moment with most allocated bytes; `peak.total` is what torch would report.
        processes: GPUs that train together; the plan is that of each.
        context_bytes, slack_bytes: outside of what is allocated, and needed all the same.
        correction_bytes: added by a probe, the difference that it measured.
    """

    model: ModelShape
    recipe: Recipe
    policy: Policy
    execution: Execution
    precision: Precision
    sizes: RunSizes
    moments: tuple[Moment, ...] = field(repr=False)
    processes: int = 1
    context_bytes: int = measured.CONTEXT_BYTES
    slack_share: float = measured.SLACK_SHARE
    correction_bytes: int = 0

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak_bytes(self) -> int:
        """Most bytes allocated at once."""
        return self.peak.total + self.correction_bytes

    @property
    def slack_bytes(self) -> int:
        return int(self.slack_share * self.peak_bytes)

    @property
    def needed_bytes(self) -> int:
        """With what the driver and torch's allocator take besides."""
        return self.peak_bytes + self.slack_bytes + self.context_bytes

    def fits(self, available_bytes: int) -> bool:
        return self.needed_bytes <= available_bytes
