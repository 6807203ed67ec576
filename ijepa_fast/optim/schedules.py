"""Learning rate, weight decay and EMA momentum as pure functions of the step.

``step`` counts from 0. As in the official code, learning rate and weight decay are advanced before they are used, so
step 0 takes their value at index 1; the momentum of step 0 is its value at index 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cosine", "linear"]


def interpolate(shape: Shape, start: float, end: float, progress: float) -> float:
    """From ``start`` to ``end`` as ``progress`` goes from 0 to 1, along half a cosine or a line; held beyond."""
    progress = min(max(progress, 0.0), 1.0)
    if shape == "linear":
        return start + (end - start) * progress
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Schedules:
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
    start_lr: float = 2e-4
    lr: float = 1e-3
    final_lr: float = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    momentum: float = 0.996
    final_momentum: float = 1.0
    weight_decay_shape: Shape = "cosine"
    momentum_shape: Shape = "linear"

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ValueError(f"schedules need at least 1 step, got {self.total_steps}")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(f"a warm-up of {self.warmup_steps} steps does not fit into {self.total_steps} steps")
        for name in ("start_lr", "lr", "final_lr", "weight_decay", "final_weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("momentum", "final_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("weight_decay_shape", "momentum_shape"):
            if getattr(self, name) not in ("cosine", "linear"):
                raise ValueError(f"{name} must be cosine or linear, got {getattr(self, name)!r}")

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
