"""Attention over packed sequences of any lengths.

Legend: T packed rows, S sequences, H heads, Dh head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_fast.ops import cpu_attention
from ijepa_fast.ops.registration import accumulation_dtype, op


def pad_sequences(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """[T, ...] packed -> [S, max_seqlen, ...] with zeros behind each sequence, and bool [S, max_seqlen] validity."""
    position = torch.arange(max_seqlen, device=x.device)
    valid = position < cu_seqlens.diff()[:, None]
    if x.shape[0] == 0:
        return x.new_zeros(*valid.shape, *x.shape[1:]), valid
    rows = (cu_seqlens[:-1, None] + position).clamp(max=x.shape[0] - 1)
    padded = x.index_select(0, rows.flatten()).unflatten(0, valid.shape)
    return padded.masked_fill_(~valid.view(*valid.shape, *[1] * (x.dim() - 1)), 0), valid


def pack_sequences(x: Tensor, valid: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Inverse of ``pad_sequences``: [S, max, ...] -> [num_rows, ...], zeros on padding rows."""
    rows = cu_seqlens[:-1, None] + torch.arange(x.shape[1], device=x.device)
    rows = torch.where(valid, rows, num_rows).flatten().long()
    return x.new_zeros(num_rows + 1, *x.shape[2:]).index_copy_(0, rows, x.flatten(0, 1))[:num_rows]


def _scores(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, wide: torch.dtype):
    q_SQHD, valid_q = pad_sequences(q.to(wide), cu_q, max_q)
    k_SKHD, valid_k = pad_sequences(k.to(wide), cu_k, max_k)
    scores_SHQK = torch.einsum("sqhd,skhd->shqk", q_SQHD, k_SKHD) * q.shape[-1] ** -0.5
    return scores_SHQK.masked_fill(~valid_k[:, None, None, :], float("-inf")), q_SQHD, k_SKHD, valid_q, valid_k


@op("varlen_attention")
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> tuple[Tensor, Tensor]:
    """Softmax attention within each packed sequence: ``softmax(q k^T / sqrt(Dh)) v``.

    Args:
        q: [Tq, H, Dh]; k, v: [Tk, H, Dh]. Sequence s of q attends to sequence s of k and v.
        cu_q, cu_k: int32 [S + 1]; zero-length sequences and padding rows are allowed.
        max_q, max_k: upper bounds of the lengths.

    Returns:
        out [Tq, H, Dh] in the dtype of q, and the log-sum-exp of the scaled scores [Tq, H] (fp32, natural log; 0 on
        padding rows, -inf where a query has no key, whose output is 0).
    """
    wide = accumulation_dtype(q.dtype)
    scores, _, _, valid_q, _ = _scores(q, k, cu_q, cu_k, max_q, max_k, wide)
    v_SKHD, _ = pad_sequences(v.to(wide), cu_k, max_k)
    lse_SHQ = scores.logsumexp(-1)
    weights = (scores - lse_SHQ.masked_fill(lse_SHQ.isinf(), 0)[..., None]).exp()
    out = torch.einsum("shqk,skhd->sqhd", weights, v_SKHD).to(q.dtype)
    out_THD = pack_sequences(out, valid_q, cu_q, q.shape[0])
    return out_THD, pack_sequences(lse_SHQ.transpose(1, 2), valid_q, cu_q, q.shape[0])


@varlen_attention.register_fake
def _(q, k, v, cu_q, cu_k, max_q, max_k):
    lse = q.new_empty(q.shape[0], q.shape[1], dtype=accumulation_dtype(q.dtype))
    return q.new_empty(q.shape), lse


@op("varlen_attention_backward")
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
    """Gradients of ``varlen_attention`` into q, k and v (no gradient flows through the log-sum-exp)."""
    wide = accumulation_dtype(q.dtype)
    scores, q_SQHD, k_SKHD, valid_q, valid_k = _scores(q, k, cu_q, cu_k, max_q, max_k, wide)
    v_SKHD, _ = pad_sequences(v.to(wide), cu_k, max_k)
    grad_SQHD, _ = pad_sequences(grad.to(wide), cu_q, max_q)
    out_SQHD, _ = pad_sequences(out.to(wide), cu_q, max_q)
    lse_SQH, _ = pad_sequences(lse.to(wide), cu_q, max_q)
    lse_SHQ = lse_SQH.transpose(1, 2)
    weights = (scores - lse_SHQ.masked_fill(lse_SHQ.isinf(), 0)[..., None]).exp()
    delta_SHQ = (grad_SQHD * out_SQHD).sum(-1).transpose(1, 2)
    grad_scores = weights * (torch.einsum("sqhd,skhd->shqk", grad_SQHD, v_SKHD) - delta_SHQ[..., None])
    grad_scores = grad_scores * q.shape[-1] ** -0.5
    grad_q = torch.einsum("shqk,skhd->sqhd", grad_scores, k_SKHD).to(q.dtype)
    grad_k = torch.einsum("shqk,sqhd->skhd", grad_scores, q_SQHD).to(k.dtype)
    grad_v = torch.einsum("shqk,sqhd->skhd", weights, grad_SQHD).to(v.dtype)
    return (
        pack_sequences(grad_q, valid_q, cu_q, q.shape[0]),
        pack_sequences(grad_k, valid_k, cu_k, k.shape[0]),
        pack_sequences(grad_v, valid_k, cu_k, v.shape[0]),
    )


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
varlen_attention.register_kernel("cpu")(cpu_attention.varlen_attention)
varlen_attention_backward.register_kernel("cpu")(cpu_attention.varlen_attention_backward)


@op("varlen_attention")
def varlen_self_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """``varlen_attention`` of the three parts of ``qkv`` [T, 3, H, Dh]: out [T, H, Dh] and log-sum-exp [T, H]."""
    return varlen_attention.definition(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


@varlen_self_attention.register_fake
def _(qkv, cu_seqlens, max_seqlen):
    rows, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty(rows, heads, dtype=accumulation_dtype(qkv.dtype))
    return qkv.new_empty(rows, heads, head_dim), lse


@op("varlen_attention_backward")
def varlen_self_attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """Gradient of ``varlen_self_attention`` into ``qkv`` [T, 3, H, Dh]."""
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return torch.stack(varlen_attention_backward.definition(grad, *qkv.unbind(1), out, lse, *bounds), 1)


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
varlen_self_attention.register_kernel("cpu")(cpu_attention.varlen_self_attention)
varlen_self_attention_backward.register_kernel("cpu")(cpu_attention.varlen_self_attention_backward)
