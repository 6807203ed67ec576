"""Variable-length attention on the CPU: torch's fused kernel on sequences of one length at a time, without padding.

The definition is that of ``ops.varlen_attention``. Reading lengths costs nothing where the host is the device, and a
sequence of a hundred tokens keeps the cores busy (heads times blocks of 32 queries). Many short sequences would leave
them idle between calls; these are first brought in order of length, so that one call takes all sequences of a length.

Legend: Tq, Tk packed rows of queries and keys, H heads, Dh head dim.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ijepa_fast.ops.registration import accumulation_dtype

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

CALL = 1 << 14
"""Values of queries and keys (rows times H * Dh) that are brought in order in the time that one call takes."""


class _Run(NamedTuple):
    """Rows of ``count`` neighbouring sequences that have one length of queries and one of keys."""

    count: int
    q: slice
    k: slice

    @property
    def empty(self) -> bool:
        return self.q.start == self.q.stop or self.k.start == self.k.stop


_NO_ROWS = _Run(0, slice(0, 0), slice(0, 0))


class _Order(NamedTuple):
    """Order in which sequences are attended to, in runs of equal lengths.

    Attributes:
        runs: the rows once they are in order, one entry for each run of equal lengths.
        rows_q, rows_k: int64 [Tq], [Tk]; the packed row of each row in order; None if rows are taken as packed.
    """

    runs: tuple[_Run, ...]
    rows_q: Tensor | None
    rows_k: Tensor | None


def _order(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor) -> _Order:
    # Padding is one more sequence, to be left in its place.
    return _order_of((*cu_q.tolist(), q.shape[0]), (*cu_k.tolist(), k.shape[0]), q.shape[1] * q.shape[2])


@lru_cache(maxsize=8)  # every layer asks, forward and backward
def _order_of(bounds_q: tuple[int, ...], bounds_k: tuple[int, ...], width: int) -> _Order:
    lengths = [[stop - start for start, stop in pairwise(bounds)] for bounds in (bounds_q, bounds_k)]
    pairs = list(zip(*lengths, strict=True))[:-1]
    runs = _runs(pairs)
    if (len(runs) - len(set(pairs))) * CALL <= (bounds_q[-1] + bounds_k[-1]) * width:
        return _Order(runs, None, None)
    order = sorted(range(len(pairs)), key=pairs.__getitem__)
    rows_q = _rows(bounds_q, [*order, len(order)])
    rows_k = rows_q if bounds_k == bounds_q else _rows(bounds_k, [*order, len(order)])
    return _Order(_runs([pairs[i] for i in order]), rows_q, rows_k)


def _runs(pairs: list[tuple[int, int]]) -> tuple[_Run, ...]:
    """Runs of equal lengths among sequences with these lengths of queries and keys, one after another."""
    runs, start_q, start_k = [], 0, 0
    for (length_q, length_k), equal in groupby(pairs):
        count = len(list(equal))
        stop_q, stop_k = start_q + count * length_q, start_k + count * length_k
        runs.append(_Run(count, slice(start_q, stop_q), slice(start_k, stop_k)))
        start_q, start_k = stop_q, stop_k
    return tuple(runs)


def _rows(bounds: tuple[int, ...], order: list[int]) -> Tensor:
    """The packed row of every row, once the sequences between these bounds stand in order."""
    packed = torch.tensor(bounds)
    starts, lengths = packed[:-1][order], packed.diff()[order]
    moved = starts - (lengths.cumsum(0) - lengths)
    return torch.arange(bounds[-1]) + moved.repeat_interleave(lengths)


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(0, order)


def _packed(x: Tensor, order: Tensor | None) -> Tensor:
    """Inverse of ``_ordered``."""
    return x if order is None else torch.empty_like(x).index_copy_(0, order, x)


def _batched(x_THD: Tensor, count: int) -> Tensor:
    """View [count, H, length, Dh] of the rows of sequences of one length."""
    return x_THD.view(count, -1, *x_THD.shape[1:]).transpose(1, 2)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> tuple[Tensor, Tensor]:
    """What ``ops.varlen_attention`` computes, for tensors on the CPU."""
    order = _order(q, k, cu_q, cu_k)
    out, lse = _attend(_ordered(q, order.rows_q), _ordered(k, order.rows_k), _ordered(v, order.rows_k), order.runs)
    return _packed(out, order.rows_q), _packed(lse, order.rows_q)


def varlen_self_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """What ``ops.varlen_self_attention`` computes, for tensors on the CPU."""
    order = _order(qkv[:, 0], qkv[:, 1], cu_seqlens, cu_seqlens)
    out, lse = _attend(*_ordered(qkv, order.rows_q).unbind(1), order.runs)
    return _packed(out, order.rows_q), _packed(lse, order.rows_q)


def _attend(q: Tensor, k: Tensor, v: Tensor, runs: tuple[_Run, ...]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of rows in order."""
    outs, lses = [], []
    for run in runs:
        if run.empty:
            out = q.new_zeros(q[run.q].shape)
            lse = q.new_full(out.shape[:2], float("-inf"), dtype=accumulation_dtype(q.dtype))
        else:
            out, lse = _forward(*(_batched(x[rows], run.count) for x, rows in ((q, run.q), (k, run.k), (v, run.k))))
            out, lse = (x.transpose(1, 2).flatten(0, 1) for x in (out, lse))
        outs.append(out)
        lses.append(lse)
    padding = q.shape[0] - (runs[-1] if runs else _NO_ROWS).q.stop
    if padding or len(runs) != 1:
        outs.append(q.new_zeros(padding, *q.shape[1:]))
        lses.append(q.new_zeros(padding, q.shape[1], dtype=accumulation_dtype(q.dtype)))
    return tuple(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (outs, lses))


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
    """What ``ops.varlen_attention_backward`` computes, for tensors on the CPU."""
    order = _order(q, k, cu_q, cu_k)
    grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    inputs = _ordered(q, order.rows_q), _ordered(k, order.rows_k), _ordered(v, order.rows_k)
    outputs = (_ordered(x, order.rows_q) for x in (grad, out, lse))
    _write_gradients(grads, inputs, *outputs, order.runs)
    orders = (order.rows_q, order.rows_k, order.rows_k)
    return tuple(_packed(x, order) for x, order in zip(grads, orders, strict=True))


