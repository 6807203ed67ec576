"""Padding rows around attention that knows of none: rows beyond ``cu_seqlens[-1]`` are zero in outputs and gradients.

Legend: T packed rows, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ijepa_fast import ops

FLASH_BLOCK = 128
"""Rows of the largest block that FlashAttention-2 cuts a sequence into: up to it, one row costs what all cost."""


class PadRows(torch.autograd.Function):
    """Packed [T, ...] -> [S, max, ...]. Both directions are gathers, because each row has exactly one slot."""

    @staticmethod
    def forward(ctx, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.num_rows = x.shape[0]
        return ops.pad_sequences(x, cu_seqlens, max_seqlen)[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _take_rows(grad, ctx.saved_tensors[0], ctx.num_rows), None, None


class PackRows(torch.autograd.Function):
    """[S, max, ...] -> packed [T, ...] with zeros on padding rows."""

    @staticmethod
    def forward(ctx, x: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.max_seqlen = x.shape[1]
        return _take_rows(x, cu_seqlens, num_rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ops.pad_sequences(grad, ctx.saved_tensors[0], ctx.max_seqlen)[0], None, None


def _take_rows(x: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
    row = torch.arange(num_rows, device=x.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    padding = sequence == cu_seqlens.shape[0] - 1
    sequence = sequence.clamp(max=max(x.shape[0] - 1, 0))
    slot = sequence * x.shape[1] + (row - cu_seqlens[sequence])
    out = x.flatten(0, 1).index_select(0, slot.masked_fill(padding, 0))
    return out.masked_fill_(padding.view(-1, *[1] * (out.dim() - 1)), 0)


class _ZeroPadding(torch.autograd.Function):
    """Zeros on padding rows, forward and backward, by copies."""

    @staticmethod
    def forward(ctx, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        return _ZeroPadding._masked(x, cu_seqlens)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _ZeroPadding._masked(grad, ctx.saved_tensors[0]), None

    @staticmethod
    def _masked(x: Tensor, cu_seqlens: Tensor) -> Tensor:
        padding = torch.arange(x.shape[0], device=x.device) >= cu_seqlens[-1]
        return x.masked_fill(padding.view(-1, *[1] * (x.dim() - 1)), 0)


def guarded(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``attend`` of any library with padding rows kept zero in its inputs, its output and all gradients.

    Libraries leave rows outside all sequences as they found them in memory. This costs eight copies of rows.
    """

    def around(q, k, v, cu_q, cu_k, max_q, max_k, uniform):
        if uniform:
            return attend(q, k, v, cu_q, cu_k, max_q, max_k)
        q, k, v = _ZeroPadding.apply(q, cu_q), _ZeroPadding.apply(k, cu_k), _ZeroPadding.apply(v, cu_k)
        return _ZeroPadding.apply(attend(q, k, v, cu_q, cu_k, max_q, max_k), cu_q)

    return around


def covered(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``attend`` of FlashAttention-2 with further sequences over the padding rows, so that no rows are copied.

    It reads no row outside the sequence that it works on, writes zeros for queries whose sequence has no keys (output:
    ``compute_attn_1rowblock``; gradient: cleared by ``compute_dot_do_o``, written by ``convert_dQ``) and zero gradients
    for keys whose sequence has no queries (``compute_dq_dk_dv_1colblock``; all in ``csrc/flash_attn/src`` of its
    repository, versions 2.4 to 2.8). So padding queries get sequences without keys, and padding keys get sequences
    without queries. Most of them are empty: each costs a few idle blocks of threads, and 128 rows of the workspace in
    which the backward pass sums the gradient of the queries, together at most twice as many as there are.
    """

    def around(q, k, v, cu_q, cu_k, max_q, max_k, uniform):
        if uniform:
            return attend(q, k, v, cu_q, cu_k, max_q, max_k)
        same = cu_k is cu_q and k.shape[0] == q.shape[0] and max_k == max_q
        # In whole blocks a bound costs hardly more, and 0, which FlashAttention-2 treats apart, does not occur.
        max_q, max_k = (-(-max(longest, 1) // FLASH_BLOCK) * FLASH_BLOCK for longest in (max_q, max_k))
        ends_q = _padding_ends(cu_q, q.shape[0], max_q)
        ends_k = ends_q if same else _padding_ends(cu_k, k.shape[0], max_k)
        cu_q = torch.cat([cu_q, ends_q, ends_q[-1:].expand(ends_k.shape[0])])
        cu_k = torch.cat([cu_k, cu_k[-1:].expand(ends_q.shape[0]), ends_k])
        return attend(q, k, v, cu_q, cu_k, max_q, max_k)

    return around


def _padding_ends(cu_seqlens: Tensor, num_rows: int, longest: int) -> Tensor:
    """Where sequences of at most ``longest`` rows end that cover the rows from ``cu_seqlens[-1]`` on: int32, not empty.

    Only the device knows how many those are. The host takes as many sequences as ``num_rows`` rows could need.
    """
    place = torch.arange(1, num_rows // longest + 2, device=cu_seqlens.device, dtype=torch.int32)
    return torch.add(cu_seqlens[-1:], place, alpha=longest).clamp_(max=num_rows)
