"""What the settings' values must fulfil, where no section checks it itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

_SHARE = (lambda value: 0 <= value <= 1, "in [0, 1]")
_POSITIVE = (lambda value: value > 0, "positive")
LIMITS = {
    "model.img_size": _POSITIVE,
    "model.in_chans": _POSITIVE,
    "model.patch_size": _POSITIVE,
    "model.depth": _POSITIVE,
    "model.predictor_depth": _POSITIVE,
    "model.mlp_ratio": _POSITIVE,
    "model.predictor_mlp_ratio": _POSITIVE,
    "model.projector_dim": _POSITIVE,
    "loader.flip": _SHARE,
    "loader.max_bad_share": _SHARE,
    "loader.max_pixels": _POSITIVE,
    "train.timeout": (lambda value: 0 < value <= 10_080, "positive and at most 10,080 (a week)"),
    "optim.warmup_epochs": (lambda value: value >= 0, "at least 0"),
    "optim.max_grad_norm": _POSITIVE,
    "evaluation.images": _POSITIVE,
    "evaluation.resize_ratio": (lambda value: value >= 1, "at least 1"),
    "evaluation.bank": (lambda value: value == 0 or 2 <= value <= 50_000, "0 or between 2 and 50,000"),
}
"""Setting -> what its numbers must fulfil, and the same in words."""


def check_limits(settings: Mapping[str, object]) -> None:
    """Raise ValueError for numbers not finite or beyond ``LIMITS``, and for texts no path can be; names are dotted."""
    for name, value in settings.items():
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"{name} must be without zero bytes, got {value!r}")
        numbers = list(_numbers(value))
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{name} must be finite, got {value}")
        fits, words = LIMITS.get(name, (None, ""))
        if fits is not None and not all(map(fits, numbers)):
            raise ValueError(f"{name} must be {words}, got {value}")


def _numbers(value: object) -> Iterator[float]:
    """The numbers in a setting, one, several, or none."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
