"""Rows of e4m3 numbers with their scales (``ops.quantize_fp8`` defines them).

Legend: T rows, D width.

A program is one row, held as two powers of two, A + B, as in ``layer_norm``. Scales of rows take one pass; one scale
for all rows needs the largest number first, which a reduction of torch finds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.row_tiles import COMPILED, check, split_width
from ijepa_fast.kernels.specs import ARCHITECTURES, CompileSpec, configuration, record_specs

# Warps of a program, which is one row.
CONFIGS = {(arch, itemsize): ((1536, 1), (8192, 4), (16384, 8)) for arch in ARCHITECTURES for itemsize in (2, 4, 8)}
LARGEST = tl.constexpr(448.0)
SMALLEST_AMAX = tl.constexpr(1e-12)


@triton.jit
def quantize_fp8_kernel(x, amax, values, scales, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """``amax``: the largest |x| of all rows [1], or None for that of each row."""
    t = tl.program_id(0).to(tl.int64)
    a, b = tl.arange(0, A), A + tl.arange(0, B)
    x_a = tl.load(x + t * D + a, mask=a < D, other=0).to(tl.float32)
    x_b = tl.load(x + t * D + b, mask=b < D, other=0).to(tl.float32)
    if amax is None:
        largest = tl.maximum(tl.max(tl.abs(x_a)), tl.max(tl.abs(x_b)))
    else:
        largest = tl.load(amax)
    # NaN must not become a small number: the values would be cut off at 448, and look healthy.
    largest = tl.maximum(largest, SMALLEST_AMAX, tl.PropagateNan.ALL)
    # Correctly rounded, because Triton's own division is approximate and the values would differ from the definition's.
    inverse = tl.div_rn(LARGEST, largest)
    tl.store(values + t * D + a, (x_a * inverse).to(tl.float8e4nv), mask=a < D)
    tl.store(values + t * D + b, (x_b * inverse).to(tl.float8e4nv), mask=b < D)
    scale = tl.div_rn(largest, LARGEST)
    if amax is None:
        tl.store(scales + t, scale)
    else:
        tl.store(scales, scale, mask=t == 0)


def quantize_fp8(x: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    check("quantize_fp8", {"x": x}, {})
    rows, width = x.shape
    values = x.new_empty(rows, width, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(rows if per_row else 1, dtype=torch.float32)
    if not rows:
        return values, scales.fill_(SMALLEST_AMAX.value / LARGEST.value)
    first, second = split_width(width)
    quantize_fp8_kernel[rows,](
        x.contiguous(),
        None if per_row else torch.linalg.vector_norm(x, math.inf).float().view(1),
        values,
        scales,
        D=width,
        A=first,
        B=second,
        num_warps=configuration(CONFIGS, x.dtype.itemsize, width),
    )
    return values, scales


def compile_specs(arch: str) -> Iterator[CompileSpec]:
    if arch == "sm_80":  # has no conversion to e4m3, and no products of such numbers
        return
    for width, dtype in (*COMPILED, (5120, torch.bfloat16)):
        case = f"{str(dtype).removeprefix('torch.')} D={width}"
        x = torch.empty(1024, width, dtype=dtype, device="meta")
        yield from record_specs(arch, f"{case} rows", quantize_fp8, x, True, memory_bound=True)
        yield from record_specs(arch, f"{case} all", quantize_fp8, x, False, memory_bound=True)
