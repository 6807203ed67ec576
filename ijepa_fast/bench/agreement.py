"""Whether two ways to compute a training step train the same, but for rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

NOTHING = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
"""Share of the whole gradient below which that of a single parameter is rounding."""


def relative(found: float, want: float) -> float:
    """0 for equal numbers, infinite for another one than 0."""
    if found == want:
        return 0.0
    return abs(found - want) / abs(want) if want else math.inf


def largest(values: Iterable[float]) -> float:
    """NaN if one of them is, which ``max`` may pass over."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def gradient_difference(gradients: Mapping[str, Tensor], want: Mapping[str, Tensor], nothing: float) -> float:
    """The largest relative difference of a parameter's gradient, over parameters; NaN if one of them is not a number.

    Args:
        gradients, want: by name of the parameter.
        nothing: share of the whole gradient that is added to what a parameter's difference is relative to.

    Raises:
        ValueError: they are of different parameters.
    """
    if others := gradients.keys() ^ want.keys():
        raise ValueError(f"different parameters are trained: {', '.join(sorted(others)[:5])}")
    whole = sum(float(value.float().square().sum()) for value in want.values()) ** 0.5
    return largest(
        float((gradients[name].float() - value.float()).norm()) / (float(value.float().norm()) + nothing * whole)
        for name, value in want.items()
    )
