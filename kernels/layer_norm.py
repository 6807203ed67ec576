"""Layer-norm with the additions before it, forward and backward (``ops.layer_norm`` defines both).

Legend: T rows, D width, P programs of the backward, each with its partial sums.

A forward program is one row in one warp, so that its sums need no barrier; the row is held as two powers of two, A + B.
A backward program is several warps that walk through rows, the next ones being loaded meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.row_tiles import COMPILED, accumulation_dtype, accumulator, check, split_width, sum_rows
from ijepa_fast.kernels.specs import ARCHITECTURES, CompileSpec, architecture, configuration, record_specs

# Warps of a forward program, which is one row: up to about 1,536 columns fit one warp's registers.
CONFIGS = {(arch, itemsize): ((1536, 1), (4096, 4), (16384, 16)) for arch in ARCHITECTURES for itemsize in (2, 4, 8)}
# (Warps, stages) of a backward program, which holds one row and three rows of sums: sixteen columns a thread.
BACKWARD_CONFIGS = {
    (arch, itemsize): ((512, (1, 3)), (1024, (2, 3)), (2048, (4, 3)), (16384, (16, 2)))
    for arch in ARCHITECTURES
    for itemsize in (2, 4, 8)
}
BACKWARD_PROGRAMS = {"sm_80": 432, "sm_90": 528, "sm_100": 592}
"""P: four on each multiprocessor of an A100, H100 or B200, so that their loads overlap."""


@triton.jit
def _part(pointer, offset, d, D: tl.constexpr, dtype: tl.constexpr):
    """Columns d of the row at an offset; columns beyond D are 0."""
    return tl.load(pointer + offset + d, mask=d < D, other=0).to(dtype)


@triton.jit
def layer_norm_kernel(
    x,
    residual,
    x_bias,
    weight,
    bias,
    out,
    h,
    means,
    rstds,
    EPS: tl.constexpr,
    D: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    wide: tl.constexpr = accumulator(x)
    t = tl.program_id(0).to(tl.int64)
    a, b = tl.arange(0, A), A + tl.arange(0, B)
    value_a, value_b = _part(x, t * D, a, D, wide), _part(x, t * D, b, D, wide)
    if x_bias is not None:
        value_a += _part(x_bias, 0, a, D, wide)
        value_b += _part(x_bias, 0, b, D, wide)
    if residual is not None:
        value_a += _part(residual, t * D, a, D, wide)
        value_b += _part(residual, t * D, b, D, wide)
    if h is not None:
        # What is normalised is what later parts of the block, and the backward, will read.
        rounded_a, rounded_b = value_a.to(h.dtype.element_ty), value_b.to(h.dtype.element_ty)
        tl.store(h + t * D + a, rounded_a, mask=a < D)
        tl.store(h + t * D + b, rounded_b, mask=b < D)
        value_a, value_b = rounded_a.to(wide), rounded_b.to(wide)
    mean = (tl.sum(value_a) + tl.sum(value_b)) / D
    # The variance is that of centred values, which cannot cancel as E[x^2] - mean^2 does. Columns beyond D, 0 so far,
    # would be -mean.
    value_a, value_b = tl.where(a < D, value_a - mean, 0), tl.where(b < D, value_b - mean, 0)
    rstd = 1 / tl.sqrt((tl.sum(value_a * value_a) + tl.sum(value_b * value_b)) / D + EPS)
    value_a *= rstd
    value_b *= rstd
    if weight is not None:
        value_a *= _part(weight, 0, a, D, wide)
        value_b *= _part(weight, 0, b, D, wide)
    if bias is not None:
        value_a += _part(bias, 0, a, D, wide)
        value_b += _part(bias, 0, b, D, wide)
    tl.store(out + t * D + a, value_a, mask=a < D)
    tl.store(out + t * D + b, value_b, mask=b < D)
    tl.store(means + t, mean)
    tl.store(rstds + t, rstd)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def layer_norm_backward_kernel(
    grad,
    grad_h_in,
    h,
    means,
    rstds,
    weight,
    grad_h,
    grad_x,
    partials,
    num_rows,
    rows_per_program,
    WEIGHT_SUM: tl.constexpr,
    BIAS_SUM: tl.constexpr,
    X_BIAS_SUM: tl.constexpr,
    SUMS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program takes rows that follow each other. ``..._SUM``: place among the partial sums, or -1."""
    wide: tl.constexpr = accumulator(means)
    p = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    weights = tl.full([BLOCK_D], 1, wide)
    if weight is not None:
        weights = _part(weight, 0, d, D, wide)
    weight_sum, bias_sum, x_bias_sum = (
        tl.zeros([BLOCK_D], wide),
        tl.zeros([BLOCK_D], wide),
        tl.zeros([BLOCK_D], wide),
    )
    # Sums over rows stay in registers until the program's last row; ``sum_rows`` adds those of all programs in order.
    first = p * rows_per_program
    for t in tl.range(first, tl.minimum(first + rows_per_program, num_rows), num_stages=STAGES):
        # Beyond D the gradient is 0: these columns add nothing to sums over a row.
        grad_out = _part(grad, t * D, d, D, wide)
        rstd = tl.load(rstds + t)
        normal = (_part(h, t * D, d, D, wide) - tl.load(means + t)) * rstd
        slope = grad_out * weights
        along, average = tl.sum(slope * normal) / D, tl.sum(slope) / D
        total = (slope - normal * along - average) * rstd
        # h goes on beside its norm, as the residual stream of what follows: the gradients of both add up.
        if grad_h_in is not None:
            total += _part(grad_h_in, t * D, d, D, wide)
        tl.store(grad_h + t * D + d, total, mask=d < D)
        # The same in the dtype of x, where the residual stream is wider than x.
        if grad_x is not None:
            tl.store(grad_x + t * D + d, total, mask=d < D)
        weight_sum += grad_out * normal
        bias_sum += grad_out
        x_bias_sum += total
    if WEIGHT_SUM >= 0:
        tl.store(partials + (p * SUMS + WEIGHT_SUM) * D + d, weight_sum, mask=d < D)
    if BIAS_SUM >= 0:
        tl.store(partials + (p * SUMS + BIAS_SUM) * D + d, bias_sum, mask=d < D)
    if X_BIAS_SUM >= 0:
        tl.store(partials + (p * SUMS + X_BIAS_SUM) * D + d, x_bias_sum, mask=d < D)


