"""Signs of collapse: the rank and the spread of pooled features.

A falling loss says nothing about health: collapsed features are easy to predict.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.evaluate.ring_buffer import RingBuffer


def rank_me(features: Tensor, centered: bool = False) -> float:
    """RankMe (arXiv 2210.02885, equation 1): the exponential of the entropy of s / sum(s), s the singular values.

    Between 1 (all rows on one line) and min(n, D) (all directions used alike); 0 if nothing but zeros is left.

    Args:
        features: [n, D].
        centered: subtract the mean over rows first. Without, a common offset counts as a direction of its own, and a
            large one hides the others.

    Returns:
        The rank; NaN if there are no rows or a feature is not finite. Waits for the device.
    """
    x = features.detach().double()
    if not len(x) or not x.isfinite().all():
        return float("nan")
    total = x.square().sum()
    if centered:
        x = x - x.mean(0)
    gram = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
    energy = torch.linalg.eigvalsh(gram)
    # What rounding leaves behind is no direction.
    energy = energy[energy > total * max(x.shape) * torch.finfo(x.dtype).eps]
    if not len(energy):
        return 0.0
    share = energy.sqrt() / energy.sqrt().sum()
    return float(torch.special.entr(share).sum().exp())


def feature_std(features: Tensor, normalized: bool = False) -> float:
    """Mean over dimensions of the standard deviation over rows (biased, that is divided by n). Waits for the device.

    Args:
        features: [n, D].
        normalized: divide every row by its length first and multiply the result by sqrt(D). Then the scale of the
            features drops out: near 1 when they point in all directions alike, 0 when all point the same way
            (arXiv 2011.10566, section 4.1).

    Returns:
        The spread; NaN if there are no rows.
    """
    x = features.detach().float()
    if not len(x):
        return float("nan")
    if normalized:
        x = F.normalize(x, dim=1) * x.shape[1] ** 0.5
    return float(x.std(0, correction=0).mean())


def feature_health(features: Tensor) -> dict[str, float]:
    """``rank``, ``rank_centered``, ``std`` and ``std_normalized`` of features [n, D]. Waits for the device."""
    return {
        "rank": rank_me(features),
        "rank_centered": rank_me(features, centered=True),
        "std": feature_std(features),
        "std_normalized": feature_std(features, normalized=True),
    }


def mean_cosine(features: Tensor) -> float:
    """Mean cosine between two different rows of features [n, D]: 1 where all point the same way. Waits for the device.

    NaN with fewer than two rows.
    """
    count = len(features)
    if count < 2:
        return float("nan")
    # In fp64, because networks at their start, and collapsed ones, differ in the last digits of fp32.
    mean = F.normalize(features.detach().double(), dim=1).mean(0)
    return float((mean.square().sum() * count - 1) / (count - 1))


class HealthBuffer:
    """The pooled target features of the last ``capacity`` images, in fp32. Pushing never waits for the device."""

    def __init__(self, dim: int, *, capacity: int = 2048, device: torch.device | str | None = None) -> None:
        self._ring = RingBuffer(capacity, {"features": ((dim,), torch.float32)}, device)

    def push(self, features: Tensor) -> None:
        """Append pooled features [B, D]."""
        self._ring.push(features=features)

    def features(self) -> Tensor:
        """fp32 [at most capacity, D], oldest first. Waits for the device."""
        return self._ring.rows()["features"]

    def report(self) -> dict[str, float]:
        """``feature_health`` of what is in the buffer; empty without any. Waits for the device."""
        features = self.features()
        return feature_health(features) if len(features) else {}

    def clear(self) -> None:
        self._ring.clear()
