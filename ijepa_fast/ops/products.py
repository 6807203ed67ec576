"""Linear layers and MLPs whose neighbours run inside the products: GELU, its derivative, and sums over rows.

``linear`` and ``mlp`` are differentiable; the ops they are made of are one pass each.

Legend: T packed rows, N output features, K input features, H hidden width of an MLP.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.ops.registration import accumulation_dtype, op


@op("linear_gelu")
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


@linear_gelu.register_fake
def _(x, weight, bias, keep_pre):
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep_pre else (0,))


@op("linear_gelu")
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


@hidden_gradient.register_fake
def _(grad, weight, pre, need_bias):
    sums = pre.new_empty(pre.shape[1] if need_bias else 0, dtype=accumulation_dtype(pre.dtype))
    return pre.new_empty(pre.shape), sums


def gelu_slope(h: Tensor) -> Tensor:
    """Derivative of the exact GELU, h times the normal distribution's cumulative distribution function."""
    cumulative = 0.5 * (1 + torch.erf(h * 0.5**0.5))
    return cumulative + h * torch.exp(-0.5 * h * h) * (2 * torch.pi) ** -0.5


@op("weight_gradient")
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


@weight_gradient.register_fake
def _(grad, x, need_bias):
    sums = x.new_empty(grad.shape[1] if need_bias else 0, dtype=accumulation_dtype(x.dtype))
    return x.new_empty(grad.shape[1], x.shape[1]), sums


def _times(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a b + bias`` in the dtypes given, whatever autocast says."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b if bias is None else torch.addmm(bias.to(b.dtype), a, b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _times(x, weight.t(), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_weight = grad_bias = None
        if needs_weight or needs_bias:
            grad_weight, sums = weight_gradient(grad, x, needs_bias)
            grad_bias = sums.to(ctx.bias_dtype) if needs_bias else None
        return _times(grad, weight) if needs_x else None, grad_weight, grad_bias


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, weight_2: Tensor, bias_2: Tensor | None) -> Tensor:
        hidden, pre = linear_gelu(x, weight, bias, True)
        ctx.save_for_backward(x, weight, weight_2, hidden, pre)
        ctx.bias_dtypes = bias.dtype, None if bias_2 is None else bias_2.dtype
        return _times(hidden, weight_2.t(), bias_2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, weight_2, hidden, pre = ctx.saved_tensors
        grad = grad.contiguous()
        needs_x, needs_weight, needs_bias, needs_weight_2, needs_bias_2 = ctx.needs_input_grad
        grad_weight = grad_bias = grad_weight_2 = grad_bias_2 = None
        if needs_weight_2 or needs_bias_2:
            grad_weight_2, sums = weight_gradient(grad, hidden, needs_bias_2)
            grad_bias_2 = sums.to(ctx.bias_dtypes[1]) if needs_bias_2 else None
        grad_pre, sums = hidden_gradient(grad, weight_2, pre, needs_bias)
        grad_bias = sums.to(ctx.bias_dtypes[0]) if needs_bias else None
        if needs_weight:
            grad_weight, _ = weight_gradient(grad_pre, x, False)
        grad_x = _times(grad_pre, weight) if needs_x else None
        return grad_x, grad_weight, grad_bias, grad_weight_2, grad_bias_2


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight^T + bias`` [T, N], with ``weight_gradient`` in the backward pass.

    Args:
        x: [T, K]. weight: [N, K] in the dtype of x. bias: [N] in any, or None.
    """
    return _Linear.apply(x, weight, bias)


def mlp(x: Tensor, weight: Tensor, bias: Tensor, weight_2: Tensor, bias_2: Tensor | None) -> Tensor:
    """``gelu(x weight^T + bias) weight_2^T + bias_2`` [T, N].

    What stands before GELU is written, for the backward pass, only where gradients are enabled.

    Args:
        x: [T, K]. weight: [H, K] and weight_2: [N, H] in the dtype of x. bias: [H] and bias_2: [N] in any, bias_2 or
            None.
    """
    if torch.is_grad_enabled():
        return _Mlp.apply(x, weight, bias, weight_2, bias_2)
    hidden, _ = linear_gelu(x, weight, bias, False)
    return _times(hidden, weight_2.t(), bias_2)
