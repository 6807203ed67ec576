"""Backward of varlen_attention: a kernel for the queries' gradient and one for the keys' and values'.

With P the softmax weights, O the output and D = rowsum(dO * O) (arXiv 2205.14135, appendix B.2):
``dV = P^T dO``, ``dS = P * (dO V^T - D)``, ``dQ = dS K / sqrt(Dh)``, ``dK = dS^T Q / sqrt(Dh)``. P is recomputed from
the log-sum-exp. Two kernels recompute it twice, but each owns what it writes: no atomics, the same bits every time.
One kernel that holds dQ, dK and dV of a sequence does not fit the register file.

The first kernel also writes the row statistics that the second reads, so they run in this order.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.specs import CompileSpec
from ijepa_fast.kernels.varlen_attention_launch import (
    attention_specs,
    check_gradient_inputs,
    check_inputs,
    launch,
    row_strides,
    tile_config,
    with_equal_strides,
)
from ijepa_fast.kernels.varlen_attention_tiles import LOG2_E, head_pointer, load_tile, row_range, store_tile, zero_rows

# Per query and head 4 places: 0 holds the log-sum-exp in base 2, DELTA holds D. The other two make a block of 32
# queries 128 elements: if a tile has fewer elements than threads, Triton 3.6 loads every element once for each thread
# that needs it.
STATISTICS = tl.constexpr(4)
DELTA = tl.constexpr(2)


@triton.jit(
    do_not_specialize=[
        "first_sequence",
        "num_sequences",
        "num_rows",
        "q_stride",
        "kv_stride",
        "out_stride",
        "dq_stride",
    ]
)
def dq_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    statistics_ptr,
    dq_ptr,
    cu_q_ptr,
    cu_k_ptr,
    first_sequence,
    num_sequences,
    num_rows,
    q_stride,
    kv_stride,
    out_stride,
    dq_stride,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Grid: (blocks of queries, heads, sequences and one more). ``grad`` and ``out`` share out_stride."""
    head, sequence = tl.program_id(1), first_sequence + tl.program_id(2)
    start_q, length_q = row_range(cu_q_ptr, sequence, num_sequences)
    start_k, length_k = row_range(cu_k_ptr, sequence, num_sequences)
    first_query = tl.program_id(0) * BLOCK_Q
    if sequence == num_sequences:
        first, step = start_q + first_query, tl.num_programs(0) * BLOCK_Q
        zero_rows(dq_ptr, dq_stride, head, first, num_rows, step, BLOCK_Q, WIDTH, REST, HEAD_DIM)
        return
    if first_query >= length_q:
        return

    q_rows = head_pointer(q_ptr, start_q, head, q_stride, HEAD_DIM)
    grad_rows = head_pointer(grad_ptr, start_q, head, out_stride, HEAD_DIM)
    out_rows = head_pointer(out_ptr, start_q, head, out_stride, HEAD_DIM)
    k_rows = head_pointer(k_ptr, start_k, head, kv_stride, HEAD_DIM)
    v_rows = head_pointer(v_ptr, start_k, head, kv_stride, HEAD_DIM)
    q = load_tile(q_rows, q_stride, first_query, length_q, BLOCK_Q, 0, WIDTH, HEAD_DIM)
    grad = load_tile(grad_rows, out_stride, first_query, length_q, BLOCK_Q, 0, WIDTH, HEAD_DIM)
    out = load_tile(out_rows, out_stride, first_query, length_q, BLOCK_Q, 0, WIDTH, HEAD_DIM)
    delta = tl.sum(grad.to(ACCUMULATE) * out.to(ACCUMULATE), 1)
    dq = tl.zeros([BLOCK_Q, WIDTH], ACCUMULATE)
    if REST > 0:
        q_rest = load_tile(q_rows, q_stride, first_query, length_q, BLOCK_Q, WIDTH, REST, HEAD_DIM)
        grad_rest = load_tile(grad_rows, out_stride, first_query, length_q, BLOCK_Q, WIDTH, REST, HEAD_DIM)
        out_rest = load_tile(out_rows, out_stride, first_query, length_q, BLOCK_Q, WIDTH, REST, HEAD_DIM)
        delta += tl.sum(grad_rest.to(ACCUMULATE) * out_rest.to(ACCUMULATE), 1)
        dq_rest = tl.zeros([BLOCK_Q, REST], ACCUMULATE)
    queries = first_query + tl.arange(0, BLOCK_Q)
    row_heads = (start_q.to(tl.int64) + queries) * tl.num_programs(1) + head
    # Queries past the end get lse 0, so that their weights, of scores 0, are finite.
    lse = LOG2_E * tl.load(lse_ptr + row_heads, mask=queries < length_q, other=0.0)
    tl.store(statistics_ptr + row_heads * STATISTICS, lse, mask=queries < length_q)
    tl.store(statistics_ptr + row_heads * STATISTICS + DELTA, delta, mask=queries < length_q)
    scale: tl.constexpr = HEAD_DIM**-0.5

    for first_key in range(0, length_k, BLOCK_K):
        k = load_tile(k_rows, kv_stride, first_key, length_k, BLOCK_K, 0, WIDTH, HEAD_DIM)
        v = load_tile(v_rows, kv_stride, first_key, length_k, BLOCK_K, 0, WIDTH, HEAD_DIM)
        scores = tl.dot(q, tl.trans(k), out_dtype=ACCUMULATE)
        dweights = tl.dot(grad, tl.trans(v), out_dtype=ACCUMULATE)
        if REST > 0:
            k_rest = load_tile(k_rows, kv_stride, first_key, length_k, BLOCK_K, WIDTH, REST, HEAD_DIM)
            v_rest = load_tile(v_rows, kv_stride, first_key, length_k, BLOCK_K, WIDTH, REST, HEAD_DIM)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, out_dtype=ACCUMULATE)
            dweights = tl.dot(grad_rest, tl.trans(v_rest), dweights, out_dtype=ACCUMULATE)
        weights = tl.exp2(scores * (scale * LOG2_E) - lse[:, None])
        # A key past the end scores 0, whose weight 2^-lse may overflow: inf * 0 would reach every column of dq.
        weights = tl.where(tl.arange(0, BLOCK_K)[None, :] < length_k - first_key, weights, 0.0)
        dscores = (weights * (dweights - delta[:, None])).to(k_ptr.dtype.element_ty)
        dq = tl.dot(dscores, k, dq, out_dtype=ACCUMULATE)
        if REST > 0:
            dq_rest = tl.dot(dscores, k_rest, dq_rest, out_dtype=ACCUMULATE)

    dq_rows = head_pointer(dq_ptr, start_q, head, dq_stride, HEAD_DIM)
    store_tile(dq_rows, dq * scale, dq_stride, first_query, length_q, BLOCK_Q, 0, WIDTH, HEAD_DIM)
    if REST > 0:
        store_tile(dq_rows, dq_rest * scale, dq_stride, first_query, length_q, BLOCK_Q, WIDTH, REST, HEAD_DIM)


