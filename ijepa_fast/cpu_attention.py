"""Variable-length attention on the CPU: torch's fused kernel on one sequence after another, without padding.

The definition is ``reference.varlen_attention``. Reading lengths costs nothing where the host is the device, and a
sequence of a hundred tokens keeps the cores busy (heads times blocks of 32 queries). Sequences of one length are taken
together.

Legend: Tq, Tk packed rows of queries and keys, H heads, Dh head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ijepa_fast.reference import accumulation_dtype

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _sequences(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of queries and of keys of every sequence."""
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for i in range(len(bounds_q) - 1):
        yield slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])


def _filled(rows: slice) -> bool:
    return rows.start < rows.stop


def _one_length(x: Tensor, cu_seqlens: Tensor) -> int:
    """The length of the sequences of x if all have the same and no row is padding, else 0."""
    lengths = set(cu_seqlens.diff().tolist())
    return lengths.pop() if len(lengths) == 1 and int(cu_seqlens[-1]) == x.shape[0] else 0


def _batched(x_THD: Tensor, length: int) -> Tensor:
    """View [S, H, length, Dh] of sequences of one length."""
    return x_THD.unflatten(0, (-1, length)).transpose(1, 2)


def _heads_first(x_THD: Tensor, rows: slice) -> Tensor:
    return x_THD[rows].transpose(0, 1)[None]


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> tuple[Tensor, Tensor]:
    """As ``reference.varlen_attention``."""
    length_q, length_k = _one_length(q, cu_q), _one_length(k, cu_k)
    if length_q and length_k:
        out, lse = _forward(_batched(q, length_q), _batched(k, length_k), _batched(v, length_k))
        return out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
    out, used = torch.empty(q.shape, dtype=q.dtype), int(cu_q[-1])
    lse = torch.empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))
    out[used:] = lse[used:] = 0
    for rows_q, rows_k in _sequences(cu_q, cu_k):
        if not (_filled(rows_q) and _filled(rows_k)):
            out[rows_q], lse[rows_q] = 0, float("-inf")
            continue
        part, part_lse = _forward(_heads_first(q, rows_q), _heads_first(k, rows_k), _heads_first(v, rows_k))
        out[rows_q] = part[0].transpose(0, 1)
        lse[rows_q] = part_lse[0].T
    return out, lse


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
    """As ``reference.varlen_attention_backward``."""
    grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    _write_gradients(grads, grad, (q, k, v), out, lse, cu_q, cu_k)
    return grads


def varlen_self_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """As ``reference.varlen_self_attention``."""
    return varlen_attention(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


def varlen_self_attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """As ``reference.varlen_self_attention_backward``."""
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    _write_gradients(grad_qkv.unbind(1), grad, qkv.unbind(1), out, lse, cu_seqlens, cu_seqlens)
    return grad_qkv


def _write_gradients(grads: tuple[Tensor, ...], grad: Tensor, qkv, out: Tensor, lse: Tensor, cu_q, cu_k) -> None:
    """Fill ``grads``, of queries, keys and values."""
    length_q, length_k = _one_length(qkv[0], cu_q), _one_length(qkv[1], cu_k)
    if length_q and length_k:
        lengths = (length_q, length_k, length_k)
        inputs = [_batched(x, length) for x, length in zip(qkv, lengths, strict=True)]
        all_lse = lse.unflatten(0, (-1, length_q)).transpose(1, 2).contiguous()
        parts = _backward(_batched(grad, length_q), *inputs, _batched(out, length_q), all_lse, 0.0, False)
        for target, part, length in zip(grads, parts, lengths, strict=True):
            _batched(target, length).copy_(part)
        return
    for target, bounds in zip(grads, (cu_q, cu_k, cu_k), strict=True):
        target[int(bounds[-1]) :] = 0
    for rows_q, rows_k in _sequences(cu_q, cu_k):
        rows = (rows_q, rows_k, rows_k)
        if not (_filled(rows_q) and _filled(rows_k)):
            for target, r in zip(grads, rows, strict=True):
                target[r] = 0
            continue
        inputs = [_heads_first(x, r) for x, r in zip(qkv, rows, strict=True)]
        part_lse = lse[rows_q].T.contiguous()[None]
        parts = _backward(_heads_first(grad, rows_q), *inputs, _heads_first(out, rows_q), part_lse, 0.0, False)
        for target, part, r in zip(grads, parts, rows, strict=True):
            target[r] = part[0].transpose(0, 1)