def _rows_of(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _present(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def layer_norm(
    x: Tensor, residual: Tensor | None, x_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check("layer_norm", {"x": x, **_present(residual=residual, x_bias=x_bias, weight=weight, bias=bias)}, {})
    rows, width = x.shape
    for name, tensor in _present(x_bias=x_bias, weight=weight, bias=bias).items():
        if tensor.shape != (width,):
            raise ValueError(f"layer_norm: {name} must have shape [{width}], got {list(tensor.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"layer_norm: residual must have the shape {list(x.shape)} of x, got {list(residual.shape)}")
    wide = accumulation_dtype(x.dtype)
    out, means, rstds = x.new_empty(rows, width), x.new_empty(rows, dtype=wide), x.new_empty(rows, dtype=wide)
    adds = x_bias is not None or residual is not None
    h = x.new_empty(rows, width, dtype=x.dtype if residual is None else residual.dtype) if adds else x.new_empty(0)
    if out.numel():
        first, second = split_width(width)
        layer_norm_kernel[rows,](
            x.contiguous(),
            _rows_of(residual),
            _rows_of(x_bias),
            _rows_of(weight),
            _rows_of(bias),
            out,
            h if adds else None,
            means,
            rstds,
            EPS=eps,
            D=width,
            A=first,
            B=second,
            num_warps=configuration(CONFIGS, x.dtype.itemsize, width),
        )
    return out, h, means, rstds


def layer_norm_backward(
    grad: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    need_weight: bool,
    need_bias: bool,
    need_x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = _present(grad=grad, grad_h=grad_h, h=h, mean=mean, rstd=rstd, weight=weight)
    check("layer_norm_backward", given, {})
    rows, width = h.shape
    grad_total = h.new_empty(rows, width)
    grad_x = grad.new_empty(rows, width) if grad.dtype != h.dtype else None
    needed = (need_weight, need_bias, need_x_bias)
    # Partial sums that nobody needs take no place, so that no memory is written for them.
    places = [sum(needed[:i]) if need else -1 for i, need in enumerate(needed)]
    programs = min(rows, BACKWARD_PROGRAMS[architecture()])
    partials = mean.new_empty(programs, sum(needed), width)
    if grad_total.numel():
        num_warps, stages = configuration(BACKWARD_CONFIGS, h.dtype.itemsize, width)
        layer_norm_backward_kernel[programs,](
            grad.contiguous(),
            _rows_of(grad_h),
            h.contiguous(),
            mean,
            rstd,
            _rows_of(weight),
            grad_total,
            grad_x,
            partials,
            rows,
            triton.cdiv(rows, programs),
            WEIGHT_SUM=places[0],
            BIAS_SUM=places[1],
            X_BIAS_SUM=places[2],
            SUMS=sum(needed),
            D=width,
            BLOCK_D=triton.next_power_of_2(width),
            STAGES=stages,
            num_warps=num_warps,
        )
    sums = iter(sum_rows(partials))
    weight_bias_x_bias = [next(sums) if need else mean.new_empty(0) for need in needed]
    return grad_total, grad.new_empty(0) if grad_x is None else grad_x, *weight_bias_x_bias


def compile_specs(arch: str) -> Iterator[CompileSpec]:
    for width, dtype in COMPILED:
        case = f"{str(dtype).removeprefix('torch.')} D={width}"
        x = torch.empty(1024, width, dtype=dtype, device="meta")
        stream, statistics = x.float(), x[:, 0].float().contiguous()
        affine = stream[0]
        yield from record_specs(arch, case, layer_norm, x, None, None, affine, affine, 1e-6, memory_bound=True)
        yield from record_specs(arch, f"{case} add", layer_norm, x, x, affine, affine, affine, 1e-6, memory_bound=True)
        plain = (x, None, x, statistics, statistics, affine, True, True, False)
        yield from record_specs(arch, case, layer_norm_backward, *plain, memory_bound=True)
        added = (x, x, x, statistics, statistics, affine, True, True, True)
        yield from record_specs(arch, f"{case} add", layer_norm_backward, *added, memory_bound=True)
        if dtype == torch.bfloat16:
            mixed = f"{case} fp32 stream"
            yield from record_specs(arch, mixed, layer_norm, x, stream, affine, affine, affine, 1e-6, memory_bound=True)
            wide = (x, stream, stream, statistics, statistics, affine, True, True, True)
            yield from record_specs(arch, mixed, layer_norm_backward, *wide, memory_bound=True)
