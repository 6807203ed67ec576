"""Exponential moving average of a list of tensors in one launch (``ops.ema_`` defines it)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.multi_tensor import Columns, Launch, build_tables, element, fit, places
from ijepa_fast.kernels.row_tiles import accumulator
from ijepa_fast.kernels.specs import ARCHITECTURES, CompileSpec, architecture, record_specs

CONFIGS = dict.fromkeys(ARCHITECTURES, Launch(block=2048, num_warps=4, narrow=512))
# Columns of the tensor table.
TARGET, SOURCE, SIZE, KIND = map(tl.constexpr, range(4))
ENTRY = tl.constexpr(5)


@triton.jit
def average_block(
    entry, start, count, momentum, KINDS: tl.constexpr, NUMBER: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """Elements start <= i < start + min(count, BLOCK) of one tensor. With VECTOR, 16 divides count."""
    lanes = tl.arange(0, BLOCK)
    if VECTOR:
        # Changes nothing, but tells the compiler that the mask ends on a multiple of 16, so that accesses stay wide.
        count = count // 16 * 16
    mask = lanes < count
    targets = places(tl.load(entry + TARGET), element(KINDS, NUMBER, TARGET), start + lanes, VECTOR)
    sources = places(tl.load(entry + SOURCE), element(KINDS, NUMBER, SOURCE), start + lanes, VECTOR)
    wide: tl.constexpr = accumulator(targets)
    target = tl.load(targets, mask=mask, other=0).to(wide)
    source = tl.load(sources, mask=mask, other=0).to(wide)
    # This form leaves a target that equals its source as it is, whatever the momentum.
    tl.store(targets, target + (source - target) * (1 - momentum).to(wide), mask=mask)


@triton.jit
def ema_kernel(tensor_table, program_table, momentum, KINDS: tl.constexpr, BLOCK: tl.constexpr, NARROW: tl.constexpr):
    program = tl.program_id(0)
    tensor = tl.load(program_table + 2 * program)
    block = tl.load(program_table + 2 * program + 1)
    momentum = tl.load(momentum).to(tl.float64)
    entry = tensor_table + tensor * ENTRY
    kind = tl.load(entry + KIND)
    start = block.to(tl.int64) * BLOCK
    count = tl.minimum(tl.load(entry + SIZE) - start, BLOCK).to(tl.int32)
    vector = (kind % 2 == 1) & (count % 16 == 0)
    for number in tl.static_range(len(KINDS)):
        if kind // 2 == number:
            if vector:
                average_block(entry, start, count, momentum, KINDS, number, BLOCK, True)
            else:
                for done in range(0, count, NARROW):
                    average_block(entry, start + done, count - done, momentum, KINDS, number, NARROW, False)


def tables(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Both tables for ``ema_`` of these lists."""
    return build_tables("ema_", Columns((targets, sources), (None, None)), CONFIGS[architecture()].block)


def ema_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: Tensor,
    tensor_table: Tensor | None = None,
    program_table: Tensor | None = None,
) -> None:
    config = CONFIGS[architecture()]
    tensor_table, program_table, kinds = fit(
        "ema_", tensor_table, program_table, Columns((targets, sources), (None, None)), config.block
    )
    if len(program_table):
        ema_kernel[len(program_table),](
            tensor_table,
            program_table,
            momentum,
            KINDS=kinds,
            BLOCK=config.block,
            NARROW=config.narrow,
            num_warps=config.num_warps,
        )


def compile_specs(arch: str) -> Iterator[CompileSpec]:
    wide = torch.empty(1280, 1280, device="meta")
    low = wide.bfloat16()
    momentum = torch.empty((), dtype=torch.float64, device="meta")
    cases = {
        "fp32": ([wide], [wide]),
        "bf16 into fp32": ([wide], [low]),
        "both": ([wide, wide], [low, wide]),
    }
    for case, (targets, sources) in cases.items():
        yield from record_specs(arch, case, ema_, targets, sources, momentum, memory_bound=True)
