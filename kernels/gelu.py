"""Bias and erf-GELU, forward and backward (``reference.bias_gelu`` defines both).

Legend: T rows, D width, P strips of rows of the backward, each with its partial sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.rows import Tile, accumulation_dtype, accumulator, check, sum_rows, tile_for
from ijepa_fast.kernels.specs import ARCHITECTURES, CompileSpec, record_specs

CONFIGS = {
    (arch, itemsize): tuple((columns, Tile(rows[columns], columns, 4)) for columns in (64, 128, 256))
    for arch in ARCHITECTURES
    for itemsize, rows in {2: {64: 64, 128: 32, 256: 16}, 4: {64: 32, 128: 16, 256: 8}}.items()
}
TILES_PER_STRIP = 8
"""Tiles of rows that one backward program walks through, summing the gradient of the bias."""


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


@triton.jit(do_not_specialize=["num_rows"])
def bias_gelu_kernel(x, bias, out, num_rows, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    t = (program // column_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (t < num_rows)[:, None] & (d < D)[None, :]
    offsets = t[:, None] * D + d[None, :]
    h = tl.load(x + offsets, mask=mask, other=0).to(accumulator(x))
    if bias is not None:
        h += tl.load(bias + d, mask=d < D, other=0).to(h.dtype)[None, :]
    cumulative, _ = normal(h, x.dtype.element_ty.primitive_bitwidth > 16)
    tl.store(out + offsets, h * cumulative, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def bias_gelu_backward_kernel(
    grad,
    x,
    bias,
    grad_x,
    partials,
    num_rows,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    wide: tl.constexpr = accumulator(x)
    program = tl.program_id(0)
    p = (program // column_blocks).to(tl.int64)
    d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    added = tl.zeros([BLOCK_D], wide)
    if bias is not None:
        added = tl.load(bias + d, mask=d < D, other=0).to(wide)
    total = tl.zeros([BLOCK_T, BLOCK_D], wide)
    for tile in tl.range(TILES):
        t = (p * TILES + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (t < num_rows)[:, None] & (d < D)[None, :]
        offsets = t[:, None] * D + d[None, :]
        h = tl.load(x + offsets, mask=mask, other=0).to(wide) + added[None, :]
        grad_out = tl.load(grad + offsets, mask=mask, other=0).to(wide)
        cumulative, density = normal(h, x.dtype.element_ty.primitive_bitwidth > 16)
        value = grad_out * (cumulative + h * density)
        tl.store(grad_x + offsets, value, mask=mask)
        total += value
    if bias is not None:
        tl.store(partials + p * D + d, tl.sum(total, axis=0), mask=d < D)


def _check(x: Tensor, bias: Tensor | None, **others: Tensor) -> None:
    check("bias_gelu", {"x": x, **others, **({} if bias is None else {"bias": bias})}, {})
    if bias is not None and bias.shape != (x.shape[1],):
        raise ValueError(f"bias_gelu: bias must have shape [{x.shape[1]}], got {list(bias.shape)}")


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, bias)
    rows, width = x.shape
    out = x.new_empty(rows, width)
    if out.numel():
        tile = tile_for(CONFIGS, x.dtype, width)
        bias_gelu_kernel[triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns),](
            x.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            rows,
            D=width,
            BLOCK_T=tile.rows,
            BLOCK_D=tile.columns,
            num_warps=tile.num_warps,
        )
    return out


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(x, bias, grad=grad)
    rows, width = x.shape
    grad_x = x.new_empty(rows, width)
    tile = tile_for(CONFIGS, x.dtype, width)
    strips = triton.cdiv(rows, TILES_PER_STRIP * tile.rows)
    wide = accumulation_dtype(x.dtype)
    partials = x.new_empty(strips, 1, width if bias is not None else 0, dtype=wide)
    if grad_x.numel():
        bias_gelu_backward_kernel[strips * triton.cdiv(width, tile.columns),](
            grad.contiguous(),
            x.contiguous(),
            None if bias is None else bias.contiguous(),
            grad_x,
            partials,
            rows,
            D=width,
            TILES=TILES_PER_STRIP,
            BLOCK_T=tile.rows,
            BLOCK_D=tile.columns,
            num_warps=tile.num_warps,
        )
    (grad_bias,) = sum_rows(partials)
    return grad_x, grad_bias


def compile_specs(arch: str) -> Iterator[CompileSpec]:
    for width, dtype in [
        (5120, torch.bfloat16),
        (1152, torch.bfloat16),
        (192, torch.bfloat16),
        (5120, torch.float32),
    ]:
        case = f"{str(dtype).removeprefix('torch.')} D={width}"
        x = torch.empty(256, width, dtype=dtype, device="meta")
        for bias in (
            (torch.empty(width, device="meta"), None) if width == 5120 else (torch.empty(width, device="meta"),)
        ):
            which = case if bias is not None else f"{case} without bias"
            yield from record_specs(arch, which, bias_gelu, x, bias, memory_bound=True)
            yield from record_specs(arch, which, bias_gelu_backward, x, x, bias, memory_bound=True)
