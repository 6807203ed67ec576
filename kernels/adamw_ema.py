"""One pass over all parameters: AdamW on the masters, their low-precision copies, the EMA and its copies.

``ops.adamw_ema_`` defines it. With bf16 gradients and copies it moves 38 bytes per parameter: gradient (2),
master, moments and EMA in (16) and out (16), and both copies out (4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.multi_tensor import Columns, Launch, build_tables, element, fit, places, present
from ijepa_fast.kernels.specs import ARCHITECTURES, CompileSpec, architecture, record_specs

CONFIGS = dict.fromkeys(ARCHITECTURES, Launch(block=1024, num_warps=4, narrow=256))
# Columns of the tensor table.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, COPY, EMA, EMA_COPY, SIZE, KIND, GROUP = map(tl.constexpr, range(10))
ENTRY = tl.constexpr(10)
# Columns of the settings of a group.
LR, BETA1, BETA2, EPS, WEIGHT_DECAY = map(tl.constexpr, range(5))
SETTINGS = tl.constexpr(5)


@triton.jit
def bias_corrections(beta1, beta2, step):
    """``1 - beta ** step`` of fp64 scalars by repeated squaring, while the data of the block is on its way.

    In fp32 the difference would lose four digits at beta 0.999 and step 1.
    """
    power1 = beta1 * 0 + 1
    power2 = power1
    while step > 0:
        if step % 2 == 1:
            power1 *= beta1
            power2 *= beta2
        beta1 *= beta1
        beta2 *= beta2
        step //= 2
    return 1 - power1, 1 - power2


@triton.jit
def update_block(
    entry,
    start,
    count,
    scalars,
    KINDS: tl.constexpr,
    NUMBER: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Elements start <= i < start + min(count, BLOCK) of one tensor. With VECTOR, 16 divides count."""
    wide: tl.constexpr = element(KINDS, NUMBER, PARAM)
    lanes = tl.arange(0, BLOCK)
    if VECTOR:
        # Changes nothing, but tells the compiler that the mask ends on a multiple of 16, so that accesses stay wide.
        count = count // 16 * 16
    mask = lanes < count
    offsets = start + lanes
    # All loads first: nothing below may wait for memory twice.
    grads = places(tl.load(entry + GRAD), element(KINDS, NUMBER, GRAD), offsets, VECTOR)
    exp_avgs = places(tl.load(entry + EXP_AVG), wide, offsets, VECTOR)
    exp_avg_sqs = places(tl.load(entry + EXP_AVG_SQ), wide, offsets, VECTOR)
    params = places(tl.load(entry + PARAM), wide, offsets, VECTOR)
    if present(KINDS, NUMBER, COPY):
        copies = places(tl.load(entry + COPY), element(KINDS, NUMBER, COPY), offsets, VECTOR)
    if present(KINDS, NUMBER, EMA):
        emas = places(tl.load(entry + EMA), wide, offsets, VECTOR)
    if present(KINDS, NUMBER, EMA_COPY):
        ema_copies = places(tl.load(entry + EMA_COPY), element(KINDS, NUMBER, EMA_COPY), offsets, VECTOR)
    grad = tl.load(grads, mask=mask, other=0).to(wide)
    exp_avg = tl.load(exp_avgs, mask=mask, other=0)
    exp_avg_sq = tl.load(exp_avg_sqs, mask=mask, other=0)
    param = tl.load(params, mask=mask, other=0)
    if present(KINDS, NUMBER, EMA):
        ema = tl.load(emas, mask=mask, other=0)

    lr, beta1, beta2, eps, weight_decay, step, momentum, grad_scale = scalars
    correction1, correction2 = bias_corrections(beta1, beta2, step)
    rate = lr.to(wide) / correction1.to(wide)
    grad *= grad_scale.to(wide)
    # What is subtracted from 1 is fp64 and rounded after: 1 - momentum in fp32 is off by 0.1 % at momentum 0.99997.
    exp_avg += (grad - exp_avg) * (1 - beta1).to(wide)
    exp_avg_sq = exp_avg_sq * beta2.to(wide) + grad * grad * (1 - beta2).to(wide)
    denominator = tl.sqrt(exp_avg_sq) / tl.sqrt(correction2.to(wide)) + eps.to(wide)
    param = param * (1 - lr * weight_decay).to(wide) - rate * (exp_avg / denominator)

    tl.store(exp_avgs, exp_avg, mask=mask)
    tl.store(exp_avg_sqs, exp_avg_sq, mask=mask)
    tl.store(params, param, mask=mask)
    if present(KINDS, NUMBER, COPY):
        tl.store(copies, param, mask=mask)
    if present(KINDS, NUMBER, EMA):
        ema += (param - ema) * (1 - momentum).to(wide)
        tl.store(emas, ema, mask=mask)
    if present(KINDS, NUMBER, EMA_COPY):
        tl.store(ema_copies, ema, mask=mask)


