"""Learning rate, weight decay and EMA momentum as pure functions of the step.

``step`` counts from 0. As in the official code, learning rate and weight decay are advanced before they are used, so
step 0 takes their value at index 1; the momentum of step 0 is its value at index 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

Shape = Literal["cosine", "linear"]


def interpolate(shape: Shape, start: float, end: float, progress: float) -> float:
    """From ``start`` to ``end`` as ``progress`` goes from 0 to 1, along half a cosine or a line; held beyond."""
    progress = min(max(progress, 0.0), 1.0)
    if shape == "linear":
        return start + (end - start) * progress
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class _Ends:
    """Where the three schedules begin and end, and along which shapes they go; the defaults are the official recipe."""

    start_lr: float = 2e-4
    lr: float = field(default=1e-3, metadata={"common": True})
    final_lr: float = 1e-6
    weight_decay: float = field(default=0.04, metadata={"common": True})
    final_weight_decay: float = 0.4
    weight_decay_shape: Shape = "cosine"
    momentum: float = field(default=0.996, metadata={"common": True})
    final_momentum: float = 1.0
    momentum_shape: Shape = "linear"

    def __post_init__(self) -> None:
        for name in ("start_lr", "lr", "final_lr", "weight_decay", "final_weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("momentum", "final_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("weight_decay_shape", "momentum_shape"):
            if getattr(self, name) not in ("cosine", "linear"):
                raise ValueError(f"{name} must be cosine or linear, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Schedules(_Ends):
    """The three schedules of a run of ``total_steps`` steps.

    Args:
        total_steps: length the schedules are drawn for; a run may stop earlier (the official ``ipe_scale`` 1.25
            stretches them beyond the last step).
        warmup_steps: linear warm-up of the learning rate, followed by half a cosine.
        start_lr, lr, final_lr: at index 0, after warm-up, at the end.
        weight_decay, final_weight_decay: at index 0 and at the end.
        momentum, final_momentum: of the EMA, at index 0 and at the end.
        weight_decay_shape, momentum_shape: "cosine" or "linear". The official code has cosine and linear; the paper
            writes linear for both.

    Raises:
        ValueError: warm-up longer than the run, or a value out of its range.
    """

    total_steps: int
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total_steps < 1:
            raise ValueError(f"schedules need at least 1 step, got {self.total_steps}")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(f"a warm-up of {self.warmup_steps} steps does not fit into {self.total_steps} steps")

    def lr_at(self, step: int) -> float:
        index = step + 1
        if index < self.warmup_steps:
            return interpolate("linear", self.start_lr, self.lr, index / self.warmup_steps)
        progress = (index - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return interpolate("cosine", self.lr, self.final_lr, progress)

    def weight_decay_at(self, step: int) -> float:
        progress = (step + 1) / self.total_steps
        return interpolate(self.weight_decay_shape, self.weight_decay, self.final_weight_decay, progress)

    def momentum_at(self, step: int) -> float:
        return interpolate(self.momentum_shape, self.momentum, self.final_momentum, step / self.total_steps)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(_Ends):
    """AdamW, its schedules and the EMA; the defaults are the official recipe.

    Args:
        start_lr: learning rate at the start of the warm-up.
        lr: learning rate after the warm-up.
        final_lr: learning rate at the end of the schedule.
        warmup_epochs: length of the linear warm-up; fractions are allowed.
        weight_decay: weight decay at the start; biases and norms are not decayed.
        final_weight_decay: weight decay at the end of the schedule.
        weight_decay_shape: cosine (official code) or linear (paper).
        momentum: momentum of the EMA of the target encoder at the start.
        final_momentum: momentum of the EMA at the end of the schedule.
        momentum_shape: linear (official) or cosine.
        schedule_stretch: length of the schedules over that of the run (the official ipe_scale).
        betas: decay rates of Adam's two moments.
        eps: what Adam adds to the root of the second moment.
        max_grad_norm: clip the total gradient norm to this; null for no clipping.
        layer_decay: learning rate multiplier from one encoder layer to the one below.
    """

    warmup_epochs: float = field(default=40.0, metadata={"common": True})
    schedule_stretch: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = None
    layer_decay: float = 1.0

    def schedules(self, total_steps: int, steps_per_epoch: int) -> Schedules:
        """The schedules of a run. Raises ValueError if the warm-up does not fit into it."""
        if not self.schedule_stretch >= 1:
            raise ValueError(f"optim.schedule_stretch must be at least 1, got {self.schedule_stretch}")
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        if warmup_steps >= int(total_steps * self.schedule_stretch):
            raise ValueError(
                f"optim.warmup_epochs {self.warmup_epochs} ({warmup_steps} steps, with {steps_per_epoch} in an epoch) "
                f"does not fit into the {total_steps} steps of the run: lower it, or raise train.steps or train.epochs"
            )
        ends = {f.name: getattr(self, f.name) for f in fields(_Ends)}
        return Schedules(int(total_steps * self.schedule_stretch), warmup_steps, **ends)
