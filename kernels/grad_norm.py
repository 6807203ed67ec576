"""L2 norm over a list of tensors (``ops.grad_norm`` defines it): one sum per program, then one over all of them.

The order of all sums depends on the sizes alone, so the norm has one value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_fast.kernels.multi_tensor import Columns, Launch, build_tables, element, fit, places
from ijepa_fast.kernels.row_tiles import accumulator
from ijepa_fast.kernels.specs import ARCHITECTURES, CompileSpec, architecture, record_specs

CONFIGS = dict.fromkeys(ARCHITECTURES, Launch(block=8192, num_warps=8, narrow=1024))
PARTIALS_PER_ROUND, PARTIALS_WARPS = 8192, 16
# Columns of the tensor table.
GRAD, SIZE, KIND = map(tl.constexpr, range(3))
ENTRY = tl.constexpr(4)


@triton.jit
def sum_of_squares(
    entry, start, count, KINDS: tl.constexpr, NUMBER: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """Sum of squares of elements start <= i < start + min(count, BLOCK) of a tensor. With VECTOR, 16 divides count."""
    lanes = tl.arange(0, BLOCK)
    if VECTOR:
        # Changes nothing, but tells the compiler that the mask ends on a multiple of 16, so that accesses stay wide.
        count = count // 16 * 16
    grads = places(tl.load(entry + GRAD), element(KINDS, NUMBER, GRAD), start + lanes, VECTOR, 8)
    wide: tl.constexpr = accumulator(grads)
    grad = tl.load(grads, mask=lanes < count, other=0).to(wide)
    return tl.sum(grad * grad)


@triton.jit
def block_norms_kernel(
    tensor_table, program_table, partials, KINDS: tl.constexpr, BLOCK: tl.constexpr, NARROW: tl.constexpr
):
    program = tl.program_id(0)
    tensor = tl.load(program_table + 2 * program)
    block = tl.load(program_table + 2 * program + 1)
    entry = tensor_table + tensor * ENTRY
    kind = tl.load(entry + KIND)
    start = block.to(tl.int64) * BLOCK
    count = tl.minimum(tl.load(entry + SIZE) - start, BLOCK).to(tl.int32)
    vector = (kind % 2 == 1) & (count % 16 == 0)
    for number in tl.static_range(len(KINDS)):
        if kind // 2 == number:
            if vector:
                tl.store(partials + program, sum_of_squares(entry, start, count, KINDS, number, BLOCK, True))
            else:
                total = tl.zeros([], partials.dtype.element_ty)
                for done in range(0, count, NARROW):
                    total += sum_of_squares(entry, start + done, count - done, KINDS, number, NARROW, False)
                tl.store(partials + program, total)


@triton.jit(do_not_specialize=["num_partials"])
def root_of_sum_kernel(partials, out, num_partials, BLOCK: tl.constexpr):
    # One program suffices: there is one partial sum per 8,192 gradients.
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], partials.dtype.element_ty)
    for first in range(0, num_partials, BLOCK):
        total += tl.load(partials + first + lanes, mask=first + lanes < num_partials, other=0)
    tl.store(out, tl.sqrt(tl.sum(total)))


def tables(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Both tables for ``grad_norm`` of this list."""
    return build_tables("grad_norm", Columns((grads,), (None,)), CONFIGS[architecture()].block)


def grad_norm(
    grads: Sequence[Tensor], tensor_table: Tensor | None = None, program_table: Tensor | None = None
) -> Tensor:
    return _root_of_sum(_block_norms(grads, tensor_table, program_table))


def _block_norms(grads: Sequence[Tensor], tensor_table: Tensor | None, program_table: Tensor | None) -> Tensor:
    """[programs] sums of squares."""
    config = CONFIGS[architecture()]
    tensor_table, program_table, kinds = fit(
        "grad_norm", tensor_table, program_table, Columns((grads,), (None,)), config.block
    )
    wide = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    partials = grads[0].new_empty(len(program_table), dtype=wide)
    if len(program_table):
        block_norms_kernel[len(program_table),](
            tensor_table,
            program_table,
            partials,
            KINDS=kinds,
            BLOCK=config.block,
            NARROW=config.narrow,
            num_warps=config.num_warps,
        )
    return partials


def _root_of_sum(partials: Tensor) -> Tensor:
    out = partials.new_empty(())
    root_of_sum_kernel[1,](partials, out, len(partials), BLOCK=PARTIALS_PER_ROUND, num_warps=PARTIALS_WARPS)
    return out


def compile_specs(arch: str) -> Iterator[CompileSpec]:
    wide = torch.empty(1280, 1280, device="meta")
    cases = {"bf16": [wide.bfloat16()], "fp32": [wide], "bf16 and fp32": [wide.bfloat16(), wide]}
    for case, grads in cases.items():
        yield from record_specs(arch, case, _block_norms, grads, None, None, memory_bound=True)
    # Kilobytes, whose number is no multiple of a wide load's.
    yield from record_specs(arch, "fp32", _root_of_sum, wide.view(-1), memory_bound=True, load_bits=32)
