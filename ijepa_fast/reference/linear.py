"""Matrix products with what stands next to them: the MLP's first layer with GELU, and gradients with their sums.

Legend: T packed rows, N output features, K input features, H hidden width of an MLP.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.reference.layers import gelu_slope
from ijepa_fast.reference.precision import accumulation_dtype


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, keep_pre: bool) -> tuple[Tensor, Tensor]:
    """Linear layer and GELU in its exact (erf) form (arXiv 1606.08415): the first half of an MLP.

    Args:
        x: [T, K]. weight: [N, K] in the dtype of x. bias: [N].
        keep_pre: whether a backward pass will need ``pre``.

    Returns:
        gelu(pre) [T, N]; pre = x weight^T + bias [T, N], or empty. Both in the dtype of x; GELU is taken of the rounded
        ``pre``, which is what the backward pass reads.
    """
    wide = accumulation_dtype(x.dtype)
    pre = F.linear(x.to(wide), weight.to(wide), bias.to(wide)).to(x.dtype)
    return F.gelu(pre.to(wide)).to(x.dtype), pre if keep_pre else x.new_empty(0)


def hidden_gradient(grad: Tensor, weight: Tensor, pre: Tensor, need_bias: bool) -> tuple[Tensor, Tensor]:
    """Gradient into ``pre`` of ``linear_gelu`` from behind the layer that follows: an MLP's second layer.

    Args:
        grad: [T, N] of the second layer's output. weight: [N, H], the second layer's. pre: [T, H].

    Returns:
        ``(grad weight) * gelu'(pre)`` [T, H] in the dtype of pre; its sum over rows [H], the gradient of the first
        layer's bias, in fp32 (fp64 for fp64), empty if not needed.
    """
    wide = accumulation_dtype(pre.dtype)
    grad_pre = grad.to(wide) @ weight.to(wide) * gelu_slope(pre.to(wide))
    return grad_pre.to(pre.dtype), grad_pre.sum(0) if need_bias else grad_pre.new_empty(0)


def weight_gradient(grad: Tensor, x: Tensor, need_bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of a linear layer's weight and bias.

    Args:
        grad: [T, N] of its output. x: [T, K], its input, in the same dtype.

    Returns:
        ``grad^T x`` [N, K] in their dtype; the sum of grad over rows [N] in fp32 (fp64 for fp64), empty if not needed.
    """
    wide = accumulation_dtype(x.dtype)
    product = grad.to(wide).T @ x.to(wide)
    return product.to(x.dtype), grad.sum(0, dtype=wide) if need_bias else product.new_empty(0)
