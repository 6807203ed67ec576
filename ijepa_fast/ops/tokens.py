"""Gathers of patches and tokens: into the encoders, and into the predictor.

Legend: B images, C channels, p patch size, N patches per image, T packed rows, M target blocks per image, D width,
K = C * p * p rounded up to a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.ops.registration import accumulation_dtype, op


def padded_patch_width(channels: int, patch_size: int) -> int:
    """K: values of one patch rounded up to a multiple of 16, so that bf16 rows start on 32-byte boundaries."""
    return -(-channels * patch_size * patch_size // 16) * 16


@op("gather_patches")
def gather_patches(
    images: Tensor, indices: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """Normalised pixels of the wanted patches, one patch a row.

    Args:
        images: uint8 or floating [B, C, h, w], h and w divisible by ``patch_size``. uint8 is divided by 255 first.
        indices: int32 [T], ``image * N + patch`` with patches in row-major order; -1 for padding.
        patch_size: p, pixels.
        mean, std: per channel, in units of [0, 1] images; both empty to leave the values as they are.
        dtype: of the result.

    Returns:
        [T, K]; columns in (channel, row, column) order, as a convolution's weight flattens; zeros behind C * p * p.
    """
    batch, channels, height, width = images.shape
    grid_h, grid_w = height // patch_size, width // patch_size
    rows = indices.clamp(min=0).long()
    image, patch = rows // (grid_h * grid_w), rows % (grid_h * grid_w)
    grid = images.view(batch, channels, grid_h, patch_size, grid_w, patch_size)
    x = grid[image, :, patch // grid_w, :, patch % grid_w].to(
        accumulation_dtype(torch.promote_types(images.dtype, dtype))
    )
    if images.dtype == torch.uint8:
        x = x / 255
    if mean:
        shape = (1, channels, 1, 1)
        x = (x - x.new_tensor(mean).view(shape)) / x.new_tensor(std).view(shape)
    x = x.flatten(1).to(dtype).masked_fill((indices < 0)[:, None], 0)
    return F.pad(x, (0, padded_patch_width(channels, patch_size) - x.shape[1]))


@gather_patches.register_fake
def _(images, indices, patch_size, mean, std, dtype):
    width = padded_patch_width(images.shape[1], patch_size)
    return images.new_empty(indices.shape[0], width, dtype=dtype)


@op("gather_add")
def gather_add(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """Rows of ``x`` plus the position of their patch.

    ``out[t] = x[t] + table[indices[t] % N]``

    Args:
        x: [T, D].
        table: [N, D] positions; they get no gradient.
        indices: int32 [T]; -1 for padding.

    Returns:
        [T, D] in the dtype of ``x``.
    """
    rows = indices.clamp(min=0).long()
    out = x + table.index_select(0, rows % table.shape[0]).to(x.dtype)
    return out.masked_fill((indices < 0)[:, None], 0)


@gather_add.register_fake
def _(x, table, indices):
    return x.new_empty(x.shape)


@op("gather_add")
def gather_add_backward(grad: Tensor, indices: Tensor) -> Tensor:
    """Gradient of ``gather_add`` into ``x`` [T, D]: zero on padding rows."""
    return grad.masked_fill((indices < 0)[:, None], 0)


@gather_add_backward.register_fake
def _(grad, indices):
    return grad.new_empty(grad.shape)


def _gather_add_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _gather_add_grad(ctx, grad):
    return gather_add_backward(grad.contiguous(), *ctx.saved_tensors), None, None


gather_add.register_autograd(_gather_add_grad, setup_context=_gather_add_setup)


@op("predictor_tokens")
def predictor_tokens(
    context: Tensor, mask_token: Tensor, positions: Tensor, indices: Tensor, sources: Tensor, copies: Tensor
) -> Tensor:
    """Input rows of the predictor: projected context or the mask token, plus the position of the patch.

    ``out[t] = (context[sources[t]] if sources[t] >= 0 else mask_token) + positions[indices[t] % N]``

    Args:
        context: [Tc, D] projected context rows.
        mask_token: [D].
        positions: [N, D] frozen table.
        indices: int32 [Tp] token index of every predictor row; -1 for padding.
        sources: int32 [Tp] context row each predictor row copies; -1 for a mask token (or padding).
        copies: int32 [Tc, M] predictor rows that copy a context row; -1 where there is none. Read by the backward.

    Returns:
        [Tp, D] in the dtype of ``context``.
    """
    # All may be mask tokens; then any row stands in for those of the context.
    rows = context if context.shape[0] else mask_token.to(context.dtype)[None]
    from_context = rows.index_select(0, sources.clamp(min=0).long())
    values = torch.where((sources >= 0)[:, None], from_context, mask_token.to(context.dtype))
    table = positions.index_select(0, indices.clamp(min=0).long() % positions.shape[0]).to(context.dtype)
    return (values + table).masked_fill((indices < 0)[:, None], 0)


@predictor_tokens.register_fake
def _(context, mask_token, positions, indices, sources, copies):
    return context.new_empty(indices.shape[0], context.shape[1])


@op("predictor_tokens")
def predictor_tokens_backward(grad: Tensor, indices: Tensor, sources: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients into ``context`` [Tc, D] (sum of the M copies in order) and ``mask_token`` [D] (fp32)."""
    wide = grad.to(accumulation_dtype(grad.dtype))
    grad_context = wide.new_zeros(copies.shape[0], grad.shape[1])
    for copy in copies.T:
        taken = wide.index_select(0, copy.clamp(min=0).long())
        grad_context += taken.masked_fill((copy < 0)[:, None], 0)
    is_mask_token = (sources < 0) & (indices >= 0)
    grad_token = wide.masked_fill(~is_mask_token[:, None], 0).sum(0)
    return grad_context.to(grad.dtype), grad_token


@predictor_tokens_backward.register_fake
def _(grad, indices, sources, copies):
    wide = accumulation_dtype(grad.dtype)
    return grad.new_empty(copies.shape[0], grad.shape[1]), grad.new_empty(grad.shape[1], dtype=wide)


def _predictor_tokens_setup(ctx, inputs, output):
    _, mask_token, _, indices, sources, copies = inputs
    ctx.save_for_backward(indices, sources, copies)
    ctx.token_dtype = mask_token.dtype


def _predictor_tokens_grad(ctx, grad):
    grad_context, grad_token = predictor_tokens_backward(grad.contiguous(), *ctx.saved_tensors)
    return grad_context, grad_token.to(ctx.token_dtype), None, None, None, None


predictor_tokens.register_autograd(_predictor_tokens_grad, setup_context=_predictor_tokens_setup)
