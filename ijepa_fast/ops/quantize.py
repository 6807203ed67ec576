"""Numbers of 8 bits with a scale, for matrix products.

Legend: T rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_fast.ops.registration import op

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
"""Largest finite e4m3 number (arXiv 2209.05433, table 1)."""
SMALLEST_AMAX = 1e-12
"""Rows of smaller numbers, or of zeros, are scaled as if this were their largest: the scale stays a normal number."""


@op("quantize_fp8")
def quantize_fp8(x: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """Values and scales with ``x ~ values * scales``; the largest |x| of a row, or of all, becomes 448, e4m3's largest.

    ``values = round(x * (448 / amax))`` and ``scales = amax / 448``, in fp32, rounded to nearest, ties to even. So
    nothing has to be saturated, and zeros stay zeros. A row with NaN or infinity in it has NaN among its values.

    Args:
        x: [T, D], D at least 1.
        per_row: a scale for each row instead of one for all.

    Returns:
        values e4m3 [T, D]; scales fp32, [T] with ``per_row``, else [1].
    """
    wide = x.float()
    if per_row:
        amax = wide.abs().amax(1)
    else:
        amax = wide.abs().amax().view(1) if len(wide) else wide.new_zeros(1)
    amax = amax.clamp(min=SMALLEST_AMAX)
    # A tensor: torch divides a number by a tensor, and on GPUs a tensor by a number, through a rounded reciprocal.
    largest = torch.full_like(amax, FP8_LARGEST)
    return (wide * (largest / amax)[:, None]).to(FP8), amax / largest


@quantize_fp8.register_fake
def _(x, per_row):
    scales = x.new_empty(x.shape[0] if per_row else 1, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=FP8), scales
