"""The kernel of quantize_fp8 in Triton's interpreter, and its definition, against what e4m3 numbers are."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_testing import (
    INTERPRETED_DTYPES,
    LastProgram,
    allocate_huge_outputs,
    huge,
    interpreted,
    rows_beyond_int32,
)

from ijepa_fast import ops
from ijepa_fast.kernels import quantize_fp8 as kernels

pytestmark = pytest.mark.interpreter

NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
FINITE = NUMBERS[NUMBERS.isfinite()].unique()
"""All 253 of them (two zeros), ascending."""


@pytest.fixture(autouse=True)
def casts_by_torch(monkeypatch):
    """The interpreter rounds to e4m3 wrongly (ties, and carries into the exponent): torch does it instead."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(values, source, target, rounding):
        if target.name != "fp8e4nv":
            return convert(values, source, target, rounding)
        rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", converted)


def draw_case(rows: int, width: int, spread: float, seed: int) -> torch.Tensor:
    """Rows of very different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    x *= torch.exp(spread * torch.randn(rows, 1, generator=generator))
    x[rows // 2 :][:1] = 0
    return x


cases = st.builds(draw_case, st.integers(0, 40), st.integers(1, 300), st.floats(0, 3), st.integers(0, 2**31))


def assert_same(result, wanted):
    values, scales = result
    assert values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    assert torch.equal(values.view(torch.uint8), wanted[0].view(torch.uint8))
    assert torch.equal(scales, wanted[1])


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@pytest.mark.parametrize("per_row", [True, False])
@interpreted
@given(cases)
@example(draw_case(0, 8, 1.0, 0))
@example(draw_case(1, 1, 1.0, 0))
@example(draw_case(3, 1280, 1.0, 0))
@example(draw_case(9, 161, 1.0, 0))
def test_kernel_gives_the_bits_of_the_reference(dtype, per_row, case):
    x = case.to(dtype)
    assert_same(kernels.quantize_fp8(x, per_row), ops.quantize_fp8.definition(x, per_row))


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_nearest_number_and_the_whole_range(dtype, per_row):
    x = draw_case(20, 300, 2.0, 0).to(dtype)
    values, scales = ops.quantize_fp8.definition(x, per_row)
    amax = x.double().abs().amax(1) if per_row else x.double().abs().amax().view(1)
    torch.testing.assert_close(scales.double(), amax.clamp(min=1e-12) / 448, rtol=2**-23, atol=0)
    scaled = x.double() / scales.double()[:, None]
    nearest = (scaled[..., None] - FINITE).abs().amin(-1)
    # In fp32 the quotient is off by a few units in its last place, which decides near the middle of two numbers.
    assert ((scaled - values.double()).abs() <= nearest + scaled.abs() * 2**-21).all()
    assert values.double().abs().max() == 448 and values[10].double().eq(0).all()
    if per_row:
        assert values.double().abs().amax(1)[torch.arange(20) != 10].eq(448).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(per_row, bad):
    x = draw_case(4, 48, 1.0, 0)
    x[1, 5] = bad
    for values, scales in (kernels.quantize_fp8(x, per_row), ops.quantize_fp8.definition(x, per_row)):
        products = (values.double() * scales.double()[:, None]).sum(1)
        assert not products[1].isfinite()
        assert products[[0, 2, 3]].isfinite().all() or not per_row


@pytest.mark.parametrize("per_row", [True, False])
def test_zeros_and_next_to_nothing(per_row):
    for size in (0.0, 1e-30, 1e-45):
        values, scales = kernels.quantize_fp8(torch.full((3, 16), size), per_row)
        assert values.double().eq(0).all() and scales.gt(0).all() and (1 / scales).isfinite().all()


def test_non_contiguous_inputs():
    x = draw_case(30, 70, 1.0, 0)
    assert_same(kernels.quantize_fp8(x.T.contiguous().T, True), ops.quantize_fp8.definition(x, True))


def test_offsets_beyond_int32(monkeypatch):
    rows, width = rows_beyond_int32(2048), 2048
    x = huge(rows, width, torch.float16)
    x[-1] = 20
    allocate_huge_outputs(monkeypatch)
    monkeypatch.setattr(kernels, "quantize_fp8_kernel", LastProgram(kernels.quantize_fp8_kernel, monkeypatch))
    values, scales = kernels.quantize_fp8(x, True)
    assert values[-1].float().eq(448).all() and scales[-1] == np.float32(20 / 448)


def test_unsupported_dtype_raises():
    with pytest.raises(ValueError, match="x must be bfloat16, .* got torch.int8"):
        kernels.quantize_fp8(torch.zeros(4, 8, dtype=torch.int8), True)