def varlen_self_attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """What ``ops.varlen_self_attention_backward`` computes, for tensors on the CPU."""
    order = _order(qkv[:, 0], qkv[:, 1], cu_seqlens, cu_seqlens)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    outputs = (_ordered(x, order.rows_q) for x in (grad, out, lse))
    _write_gradients(grad_qkv.unbind(1), _ordered(qkv, order.rows_q).unbind(1), *outputs, order.runs)
    return _packed(grad_qkv, order.rows_q)


def _write_gradients(
    grads: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    runs: tuple[_Run, ...],
) -> None:
    """Fill ``grads`` of ``inputs`` (queries, keys and values), rows in order."""
    last = runs[-1] if runs else _NO_ROWS
    for target, rows in zip(grads, (last.q, last.k, last.k), strict=True):
        target[rows.stop :] = 0
    for run in runs:
        rows = (run.q, run.k, run.k)
        if run.empty:
            for target, r in zip(grads, rows, strict=True):
                target[r] = 0
            continue
        qkv = [_batched(x[r], run.count) for x, r in zip(inputs, rows, strict=True)]
        grad_run, out_run, lse_run = (_batched(x[run.q], run.count) for x in (grad, out, lse))
        parts = _backward(grad_run, *qkv, out_run, lse_run.contiguous(), 0.0, False)
        for target, part, r in zip(grads, parts, rows, strict=True):
            _batched(target[r], run.count).copy_(part)
