"""Learning rate, weight decay and EMA momentum as pure functions of the step.

``step`` counts from 0. As in the official code, learning rate and weight decay are advanced before they are used, so
step 0 takes their value at index 1; the momentum of step 0 is its value at index 0.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, fields
from typing import Literal

log = logging.getLogger(__name__)

Shape = Literal["cosine", "linear"]


def interpolate(shape: Shape, start: float, end: float, progress: float) -> float:
    """From ``start`` to ``end`` as ``progress`` goes from 0 to 1, along half a cosine or a line; held beyond."""
    progress = min(max(progress, 0.0), 1.0)
    if shape == "linear":
        return start + (end - start) * progress
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class _Ends:
    """Where the three schedules begin and end; the defaults are the official recipe."""

    lr: float = field(default=1e-3, metadata={"common": True})
    lr_ends: tuple[float, float] = (2e-4, 1e-6)
    weight_decay: tuple[float, float] = (0.04, 0.4)
    momentum: tuple[float, float] = (0.996, 1.0)

    def __post_init__(self) -> None:
        for name in ("lr_ends", "weight_decay", "momentum"):
            ends = getattr(self, name)
            if not isinstance(ends, (tuple, list)) or len(ends) != 2:
                raise ValueError(f"{name} must be two numbers, at the start and at the end, got {ends!r}")
        for name, values in (("lr", (self.lr,)), ("lr_ends", self.lr_ends), ("weight_decay", self.weight_decay)):
            if not all(value >= 0 for value in values):
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not all(0 <= value <= 1 for value in self.momentum):
            raise ValueError(f"momentum must lie in [0, 1], got {self.momentum}")


@dataclass(frozen=True)
class Schedules(_Ends):
    """The three schedules of a run of ``total_steps`` steps.

    Args:
        total_steps: length the schedules are drawn for; a run may stop earlier (the official ``ipe_scale`` 1.25
            stretches them beyond the last step).
        warmup_steps: linear warm-up of the learning rate, followed by half a cosine.
        lr: learning rate after the warm-up.
        lr_ends: learning rate at index 0 and at the end.
        weight_decay: at index 0 and at the end.
        momentum: of the EMA, at index 0 and at the end.
        weight_decay_shape, momentum_shape: "cosine" or "linear". The official code has cosine and linear; the paper
            writes linear for both.

    Raises:
        ValueError: warm-up longer than the run, or a value out of its range.
    """

    total_steps: int
    warmup_steps: int = 0
    weight_decay_shape: Shape = "cosine"
    momentum_shape: Shape = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_decay_shape", "momentum_shape"):
            if getattr(self, name) not in ("cosine", "linear"):
                raise ValueError(f"{name} must be cosine or linear, got {getattr(self, name)!r}")
        if self.total_steps < 1:
            raise ValueError(f"schedules need at least 1 step, got {self.total_steps}")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(f"a warm-up of {self.warmup_steps} steps does not fit into {self.total_steps} steps")

    def lr_at(self, step: int) -> float:
        index = step + 1
        start, end = self.lr_ends
        if index < self.warmup_steps:
            return interpolate("linear", start, self.lr, index / self.warmup_steps)
        progress = (index - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return interpolate("cosine", self.lr, end, progress)

    def weight_decay_at(self, step: int) -> float:
        return interpolate(self.weight_decay_shape, *self.weight_decay, (step + 1) / self.total_steps)

    def momentum_at(self, step: int) -> float:
        return interpolate(self.momentum_shape, *self.momentum, step / self.total_steps)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(_Ends):
    """AdamW, its schedules and the EMA; the defaults are the official recipe.

    Args:
        lr: learning rate after the warm-up.
        lr_ends: learning rate at the start of the warm-up and, along half a cosine, at the end.
        warmup_epochs: length of the linear warm-up; fractions are allowed.
        weight_decay: weight decay at the start and, along half a cosine, at the end; a flag may name the start alone.
            Biases and norms are not decayed.
        momentum: momentum of the EMA of the target encoder at the start and, along a line, at the end; a flag may name
            the start alone.
        betas: decay rates of Adam's two moments.
        max_grad_norm: clip the total gradient norm to this; null for no clipping.
    """

    warmup_epochs: float = field(default=40.0, metadata={"common": True})
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = None

    def schedules(self, total_steps: int, steps_per_epoch: int) -> Schedules:
        """The schedules of a run. A warm-up that does not fit into it, as in a short trial, is a tenth of it."""
        warmup_steps = asked = round(self.warmup_epochs * steps_per_epoch)
        if asked >= total_steps:
            warmup_steps = total_steps // 10
            log.warning(
                "optim.warmup_epochs %g (%d steps, with %d in an epoch) does not fit into the %d steps of the run: "
                "its warm-up takes %d steps",
                *(self.warmup_epochs, asked, steps_per_epoch, total_steps, warmup_steps),
            )
        ends = {f.name: getattr(self, f.name) for f in fields(_Ends)}
        return Schedules(total_steps, warmup_steps, **ends)
