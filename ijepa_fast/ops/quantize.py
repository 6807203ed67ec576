"""Numbers of 8 bits, see ``reference/quantize.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_fast import reference
from ijepa_fast.ops.registration import cuda_kernel


@torch.library.custom_op("ijepa_fast::quantize_fp8", mutates_args=())
def quantize_fp8(x: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    return reference.quantize_fp8(x, per_row)


@quantize_fp8.register_fake
def _(x, per_row):
    scales = x.new_empty(x.shape[0] if per_row else 1, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=reference.FP8), scales


cuda_kernel(quantize_fp8, "quantize_fp8", "quantize_fp8")
