"""Learning-rate schedules, and optimizers that step low-precision weights in float32.

Everything the loop needs of an optimizer is in :class:`StepOptimizer`, whatever stands behind it: one optimizer or two
(Muon for matrices, AdamW for the rest), weights that are float32 already (adapters), or bfloat16 weights whose small
updates must not be rounded away.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from finesight.errors import RecipeError, TrainingError
from finesight.models.rounding import stochastic_round_into
from finesight.models.sharding import divided_like, norm_over_processes, own_part
from finesight.recipe import TrainingSettings
from finesight.training.parameter_groups import build_optimizers, load_optimizer_state

Updates = Literal["float32_masters", "stochastic_rounding"]

# Under stochastic rounding, weights are brought to float32 this many bytes at a time.
ROUNDING_CHUNK_BYTES = 256 * 2**20


def learning_rate_factor(step: int, *, kind: str, total_steps: int, warmup_steps: int = 0, min_lr_ratio: float = 0.0) -> float:
    """The learning rate of a step over the peak learning rate.

    It rises linearly so that the first step already moves and step `warmup_steps` (counted from 0) has the peak. Then,
    with p the share of the remaining steps that are done: cosine (1 + cos πp) / 2; linear 1 - p; cosine_with_min_lr the
    cosine between 1 and `min_lr_ratio` (shapes as in transformers' schedulers of these names).

    Args:
        step: counted from 0.
        kind: a value of `training.lr_scheduler_type`.
    """
    if kind == "constant":
        return 1.0
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant_with_warmup":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if kind == "linear":
        return 1.0 - progress
    cosine = (1.0 + math.cos(math.pi * progress)) / 2
    return min_lr_ratio + (1.0 - min_lr_ratio) * cosine if kind == "cosine_with_min_lr" else cosine


def warmup_steps(settings: TrainingSettings, total_steps: int) -> int:
    """Steps in which the learning rate rises: the number given, or the share of all steps, rounded up."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return math.ceil(settings.warmup_ratio * total_steps)


@dataclass(frozen=True)
class _Member:
    """A trainable parameter, and the float32 tensor that the optimizer steps in its place (itself, if it is float32)."""

    number: int  # in the order of the parameters
    name: str
    weight: nn.Parameter
    master: nn.Parameter

    @property
    def rounded(self) -> bool:
        return self.master is not self.weight


class StepOptimizer:
    """The optimizers of a run behind one face.

    float32 parameters are stepped as they are. Of bfloat16 and float16 parameters either float32 masters are kept (the
    optimizer steps these; the weights are their rounded copies; gradients add up in float32 too), or, with
    `stochastic_rounding` (bfloat16 only), each weight is brought to float32 for the step and rounded back at random.

    With `training.gradient_release` every parameter has an optimizer of its own, and :meth:`releasing` takes the place
    of :meth:`clip_gradients` and :meth:`step`.

    Args:
        named_parameters: the trainable parameters, with names that :func:`finesight.models.parameters.part_of` knows.
        settings: learning rates, decay, kind of optimizer.
        updates: how small updates of low-precision weights survive.

    Raises:
        RecipeError: an extra is missing, or a setting does not suit the weights.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        settings: TrainingSettings,
        updates: Updates = "float32_masters",
    ) -> None:
        self.updates = updates
        self.seed = settings.seed
        self.steps_done = 0
        trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        self._members = [self._member(number, name, parameter) for number, (name, parameter) in enumerate(trainable)]
        if not self._members:
            raise TrainingError("Nothing trains: no parameter requires a gradient. Check the `tuning` section of the recipe.")
        masters = [(m.name, m.master) for m in self._members]
        self.optimizers = (
            [optimizer for each in masters for optimizer in build_optimizers([each], settings)]
            if settings.gradient_release
            else build_optimizers(masters, settings)
        )
        self._released: dict[int, torch.Tensor] = {}  # of each member stepped in this backward pass: its gradient's norm
        for group in self._groups:
            group["initial_lr"] = group["lr"]

    def _member(self, number: int, name: str, parameter: nn.Parameter) -> _Member:
        if parameter.dtype == torch.float32:
            return _Member(number, name, parameter, parameter)
        if self.updates == "float32_masters":
            return _Member(number, name, parameter, nn.Parameter(parameter.detach().float()))
        if parameter.dtype != torch.bfloat16:
            raise RecipeError(
                f"tuning.bf16_updates: stochastic_rounding is for bfloat16 weights, {name} is {parameter.dtype}; "
                "set tuning.bf16_updates: float32_masters"
            )
        # Between steps only its number of dimensions is kept.
        return _Member(number, name, parameter, nn.Parameter(parameter.new_empty((0,) * parameter.ndim, dtype=torch.float32)))

    @property
    def names(self) -> list[str]:
        """Names of the trainable parameters, in the order of the state."""
        return [member.name for member in self._members]

    @property
    def collects_each_pack(self) -> bool:
        """Whether :meth:`collect_gradients` must follow each backward (gradients add up outside the parameters)."""
        return self.updates == "float32_masters" and any(member.rounded for member in self._members)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Adds the gradients of low-precision weights to those of their masters, in float32."""
        if self.collects_each_pack:
            for member in self._members:
                self._collect(member)

    def _collect(self, member: _Member) -> None:
        if not member.rounded or member.weight.grad is None:
            return
        if member.master.grad is None:
            member.master.grad = member.weight.grad.float()
        else:
            member.master.grad.add_(member.weight.grad)
        member.weight.grad = None

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Divides all gradients by the loss scale of float16 training."""
        for optimizer in self.optimizers:
            scaler.unscale_(optimizer)

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Scales all gradients down together to `max_norm` (0: never).

        Returns:
            Their norm before, a float32 scalar on the device.
        """
        gradients = self._gradients()
        if not gradients:
            return torch.zeros(())
        parts = [own_part(gradient) for gradient in gradients]
        norm = _joint_norm(torch._foreach_norm(parts, dtype=torch.float32))  # an adapter has hundreds of small matrices
        norm = norm_over_processes(norm, gradients[0])
        if max_norm > 0:
            torch._foreach_mul_(parts, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    def _gradients(self) -> list[torch.Tensor]:
        carriers = (self._carrier(member) for member in self._members)
        return [carrier.grad for carrier in carriers if carrier.grad is not None]

    def _carrier(self, member: _Member) -> nn.Parameter:
        """Where the gradient of a step lies before the update."""
        return member.master if self.updates == "float32_masters" else member.weight

    def set_factor(self, factor: float) -> None:
        """Sets every learning rate to its peak times a factor of the schedule."""
        for group in self._groups:
            group["lr"] = group["initial_lr"] * factor

    def learning_rates(self) -> dict[str, float]:
        """The present learning rate of each part that trains; of a part under two optimizers, AdamW's."""
        rates: dict[str, float] = {}
        for group in self._groups:
            if "betas" in group or group["part"] not in rates:  # Adam's; Muon has a momentum
                rates[group["part"]] = group["lr"]
        return rates

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients at hand."""
        if self.updates == "stochastic_rounding":
            self._step_rounding()
        else:
            for optimizer in self.optimizers:
                optimizer.step()
            for member in self._members:
                if member.rounded:
                    member.weight.copy_(member.master)
        self.steps_done += 1

    def _step_rounding(self) -> None:
        """Steps weights chunk by chunk: optimizers pass over tensors that have no gradient."""
        for optimizer in self.optimizers:  # what is float32 already
            optimizer.step()
        held = [(m, m.master.grad) for m in self._members if not m.rounded]
        for member, _ in held:
            member.master.grad = None
        for chunk in self._chunks():
            self._step_chunk(chunk, self.optimizers)
        for member, gradient in held:
            member.master.grad = gradient

    def _step_chunk(self, chunk: Sequence[_Member], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for member in chunk:
            member.master.data = member.weight.float()
            member.master.grad = member.weight.grad.float()  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.step()
        for member in chunk:  # of all of them before the first is rounded, which takes memory too
            member.master.grad = None
        generator = torch.Generator(chunk[0].weight.device)
        for member in chunk:
            # The same on all processes, so that their weights stay equal; a function of step and parameter, so that nothing
            # is to be saved and the order of updates does not matter.
            generator.manual_seed(((self.seed * 1_000_003 + self.steps_done) * 65_537 + member.number) % 2**63)
            stochastic_round_into(member.weight, member.master.data, generator)
            member.master.data = member.master.data.new_empty((0,) * member.weight.ndim)

    @property
    def has_released(self) -> bool:
        """Whether weights were updated in a backward pass under :meth:`releasing` that did not come to its end."""
        return bool(self._released)

    @contextmanager
    def releasing(self) -> Iterator[None]:
        """Around the backward pass of a step's last pack: each weight is updated, and its gradient let go, as soon as it is complete.

        Weights whose gradient is of earlier packs alone are updated at the end. To the bit, the weights are those that
        :meth:`step` after the same backward pass would give. For a single process: gradients are not averaged.
        """
        hooks = [m.weight.register_post_accumulate_grad_hook(partial(self._release, m)) for m in self._members]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for member in self._members:
            if self._carrier(member).grad is not None:
                self._release(member)
        self.steps_done += 1

    @torch.no_grad()
    def _release(self, member: _Member, weight: torch.Tensor | None = None) -> None:
        if self.updates == "float32_masters":
            self._collect(member)
        gradient = self._carrier(member).grad
        if gradient is None:
            return
        self._released[member.number] = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        own = self.optimizers[member.number]
        if member.rounded and self.updates == "stochastic_rounding":
            self._step_chunk([member], [own])
        else:
            own.step()
            if member.rounded:
                member.weight.copy_(member.master)
        member.weight.grad = member.master.grad = None

    def take_released_norm(self) -> torch.Tensor:
        """Norm of all gradients of the step that :meth:`releasing` was around, a float32 scalar on the device."""
        norms, self._released = [self._released[number] for number in sorted(self._released)], {}
        return _joint_norm(norms) if norms else torch.zeros(())

    def _chunks(self) -> list[list[_Member]]:
        chunks: list[list[_Member]] = []
        room = 0
        for member in self._members:
            if not member.rounded or member.weight.grad is None:
                continue
            size = 4 * member.weight.numel()
            if not chunks or size > room:
                chunks.append([])
                room = ROUNDING_CHUNK_BYTES
            chunks[-1].append(member)
            room -= size
        return chunks

    def zero_grad(self) -> None:
        """Frees all gradients."""
        for member in self._members:
            member.weight.grad = None
            member.master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact continuation needs: tensors (divided ones where the weights are), numbers and lists only."""
        masters = {m.name: m.master.data for m in self._members if m.rounded} if self.updates == "float32_masters" else {}
        return {
            "names": self.names,
            "updates": self.updates,
            "steps_done": self.steps_done,
            "masters": masters,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, its tensors in one piece.

        Raises:
            TrainingError: it belongs to other parameters or other optimizers.
        """
        if state["names"] != self.names or len(state["optimizers"]) != len(self.optimizers):
            differing = sorted(set(state["names"]) ^ set(self.names))[:3]
            raise TrainingError(
                f"The optimizer state belongs to {len(state['names'])} parameters, this run trains {len(self.names)}"
                + (f" (only on one side: {', '.join(differing)})" if differing else "")
                + ". Resume with the recipe of the checkpoint."
            )
        if self.updates == "float32_masters":
            for member in self._members:
                if member.rounded:
                    member.master.copy_(divided_like(state["masters"][member.name], member.master))
        for optimizer, content in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer_state(optimizer, content)
        self.steps_done = state["steps_done"]


def _joint_norm(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
