"""Layer norm with the residual sum before it: what stands between the matrix products of a block.

Legend: T packed rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_fast.ops.registration import accumulation_dtype, op


@op("layer_norm")
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


@layer_norm.register_fake
def _(x, residual, x_bias, weight, bias, eps):
    statistics = x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))
    adds = residual is not None or x_bias is not None
    h = x.new_empty(x.shape if adds else (0,), dtype=x.dtype if residual is None else residual.dtype)
    return x.new_empty(x.shape), h, statistics, torch.empty_like(statistics)


@op("layer_norm")
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
