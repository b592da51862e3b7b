"""Parameter groups, learning-rate schedules, and optimizers that step low-precision weights in float32.

Everything the loop needs of an optimizer is in :class:`StepOptimizer`, whatever stands behind it: one optimizer or two
(Muon for matrices, AdamW for the rest), weights that are float32 already (adapters), or bfloat16 weights whose small
updates must not be rounded away.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from finesight.errors import RecipeError, TrainingError
from finesight.models.parameters import part_of
from finesight.recipe import TrainingSettings

GroupPart = Literal["tower", "merger", "language_model"]
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


def group_part(name: str) -> GroupPart:
    """The part whose learning rate a parameter takes."""
    part = part_of(name)
    return part if part in ("tower", "merger") else "language_model"


def takes_muon(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon steps a parameter: matrices of hidden layers, no embeddings, vocabulary matrices or convolutions."""
    steps = name.split(".")
    outside = {"embed_tokens", "lm_head", "pos_embed", "patch_embed"}
    return parameter.ndim == 2 and not outside.intersection(steps)


def stochastic_round(values: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """float32 to bfloat16, up or down with the probability that makes the mean exact.

    bfloat16 is the upper half of a float32: a random lower half is added and the lower half cut off, so a value that
    lies a share s of the way to the next bfloat16 goes there with probability s. Infinities and nan stay.
    """
    bits = values.float().contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).to(torch.bfloat16)


@dataclass(frozen=True)
class _Member:
    """A trainable parameter, and the float32 tensor that the optimizer steps in its place (itself, if it is float32)."""

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
        self._members = [self._member(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        if not self._members:
            raise TrainingError("Nothing trains: no parameter requires a gradient. Check the `tuning` section of the recipe.")
        self.optimizers = _build_optimizers([(m.name, m.master) for m in self._members], settings)
        for group in self._groups:
            group["initial_lr"] = group["lr"]

    def _member(self, name: str, parameter: nn.Parameter) -> _Member:
        if parameter.dtype == torch.float32:
            return _Member(name, parameter, parameter)
        if self.updates == "float32_masters":
            return _Member(name, parameter, nn.Parameter(parameter.detach().float()))
        if parameter.dtype != torch.bfloat16:
            raise RecipeError(
                f"tuning.bf16_updates: stochastic_rounding is for bfloat16 weights, {name} is {parameter.dtype}; "
                "set tuning.bf16_updates: float32_masters"
            )
        # Between steps only its number of dimensions is kept.
        return _Member(name, parameter, nn.Parameter(parameter.new_empty((0,) * parameter.ndim, dtype=torch.float32)))

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
        if not self.collects_each_pack:
            return
        for member in self._members:
            if not member.rounded or member.weight.grad is None:
                continue
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
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
        if max_norm > 0:
            torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    def _gradients(self) -> list[torch.Tensor]:
        carriers = (m.master if self.updates == "float32_masters" else m.weight for m in self._members)
        return [carrier.grad for carrier in carriers if carrier.grad is not None]

    def set_factor(self, factor: float) -> None:
        """Sets every learning rate to its peak times a factor of the schedule."""
        for group in self._groups:
            group["lr"] = group["initial_lr"] * factor

    def learning_rates(self) -> dict[str, float]:
        """The present learning rate of each part that trains; of a part under two optimizers, AdamW's."""
        rates: dict[str, float] = {}
        for group in self._groups:
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
        for number, chunk in enumerate(self._chunks()):
            for member in chunk:
                member.master.data = member.weight.float()
                member.master.grad = member.weight.grad.float()  # type: ignore[union-attr]
            for optimizer in self.optimizers:
                optimizer.step()
            generator = torch.Generator(chunk[0].weight.device)
            # The same on all processes, so that their weights stay equal; a function of the step, so that nothing is to be saved.
            generator.manual_seed(((self.seed * 1_000_003 + self.steps_done) * 65_537 + number) % 2**63)
            for member in chunk:
                member.weight.copy_(stochastic_round(member.master.data, generator))
                member.master.grad = None
                member.master.data = member.master.data.new_empty((0,) * member.weight.ndim)
        for member, gradient in held:
            member.master.grad = gradient

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
        """Everything an exact continuation needs: tensors, numbers and lists only."""
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
        """Restores what :meth:`state_dict` gave.

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
                    member.master.copy_(state["masters"][member.name])
        for optimizer, content in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        self.steps_done = state["steps_done"]


def parameter_groups(named: Sequence[tuple[str, nn.Parameter]], settings: TrainingSettings) -> list[dict[str, Any]]:
    """Groups for AdamW: one for each part and, within it, for matrices (with decay) and vectors (without)."""
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in named:
        part, decays = group_part(name), parameter.ndim >= 2
        fresh: dict[str, Any] = {
            "params": [],
            "part": part,
            "lr": part_learning_rate(part, settings),
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        groups.setdefault((part, decays), fresh)["params"].append(parameter)
    return list(groups.values())


def part_learning_rate(part: GroupPart, settings: TrainingSettings) -> float:
    """Peak learning rate of a part."""
    own = {"tower": settings.vision_learning_rate, "merger": settings.merger_learning_rate}.get(part)
    return settings.learning_rate if own is None else own


def _build_optimizers(named: Sequence[tuple[str, nn.Parameter]], settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    if settings.optim == "adamw_8bit":
        return [_adamw_8bit(parameter_groups(named, settings), settings)]
    if settings.optim == "muon":
        matrices = [(name, parameter) for name, parameter in named if takes_muon(name, parameter)]
        rest = [(name, parameter) for name, parameter in named if not takes_muon(name, parameter)]
        optimizers = [_muon(matrices, settings)] if matrices else []
        return optimizers + ([_adamw(parameter_groups(rest, settings), settings)] if rest else [])
    return [_adamw(parameter_groups(named, settings), settings)]


def _adam_arguments(settings: TrainingSettings) -> dict[str, Any]:
    return {"lr": settings.learning_rate, "betas": (settings.adam_beta1, settings.adam_beta2), "eps": settings.adam_epsilon}


def _adamw(groups: list[dict[str, Any]], settings: TrainingSettings) -> torch.optim.Optimizer:
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, fused=True if on_gpu else None, **_adam_arguments(settings))


def _adamw_8bit(groups: list[dict[str, Any]], settings: TrainingSettings) -> torch.optim.Optimizer:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            "training.optim: adamw_8bit needs bitsandbytes, which is not installed: pip install 'finesight[gpu]', or set training.optim: adamw"
        )
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, **_adam_arguments(settings))


def _muon(named: Sequence[tuple[str, nn.Parameter]], settings: TrainingSettings) -> torch.optim.Optimizer:
    """Muon with updates as large as AdamW's (`match_rms_adamw`), so that learning rates of AdamW carry over.

    A part with a learning rate of its own keeps its ratio to `training.learning_rate`.
    """
    base = settings.muon_learning_rate or settings.learning_rate
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named:
        part = group_part(name)
        ratio = part_learning_rate(part, settings) / settings.learning_rate
        groups.setdefault(part, {"params": [], "part": part, "lr": base * ratio})["params"].append(parameter)
    return torch.optim.Muon(list(groups.values()), lr=base, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")
