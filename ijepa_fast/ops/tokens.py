"""Gathers of patches and tokens, see ``reference/tokens.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ijepa_fast import reference
from ijepa_fast.ops.registration import cuda_kernel


@torch.library.custom_op("ijepa_fast::gather_patches", mutates_args=())
def gather_patches(
    images: Tensor, indices: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    return reference.gather_patches(images, indices, patch_size, list(mean), list(std), dtype)


@gather_patches.register_fake
def _(images, indices, patch_size, mean, std, dtype):
    width = reference.padded_patch_width(images.shape[1], patch_size)
    return images.new_empty(indices.shape[0], width, dtype=dtype)


cuda_kernel(gather_patches, "gather_patches", "gather_patches")


@torch.library.custom_op("ijepa_fast::gather_add", mutates_args=())
def gather_add(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    return reference.gather_add(x, table, indices)


@gather_add.register_fake
def _(x, table, indices):
    return x.new_empty(x.shape)


@torch.library.custom_op("ijepa_fast::gather_add_backward", mutates_args=())
def gather_add_backward(grad: Tensor, indices: Tensor) -> Tensor:
    return reference.gather_add_backward(grad, indices)


@gather_add_backward.register_fake
def _(grad, indices):
    return grad.new_empty(grad.shape)


def _gather_add_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _gather_add_grad(ctx, grad):
    return gather_add_backward(grad.contiguous(), *ctx.saved_tensors), None, None


gather_add.register_autograd(_gather_add_grad, setup_context=_gather_add_setup)
cuda_kernel(gather_add, "gather_add", "gather_add")
cuda_kernel(gather_add_backward, "gather_add", "gather_add_backward")


@torch.library.custom_op("ijepa_fast::predictor_tokens", mutates_args=())
def predictor_tokens(
    context: Tensor, mask_token: Tensor, positions: Tensor, indices: Tensor, sources: Tensor, copies: Tensor
) -> Tensor:
    return reference.predictor_tokens(context, mask_token, positions, indices, sources, copies)


@predictor_tokens.register_fake
def _(context, mask_token, positions, indices, sources, copies):
    return context.new_empty(indices.shape[0], context.shape[1])


@torch.library.custom_op("ijepa_fast::predictor_tokens_backward", mutates_args=())
def predictor_tokens_backward(grad: Tensor, indices: Tensor, sources: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    return reference.predictor_tokens_backward(grad, indices, sources, copies)


@predictor_tokens_backward.register_fake
def _(grad, indices, sources, copies):
    wide = reference.accumulation_dtype(grad.dtype)
    return grad.new_empty(copies.shape[0], grad.shape[1]), grad.new_empty(grad.shape[1], dtype=wide)


def _predictor_tokens_setup(ctx, inputs, output):
    _, mask_token, _, indices, sources, copies = inputs
    ctx.save_for_backward(indices, sources, copies)
    ctx.token_dtype = mask_token.dtype


def _predictor_tokens_grad(ctx, grad):
    grad_context, grad_token = predictor_tokens_backward(grad.contiguous(), *ctx.saved_tensors)
    return grad_context, grad_token.to(ctx.token_dtype), None, None, None, None


predictor_tokens.register_autograd(_predictor_tokens_grad, setup_context=_predictor_tokens_setup)
cuda_kernel(predictor_tokens, "predictor_tokens", "predictor_tokens")
cuda_kernel(predictor_tokens_backward, "predictor_tokens", "predictor_tokens_backward")
