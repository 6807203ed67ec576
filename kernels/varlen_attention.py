"""Softmax attention within packed sequences of 30 to 300 tokens: the forward kernel.

Legend: Tq, Tk packed query and key rows, S sequences, H heads, Dh head dim.

One program computes BLOCK_Q queries of one sequence and head in a loop over blocks of BLOCK_K keys, with the online
softmax of FlashAttention (arXiv 2205.14135, algorithm 1; 2307.08691, section 3.1) in fp32 and base 2. The grid covers
``max_q`` rows of every sequence; programs past a sequence's end return at once. The programs of one more sequence
write zeros to the padding rows.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.row_tiles import accumulation_dtype
from ijepa_fast.kernels.specs import CompileSpec
from ijepa_fast.kernels.varlen_attention_launch import (
    attention_specs,
    check_inputs,
    launch,
    row_strides,
    tile_config,
    with_equal_strides,
)
from ijepa_fast.kernels.varlen_attention_tiles import (
    LN_2,
    LOG2_E,
    head_pointer,
    load_tile,
    row_range,
    store_tile,
    zero_lse,
    zero_rows,
)


@triton.jit(
    do_not_specialize=[
        "first_sequence",
        "num_sequences",
        "num_rows",
        "q_stride",
        "kv_stride",
        "out_stride",
    ]
)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    first_sequence,
    num_sequences,
    num_rows,
    q_stride,
    kv_stride,
    out_stride,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Grid: (blocks of queries, heads, sequences and one more)."""
    head, sequence = tl.program_id(1), first_sequence + tl.program_id(2)
    start_q, length_q = row_range(cu_q_ptr, sequence, num_sequences)
    start_k, length_k = row_range(cu_k_ptr, sequence, num_sequences)
    first_query = tl.program_id(0) * BLOCK_Q
    # Only the device knows where padding begins; the programs of one more sequence share out its rows.
    if sequence == num_sequences:
        first, step = start_q + first_query, tl.num_programs(0) * BLOCK_Q
        zero_rows(out_ptr, out_stride, head, first, num_rows, step, BLOCK_Q, WIDTH, REST, HEAD_DIM)
        zero_lse(lse_ptr, head, first, num_rows, step, BLOCK_Q)
        return
    if first_query >= length_q:
        return

    q_rows = head_pointer(q_ptr, start_q, head, q_stride, HEAD_DIM)
    k_rows = head_pointer(k_ptr, start_k, head, kv_stride, HEAD_DIM)
    v_rows = head_pointer(v_ptr, start_k, head, kv_stride, HEAD_DIM)
    q = load_tile(q_rows, q_stride, first_query, length_q, BLOCK_Q, 0, WIDTH, HEAD_DIM)
    out = tl.zeros([BLOCK_Q, WIDTH], ACCUMULATE)
    if REST > 0:
        q_rest = load_tile(q_rows, q_stride, first_query, length_q, BLOCK_Q, WIDTH, REST, HEAD_DIM)
        out_rest = tl.zeros([BLOCK_Q, REST], ACCUMULATE)
    maximum = tl.full([BLOCK_Q], float("-inf"), ACCUMULATE)
    total = tl.zeros([BLOCK_Q], ACCUMULATE)
    scale: tl.constexpr = LOG2_E * HEAD_DIM**-0.5

    for first_key in range(0, length_k, BLOCK_K):
        k = load_tile(k_rows, kv_stride, first_key, length_k, BLOCK_K, 0, WIDTH, HEAD_DIM)
        scores = tl.dot(q, tl.trans(k), out_dtype=ACCUMULATE)
        if REST > 0:
            k_rest = load_tile(k_rows, kv_stride, first_key, length_k, BLOCK_K, WIDTH, REST, HEAD_DIM)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, out_dtype=ACCUMULATE)
        # Keys past the end get weight 0. Every block holds at least one key, so the maximum is finite after the first.
        scores = tl.where(tl.arange(0, BLOCK_K)[None, :] < length_k - first_key, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores * scale - (new_maximum * scale)[:, None])
        rescale = tl.exp2((maximum - new_maximum) * scale)
        maximum = new_maximum
        total = total * rescale + tl.sum(weights, 1)
        # Their sum is of the unrounded weights; the matrix unit takes the rounded ones.
        weights = weights.to(v_ptr.dtype.element_ty)
        v = load_tile(v_rows, kv_stride, first_key, length_k, BLOCK_K, 0, WIDTH, HEAD_DIM)
        out = tl.dot(weights, v, out * rescale[:, None], out_dtype=ACCUMULATE)
        if REST > 0:
            v_rest = load_tile(v_rows, kv_stride, first_key, length_k, BLOCK_K, WIDTH, REST, HEAD_DIM)
            out_rest = tl.dot(weights, v_rest, out_rest * rescale[:, None], out_dtype=ACCUMULATE)

    total = tl.where(length_k > 0, total, 1.0)  # without keys: out is 0, and lse stays at -inf
    inverse = (1.0 / total)[:, None]
    out_rows = head_pointer(out_ptr, start_q, head, out_stride, HEAD_DIM)
    store_tile(out_rows, out * inverse, out_stride, first_query, length_q, BLOCK_Q, 0, WIDTH, HEAD_DIM)
    if REST > 0:
        store_tile(out_rows, out_rest * inverse, out_stride, first_query, length_q, BLOCK_Q, WIDTH, REST, HEAD_DIM)
    queries = first_query + tl.arange(0, BLOCK_Q)
    lse = (maximum * scale + tl.log2(total)) * LN_2
    lse_rows = lse_ptr + (start_q.to(tl.int64) + queries) * tl.num_programs(1) + head
    tl.store(lse_rows, lse, mask=queries < length_q)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> tuple[Tensor, Tensor]:
    """out [Tq, H, Dh] and log-sum-exp [Tq, H]; arguments and results as ``ops.varlen_attention``.

    q, k and v may be views of wider rows (of one [T, 3, H, Dh] tensor); nothing is copied.

    Raises:
        ValueError: see ``check_inputs``.
    """
    check_inputs(q, k, v, cu_q, cu_k, max_q, max_k)
    k, v = with_equal_strides(k, v)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))
    tile = tile_config(k, cu_k).forward
    launch(
        forward_kernel,
        tile,
        (q, k, v, out, lse, cu_q, cu_k),
        rows_of=out,
        block=tile.block_q,
        max_seqlen=max_q,
        strides=row_strides(q, k, out),
    )
    return out, lse


def varlen_self_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """``varlen_attention`` of the three parts of ``qkv`` [T, 3, H, Dh]: out [T, H, Dh] and log-sum-exp [T, H]."""
    return varlen_attention(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


def compile_specs(arch: str) -> Iterator[CompileSpec]:
    """Every configuration in which the launcher may run the kernel on ``arch``."""
    yield from attention_specs(arch, varlen_self_attention, gradient=False)
