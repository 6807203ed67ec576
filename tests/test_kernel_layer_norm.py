"""layer_norm kernels in Triton's interpreter against the fp64 reference, forward and backward."""

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

from ijepa_fast import ops
from ijepa_fast.kernels import layer_norm as kernels

pytestmark = pytest.mark.interpreter

EPS = 1e-6


def draw_case(rows: int, width: int, optional: int, seed: int):
    """x, residual, x_bias, weight and bias; the bits of ``optional`` say which of the last four are not None."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, width), (width,), (width,), (width,))
    given = (torch.randn(shape, generator=generator) if optional >> i & 1 else None for i, shape in enumerate(shapes))
    return torch.randn(rows, width, generator=generator) + 0.5, *given


cases = st.builds(draw_case, st.integers(0, 9), st.integers(2, 300), st.integers(0, 15), st.integers(0, 2**31))
# 1,100 columns are held in two parts.
EXAMPLES = [draw_case(0, 8, 15, 0), draw_case(1, 2, 0, 0), draw_case(7, 1100, 15, 0)]


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases)
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
def test_forward(dtype, case):
    x, residual, x_bias, weight, bias = case
    size = largest(x) + largest(residual) + largest(x_bias)
    rstd = largest(ops.layer_norm.definition(*(None if t is None else t.double() for t in case), EPS)[3])
    out = 4 * size * rstd * (1 if weight is None else largest(weight)) + largest(bias)
    assert_close_to_reference(
        kernels.layer_norm,
        ops.layer_norm.definition,
        [*case, EPS],
        dtype,
        magnitudes=[out, size, 2 * size, 4 * size * rstd**2],
    )


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases, st.integers(0, 15), st.integers(1, 4))
@example(EXAMPLES[0], 15, 4)
@example(EXAMPLES[1], 15, 1)
@example(EXAMPLES[2], 15, 3)
def test_backward(dtype, case, needed, programs):
    h, grad_h, _, weight, _ = case
    grad = torch.randn(h.shape, generator=torch.Generator().manual_seed(0))
    needs = [bool(needed >> i & 1) for i in range(3)]

    def with_statistics(function):
        def run(grad, grad_h, h, weight):
            _, _, mean, rstd = ops.layer_norm.definition(h.double(), None, None, None, None, EPS)
            wide = ops.accumulation_dtype(h.dtype)
            return function(grad, grad_h, h, mean.to(wide), rstd.to(wide), weight, *needs)

        return run

    rstd = largest(ops.layer_norm.definition(h.double(), None, None, None, None, EPS)[3])
    normal = (largest(h) + 0.5) * rstd
    slope = largest(grad) * (1 if weight is None else largest(weight))
    total = 2 * slope * (2 + normal**2) * rstd + largest(grad_h)
    sums = grad.abs().sum(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BACKWARD_PROGRAMS", {"sm_90": programs})
        assert_close_to_reference(
            with_statistics(kernels.layer_norm_backward),
            with_statistics(ops.layer_norm_backward.definition),
            [grad, grad_h, h, weight],
            dtype,
            magnitudes=[total, 0, largest(sums) * normal, largest(sums), total * len(h)],
        )


def test_fp16_beside_an_fp32_stream():
    x, residual, x_bias, weight, bias = EXAMPLES[2]
    arguments = (x.half(), residual, x_bias, weight, bias, EPS)
    out, h, mean, rstd = kernels.layer_norm(*arguments)
    expected = ops.layer_norm.definition(*arguments)
    assert (out.dtype, h.dtype, mean.dtype) == (torch.float16, torch.float32, torch.float32)
    torch.testing.assert_close((out, h, mean, rstd), expected)
    arguments = (out, h, h, mean, rstd, weight, True, True, True)
    grads, expected = kernels.layer_norm_backward(*arguments), ops.layer_norm_backward.definition(*arguments)
    assert [grad.dtype for grad in grads] == [grad.dtype for grad in expected]
    assert grads[1].shape == x.shape
    torch.testing.assert_close(grads, expected)


def test_non_contiguous_inputs():
    x, residual, x_bias, weight, bias = EXAMPLES[2]
    turned = [t.T.contiguous().T for t in (x, residual)]
    expected = kernels.layer_norm(x, residual, x_bias, weight, bias, EPS)
    assert all(map(torch.equal, kernels.layer_norm(*turned, x_bias, weight, bias, EPS), expected))


def test_offsets_beyond_int32(monkeypatch):
    rows, width = rows_beyond_int32(2048), 2048
    x, residual = huge(rows, width, torch.float16), huge(rows, width, torch.float16)
    x[-1, ::2], residual[-1] = 2, 3
    allocate_huge_outputs(monkeypatch)
    monkeypatch.setattr(kernels, "BACKWARD_PROGRAMS", {"sm_90": rows})
    for name in ("layer_norm_kernel", "layer_norm_backward_kernel"):
        monkeypatch.setattr(kernels, name, LastProgram(getattr(kernels, name), monkeypatch))
    out, h, mean, rstd = kernels.layer_norm(x, residual, None, None, None, 0.0)
    assert h[-1, ::2].eq(5).all() and h[-1, 1::2].eq(3).all()
    assert out[-1, ::2].eq(1).all() and out[-1, 1::2].eq(-1).all()
    assert mean[-1] == 4 and rstd[-1] == 1

    monkeypatch.setattr(kernels, "sum_rows", lambda partials: [])
    grad, _, *_ = kernels.layer_norm_backward(x, residual, h, mean, rstd, None, False, False, False)
    assert grad[-1].eq(3).all()  # x is 1 + normalised h on this row: all of it is projected out


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(4, 8, dtype=torch.int8), "x must be bfloat16, .* got torch.int8"),
        (1, torch.zeros(3, 8), r"residual must have the shape \[4, 8\] of x, got \[3, 8\]"),
        (2, torch.zeros(7), r"x_bias must have shape \[8\], got \[7\]"),
        (3, torch.zeros(8, device="meta"), "on one device, got .* weight on meta"),
        (4, torch.zeros(8, 1), r"bias must have shape \[8\], got \[8, 1\]"),
    ],
)
def test_unsupported_arguments_raise(position, value, message):
    arguments = [torch.zeros(4, 8), None, None, torch.zeros(8), torch.zeros(8), EPS]
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        kernels.layer_norm(*arguments)
