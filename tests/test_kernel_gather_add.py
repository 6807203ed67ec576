"""gather_add kernels in Triton's interpreter against the fp64 reference, forward and backward."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_testing import (
    INTERPRETED_DTYPES,
    LastProgram,
    allocate_huge_outputs,
    assert_close_to_reference,
    huge,
    interpreted,
    rows_beyond_int32,
)

from ijepa_fast import ops
from ijepa_fast.kernels import gather_add as kernels

pytestmark = pytest.mark.interpreter


def draw_case(rows: int, positions: int, width: int, seed: int):
    """x, table, and indices into several images with padding rows and repetitions among them."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, 3 * positions, (rows,), generator=generator, dtype=torch.int32)
    return (*(torch.randn(n, width, generator=generator) for n in (rows, positions)), indices)


cases = st.builds(draw_case, st.integers(0, 70), st.integers(1, 12), st.integers(1, 200), st.integers(0, 2**31))


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases)
@example(draw_case(0, 1, 8, 0))
@example(draw_case(1, 1, 1, 0))
def test_forward(dtype, case):
    assert_close_to_reference(kernels.gather_add, ops.gather_add.definition, case, dtype)


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases)
@example(draw_case(0, 3, 8, 0))
@example(draw_case(90, 2, 65, 0))
def test_backward(dtype, case):
    x, _, indices = case
    assert_close_to_reference(kernels.gather_add_backward, ops.gather_add_backward.definition, [x, indices], dtype)


def test_mixed_precision_rounds_the_table_to_the_dtype_of_x():
    x, table, indices = draw_case(40, 9, 70, 0)
    out = kernels.gather_add(x.half(), table, indices)
    assert torch.equal(out, ops.gather_add.definition(x.half(), table, indices))


def test_non_contiguous_inputs():
    x, table, indices = draw_case(40, 9, 70, 0)
    turned = x.T.contiguous().T, indices.repeat_interleave(2)[::2]
    out = kernels.gather_add(turned[0], table.T.contiguous().T, turned[1])
    assert torch.equal(out, ops.gather_add.definition(x, table, indices))
    assert torch.equal(kernels.gather_add_backward(*turned), ops.gather_add_backward.definition(x, indices))


@pytest.mark.parametrize("kernel", ["gather_add_kernel", "masked_copy_kernel"])
def test_offsets_beyond_int32(kernel, monkeypatch):
    allocate_huge_outputs(monkeypatch)
    monkeypatch.setattr(kernels, kernel, LastProgram(getattr(kernels, kernel), monkeypatch))
    rows, width = rows_beyond_int32(2048), 2048
    x = huge(rows, width, torch.float16)
    x[-1] = torch.arange(width)
    indices = torch.zeros(rows, dtype=torch.int32)
    if kernel == "gather_add_kernel":
        out = kernels.gather_add(x, torch.ones(1, width), indices)
        assert torch.equal(out[-1, -64:], x[-1, -64:] + 1)
    else:
        out = kernels.gather_add_backward(x, indices)
        assert torch.equal(out[-1, -64:], x[-1, -64:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 8, dtype=torch.int8)}, "x must be bfloat16, float16, float32 or float64, got torch.int8"),
        ({"indices": torch.zeros(4)}, "indices must be int32, got torch.float32"),
        ({"table": torch.zeros(2, 8, device="meta")}, "on one device, got x on cpu, table on meta"),
        ({"table": torch.zeros(2, 7)}, "x has width 8, table 7"),
        ({"x": torch.zeros(5, 8)}, "x has 5 rows for 4 indices"),
    ],
)
def test_unsupported_arguments_raise(change, message):
    arguments = {"x": torch.zeros(4, 8), "table": torch.zeros(2, 8), "indices": torch.zeros(4, dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        kernels.gather_add(**{**arguments, **change})
