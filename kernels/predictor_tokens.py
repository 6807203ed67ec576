"""Input rows of the predictor, and the way back (``ops.predictor_tokens`` defines both).

Legend: Tc context rows, Tp predictor rows, M copies of a context row, N positions, D width, P partial rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.row_tiles import COMPILED, RowTile, accumulation_dtype, accumulator, check, sum_rows, tile_for
from ijepa_fast.kernels.specs import ARCHITECTURES, CompileSpec, record_specs

CONFIGS = {
    (arch, itemsize): tuple((columns, RowTile(rows[columns], columns, 4)) for columns in (64, 128, 256))
    for arch in ARCHITECTURES
    for itemsize, rows in {2: {64: 64, 128: 32, 256: 16}, 4: {64: 32, 128: 16, 256: 8}}.items()
}
TILES_PER_PARTIAL = 4
"""Tiles of rows that one program sums for the mask token: few, so that no program waits long for its loads."""


@triton.jit(do_not_specialize=["num_rows", "num_positions"])
def predictor_tokens_kernel(
    context,
    mask_token,
    positions,
    indices,
    sources,
    out,
    num_rows,
    num_positions,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    wide: tl.constexpr = accumulator(context)
    program = tl.program_id(0)
    t = (program // column_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = t < num_rows
    token = tl.load(indices + t, mask=inside, other=-1)
    source = tl.load(sources + t, mask=inside, other=-1)
    real, copied, column = (token >= 0)[:, None], (source >= 0)[:, None], (d < D)[None, :]
    # Rows of mask tokens load nothing here.
    values = tl.load(context + source.to(tl.int64)[:, None] * D + d[None, :], mask=real & copied & column, other=0)
    mask_values = tl.load(mask_token + d, mask=d < D, other=0).to(values.dtype)
    values = tl.where(copied, values, mask_values[None, :])
    position = tl.load(positions + (token % num_positions)[:, None] * D + d[None, :], mask=real & column, other=0)
    total = values.to(wide) + position.to(values.dtype).to(wide)
    tl.store(out + t[:, None] * D + d[None, :], tl.where(real, total, 0), mask=inside[:, None] & column)


@triton.jit(do_not_specialize=["num_rows"])
def sum_copies_kernel(
    grad, copies, out, num_rows, D: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    t = (program // column_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside, column = t < num_rows, (d < D)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_D], accumulator(grad))
    # A context row gathers its copies, instead of the copies adding to it: no atomics, and a fixed order. Unrolled, so
    # that the loads of all copies are in flight together.
    for m in tl.static_range(M):
        row = tl.load(copies + t * M + m, mask=inside, other=-1).to(tl.int64)
        total += tl.load(grad + row[:, None] * D + d[None, :], mask=(row >= 0)[:, None] & column, other=0)
    tl.store(out + t[:, None] * D + d[None, :], total, mask=inside[:, None] & column)


@triton.jit(do_not_specialize=["num_rows"])
def sum_mask_tokens_kernel(
    grad,
    indices,
    sources,
    partials,
    num_rows,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``partials[p]`` sums the rows of mask tokens among TILES * BLOCK_T neighbouring rows."""
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    p = (program // column_blocks).to(tl.int64)
    d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_T, BLOCK_D], accumulator(grad))
    for tile in tl.static_range(TILES):
        t = (p * TILES + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = t < num_rows
        token = tl.load(indices + t, mask=inside, other=-1)
        source = tl.load(sources + t, mask=inside, other=0)  # past the end: a copy, which is not summed
        taken = (token >= 0) & (source < 0)
        total += tl.load(grad + t[:, None] * D + d[None, :], mask=taken[:, None] & (d < D)[None, :], other=0)
    tl.store(partials + p * D + d, tl.sum(total, axis=0), mask=d < D)


def predictor_tokens(
    context: Tensor, mask_token: Tensor, positions: Tensor, indices: Tensor, sources: Tensor, copies: Tensor
) -> Tensor:
    check(
        "predictor_tokens",
        {"context": context, "mask_token": mask_token, "positions": positions},
        {"indices": indices, "sources": sources, "copies": copies},
    )
    rows, width = indices.shape[0], context.shape[1]
    if mask_token.shape != (width,) or positions.shape[1] != width:
        raise ValueError(
            f"predictor_tokens: context has width {width}, mask_token {list(mask_token.shape)}, "
            f"positions {list(positions.shape)}"
        )
    if sources.shape[0] != rows:
        raise ValueError(f"predictor_tokens: {rows} indices, but {sources.shape[0]} sources")
    out = context.new_empty(rows, width)
    if out.numel():
        tile = tile_for(CONFIGS, context.dtype, width)
        grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns),)
        predictor_tokens_kernel[grid](
            context.contiguous(),
            mask_token.contiguous(),
            positions.contiguous(),
            indices.contiguous(),
            sources.contiguous(),
            out,
            rows,
            positions.shape[0],
            D=width,
            BLOCK_T=tile.rows,
            BLOCK_D=tile.columns,
            num_warps=tile.num_warps,
        )
    return out


def predictor_tokens_backward(grad: Tensor, indices: Tensor, sources: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    check("predictor_tokens_backward", {"grad": grad}, {"indices": indices, "sources": sources, "copies": copies})
    grad, indices, sources, copies = grad.contiguous(), indices.contiguous(), sources.contiguous(), copies.contiguous()
    rows, width = grad.shape
    tile = tile_for(CONFIGS, grad.dtype, width)
    column_blocks = triton.cdiv(width, tile.columns)
    grad_context = grad.new_empty(copies.shape[0], width)
    if grad_context.numel():
        sum_copies_kernel[triton.cdiv(copies.shape[0], tile.rows) * column_blocks,](
            grad,
            copies,
            grad_context,
            copies.shape[0],
            D=width,
            M=copies.shape[1],
            BLOCK_T=tile.rows,
            BLOCK_D=tile.columns,
            num_warps=tile.num_warps,
        )
    num_partials = triton.cdiv(rows, TILES_PER_PARTIAL * tile.rows)
    partials = grad.new_empty(num_partials, width, dtype=accumulation_dtype(grad.dtype))
    if partials.numel():
        sum_mask_tokens_kernel[num_partials * column_blocks,](
            grad,
            indices,
            sources,
            partials,
            rows,
            D=width,
            TILES=TILES_PER_PARTIAL,
            BLOCK_T=tile.rows,
            BLOCK_D=tile.columns,
            num_warps=tile.num_warps,
        )
    (grad_token,) = sum_rows(partials[:, None])
    return grad_context, grad_token


def compile_specs(arch: str) -> Iterator[CompileSpec]:
    for width, dtype in COMPILED:
        case = f"{str(dtype).removeprefix('torch.')} D={width}"
        context = torch.empty(256, width, dtype=dtype, device="meta")
        fixed = torch.empty(256, width, device="meta")
        rows = torch.empty(256, dtype=torch.int32, device="meta")
        copies = torch.empty(256, 4, dtype=torch.int32, device="meta")
        forward = (context, fixed[0], fixed, rows, rows, copies)
        yield from record_specs(arch, case, predictor_tokens, *forward, memory_bound=True)
        yield from record_specs(arch, case, predictor_tokens_backward, context, rows, rows, copies, memory_bound=True)
