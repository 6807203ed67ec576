"""Gradient of a linear layer's weight, and of its bias on the way (``ops.weight_gradient`` defines both).

Legend: T packed rows, N output features, K input features, S splits of the rows.

The result is small and the sum long: a predictor's 384 x 384 gradient has 9 tiles of 128 x 128, for 132
multiprocessors. So the rows are split, each split gives fp32 partial sums of every tile, and a second kernel adds these
in a fixed order: the same bits every time, without atomics. Where the tiles alone fill the GPU, cuBLAS multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.linear_tiles import ProductTile, check_products, products
from ijepa_fast.kernels.row_tiles import accumulation_dtype, accumulator, sum_rows
from ijepa_fast.kernels.specs import CompileSpec, architecture

CONFIGS = {
    ("sm_80", 2): ProductTile(128, 64, 64, 4, 3),
    ("sm_90", 2): ProductTile(128, 128, 64, 8, 3, 128),
    ("sm_100", 2): ProductTile(128, 128, 64, 8, 3),
}
"""(architecture, itemsize) -> tile; its depth is rows at a time. Chosen from compiled code, not yet from times."""

PROGRAMS = {"sm_80": 216, "sm_90": 264, "sm_100": 296}
"""Number of programs to aim at: two on each multiprocessor of an A100, H100 or B200. Not measured yet."""

LEAST_ROWS = 512
"""Rows of a split: shorter sums are not worth the writing of their results."""

SUM_SPLITS, SUM_COLUMNS = 32, 64
"""Tile of the second stage."""


@triton.jit
def _grad_times_x(
    grad,
    x,
    n,
    k,
    first_row,
    last_row,
    NEED_BIAS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Product [BLOCK_N, BLOCK_K] over a split's rows, and sums [BLOCK_N] of grad if needed."""
    wide: tl.constexpr = accumulator(x)
    t = tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_N, BLOCK_K], wide)
    sums = tl.zeros([BLOCK_N], wide)
    grad_offsets, x_offsets = t[:, None] * N + n[None, :], t[:, None] * K + k[None, :]
    # Rows are counted in 32 bits by the loop, and once more in 64 bits for addresses: T * N can pass 2 ** 31.
    start = tl.zeros([], tl.int64) + first_row
    for row in range(first_row, last_row, BLOCK_T):
        # Rows past the split's last must be zero here: they would be part of the sum.
        inside = (t < last_row - row)[:, None]
        grad_mask, x_mask = inside, inside
        if N % BLOCK_N != 0:
            grad_mask = inside & (n < N)[None, :]
        if K % BLOCK_K != 0:
            x_mask = inside & (k < K)[None, :]
        grads = tl.load(grad + start * N + grad_offsets, mask=grad_mask, other=0)
        inputs = tl.load(x + start * K + x_offsets, mask=x_mask, other=0)
        total = tl.dot(tl.trans(grads), inputs, total, out_dtype=wide)
        start += BLOCK_T
    if NEED_BIAS:
        # A loop of its own, whose rows are still in the L2 cache. A load that feeds both a product and a sum gets one
        # buffer less than Hopper's asynchronous products need, and is overwritten while they read it
        # (triton-lang/triton#6691; compile.py looks for this).
        start = tl.zeros([], tl.int64) + first_row
        for row in range(first_row, last_row, BLOCK_T):
            grad_mask = (t < last_row - row)[:, None] & (n < N)[None, :]
            sums += tl.sum(tl.load(grad + start * N + grad_offsets, mask=grad_mask, other=0).to(wide), axis=0)
            start += BLOCK_T
    return total, sums


