"""Linear layers in FP8 (e4m3), for the target encoder, which needs no gradient.

Values and scales are those of ``ops.quantize_fp8``: with one scale per tensor, or one per row of the input (a
token) and per row of the weight (an output feature). Both are found on the device in every forward pass, because the
EMA changes the weights at every step. Products are summed in fp32, multiplied by both scales, and rounded.

On CUDA it is ``torch._scaled_mm`` that multiplies, with the faster sums that Hopper has for FP8, which are less exact.
Elsewhere e4m3 numbers are multiplied as fp32: for tests, and for training curves without such a GPU.

Legend: T rows, K input features, D output features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast import ops

Scaling = Literal["off", "tensor", "row"]
MULTIPLE = 16
"""Input and output features must be multiples of it: ``torch._scaled_mm`` wants rows that are 16 bytes wide."""
CAPABILITY = (8, 9)
"""Of the first GPUs that multiply e4m3 numbers: Ada, then Hopper (9.0)."""

_scaling: Scaling = "off"


@contextmanager
def fp8_products(scaling: Scaling) -> Iterator[None]:
    """Inside, ``blocks.Linear`` multiplies in FP8. Weights stay what they are, as with ``torch.autocast``."""
    global _scaling
    outside, _scaling = _scaling, scaling
    try:
        yield
    finally:
        _scaling = outside


def active_scaling() -> Scaling:
    """That of the ``fp8_products`` around the caller; "off" outside."""
    return _scaling


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scaling: Scaling) -> Tensor:
    """``F.linear`` of x [T, K] and weight [D, K] rounded to e4m3: [T, D] in the dtype of the weight. No gradient.

    Args:
        weight: on a GPU bf16, because row-wise scaling has no other results there.
        bias: [D] in the dtype of the weight, or None.
        scaling: "tensor" or "row". With "tensor" what becomes of a row depends on the other rows.
    """
    per_row = scaling == "row"
    x_TK, x_scales = ops.quantize_fp8(x, per_row)
    weight_DK, weight_scales = ops.quantize_fp8(weight, per_row)
    if not x.is_cuda:
        out_TD = F.linear(x_TK.float(), weight_DK.float()) * x_scales[:, None] * weight_scales
        return (out_TD if bias is None else out_TD + bias.float()).to(weight.dtype)
    return torch._scaled_mm(
        x_TK,
        weight_DK.t(),
        scale_a=x_scales.unsqueeze(1) if per_row else x_scales,
        scale_b=weight_scales.unsqueeze(0) if per_row else weight_scales,
        bias=bias,
        out_dtype=weight.dtype,
        use_fast_accum=True,
    )


def check_fp8(scaling: Scaling, linears: Iterable[nn.Linear], device: torch.device) -> None:
    """Raises ValueError for an unknown scaling, or one that these layers cannot have, or not on this device."""
    if scaling not in get_args(Scaling):
        raise ValueError(f"FP8 scaling must be one of {', '.join(get_args(Scaling))}, got {scaling!r}")
    if scaling == "off":
        return
    for layer in linears:
        if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
            raise ValueError(
                f"FP8 needs widths that are multiples of {MULTIPLE}, "
                f"but a layer goes from {layer.in_features} to {layer.out_features}"
            )
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        wanted, found = (".".join(map(str, version)) for version in (CAPABILITY, capability))
        raise ValueError(
            f"FP8 needs a GPU of compute capability {wanted}, but {torch.cuda.get_device_name(device)} has {found}"
        )
