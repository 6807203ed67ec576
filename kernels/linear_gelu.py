"""GELU inside the products on both of its sides: ``linear_gelu`` forward and ``hidden_gradient`` backward.

Legend: T packed rows, N output features, K input features; of ``hidden_gradient`` N is the MLP's hidden width.

A program is one tile of the result. GELU is taken of the sums rounded to the dtype of x, which is what the backward
pass reads; its derivative multiplies fp32 sums. Both happen in registers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.linear_tiles import (
    GELU_CONFIGS,
    GROUP,
    HIDDEN_GRADIENT_CONFIGS,
    ProductTile,
    check_products,
    grouped_tile,
    left_and_right,
    products,
    rows_times_matrix,
    tile_of,
)
from ijepa_fast.kernels.row_tiles import accumulation_dtype, accumulator, sum_rows
from ijepa_fast.kernels.specs import CompileSpec


@triton.jit
def normal(h, EXACT: tl.constexpr):
    """Cumulative distribution and density of the standard normal distribution.

    For 16-bit tensors erf is Abramowitz and Stegun's formula 7.1.26: an absolute error of 1.5e-7, as small as that of
    1 + erf in fp32, from the exponential that the density needs anyway. CUDA's own erf makes the kernel wait for
    arithmetic instead of memory.
    """
    exponential = tl.exp(-0.5 * h * h)
    if EXACT:
        cumulative = 0.5 * (1 + tl.erf(h * 0.7071067811865476))
    else:
        t = 1 / (1 + 0.23164190 * tl.abs(h))  # 0.3275911 / sqrt(2)
        series = t * (0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.726576014 + t * 0.530702715))))
        tail = series * exponential
        cumulative = tl.where(h < 0, tail, 1 - tail)
    return cumulative, 0.3989422804014327 * exponential


@triton.jit(do_not_specialize=["num_rows", "row_tiles", "depth"])
def linear_gelu_kernel(
    x,
    weight,
    bias,
    out,
    pre,
    num_rows,
    row_tiles,
    depth,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    wide: tl.constexpr = accumulator(x)
    row, column = grouped_tile(tl.program_id(0), row_tiles, (N + BLOCK_N - 1) // BLOCK_N, GROUP)
    # The tile's start is 64-bit, because T * N can pass 2 ** 31; offsets within the tile stay 32-bit.
    start = (row * BLOCK_T).to(tl.int64)
    rows_left = num_rows - row * BLOCK_T
    t, n = tl.arange(0, BLOCK_T), column * BLOCK_N + tl.arange(0, BLOCK_N)
    total = rows_times_matrix(
        x + start * K, weight, rows_left - 1, depth, n, N, K, 1, K, BLOCK_T, BLOCK_N, BLOCK_K, wide
    )
    halves = left_and_right(total, BLOCK_T, BLOCK_N)
    for half in tl.static_range(2):
        n = column * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        value = halves[half] + tl.load(bias + n, mask=n < N, other=0).to(wide)[None, :]
        # GELU is taken of what the backward pass will read.
        rounded = value.to(out.dtype.element_ty)
        mask = (t < rows_left)[:, None] & (n < N)[None, :]
        offsets = t[:, None] * N + n[None, :]
        if pre is not None:
            tl.store(pre + start * N + offsets, rounded, mask=mask)
        h = rounded.to(wide)
        cumulative, _ = normal(h, x.dtype.element_ty.primitive_bitwidth > 16)
        tl.store(out + start * N + offsets, (h * cumulative).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "row_tiles", "depth"])
def hidden_gradient_kernel(
    grad,
    weight,
    pre,
    grad_pre,
    partials,
    num_rows,
    row_tiles,
    depth,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes into ``partials`` [tiles of rows, N] the sums over the rows of each tile, unless it is None."""
    wide: tl.constexpr = accumulator(pre)
    row, column = grouped_tile(tl.program_id(0), row_tiles, (N + BLOCK_N - 1) // BLOCK_N, GROUP)
    start = (row * BLOCK_T).to(tl.int64)
    rows_left = num_rows - row * BLOCK_T
    t, n = tl.arange(0, BLOCK_T), column * BLOCK_N + tl.arange(0, BLOCK_N)
    total = rows_times_matrix(
        grad + start * K, weight, rows_left - 1, depth, n, N, K, N, 1, BLOCK_T, BLOCK_N, BLOCK_K, wide
    )
    halves = left_and_right(total, BLOCK_T, BLOCK_N)
    for half in tl.static_range(2):
        n = column * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        mask = (t < rows_left)[:, None] & (n < N)[None, :]
        offsets = t[:, None] * N + n[None, :]
        h = tl.load(pre + start * N + offsets, mask=mask, other=0).to(wide)
        cumulative, density = normal(h, pre.dtype.element_ty.primitive_bitwidth > 16)
        value = halves[half] * (cumulative + h * density)
        tl.store(grad_pre + start * N + offsets, value.to(grad_pre.dtype.element_ty), mask=mask)
        if partials is not None:
            # Rows past the last repeat it in the product, so they must not be summed.
            sums = tl.sum(tl.where((t < rows_left)[:, None], value, 0), axis=0)
            tl.store(partials + row.to(tl.int64) * N + n, sums, mask=n < N)


def _options(tile: ProductTile) -> dict[str, int | None]:
    return {
        "BLOCK_T": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "GROUP": GROUP,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": tile.max_registers,
    }


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, keep_pre: bool) -> tuple[Tensor, Tensor]:
    rows, inputs = x.shape
    outputs = weight.shape[0]
    shapes = {"weight": (outputs, inputs), "bias": (outputs,)}
    check_products("linear_gelu", {"x": x, "weight": weight}, shapes, bias=bias)
    out = x.new_empty(rows, outputs)
    pre = x.new_empty(out.shape if keep_pre else (0,))
    if out.numel():
        tile = tile_of(GELU_CONFIGS, inputs)
        row_tiles = triton.cdiv(rows, tile.rows)
        linear_gelu_kernel[row_tiles * triton.cdiv(outputs, tile.columns),](
            x.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            out,
            pre if keep_pre else None,
            rows,
            row_tiles,
            inputs,
            N=outputs,
            K=inputs,
            **_options(tile),
        )
    return out, pre


