"""Layer norm with the residual sum, see ``reference/layers.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_fast import reference
from ijepa_fast.ops.registration import cuda_kernel


@torch.library.custom_op("ijepa_fast::layer_norm", mutates_args=())
def layer_norm(
    x: Tensor, residual: Tensor | None, x_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return reference.layer_norm(x, residual, x_bias, weight, bias, eps)


@layer_norm.register_fake
def _(x, residual, x_bias, weight, bias, eps):
    statistics = x.new_empty(x.shape[0], dtype=reference.accumulation_dtype(x.dtype))
    adds = residual is not None or x_bias is not None
    h = x.new_empty(x.shape if adds else (0,), dtype=x.dtype if residual is None else residual.dtype)
    return x.new_empty(x.shape), h, statistics, torch.empty_like(statistics)


@torch.library.custom_op("ijepa_fast::layer_norm_backward", mutates_args=())
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
    return reference.layer_norm_backward(grad, grad_h, h, mean, rstd, weight, need_weight, need_bias, need_x_bias)


@layer_norm_backward.register_fake
def _(grad, grad_h, h, mean, rstd, weight, need_weight, need_bias, need_x_bias):
    sums = [mean.new_empty(h.shape[1] if need else 0) for need in (need_weight, need_bias, need_x_bias)]
    return h.new_empty(h.shape), grad.new_empty(grad.shape if grad.dtype != h.dtype else (0,)), *sums


def _layer_norm_setup(ctx, inputs, output):
    x, residual, x_bias, weight, bias, _ = inputs
    _, h, mean, rstd = output
    ctx.adds = residual is not None or x_bias is not None
    ctx.mark_non_differentiable(mean, rstd, *([] if ctx.adds else [h]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h if ctx.adds else x, mean, rstd, weight)
    ctx.x_dtype, ctx.dtypes = x.dtype, [None if t is None else t.dtype for t in (weight, bias, x_bias)]


def _layer_norm_grad(ctx, grad, grad_h, _grad_mean, _grad_rstd):
    h, mean, rstd, weight = ctx.saved_tensors
    if grad is None:  # only h was used
        grad = torch.zeros_like(h, dtype=ctx.x_dtype)
    needs_x, needs_residual, needs_x_bias, needs_weight, needs_bias, _ = ctx.needs_input_grad
    grad_h = grad_h.contiguous() if ctx.adds and grad_h is not None else None
    total, grad_x, *sums = layer_norm_backward(
        grad.contiguous(), grad_h, h, mean, rstd, weight, needs_weight, needs_bias, needs_x_bias
    )
    needs = (needs_weight, needs_bias, needs_x_bias)
    of_weight, of_bias, of_x_bias = (
        g.to(dtype) if need else None for g, dtype, need in zip(sums, ctx.dtypes, needs, strict=True)
    )
    of_x = total if ctx.x_dtype == h.dtype else grad_x
    return of_x if needs_x else None, total if needs_residual else None, of_x_bias, of_weight, of_bias, None


layer_norm.register_autograd(_layer_norm_grad, setup_context=_layer_norm_setup)
cuda_kernel(layer_norm, "layer_norm", "layer_norm")
cuda_kernel(layer_norm_backward, "layer_norm", "layer_norm_backward")
