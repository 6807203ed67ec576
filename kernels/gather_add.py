"""Rows plus the position of their patch, and the way back (``ops.gather_add`` defines both).

Legend: T rows, N positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.row_tiles import COMPILED, RowTile, accumulator, check, tile_for
from ijepa_fast.kernels.specs import ARCHITECTURES, CompileSpec, record_specs

# Each thread holds four or more independent 16-byte loads; a warp reads whole rows of a column block.
CONFIGS = {
    (arch, itemsize): tuple((columns, RowTile(rows[columns], columns, 4)) for columns in (64, 128, 256))
    for arch in ARCHITECTURES
    for itemsize, rows in {2: {64: 64, 128: 32, 256: 16}, 4: {64: 32, 128: 16, 256: 8}}.items()
}


@triton.jit(do_not_specialize=["num_rows", "num_positions"])
def gather_add_kernel(
    x,
    table,
    indices,
    out,
    num_rows,
    num_positions,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    # 64 bits: T * D can pass 2 ** 31.
    t = (program // column_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    # Padding rows have token -1: they load nothing and are stored as zeros, because weight gradients sum over all rows.
    token = tl.load(indices + t, mask=t < num_rows, other=-1)
    mask = (token >= 0)[:, None] & (d < D)[None, :]
    values = tl.load(x + t[:, None] * D + d[None, :], mask=mask, other=0)
    # A token index counts through the images of the batch, all of which have the same positions.
    positions = tl.load(table + (token % num_positions)[:, None] * D + d[None, :], mask=mask, other=0)
    # The position is rounded to the dtype of x first, as the definition does.
    total = values.to(accumulator(x)) + positions.to(values.dtype).to(accumulator(x))
    tl.store(out + t[:, None] * D + d[None, :], total, mask=(t < num_rows)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def masked_copy_kernel(x, indices, out, num_rows, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """``x`` with zeros in its padding rows, whose gradient from above may be anything."""
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    t = (program // column_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (t < num_rows)[:, None] & (d < D)[None, :]
    token = tl.load(indices + t, mask=t < num_rows, other=-1)
    offsets = t[:, None] * D + d[None, :]
    tl.store(out + offsets, tl.load(x + offsets, mask=inside & (token >= 0)[:, None], other=0), mask=inside)


def gather_add(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    check("gather_add", {"x": x, "table": table}, {"indices": indices})
    rows, width = indices.shape[0], x.shape[1]
    if table.shape[1] != width:
        raise ValueError(f"gather_add: x has width {width}, table {table.shape[1]}")
    if x.shape[0] != rows:
        raise ValueError(f"gather_add: x has {x.shape[0]} rows for {rows} indices")
    out = x.new_empty(rows, width)
    if out.numel():
        tile = tile_for(CONFIGS, x.dtype, width)
        grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns),)
        gather_add_kernel[grid](
            x.contiguous(),
            table.contiguous(),
            indices.contiguous(),
            out,
            rows,
            table.shape[0],
            D=width,
            BLOCK_T=tile.rows,
            BLOCK_D=tile.columns,
            num_warps=tile.num_warps,
        )
    return out


def gather_add_backward(grad: Tensor, indices: Tensor) -> Tensor:
    check("gather_add_backward", {"grad": grad}, {"indices": indices})
    rows, width = grad.shape
    out = grad.new_empty(rows, width)
    if out.numel():
        tile = tile_for(CONFIGS, grad.dtype, width)
        grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns),)
        masked_copy_kernel[grid](
            grad.contiguous(),
            indices.contiguous(),
            out,
            rows,
            D=width,
            BLOCK_T=tile.rows,
            BLOCK_D=tile.columns,
            num_warps=tile.num_warps,
        )
    return out


def compile_specs(arch: str) -> Iterator[CompileSpec]:
    for width, dtype in COMPILED:
        case = f"{str(dtype).removeprefix('torch.')} D={width}"
        x = torch.empty(256, width, dtype=dtype, device="meta")
        table = torch.empty(256, width, device="meta")
        indices = torch.empty(256, dtype=torch.int32, device="meta")
        yield from record_specs(arch, case, gather_add, x, table, indices, memory_bound=True)
        yield from record_specs(arch, case, gather_add_backward, x, indices, memory_bound=True)
