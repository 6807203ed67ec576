"""Distance of the predictions to the normalised target features (``ops.target_loss`` defines it).

Legend: T predicted rows, R target rows, S target blocks, D width, held as two powers of two, A + B.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.row_tiles import COMPILED, accumulation_dtype, accumulator, check, split_width
from ijepa_fast.kernels.specs import ARCHITECTURES, CompileSpec, configuration, record_specs

KINDS = ("smooth_l1", "l2", "l1")

# Warps per program, which is one row: rows fit one warp's registers up to about 1,536 columns.
CONFIGS = {(arch, itemsize): ((1536, 1), (4096, 4), (16384, 16)) for arch in ARCHITECTURES for itemsize in (2, 4, 8)}
SUM_BLOCK, SUM_WARPS = 8192, 8


@triton.jit
def _row_weight(cu_seqlens, t, num_sequences, search_steps, D: tl.constexpr, dtype: tl.constexpr):
    """1 / (length of the block that holds row t * S * D)."""
    # A search instead of a table of blocks per row: its few reads hit the cache, and there is nothing to build.
    low, high = num_sequences * 0, num_sequences  # 0 as a number of run time, since the loop changes it
    for _ in range(search_steps):  # the first block that ends behind t
        middle = tl.minimum((low + high) // 2, num_sequences - 1)
        ends_before = tl.load(cu_seqlens + middle + 1) <= t
        low = tl.where(ends_before, middle + 1, low)
        high = tl.where(ends_before, high, middle)
    block = tl.minimum(low, num_sequences - 1)
    length = tl.maximum(tl.load(cu_seqlens + block + 1) - tl.load(cu_seqlens + block), 1)
    return 1 / (length.to(dtype) * num_sequences * D)


@triton.jit
def _differences(
    prediction,
    target,
    t,
    row,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    D: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """Prediction less (normalised) target of one row, as its two parts."""
    wide: tl.constexpr = accumulator(prediction)
    a, b = tl.arange(0, A), A + tl.arange(0, B)
    in_a, in_b = a < D, b < D
    target_a = tl.load(target + row.to(tl.int64) * D + a, mask=in_a, other=0).to(wide)
    target_b = tl.load(target + row.to(tl.int64) * D + b, mask=in_b, other=0).to(wide)
    prediction_a = tl.load(prediction + t * D + a, mask=in_a, other=0).to(wide)
    prediction_b = tl.load(prediction + t * D + b, mask=in_b, other=0).to(wide)
    if NORMALIZE:
        mean = (tl.sum(target_a) + tl.sum(target_b)) / D
        target_a = tl.where(in_a, target_a - mean, 0)
        target_b = tl.where(in_b, target_b - mean, 0)
        rstd = 1 / tl.sqrt((tl.sum(target_a * target_a) + tl.sum(target_b * target_b)) / D + EPS)
        target_a *= rstd
        target_b *= rstd
    # Columns beyond D are 0 on both sides and add nothing to any loss.
    return prediction_a - target_a, prediction_b - target_b


@triton.jit
def _distance(difference, KIND: tl.constexpr):
    size = tl.abs(difference)
    if KIND == "smooth_l1":  # size ** 2 / 2 up to 1, then size - 1 / 2
        quadratic = tl.minimum(size, 1.0)
        return quadratic * (size - 0.5 * quadratic)
    if KIND == "l2":
        return size * size
    return size


@triton.jit
def _slope(difference, KIND: tl.constexpr):
    if KIND == "smooth_l1":
        return tl.minimum(tl.maximum(difference, -1.0), 1.0)
    if KIND == "l2":
        return 2 * difference
    return tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0)).to(difference.dtype)


@triton.jit(do_not_specialize=["num_sequences", "search_steps"])
def target_loss_kernel(
    prediction,
    target,
    rows,
    cu_seqlens,
    row_losses,
    num_sequences,
    search_steps,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    D: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + t)
    loss = tl.zeros([], accumulator(prediction))
    if row >= 0:  # a program is one row, so padding rows cost no loads
        difference_a, difference_b = _differences(prediction, target, t, row, NORMALIZE, EPS, D, A, B)
        weight = _row_weight(cu_seqlens, t, num_sequences, search_steps, D, loss.dtype)
        loss = (tl.sum(_distance(difference_a, KIND)) + tl.sum(_distance(difference_b, KIND))) * weight
    tl.store(row_losses + t, loss)


@triton.jit
def sum_kernel(values, out, num_values, BLOCK: tl.constexpr):
    """Sum of one number per row, by one program: T numbers are kilobytes, and their order is fixed."""
    total = tl.zeros([BLOCK], accumulator(values))
    for first in range(0, num_values, BLOCK):
        place = first + tl.arange(0, BLOCK)
        total += tl.load(values + place, mask=place < num_values, other=0)
    tl.store(out, tl.sum(total))


@triton.jit(do_not_specialize=["num_sequences", "search_steps"])
def target_loss_backward_kernel(
    grad,
    prediction,
    target,
    rows,
    cu_seqlens,
    grad_prediction,
    num_sequences,
    search_steps,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    D: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    a, b = tl.arange(0, A), A + tl.arange(0, B)
    row = tl.load(rows + t)
    if row >= 0:
        difference_a, difference_b = _differences(prediction, target, t, row, NORMALIZE, EPS, D, A, B)
        weight = _row_weight(cu_seqlens, t, num_sequences, search_steps, D, difference_a.dtype) * tl.load(grad)
        tl.store(grad_prediction + t * D + a, _slope(difference_a, KIND) * weight, mask=a < D)
        tl.store(grad_prediction + t * D + b, _slope(difference_b, KIND) * weight, mask=b < D)
    else:
        tl.store(grad_prediction + t * D + a, tl.zeros([A], grad_prediction.dtype.element_ty), mask=a < D)
        tl.store(grad_prediction + t * D + b, tl.zeros([B], grad_prediction.dtype.element_ty), mask=b < D)


def _constants(prediction: Tensor, cu_seqlens: Tensor, kind: str, normalize: bool, eps: float) -> dict:
    """Arguments that the forward and the backward kernel have in common, by name."""
    width = prediction.shape[1]
    first, second = split_width(width)
    num_sequences = cu_seqlens.shape[0] - 1
    return {
        "num_sequences": num_sequences,
        "search_steps": num_sequences.bit_length(),
        "KIND": kind,
        "NORMALIZE": normalize,
        "EPS": eps,
        "D": width,
        "A": first,
        "B": second,
        "num_warps": configuration(CONFIGS, prediction.dtype.itemsize, width),
    }


def _check(prediction: Tensor, target: Tensor, rows: Tensor, cu_seqlens: Tensor, kind: str) -> None:
    check("target_loss", {"prediction": prediction, "target": target}, {"rows": rows, "cu_seqlens": cu_seqlens})
    if kind not in KINDS:
        raise ValueError(f"target_loss: loss must be one of {', '.join(KINDS)}, got {kind!r}")
    if prediction.shape[1] != target.shape[1] or prediction.shape[0] != rows.shape[0]:
        raise ValueError(
            f"target_loss: prediction {list(prediction.shape)}, target {list(target.shape)} and "
            f"{rows.shape[0]} rows do not fit"
        )


def target_loss(
    prediction: Tensor, target: Tensor, rows: Tensor, cu_seqlens: Tensor, kind: str, normalize: bool, eps: float
) -> Tensor:
    _check(prediction, target, rows, cu_seqlens, kind)
    num_rows = prediction.shape[0]
    # A number that is a multiple of 16 is all that the kernel of the sum knows, so it is the same one for all counts.
    row_losses = prediction.new_empty(-(-num_rows // 16) * 16, dtype=accumulation_dtype(prediction.dtype))
    row_losses[num_rows:] = 0
    if num_rows:
        target_loss_kernel[num_rows,](
            prediction.contiguous(),
            target.contiguous(),
            rows.contiguous(),
            cu_seqlens.contiguous(),
            row_losses,
            **_constants(prediction, cu_seqlens, kind, normalize, eps),
        )
    loss = row_losses.new_empty(())
    sum_kernel[1,](row_losses, loss, row_losses.shape[0], BLOCK=SUM_BLOCK, num_warps=SUM_WARPS)
    return loss


def target_loss_backward(
    grad: Tensor,
    prediction: Tensor,
    target: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    kind: str,
    normalize: bool,
    eps: float,
) -> Tensor:
    _check(prediction, target, rows, cu_seqlens, kind)
    grad_prediction = prediction.new_empty(prediction.shape[0], prediction.shape[1])
    if grad_prediction.numel():
        target_loss_backward_kernel[rows.shape](
            grad,
            prediction.contiguous(),
            target.contiguous(),
            rows.contiguous(),
            cu_seqlens.contiguous(),
            grad_prediction,
            **_constants(prediction, cu_seqlens, kind, normalize, eps),
        )
    return grad_prediction


def compile_specs(arch: str) -> Iterator[CompileSpec]:
    rows = torch.empty(256, dtype=torch.int32, device="meta")
    for width, dtype in COMPILED:
        features = torch.empty(256, width, dtype=dtype, device="meta")
        for kind in KINDS if (width, dtype) == (1280, torch.bfloat16) else ("smooth_l1",):
            case = f"{str(dtype).removeprefix('torch.')} D={width} {kind}"
            arguments = (features, features, rows, rows, kind, True, 1e-5)
            yield from record_specs(arch, case, target_loss, *arguments, memory_bound=True)
            grad = torch.empty((), dtype=accumulation_dtype(dtype), device="meta")
            yield from record_specs(arch, case, target_loss_backward, grad, *arguments, memory_bound=True)
