"""Shared parts of the kernels that work row by row: tiles, accumulators, argument checks and the sum of partial rows.

Legend: T rows, D width, P partial rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.specs import configuration

COMPILED = ((192, torch.bfloat16), (384, torch.bfloat16), (1280, torch.bfloat16), (1280, torch.float32))
"""Widths and dtypes that ``compile_specs`` lists: one for every bucket of the tables."""

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class RowTile(NamedTuple):
    """Rows and columns that one program works on, and its warps."""

    rows: int
    columns: int
    num_warps: int


TileTable = Mapping[tuple[str, int], Sequence[tuple[int, RowTile]]]


def column_block(width: int) -> int:
    """Columns per program: of 256, 128 and 64 the one that covers the width with the fewest idle lanes."""
    return min((256, 128, 64), key=lambda block: triton.cdiv(width, block) * block)


def tile_for(table: TileTable, dtype: torch.dtype, width: int) -> RowTile:
    """The row of a table whose buckets are ``column_block``; fp64 (for tests) takes the rows of fp32."""
    return configuration(table, min(dtype.itemsize, 4), column_block(width))


def split_width(width: int) -> tuple[int, int]:
    """Two powers of two that together hold a row: 1280 = 1024 + 256, where one alone would be 2048 and 37 % idle.

    Where one alone is at least three quarters full, or small, the second is 1 (and the compiler drops it).
    """
    whole = triton.next_power_of_2(width)
    if whole <= 1024 or 4 * width >= 3 * whole:
        return whole, 1
    return whole // 2, triton.next_power_of_2(width - whole // 2)


@triton.constexpr_function
def accumulator(pointer):
    """Type that values behind a pointer are computed in: fp32, or fp64 for fp64."""
    return tl.float64 if pointer.dtype.element_ty == tl.float64 else tl.float32


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(op: str, floating: Mapping[str, Tensor], indices: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a dtype that kernels do not take, or tensors on different devices."""
    for name, tensor in floating.items():
        if tensor.dtype not in FLOATING:
            raise ValueError(f"{op}: {name} must be bfloat16, float16, float32 or float64, got {tensor.dtype}")
    for name, tensor in indices.items():
        if tensor.dtype != torch.int32:
            raise ValueError(f"{op}: {name} must be int32, got {tensor.dtype}")
    devices = {name: tensor.device for name, tensor in {**floating, **indices}.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"{op}: all tensors must be on one device, got "
            + ", ".join(f"{name} on {d}" for name, d in devices.items())
        )


@triton.jit(do_not_specialize=["num_partials"])
def sum_rows_kernel(
    partials,
    out_0,
    out_1,
    out_2,
    num_partials,
    D: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    which = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    # Sums stay apart by their place in the block until the end: one reduction across threads instead of one per round.
    total = tl.zeros([BLOCK_P, BLOCK_D], accumulator(partials))
    for first in range(0, num_partials, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        mask = (p < num_partials)[:, None] & (d < D)[None, :]
        total += tl.load(partials + (p * SUMS + which)[:, None] * D + d[None, :], mask=mask, other=0)
    result = tl.sum(total, axis=0)
    # The outputs are separate tensors, and Triton cannot choose a pointer by a number it learns at run time.
    if which == 0:
        tl.store(out_0 + d, result, mask=d < D)
    if SUMS > 1:
        if which == 1:
            tl.store(out_1 + d, result, mask=d < D)
    if SUMS > 2:
        if which == 2:
            tl.store(out_2 + d, result, mask=d < D)


def sum_rows(partials: Tensor) -> list[Tensor]:
    """Sums over P of partial rows [P, n, D], n up to 3, as n tensors [D]: the second stage of sums over rows.

    Their order depends on P and D alone.
    """
    num_partials, sums, width = partials.shape
    outs = [partials.new_empty(width) for _ in range(sums)]
    if width and sums:
        # 16 columns a program: at width 1,280 these are 80 programs, and each walks a few hundred rows.
        sum_rows_kernel[triton.cdiv(width, 16), sums](
            partials,
            *outs,
            *[None] * (3 - sums),
            num_partials,
            D=width,
            SUMS=sums,
            BLOCK_P=256,
            BLOCK_D=16,
            num_warps=4,
        )
    return outs
