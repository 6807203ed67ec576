"""bias_gelu kernels in Triton's interpreter against the fp64 reference, forward and backward."""

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
from ijepa_fast.kernels import gelu as kernels

pytestmark = pytest.mark.interpreter


def draw_case(rows: int, width: int, with_bias: bool, seed: int):
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(width, generator=generator) if with_bias else None
    return 2 * torch.randn(rows, width, generator=generator), bias


cases = st.builds(draw_case, st.integers(0, 70), st.integers(1, 300), st.booleans(), st.integers(0, 2**31))
EXAMPLES = [draw_case(0, 8, True, 0), draw_case(1, 1, False, 0), draw_case(300, 70, True, 0)]


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases)
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
def test_forward(dtype, case):
    size = largest(case[0]) + largest(case[1])
    assert_close_to_reference(kernels.bias_gelu, reference.bias_gelu, case, dtype, magnitudes=[2 * size])


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases)
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
def test_backward(dtype, case):
    x, bias = case
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    size = largest(x) + largest(bias)
    assert_close_to_reference(
        kernels.bias_gelu_backward,
        reference.bias_gelu_backward,
        [grad, x, bias],
        dtype,
        magnitudes=[2 * size * largest(grad), 2 * size * largest(grad.abs().sum(0))],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_whole_range_and_tails(dtype):
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None].to(dtype)
    exact = torch.nn.functional.gelu(x.double())
    # fp16: half a unit in the last place of the result, and 1.5e-7 / 2 of the formula that stands for erf.
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + (
        x.abs() * 1.5e-7 / 2 + 2**-25 if dtype == torch.float16 else 1e-15
    )
    error = (kernels.bias_gelu(x, None).double() - exact).abs()
    assert (error <= allowed).all(), float((error / allowed).max())


def test_fp32_bias_beside_fp16():
    x, bias = EXAMPLES[2]
    x = x.half()
    torch.testing.assert_close(kernels.bias_gelu(x, bias), reference.bias_gelu(x, bias))
    torch.testing.assert_close(kernels.bias_gelu_backward(x, x, bias), reference.bias_gelu_backward(x, x, bias))


def test_non_contiguous_inputs():
    x, bias = EXAMPLES[2]
    turned, repeated = x.T.contiguous().T, bias.repeat_interleave(2)[::2]
    assert torch.equal(kernels.bias_gelu(turned, repeated), kernels.bias_gelu(x, bias))


def test_offsets_beyond_int32(monkeypatch):
    rows, width = rows_beyond_int32(2048), 2048
    x = huge(rows, width, torch.float16)
    x[-1] = 20
    allocate_huge_outputs(monkeypatch)
    for name in ("bias_gelu_kernel", "bias_gelu_backward_kernel"):
        monkeypatch.setattr(kernels, name, LastProgram(getattr(kernels, name), monkeypatch))
    assert kernels.bias_gelu(x, None)[-1, -64:].eq(20).all()
    assert kernels.bias_gelu_backward(x, x, None)[0][-1, -64:].eq(20).all()


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(4, 8, dtype=torch.int8), None, "x must be bfloat16, .* got torch.int8"),
        (torch.zeros(4, 8), torch.zeros(7), r"bias must have shape \[8\], got \[7\]"),
        (torch.zeros(4, 8), torch.zeros(8, device="meta"), "on one device, got x on cpu, bias on meta"),
    ],
)
def test_unsupported_arguments_raise(x, bias, message):
    with pytest.raises(ValueError, match=message):
        kernels.bias_gelu(x, bias)