def hidden_gradient(grad: Tensor, weight: Tensor, pre: Tensor, need_bias: bool) -> tuple[Tensor, Tensor]:
    rows, outputs = grad.shape
    hidden = pre.shape[1]
    factors = {"grad": grad, "weight": weight, "pre": pre}
    check_products("hidden_gradient", factors, {"weight": (outputs, hidden), "pre": (rows, hidden)})
    grad_pre = pre.new_empty(rows, hidden)
    tile = tile_of(HIDDEN_GRADIENT_CONFIGS, outputs)
    row_tiles = triton.cdiv(rows, tile.rows)
    wide = accumulation_dtype(pre.dtype)
    partials = pre.new_empty(row_tiles, 1, hidden if need_bias else 0, dtype=wide)
    if grad_pre.numel():
        hidden_gradient_kernel[row_tiles * triton.cdiv(hidden, tile.columns),](
            grad.contiguous(),
            weight.contiguous(),
            pre.contiguous(),
            grad_pre,
            partials if need_bias else None,
            rows,
            row_tiles,
            outputs,
            N=hidden,
            K=outputs,
            **_options(tile),
        )
    (grad_bias,) = sum_rows(partials)
    return grad_pre, grad_bias


def compile_specs(arch: str) -> Iterator[CompileSpec]:
    """Predictor, the smallest encoder, and the widths of ViT-H and ViT-g; both forms of both kernels."""
    for width, hidden in ((384, 1536), (192, 768), (1280, 5120), (1408, 6144)):
        x = torch.empty(256, width, dtype=torch.bfloat16, device="meta")
        weight, bias = x.new_empty(hidden, width), x.new_empty(hidden, dtype=torch.float32)
        weight_2, pre = x.new_empty(width, hidden), x.new_empty(256, hidden)
        case = f"bfloat16 D={width} H={hidden}"
        for flag in (False, True):
            kept, summed = ("with pre", "with bias") if flag else ("", "")
            yield from products(arch, f"{case} {kept}", linear_gelu, x, weight, bias, flag)
            yield from products(arch, f"{case} {summed}", hidden_gradient, x, weight_2, pre, flag)
