"""Attention over packed sequences, see ``reference/attention.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_fast import reference
from ijepa_fast.ops import cpu_attention
from ijepa_fast.ops.registration import cuda_kernel


@torch.library.custom_op("ijepa_fast::varlen_attention", mutates_args=())
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):  # autocast would reach the products inside the reference
        return reference.varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k)


@varlen_attention.register_fake
def _(q, k, v, cu_q, cu_k, max_q, max_k):
    lse = q.new_empty(q.shape[0], q.shape[1], dtype=reference.accumulation_dtype(q.dtype))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("ijepa_fast::varlen_attention_backward", mutates_args=())
def varlen_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return reference.varlen_attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k)


@varlen_attention_backward.register_fake
def _(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _varlen_attention_setup(ctx, inputs, output):
    q, k, v, cu_q, cu_k, *ctx.bounds = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)


def _varlen_attention_grad(ctx, grad, _grad_lse):
    grads = varlen_attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.bounds)
    return *grads, None, None, None, None


varlen_attention.register_autograd(_varlen_attention_grad, setup_context=_varlen_attention_setup)
cuda_kernel(varlen_attention, "varlen_attention", "varlen_attention")
varlen_attention.register_kernel("cpu")(cpu_attention.varlen_attention)
cuda_kernel(varlen_attention_backward, "varlen_attention_backward", "varlen_attention_backward")
varlen_attention_backward.register_kernel("cpu")(cpu_attention.varlen_attention_backward)


@torch.library.custom_op("ijepa_fast::varlen_self_attention", mutates_args=())
def varlen_self_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    with torch.autocast(qkv.device.type, enabled=False):
        return reference.varlen_self_attention(qkv, cu_seqlens, max_seqlen)


@varlen_self_attention.register_fake
def _(qkv, cu_seqlens, max_seqlen):
    rows, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty(rows, heads, dtype=reference.accumulation_dtype(qkv.dtype))
    return qkv.new_empty(rows, heads, head_dim), lse


@torch.library.custom_op("ijepa_fast::varlen_self_attention_backward", mutates_args=())
def varlen_self_attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    with torch.autocast(qkv.device.type, enabled=False):
        return reference.varlen_self_attention_backward(grad, qkv, out, lse, cu_seqlens, max_seqlen)


@varlen_self_attention_backward.register_fake
def _(grad, qkv, out, lse, cu_seqlens, max_seqlen):
    return qkv.new_empty(qkv.shape)


def _varlen_self_attention_setup(ctx, inputs, output):
    qkv, cu_seqlens, ctx.max_seqlen = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, cu_seqlens)


def _varlen_self_attention_grad(ctx, grad, _grad_lse):
    grad_qkv = varlen_self_attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.max_seqlen)
    return grad_qkv, None, None


varlen_self_attention.register_autograd(_varlen_self_attention_grad, setup_context=_varlen_self_attention_setup)
cuda_kernel(varlen_self_attention, "varlen_attention", "varlen_self_attention")
varlen_self_attention.register_kernel("cpu")(cpu_attention.varlen_self_attention)
cuda_kernel(varlen_self_attention_backward, "varlen_attention_backward", "varlen_self_attention_backward")
varlen_self_attention_backward.register_kernel("cpu")(cpu_attention.varlen_self_attention_backward)
