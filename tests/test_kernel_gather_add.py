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
    largest,
    rows_beyond_int32,
)

from ijepa_fast import reference
from ijepa_fast.kernels import gather_add as kernels

pytestmark = pytest.mark.interpreter


def draw_case(rows: int, images: int, positions: int, width: int, seed: int):
    """x for gathering, x of packed rows, table and indices with padding rows and repetitions among them."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, images * positions, (rows,), generator=generator, dtype=torch.int32)
    grid = torch.randn(images * positions, width, generator=generator)
    return (
        grid,
        torch.randn(rows, width, generator=generator),
        torch.randn(positions, width, generator=generator),
        indices,
    )


cases = st.builds(
    draw_case, st.integers(0, 70), st.integers(1, 3), st.integers(1, 12), st.integers(1, 200), st.integers(0, 2**31)
)


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases)
@example(draw_case(0, 1, 1, 8, 0))
@example(draw_case(1, 1, 1, 1, 0))
def test_forward(dtype, case):
    grid, packed, table, indices = case
    for x, gather in ((grid, True), (packed, False)):
        assert_close_to_reference(kernels.gather_add, reference.gather_add, [x, table, indices, gather], dtype)


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases)
@example(draw_case(0, 2, 3, 8, 0))
@example(draw_case(90, 1, 2, 65, 0))
def test_backward(dtype, case):
    grid, packed, table, indices = case
    for gather, need_table in ((True, False), (False, True), (False, False)):
        arguments = [packed, indices, grid.shape[0], table.shape[0], gather, need_table]
        terms = reference.gather_add_backward(packed.abs(), *arguments[1:])
        assert_close_to_reference(
            kernels.gather_add_backward,
            reference.gather_add_backward,
            arguments,
            dtype,
            magnitudes=[largest(sums) for sums in terms],
        )


def test_mixed_precision_rounds_the_table_to_the_dtype_of_x():
    grid, _, table, indices = draw_case(40, 2, 9, 70, 0)
    out = kernels.gather_add(grid.half(), table, indices, True)
    assert torch.equal(out, reference.gather_add(grid.half(), table, indices, True))


def test_non_contiguous_inputs():
    grid, packed, table, indices = draw_case(40, 2, 9, 70, 0)
    out = kernels.gather_add(grid.T.contiguous().T, table.T.contiguous().T, indices.repeat(2)[::2], True)
    assert torch.equal(out, reference.gather_add(grid, table, indices.repeat(2)[::2], True))
    grad, _ = kernels.gather_add_backward(packed.T.contiguous().T, indices, 18, 9, False, False)
    assert torch.equal(grad, reference.gather_add_backward(packed, indices, 18, 9, False, False)[0])


def test_offsets_beyond_int32_when_reading():
    rows, width = rows_beyond_int32(2048), 2048
    x = huge(rows, width, torch.float16)
    x[-1] = 3
    indices = torch.tensor([rows - 1, 0], dtype=torch.int32)
    out = kernels.gather_add(x, torch.zeros(1, width), indices, True)
    assert out[0].eq(3).all() and out[1].eq(0).all()


@pytest.mark.parametrize("kernel", ["gather_add_kernel", "masked_copy_kernel"])
def test_offsets_beyond_int32_when_writing(kernel, monkeypatch):
    allocate_huge_outputs(monkeypatch)
    monkeypatch.setattr(kernels, kernel, LastProgram(getattr(kernels, kernel), monkeypatch))
    rows, width = rows_beyond_int32(2048), 2048
    x = huge(rows, width, torch.float16)
    x[-1] = torch.arange(width)
    indices = torch.zeros(rows, dtype=torch.int32)
    if kernel == "gather_add_kernel":
        out = kernels.gather_add(x, torch.ones(1, width), indices, False)
        assert torch.equal(out[-1, -64:], x[-1, -64:] + 1)
    else:
        out, _ = kernels.gather_add_backward(x, indices, rows, 1, False, False)
        assert torch.equal(out[-1, -64:], x[-1, -64:])


def test_offsets_beyond_int32_when_summing(monkeypatch):
    allocate_huge_outputs(monkeypatch)
    monkeypatch.setattr(kernels, "segment_sum_kernel", LastProgram(kernels.segment_sum_kernel, monkeypatch))
    rows, width = rows_beyond_int32(4096), 4096
    grad = torch.ones(3, width, dtype=torch.float16)
    indices = torch.tensor([rows - 1, 0, rows - 1], dtype=torch.int32)
    out, _ = kernels.gather_add_backward(grad, indices, rows, 1, True, False)
    assert out[-1, -64:].eq(2).all()


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
        kernels.gather_add(**{**arguments, **change}, gather=False)
