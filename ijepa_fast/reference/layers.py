"""What stands between the matrix products of a block: layer norm with the residual sum, and GELU's derivative.

Legend: T packed rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_fast.reference.precision import accumulation_dtype


def layer_norm(
    x: Tensor, residual: Tensor | None, x_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Layer-norm of ``h = x + x_bias + residual``, the step between two parts of a pre-norm transformer block.

    Args:
        x: [T, D].
        residual: [T, D] or None; the stream that x is added to, which may be wider than x.
        x_bias: [D] or None; bias of the projection that x comes from, for a projection that leaves it out.
        weight, bias: [D] or None; of the norm.

    Returns:
        out [T, D] in the dtype of x; h [T, D] in the dtype of the residual (else of x), or empty if h is x; mean and
        reciprocal standard deviation of the rows of h [T], fp32 (fp64 for fp64).
    """
    wide = accumulation_dtype(x.dtype)
    h, total = x.to(wide), x.new_empty(0)
    for term in (x_bias, residual):
        h = h if term is None else h + term.to(wide)
    if x_bias is not None or residual is not None:
        total = h.to(x.dtype if residual is None else residual.dtype)
        h = total.to(wide)
    mean = h.mean(-1)
    centred = h - mean[:, None]
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    out = centred * rstd[:, None]
    out = out if weight is None else out * weight.to(wide)
    out = out if bias is None else out + bias.to(wide)
    return out.to(x.dtype), total, mean, rstd


def layer_norm_backward(
    grad: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    need_weight: bool,
    need_bias: bool,
    need_x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``layer_norm`` into h, x, weight, bias and x_bias.

    Args:
        grad: [T, D] of out; grad_h: [T, D] of h or None.
        h: what was normalised.

    Returns:
        Gradient of h [T, D] in its dtype; the same in the dtype of x if that differs, else empty; weight, bias and
        x_bias [D] in fp32 (fp64 for fp64), empty if not needed.
    """
    wide = mean.dtype
    grad_out = grad.to(wide)
    normal = (h.to(wide) - mean[:, None]) * rstd[:, None]
    scaled = grad_out if weight is None else grad_out * weight.to(wide)
    slope = scaled - normal * (scaled * normal).mean(-1, keepdim=True) - scaled.mean(-1, keepdim=True)
    total = slope * rstd[:, None]
    total = total if grad_h is None else total + grad_h.to(wide)
    empty = grad_out.new_empty(0)
    return (
        total.to(h.dtype),
        total.to(grad.dtype) if grad.dtype != h.dtype else grad.new_empty(0),
        (grad_out * normal).sum(0) if need_weight else empty,
        grad_out.sum(0) if need_bias else empty.clone(),
        total.sum(0) if need_x_bias else empty.clone(),
    )


def gelu_slope(h: Tensor) -> Tensor:
    """Derivative of the exact GELU, h times the normal distribution's cumulative distribution function."""
    cumulative = 0.5 * (1 + torch.erf(h * 0.5**0.5))
    return cumulative + h * torch.exp(-0.5 * h * h) * (2 * torch.pi) ** -0.5
