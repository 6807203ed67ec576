"""Rows plus the position of their patch, and the way back (``reference.gather_add`` defines both).

Legend: T rows out, R rows of ``x``, N positions, D width, S segments, J rows of a segment taken at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.rows import COMPILED, Tile, accumulation_dtype, accumulator, check, column_block, tile_for
from ijepa_fast.kernels.specs import ARCHITECTURES, CompileSpec, record_specs

# Each thread holds four or more independent 16-byte loads; a warp reads whole rows of a column block.
CONFIGS = {
    (arch, itemsize): tuple((columns, Tile(rows[columns], columns, 4)) for columns in (64, 128, 256))
    for arch in ARCHITECTURES
    for itemsize, rows in {2: {64: 64, 128: 32, 256: 16}, 4: {64: 32, 128: 16, 256: 8}}.items()
}
# Of segment sums: (segments, rows of a segment) per program. Rows of x are taken by few tokens, positions by many.
FEW_PER_SEGMENT, MANY_PER_SEGMENT = (16, 1), (1, 16)


@triton.jit(do_not_specialize=["num_rows", "num_positions"])
def gather_add_kernel(
    x,
    table,
    indices,
    out,
    num_rows,
    num_positions,
    D: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    # 64 bits: T * D can pass 2 ** 31.
    t = (program // column_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.load(indices + t, mask=t < num_rows, other=-1)
    mask = (token >= 0)[:, None] & (d < D)[None, :]
    if GATHER:
        row = token.to(tl.int64)
    else:
        row = t
    values = tl.load(x + row[:, None] * D + d[None, :], mask=mask, other=0)
    positions = tl.load(table + (token % num_positions)[:, None] * D + d[None, :], mask=mask, other=0)
    # The position is rounded to the dtype of x first, as the reference does.
    total = values.to(accumulator(x)) + positions.to(values.dtype).to(accumulator(x))
    tl.store(out + t[:, None] * D + d[None, :], total, mask=(t < num_rows)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def masked_copy_kernel(x, indices, out, num_rows, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    t = (program // column_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (t < num_rows)[:, None] & (d < D)[None, :]
    token = tl.load(indices + t, mask=t < num_rows, other=-1)
    offsets = t[:, None] * D + d[None, :]
    tl.store(out + offsets, tl.load(x + offsets, mask=inside & (token >= 0)[:, None], other=0), mask=inside)


@triton.jit(do_not_specialize=["num_segments"])
def segment_sum_kernel(
    x,
    order,
    starts,
    out,
    num_segments,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``out[s] = sum of x[order[j]] for starts[s] <= j < starts[s + 1]``, in an order that the sizes fix."""
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    s = (program // column_blocks).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(starts + s, mask=s < num_segments, other=0)
    stop = tl.load(starts + s + 1, mask=s < num_segments, other=0)
    total = tl.zeros([BLOCK_S, BLOCK_D], accumulator(x))
    for j in range(0, tl.max(stop - start), BLOCK_J):
        place = start[:, None] + j + tl.arange(0, BLOCK_J)[None, :]
        taken = place < stop[:, None]
        row = tl.load(order + place, mask=taken, other=0).to(tl.int64)
        mask = taken[:, :, None] & (d < D)[None, None, :]
        values = tl.load(x + row[:, :, None] * D + d[None, None, :], mask=mask, other=0)
        total += tl.sum(values.to(accumulator(x)), axis=1)
    tl.store(out + s[:, None] * D + d[None, :], total, mask=(s < num_segments)[:, None] & (d < D)[None, :])


def gather_add(x: Tensor, table: Tensor, indices: Tensor, gather: bool) -> Tensor:
    check("gather_add", {"x": x, "table": table}, {"indices": indices})
    rows, width = indices.shape[0], x.shape[1]
    if table.shape[1] != width:
        raise ValueError(f"gather_add: x has width {width}, table {table.shape[1]}")
    if not gather and x.shape[0] != rows:
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
            GATHER=gather,
            BLOCK_T=tile.rows,
            BLOCK_D=tile.columns,
            num_warps=tile.num_warps,
        )
    return out


def gather_add_backward(
    grad: Tensor, indices: Tensor, num_rows: int, num_positions: int, gather: bool, need_table: bool
) -> tuple[Tensor, Tensor]:
    check("gather_add_backward", {"grad": grad}, {"indices": indices})
    grad, indices = grad.contiguous(), indices.contiguous()
    wide = accumulation_dtype(grad.dtype)
    grad_table = grad.new_empty(0, dtype=wide)
    if need_table:
        positions = torch.where(indices < 0, -1, indices % num_positions)
        grad_table = _segment_sum(grad, positions, num_positions, wide, MANY_PER_SEGMENT)
    if gather:
        return _segment_sum(grad, indices, num_rows, grad.dtype, FEW_PER_SEGMENT), grad_table
    return _masked_copy(grad, indices), grad_table


def _masked_copy(x: Tensor, indices: Tensor) -> Tensor:
    """x [T, D] with zeros where the index is -1."""
    rows, width = x.shape
    out = x.new_empty(rows, width)
    if out.numel():
        tile = tile_for(CONFIGS, x.dtype, width)
        grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns),)
        masked_copy_kernel[grid](
            x, indices, out, rows, D=width, BLOCK_T=tile.rows, BLOCK_D=tile.columns, num_warps=tile.num_warps
        )
    return out


def _segment_sum(x: Tensor, keys: Tensor, num_segments: int, dtype: torch.dtype, block: tuple[int, int]) -> Tensor:
    """[num_segments, D]: row s sums the rows of x [T, D] whose key is s. Keys of -1 belong nowhere.

    Equal keys stay in the order of their rows (a stable sort), so that the sum has one value.
    """
    width = x.shape[1]
    out = x.new_empty(num_segments, width, dtype=dtype)
    if out.numel():
        ordered, order = torch.sort(keys, stable=True)
        bounds = torch.arange(num_segments + 1, dtype=keys.dtype, device=keys.device)
        starts = torch.searchsorted(ordered, bounds, out_int32=True)
        columns = column_block(width)
        grid = (triton.cdiv(num_segments, block[0]) * triton.cdiv(width, columns),)
        segment_sum_kernel[grid](
            x,
            order,
            starts,
            out,
            num_segments,
            D=width,
            BLOCK_S=block[0],
            BLOCK_J=block[1],
            BLOCK_D=columns,
            num_warps=4,
        )
    return out


def compile_specs(arch: str) -> Iterator[CompileSpec]:
    for width, dtype in COMPILED:
        case = f"{str(dtype).removeprefix('torch.')} D={width}"
        x = torch.empty(256, width, dtype=dtype, device="meta")
        table = torch.empty(256, width, device="meta")
        indices = torch.empty(256, dtype=torch.int32, device="meta")
        for gather in (False, True):
            which = f"{case} gather" if gather else case
            yield from record_specs(arch, which, gather_add, x, table, indices, gather, memory_bound=True)
            yield from record_specs(
                arch, which, gather_add_backward, x, indices, 256, 256, gather, gather, memory_bound=True
            )