@triton.jit(do_not_specialize=["num_rows", "rows_per_split"])
def weight_gradient_kernel(
    grad,
    x,
    partials,
    bias_partials,
    num_rows,
    rows_per_split,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Programs of a split follow each other: they share rows. ``partials`` [S, N, K], ``bias_partials`` [S, N]."""
    column_tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles: tl.constexpr = column_tiles * ((N + BLOCK_N - 1) // BLOCK_N)
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    n = tile // column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile % column_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    first_row = split * rows_per_split
    last_row = tl.minimum(first_row + rows_per_split, num_rows)
    if bias_partials is not None:
        # One program of those that read the same columns of grad sums them.
        if tile % column_tiles == 0:
            total, sums = _grad_times_x(grad, x, n, k, first_row, last_row, True, N, K, BLOCK_N, BLOCK_K, BLOCK_T)
            tl.store(bias_partials + split * N + n, sums, mask=n < N)
        else:
            total, _ = _grad_times_x(grad, x, n, k, first_row, last_row, False, N, K, BLOCK_N, BLOCK_K, BLOCK_T)
    else:
        total, _ = _grad_times_x(grad, x, n, k, first_row, last_row, False, N, K, BLOCK_N, BLOCK_K, BLOCK_T)
    offsets = n[:, None] * K + k[None, :]
    tl.store(partials + split.to(tl.int64) * N * K + offsets, total, mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["num_splits"])
def sum_splits_kernel(partials, out, num_splits, SIZE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums over S of [S, SIZE], rounded to the dtype of ``out``."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_S, BLOCK_D], accumulator(partials))
    for first in range(0, num_splits, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        mask = (s < num_splits)[:, None] & (d < SIZE)[None, :]
        total += tl.load(partials + s.to(tl.int64)[:, None] * SIZE + d[None, :], mask=mask, other=0)
    tl.store(out + d, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=d < SIZE)


def split_rows(rows: int, outputs: int, inputs: int, tile: ProductTile, programs: int) -> tuple[int, int]:
    """(splits, rows of each but the last) for ``programs`` programs; one split where the tiles alone are half as many.

    They depend on the sizes and the architecture alone, so that sums have the same order in every run.
    """
    tiles = triton.cdiv(outputs, tile.rows) * triton.cdiv(inputs, tile.columns)
    splits = max(1, min(programs // max(1, tiles), triton.cdiv(rows, LEAST_ROWS)))
    per_split = triton.cdiv(triton.cdiv(rows, splits), tile.depth) * tile.depth
    return max(1, triton.cdiv(rows, max(1, per_split))), per_split


def weight_gradient(grad: Tensor, x: Tensor, need_bias: bool) -> tuple[Tensor, Tensor]:
    rows, outputs = grad.shape
    inputs = x.shape[1]
    check_products("weight_gradient", {"grad": grad, "x": x}, {"x": (rows, inputs)})
    wide = accumulation_dtype(x.dtype)
    tile = CONFIGS[architecture(), 2]
    splits, per_split = split_rows(rows, outputs, inputs, tile, PROGRAMS[architecture()])
    if splits == 1:
        # The tiles alone fill the GPU. Nothing is left to a second stage, and cuBLAS multiplies large matrices faster.
        with torch.autocast(x.device.type, enabled=False):
            product = grad.t() @ x
        return product, grad.sum(0, dtype=wide) if need_bias else x.new_empty(0, dtype=wide)
    partials = x.new_empty(splits, outputs * inputs, dtype=wide)
    bias_partials = x.new_empty(splits, 1, outputs if need_bias else 0, dtype=wide)
    tiles = triton.cdiv(outputs, tile.rows) * triton.cdiv(inputs, tile.columns)
    weight_gradient_kernel[tiles * splits,](
        grad.contiguous(),
        x.contiguous(),
        partials,
        bias_partials if need_bias else None,
        rows,
        per_split,
        N=outputs,
        K=inputs,
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_T=tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.max_registers,
    )
    out = x.new_empty(outputs, inputs)
    sum_splits_kernel[triton.cdiv(out.numel(), SUM_COLUMNS),](
        partials, out, splits, SIZE=out.numel(), BLOCK_S=SUM_SPLITS, BLOCK_D=SUM_COLUMNS, num_warps=4
    )
    (grad_bias,) = sum_rows(bias_partials)
    return out, grad_bias


def compile_specs(arch: str) -> Iterator[CompileSpec]:
    """The predictor's four matrices and two encoder sizes whose tiles do not fill a GPU."""
    for outputs, inputs in ((384, 384), (1152, 384), (1536, 384), (384, 1536), (384, 1280), (768, 768), (192, 192)):
        grad = torch.empty(16384, outputs, dtype=torch.bfloat16, device="meta")
        x = grad.new_empty(16384, inputs)
        case = f"bfloat16 {outputs} x {inputs}"
        for need_bias in (False, True):
            yield from products(arch, f"{case}{' with bias' * need_bias}", weight_gradient, grad, x, need_bias)
