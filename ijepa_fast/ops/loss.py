"""The prediction loss.

Legend: T packed rows, S sequences, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.ops.registration import accumulation_dtype, op

LOSS_KINDS = ("smooth_l1", "l2", "l1")


def _loss_rows(prediction: Tensor, target: Tensor, rows: Tensor, cu_seqlens: Tensor, normalize: bool, eps: float):
    """Difference to the (normalised) target rows [T, D] and each row's weight [T], both wide."""
    wide = accumulation_dtype(prediction.dtype)
    wanted = target.index_select(0, rows.clamp(min=0).long()).to(wide)
    if normalize:
        wanted = F.layer_norm(wanted, wanted.shape[-1:], eps=eps)
    difference = (prediction.to(wide) - wanted).masked_fill((rows < 0)[:, None], 0)
    lengths = cu_seqlens.diff()
    t = torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), t, right=True).clamp(max=max(lengths.shape[0] - 1, 0))
    length = lengths.index_select(0, sequence).clamp(min=1)
    weight = 1 / (length.to(wide) * lengths.shape[0] * prediction.shape[-1])
    return difference, weight.masked_fill(rows < 0, 0)


@op("target_loss")
def target_loss(
    prediction: Tensor, target: Tensor, rows: Tensor, cu_seqlens: Tensor, kind: str, normalize: bool, eps: float
) -> Tensor:
    """Distance of the predictions to the target encoder's (layer-normalised) features.

    Mean over features, then over a block's rows, then over all S blocks: the official mean when blocks have equal
    sizes (arXiv 2301.08243, section 3, averages over blocks).

    Args:
        prediction: [T, D], one row per target token, packed by ``cu_seqlens``.
        target: [R, D] target features.
        rows: int32 [T], the row of ``target`` each prediction is compared with; -1 for padding.
        cu_seqlens: int32 [S + 1], the target blocks. An empty block counts in S and adds nothing.
        kind: "smooth_l1" (beta 1), "l2" (squared difference) or "l1".
        normalize: layer-normalise the target rows over D, without affine parameters.
        eps: of that layer-norm; the official code uses 1e-5.

    Returns:
        fp32 scalar (fp64 for fp64 predictions).

    Raises:
        ValueError: no loss of that kind.
    """
    if kind not in LOSS_KINDS:
        raise ValueError(f"loss must be one of {', '.join(LOSS_KINDS)}, got {kind!r}")
    difference, weight = _loss_rows(prediction, target, rows, cu_seqlens, normalize, eps)
    distance = difference.abs()
    if kind == "smooth_l1":
        values = torch.where(distance < 1, 0.5 * distance * distance, distance - 0.5)
    elif kind == "l2":
        values = distance * distance
    else:
        values = distance
    return (values.sum(-1) * weight).sum()


@target_loss.register_fake
def _(prediction, target, rows, cu_seqlens, kind, normalize, eps):
    return prediction.new_empty((), dtype=accumulation_dtype(prediction.dtype))


@op("target_loss")
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
    """Gradient of ``target_loss`` into ``prediction`` [T, D]; the target gets none (it has a stop-gradient)."""
    difference, weight = _loss_rows(prediction, target, rows, cu_seqlens, normalize, eps)
    if kind == "smooth_l1":
        slope = difference.clamp(-1, 1)
    elif kind == "l2":
        slope = 2 * difference
    else:
        slope = difference.sign()
    return (slope * (weight * grad)[:, None]).to(prediction.dtype)


@target_loss_backward.register_fake
def _(grad, prediction, target, rows, cu_seqlens, kind, normalize, eps):
    return prediction.new_empty(prediction.shape)


def _target_loss_setup(ctx, inputs, output):
    prediction, target, rows, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(prediction, target, rows, cu_seqlens)


def _target_loss_grad(ctx, grad):
    return target_loss_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None, None


target_loss.register_autograd(_target_loss_grad, setup_context=_target_loss_setup)
