"""The prediction loss, see ``reference/loss.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_fast import reference
from ijepa_fast.ops.registration import cuda_kernel


@torch.library.custom_op("ijepa_fast::target_loss", mutates_args=())
def target_loss(
    prediction: Tensor, target: Tensor, rows: Tensor, cu_seqlens: Tensor, kind: str, normalize: bool, eps: float
) -> Tensor:
    if kind not in reference.LOSS_KINDS:
        raise ValueError(f"loss must be one of {', '.join(reference.LOSS_KINDS)}, got {kind!r}")
    return reference.target_loss(prediction, target, rows, cu_seqlens, kind, normalize, eps)


@target_loss.register_fake
def _(prediction, target, rows, cu_seqlens, kind, normalize, eps):
    return prediction.new_empty((), dtype=reference.accumulation_dtype(prediction.dtype))


@torch.library.custom_op("ijepa_fast::target_loss_backward", mutates_args=())
def target_loss_backward(
    grad: Tensor,
    prediction: Tensor,
    target: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    kind: str,
    normalize: bool,
    eps: float,
) -> Tensor:
    return reference.target_loss_backward(grad, prediction, target, rows, cu_seqlens, kind, normalize, eps)


@target_loss_backward.register_fake
def _(grad, prediction, target, rows, cu_seqlens, kind, normalize, eps):
    return prediction.new_empty(prediction.shape)


def _target_loss_setup(ctx, inputs, output):
    prediction, target, rows, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(prediction, target, rows, cu_seqlens)


def _target_loss_grad(ctx, grad):
    return target_loss_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None, None


target_loss.register_autograd(_target_loss_grad, setup_context=_target_loss_setup)
cuda_kernel(target_loss, "target_loss", "target_loss")
cuda_kernel(target_loss_backward, "target_loss", "target_loss_backward")
