"""Linear layers in FP8 (e4m3), for the target encoder, which needs no gradient.

Values and scales are those of ``ops.quantize_fp8``, with one scale per row of the input (a token) and per row of the
weight (an output feature). They are found on the device in every forward pass, because the EMA changes the weights at
every step. Products are summed in fp32, multiplied by both scales, and rounded.

On CUDA it is ``torch._scaled_mm`` that multiplies, with the faster sums that Hopper has for FP8, which are less exact.
Its row-wise scaling was slow while CUTLASS did it (DINOv3 scales unscaled products by hand for that reason). On Hopper
torch gives it to cuBLAS where that is 12.9 or later, as in every build for CUDA 13, and the product is written once,
with its bias. Elsewhere e4m3 numbers are multiplied as fp32: for tests, and for training curves without such a GPU.

Legend: T rows, K input features, D output features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast import ops
from ijepa_fast.model.blocks import Linear

MULTIPLE = 16
"""Input and output features must be multiples of it: ``torch._scaled_mm`` wants rows that are 16 bytes wide."""
CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that multiply e4m3 numbers: Ada; then Hopper (9.0)."""


class Fp8Linear(Linear):
    """Linear layer that multiplies in FP8 in training mode, and as ``Linear`` in evaluation mode. It has no gradient.

    Its weight stays what it is, so the EMA and checkpoints know nothing of it.
    """

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        if not self.training:
            return super().forward(x, outputs)
        weight, bias = self.part(outputs)
        return fp8_linear(x, weight, None if bias is None else bias.to(weight.dtype))


def convert_to_fp8(module: nn.Module, device: torch.device) -> None:
    """Turn every ``Linear`` inside ``module`` into an ``Fp8Linear``, in place; parameters and their names stay.

    Args:
        device: where the layers will run. On a GPU, their weights must be bf16 by then.

    Raises:
        ValueError: widths that are no multiples of 16, or a GPU that cannot multiply FP8 numbers.
    """
    layers = [layer for layer in module.modules() if type(layer) is Linear]
    for layer in layers:
        if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
            raise ValueError(
                f"FP8 needs widths that are multiples of {MULTIPLE}, "
                f"but a layer goes from {layer.in_features} to {layer.out_features}"
            )
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        wanted, actual = (".".join(map(str, version)) for version in (CAPABILITY, capability))
        raise ValueError(
            f"FP8 needs a GPU of compute capability {wanted}, but {torch.cuda.get_device_name(device)} has {actual}"
        )
    for layer in layers:
        layer.__class__ = Fp8Linear


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of x [T, K] and weight [D, K] rounded to e4m3: [T, D] in the dtype of the weight. No gradient.

    Args:
        weight: on a GPU bf16, because row-wise scaling has no other results there.
        bias: [D] in the dtype of the weight, or None.
    """
    x_TK, x_scales = ops.quantize_fp8(x, True)
    weight_DK, weight_scales = ops.quantize_fp8(weight, True)
    if not x.is_cuda:
        out_TD = F.linear(x_TK.float(), weight_DK.float()) * x_scales[:, None] * weight_scales
        return (out_TD if bias is None else out_TD + bias.float()).to(weight.dtype)
    return torch._scaled_mm(
        x_TK,
        weight_DK.t(),
        scale_a=x_scales.unsqueeze(1),
        scale_b=weight_scales.unsqueeze(0),
        bias=bias,
        out_dtype=weight.dtype,
        use_fast_accum=True,
    )
