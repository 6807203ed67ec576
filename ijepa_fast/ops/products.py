"""Linear layers and MLPs whose neighbours run inside the products, see ``reference/linear.py``.

``linear`` and ``mlp`` are differentiable; the ops they are made of are one pass each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_fast import reference
from ijepa_fast.ops.registration import cuda_kernel


@torch.library.custom_op("ijepa_fast::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, keep_pre: bool) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):  # autocast would reach the products inside the reference
        return reference.linear_gelu(x, weight, bias, keep_pre)


@linear_gelu.register_fake
def _(x, weight, bias, keep_pre):
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep_pre else (0,))


@torch.library.custom_op("ijepa_fast::hidden_gradient", mutates_args=())
def hidden_gradient(grad: Tensor, weight: Tensor, pre: Tensor, need_bias: bool) -> tuple[Tensor, Tensor]:
    with torch.autocast(pre.device.type, enabled=False):
        return reference.hidden_gradient(grad, weight, pre, need_bias)


@hidden_gradient.register_fake
def _(grad, weight, pre, need_bias):
    sums = pre.new_empty(pre.shape[1] if need_bias else 0, dtype=reference.accumulation_dtype(pre.dtype))
    return pre.new_empty(pre.shape), sums


@torch.library.custom_op("ijepa_fast::weight_gradient", mutates_args=())
def weight_gradient(grad: Tensor, x: Tensor, need_bias: bool) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return reference.weight_gradient(grad, x, need_bias)


@weight_gradient.register_fake
def _(grad, x, need_bias):
    sums = x.new_empty(grad.shape[1] if need_bias else 0, dtype=reference.accumulation_dtype(x.dtype))
    return x.new_empty(grad.shape[1], x.shape[1]), sums


cuda_kernel(linear_gelu, "linear_gelu", "linear_gelu")
cuda_kernel(hidden_gradient, "linear_gelu", "hidden_gradient")
cuda_kernel(weight_gradient, "weight_gradient", "weight_gradient")


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