@triton.jit(
    do_not_specialize=[
        "first_sequence",
        "num_sequences",
        "num_rows",
        "q_stride",
        "kv_stride",
        "grad_stride",
        "dkv_stride",
    ]
)
def dkdv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    statistics_ptr,
    dk_ptr,
    dv_ptr,
    cu_q_ptr,
    cu_k_ptr,
    first_sequence,
    num_sequences,
    num_rows,
    q_stride,
    kv_stride,
    grad_stride,
    dkv_stride,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Grid: (blocks of keys, heads, sequences and one more)."""
    head, sequence = tl.program_id(1), first_sequence + tl.program_id(2)
    start_q, length_q = row_range(cu_q_ptr, sequence, num_sequences)
    start_k, length_k = row_range(cu_k_ptr, sequence, num_sequences)
    first_key = tl.program_id(0) * BLOCK_K
    if sequence == num_sequences:
        first, step = start_k + first_key, tl.num_programs(0) * BLOCK_K
        zero_rows(dk_ptr, dkv_stride, head, first, num_rows, step, BLOCK_K, WIDTH, REST, HEAD_DIM)
        zero_rows(dv_ptr, dkv_stride, head, first, num_rows, step, BLOCK_K, WIDTH, REST, HEAD_DIM)
        return
    if first_key >= length_k:
        return

    q_rows = head_pointer(q_ptr, start_q, head, q_stride, HEAD_DIM)
    grad_rows = head_pointer(grad_ptr, start_q, head, grad_stride, HEAD_DIM)
    k_rows = head_pointer(k_ptr, start_k, head, kv_stride, HEAD_DIM)
    v_rows = head_pointer(v_ptr, start_k, head, kv_stride, HEAD_DIM)
    k = load_tile(k_rows, kv_stride, first_key, length_k, BLOCK_K, 0, WIDTH, HEAD_DIM)
    v = load_tile(v_rows, kv_stride, first_key, length_k, BLOCK_K, 0, WIDTH, HEAD_DIM)
    dk = tl.zeros([BLOCK_K, WIDTH], ACCUMULATE)
    dv = tl.zeros([BLOCK_K, WIDTH], ACCUMULATE)
    if REST > 0:
        k_rest = load_tile(k_rows, kv_stride, first_key, length_k, BLOCK_K, WIDTH, REST, HEAD_DIM)
        v_rest = load_tile(v_rows, kv_stride, first_key, length_k, BLOCK_K, WIDTH, REST, HEAD_DIM)
        dk_rest = tl.zeros([BLOCK_K, REST], ACCUMULATE)
        dv_rest = tl.zeros([BLOCK_K, REST], ACCUMULATE)
    row_head = start_q.to(tl.int64) * tl.num_programs(1) + head
    scale: tl.constexpr = HEAD_DIM**-0.5
    dtype = q_ptr.dtype.element_ty

    # Scores stand as [keys, queries], so that weights and dscores are first operands, which stay in registers.
    for first_query in range(0, length_q, BLOCK_Q):
        q = load_tile(q_rows, q_stride, first_query, length_q, BLOCK_Q, 0, WIDTH, HEAD_DIM)
        grad = load_tile(grad_rows, grad_stride, first_query, length_q, BLOCK_Q, 0, WIDTH, HEAD_DIM)
        scores = tl.dot(k, tl.trans(q), out_dtype=ACCUMULATE)
        if REST > 0:
            q_rest = load_tile(q_rows, q_stride, first_query, length_q, BLOCK_Q, WIDTH, REST, HEAD_DIM)
            grad_rest = load_tile(grad_rows, grad_stride, first_query, length_q, BLOCK_Q, WIDTH, REST, HEAD_DIM)
            scores = tl.dot(k_rest, tl.trans(q_rest), scores, out_dtype=ACCUMULATE)
        queries = first_query + tl.arange(0, BLOCK_Q)[:, None]
        row_heads = row_head + queries * tl.num_programs(1)
        statistics = tl.load(
            statistics_ptr + row_heads * STATISTICS + tl.arange(0, STATISTICS)[None, :],
            mask=queries < length_q,
            other=0.0,
        )
        lse_and_delta, _ = tl.split(tl.reshape(statistics, [BLOCK_Q, 2, 2]))
        lse, delta = tl.split(lse_and_delta)
        # No mask: a query past the end is a zero row of q, grad, lse and delta and adds nothing; a key past the end
        # makes a row of dk and dv that is not stored.
        weights = tl.exp2(scores * (scale * LOG2_E) - lse[None, :])
        dv = tl.dot(weights.to(dtype), grad, dv, out_dtype=ACCUMULATE)
        dweights = tl.dot(v, tl.trans(grad), out_dtype=ACCUMULATE)
        if REST > 0:
            dv_rest = tl.dot(weights.to(dtype), grad_rest, dv_rest, out_dtype=ACCUMULATE)
            dweights = tl.dot(v_rest, tl.trans(grad_rest), dweights, out_dtype=ACCUMULATE)
        dscores = (weights * (dweights - delta[None, :])).to(dtype)
        dk = tl.dot(dscores, q, dk, out_dtype=ACCUMULATE)
        if REST > 0:
            dk_rest = tl.dot(dscores, q_rest, dk_rest, out_dtype=ACCUMULATE)

    dk_rows = head_pointer(dk_ptr, start_k, head, dkv_stride, HEAD_DIM)
    dv_rows = head_pointer(dv_ptr, start_k, head, dkv_stride, HEAD_DIM)
    store_tile(dk_rows, dk * scale, dkv_stride, first_key, length_k, BLOCK_K, 0, WIDTH, HEAD_DIM)
    store_tile(dv_rows, dv, dkv_stride, first_key, length_k, BLOCK_K, 0, WIDTH, HEAD_DIM)
    if REST > 0:
        store_tile(dk_rows, dk_rest * scale, dkv_stride, first_key, length_k, BLOCK_K, WIDTH, REST, HEAD_DIM)
        store_tile(dv_rows, dv_rest, dkv_stride, first_key, length_k, BLOCK_K, WIDTH, REST, HEAD_DIM)


def _launch_backward(
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
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Writes dq, dk and dv, which may be views of wider rows like q, k and v; dk and dv with equal strides."""
    check_inputs(q, k, v, cu_q, cu_k, max_q, max_k)
    check_gradient_inputs(grad, out, lse, q)
    k, v = with_equal_strides(k, v)
    statistics = lse.new_empty(*lse.shape, STATISTICS.value)
    config = tile_config(k, cu_k)
    launch(
        dq_kernel,
        config.dq,
        (grad, q, k, v, out, lse, statistics, dq, cu_q, cu_k),
        rows_of=dq,
        block=config.dq.block_q,
        max_seqlen=max_q,
        strides=row_strides(q, k, out, dq),
    )
    launch(
        dkdv_kernel,
        config.dkdv,
        (grad, q, k, v, statistics, dk, dv, cu_q, cu_k),
        rows_of=dk,
        block=config.dkdv.block_k,
        max_seqlen=max_k,
        strides=row_strides(q, k, grad, dk),
    )


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
    """Gradients into q, k and v, contiguous; arguments as ``ops.varlen_attention_backward``.

    Raises:
        ValueError: see ``check_inputs`` and ``check_gradient_inputs``.
    """
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    _launch_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dq, dk, dv)
    return dq, dk, dv


def varlen_self_attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """Gradient into ``qkv`` [T, 3, H, Dh] of ``varlen_self_attention``, written in place by the kernels."""
    dqkv = qkv.new_empty(qkv.shape)
    parts, bounds = (*qkv.unbind(1), out, lse), (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    _launch_backward(grad, *parts, *bounds, *dqkv.unbind(1))
    return dqkv


def compile_specs(arch: str) -> Iterator[CompileSpec]:
    """Every configuration in which the launchers may run the kernels on ``arch``."""
    yield from attention_specs(arch, varlen_self_attention_backward, gradient=True)