@triton.jit
def adamw_ema_kernel(
    tensor_table,
    program_table,
    settings,
    steps,
    momentum,
    grad_scale,
    apply,
    KINDS: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(program_table + 2 * program)
    block = tl.load(program_table + 2 * program + 1)
    momentum = tl.load(momentum).to(tl.float64)
    grad_scale = tl.load(grad_scale).to(tl.float64)
    # Only the device knows whether the step is taken (gradients may have overflowed), and nobody waits to be told.
    if tl.load(apply) == 0:
        return
    entry = tensor_table + tensor * ENTRY
    size = tl.load(entry + SIZE)
    kind = tl.load(entry + KIND)
    group = settings + tl.load(entry + GROUP) * SETTINGS
    step = tl.load(steps + tensor).to(tl.int32)
    scalars = (
        tl.load(group + LR),
        tl.load(group + BETA1),
        tl.load(group + BETA2),
        tl.load(group + EPS),
        tl.load(group + WEIGHT_DECAY),
        step,
        momentum,
        grad_scale,
    )
    start = block.to(tl.int64) * BLOCK
    count = tl.minimum(size - start, BLOCK).to(tl.int32)
    vector = (kind % 2 == 1) & (count % 16 == 0)
    # One body per kind of tensor; the branch is the same for a whole program.
    for number in tl.static_range(len(KINDS)):
        if kind // 2 == number:
            if vector:
                update_block(entry, start, count, scalars, KINDS, number, BLOCK, True)
            else:
                for done in range(0, count, NARROW):
                    update_block(entry, start + done, count - done, scalars, KINDS, number, NARROW, False)


def tables(*lists: Sequence) -> tuple[Tensor, Tensor]:
    """Both tables for ``adamw_ema_`` of these lists, its leading arguments."""
    return build_tables("adamw_ema_", _columns(*lists), CONFIGS[architecture()].block)


def _columns(*lists: Sequence) -> Columns:
    *tensors, copy_index, ema_index, ema_copy_index, groups = lists
    # Every parameter has a gradient and two moments; copies and averages are found through their index.
    return Columns(tensors, (None, None, None, None, copy_index, ema_index, ema_copy_index), groups)


def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    emas: Sequence[Tensor],
    ema_copies: Sequence[Tensor],
    copy_index: Sequence[int],
    ema_index: Sequence[int],
    ema_copy_index: Sequence[int],
    group_index: Sequence[int],
    settings: Tensor,
    steps: Tensor,
    momentum: Tensor,
    grad_scale: Tensor,
    apply: Tensor,
    tensor_table: Tensor | None = None,
    program_table: Tensor | None = None,
) -> None:
    tensors = (params, grads, exp_avgs, exp_avg_sqs, copies, emas, ema_copies)
    columns = _columns(*tensors, copy_index, ema_index, ema_copy_index, group_index)
    config = CONFIGS[architecture()]
    tensor_table, program_table, kinds = fit("adamw_ema_", tensor_table, program_table, columns, config.block)
    for kind in kinds:
        _check_dtypes(kind)
    if len(program_table):
        adamw_ema_kernel[len(program_table),](
            tensor_table,
            program_table,
            settings.contiguous(),
            steps.contiguous(),
            momentum,
            grad_scale,
            apply,
            KINDS=kinds,
            BLOCK=config.block,
            NARROW=config.narrow,
            num_warps=config.num_warps,
        )


def _check_dtypes(kind: tuple[str | None, ...]) -> None:
    wide = kind[PARAM.value]
    if wide not in ("float32", "float64"):
        raise ValueError(f"adamw_ema_: params must be float32 or float64 masters, got {wide}")
    for name, column in (("exp_avgs", EXP_AVG), ("exp_avg_sqs", EXP_AVG_SQ), ("emas", EMA)):
        if kind[column.value] not in (wide, None):
            raise ValueError(f"adamw_ema_: {name} must have the dtype of params, {wide}, got {kind[column.value]}")
    if kind[EMA.value] is None and kind[EMA_COPY.value] is not None:
        raise ValueError("adamw_ema_: an EMA copy is given for a parameter without EMA")


def compile_specs(arch: str) -> Iterator[CompileSpec]:
    def tensors(count: int, dtype: torch.dtype) -> list[Tensor]:
        return [torch.empty(1280, 1280, dtype=dtype, device="meta") for _ in range(count)]

    def scalar(dtype: torch.dtype) -> Tensor:
        return torch.empty((), dtype=dtype, device="meta")

    wide, low = torch.float32, torch.bfloat16
    shared = (
        torch.empty(4, 5, dtype=torch.float64, device="meta"),
        torch.empty(4, device="meta"),
        scalar(torch.float64),
        scalar(wide),
        scalar(torch.bool),
    )
    one_of_each = (tensors(1, wide), tensors(1, low), tensors(1, wide), tensors(1, wide), tensors(1, low))
    cases = {
        "bf16 with EMA": (*one_of_each, tensors(1, wide), tensors(1, low), [0], [0], [0], [0]),
        "fp32 with EMA": (*(tensors(1, wide) for _ in range(4)), [], tensors(1, wide), [], [-1], [0], [-1], [0]),
        # Encoder and predictor, each with bf16 matrices and fp32 biases and norms.
        "four kinds": (
            tensors(4, wide),
            [*tensors(2, low), *tensors(2, wide)],
            tensors(4, wide),
            tensors(4, wide),
            tensors(2, low),
            tensors(2, wide),
            tensors(1, low),
            [0, 1, -1, -1],
            [0, -1, 1, -1],
            [0, -1, -1, -1],
            [0, 1, 2, 3],
        ),
    }
    for case, lists in cases.items():
        yield from record_specs(arch, case, adamw_ema_, *lists, *shared, memory_bound=True)
