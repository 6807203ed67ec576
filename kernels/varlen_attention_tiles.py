"""Device functions shared by the forward and backward kernels of varlen_attention.

A program works on a block of rows of one sequence and head. Sequence S, one past the last, stands for the padding
rows. A head's columns are loaded as one or two tiles whose widths are powers of two, as Triton wants them: head dim
80 is 64 + 16, not 128 (WIDTH + REST). Row strides arrive in units of 8 elements, so that the compiler knows every row
of every head to start on a 16-byte boundary; without that it loads element by element.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
STRIDE_UNIT = tl.constexpr(8)


@triton.jit
def row_range(cu_seqlens_ptr, sequence, num_sequences):
    """First row and length of a sequence; for sequence S the first padding row and 0."""
    start = tl.load(cu_seqlens_ptr + sequence)
    return start, tl.load(cu_seqlens_ptr + tl.minimum(sequence + 1, num_sequences)) - start


@triton.jit
def head_pointer(pointer, first_row, head, row_stride, HEAD_DIM: tl.constexpr):
    """Column 0 of ``head`` in row ``first_row``. 64-bit: row * stride passes 2^31 from 560 k rows on at width 3,840."""
    return pointer + first_row.to(tl.int64) * (row_stride * STRIDE_UNIT) + head * HEAD_DIM


@triton.jit
def _tile(row_stride, num_rows, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Offsets and mask of a tile whose first row is row 0, so that a loop over tiles computes the offsets once."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = FIRST + tl.arange(0, WIDTH)[None, :]
    mask = rows < num_rows
    if FIRST + WIDTH > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)
    return rows * (row_stride * STRIDE_UNIT) + columns, mask


@triton.jit
def load_tile(
    pointer,
    row_stride,
    first_row,
    num_rows,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """[ROWS, WIDTH]: columns FIRST.. of rows first_row.. of a sequence; zeros past its num_rows and past the head."""
    offsets, mask = _tile(row_stride, num_rows - first_row, ROWS, FIRST, WIDTH, HEAD_DIM)
    return tl.load(pointer + first_row * (row_stride * STRIDE_UNIT) + offsets, mask=mask, other=0.0)


@triton.jit
def store_tile(
    pointer,
    values,
    row_stride,
    first_row,
    num_rows,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """The inverse of ``load_tile``; ``values`` are rounded to the pointer's dtype."""
    offsets, mask = _tile(row_stride, num_rows - first_row, ROWS, FIRST, WIDTH, HEAD_DIM)
    pointer += first_row * (row_stride * STRIDE_UNIT)
    tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def zero_rows(
    pointer,
    row_stride,
    head,
    first_row,
    last_row,
    step,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Zeros in one head of ROWS rows from first_row, first_row + step, ... on, as far as last_row (exclusive)."""
    while first_row < last_row:
        rows = head_pointer(pointer, first_row, head, row_stride, HEAD_DIM)
        zeros = tl.zeros([ROWS, WIDTH], tl.float32)
        store_tile(rows, zeros, row_stride, 0, last_row - first_row, ROWS, 0, WIDTH, HEAD_DIM)
        if REST > 0:
            zeros = tl.zeros([ROWS, REST], tl.float32)
            store_tile(rows, zeros, row_stride, 0, last_row - first_row, ROWS, WIDTH, REST, HEAD_DIM)
        first_row += step


@triton.jit
def zero_lse(pointer, head, first_row, last_row, step, ROWS: tl.constexpr):
    """Zeros in the log-sum-exp [T, H] of the rows that ``zero_rows`` clears."""
    while first_row < last_row:
        rows = first_row.to(tl.int64) + tl.arange(0, ROWS)
        tl.store(pointer + rows * tl.num_programs(1) + head, tl.zeros([ROWS], tl.float32), mask=rows < last_row)
        first_row += step
