"""Shared parts of the kernels around matrix products: tile tables, the loop of a product, and checks.

Legend: T packed rows, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.row_tiles import check
from ijepa_fast.kernels.specs import CompileSpec, configuration, record_specs

DTYPES = (torch.bfloat16, torch.float16)


class ProductTile(NamedTuple):
    """One program: rows and columns of its result, how much of the sum it loads at a time, and Triton's options."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread; None leaves it to the compiler


# Chosen from compiled code (registers, spills, shared memory), not yet from times. On sm_90 two programs of eight warps
# share a multiprocessor (96 kB of shared memory and 128 registers each), so that one multiplies while the other is
# between its products: the arithmetic of GELU takes about a third as long as the product at K = 1,280, and as long at
# K = 384. Where the matrix unit reads registers (sm_80), tiles are smaller and there are fewer stages.
_TILES = {
    "sm_80": ((512, ProductTile(64, 128, 32, 4, 3)), (65536, ProductTile(128, 128, 32, 8, 3))),
    "sm_90": ((512, ProductTile(128, 128, 64, 8, 3, 128)), (65536, ProductTile(128, 128, 64, 8, 3, 128))),
    "sm_100": ((512, ProductTile(128, 128, 64, 8, 3)), (65536, ProductTile(128, 128, 64, 8, 3))),
}
GELU_CONFIGS = {(arch, 2): rows for arch, rows in _TILES.items()}
"""(architecture, itemsize) -> (largest K, tile of ``linear_gelu``)."""

HIDDEN_GRADIENT_CONFIGS = {(arch, 2): rows for arch, rows in _TILES.items()}
"""(architecture, itemsize) -> (largest K, tile of ``hidden_gradient``); K is the second layer's width."""

GROUP = 8
"""Tiles of rows that are computed before the next columns: they share the weights that the L2 cache holds."""


def tile_of(table: dict, size: int) -> ProductTile:
    """Under the interpreter fp32 and fp64 take the tiles of 16-bit tensors."""
    return configuration(table, 2, size)


def check_products(op: str, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], **vectors: Tensor) -> None:
    """Raises ValueError for dtypes, devices or shapes that a product does not take.

    Args:
        tensors: factors, which must share a dtype that the matrix unit takes.
        shapes: what their shapes must be.
        vectors: other floating tensors, of any dtype.
    """
    check(op, {**tensors, **vectors}, {})
    first, *rest = tensors.items()
    for name, tensor in rest:
        if tensor.dtype != first[1].dtype:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, {first[0]} is {first[1].dtype}")
    if not triton.knobs.runtime.interpret and first[1].dtype not in DTYPES:
        raise ValueError(f"{op}: {first[0]} must be bfloat16 or float16 on a GPU, got {first[1].dtype}")
    for name, shape in shapes.items():
        found = {**tensors, **vectors}[name].shape
        if found != shape:
            raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(found)}")


@triton.jit
def grouped_tile(program, row_tiles, COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
    """(tile of rows, tile of columns) of a program: GROUP tiles of rows, then the next columns."""
    # Column after column, GROUP tiles of rows each: programs that run at one time share columns of the weights.
    group = program // (GROUP * COLUMN_TILES)
    first = group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)  # the last group may be smaller
    place = program - group * (GROUP * COLUMN_TILES)
    return first + place % size, place // size


@triton.jit
def rows_times_matrix(
    rows,
    matrix,
    last_row,
    depth,
    n,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """The rows from the pointer ``rows`` on times columns n of a matrix [K, N] with these strides: [BLOCK_T, BLOCK_N].

    Rows past ``last_row`` repeat it and columns past the last are zero: neither is stored. ``depth`` is K once more,
    as a number that the compiler does not know, or it would unroll the whole loop.
    """
    k = tl.arange(0, BLOCK_K)
    # Row numbers are cut off at the last row instead of masked: the loop's loads need no mask then if K divides evenly.
    left = rows + tl.minimum(tl.arange(0, BLOCK_T), last_row)[:, None] * K + k[None, :]
    right = matrix + k[:, None] * STRIDE_K + n[None, :] * STRIDE_N
    total = tl.zeros([BLOCK_T, BLOCK_N], ACCUMULATE)
    for first in range(0, depth, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(left + first)
        else:
            a = tl.load(left + first, mask=(k < K - first)[None, :], other=0)
        if K % BLOCK_K == 0 and N % BLOCK_N == 0:
            b = tl.load(right + first * STRIDE_K)
        else:
            b = tl.load(right + first * STRIDE_K, mask=(k < K - first)[:, None] & (n < N)[None, :], other=0)
        total = tl.dot(a, b, total, out_dtype=ACCUMULATE)
    return total


@triton.jit
def left_and_right(total, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile. What follows a product takes one after the other, or its values spill."""
    return tl.split(tl.permute(tl.reshape(total, (BLOCK_T, 2, BLOCK_N // 2)), (0, 2, 1)))


def products(arch: str, case: str, launch: Callable[..., Any], *arguments: Any) -> Iterator[CompileSpec]:
    """``record_specs`` of a launcher whose first kernel is a product; what it launches after that sums or rounds."""
    first, *rest = record_specs(arch, case, launch, *arguments)
    yield replace(first, product=True)
    for spec in rest:
        yield replace(spec, memory_bound=True)
