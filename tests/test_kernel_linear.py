"""Kernels of linear layers in Triton's interpreter against the fp64 reference: linear_gelu, hidden_gradient,
weight_gradient."""

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
from ijepa_fast.kernels import linear_gelu as gelu_kernels
from ijepa_fast.kernels import weight_gradient as gradient_kernels
from ijepa_fast.kernels.linear_tiles import ProductTile

pytestmark = pytest.mark.interpreter

STEEPEST = 1.13
"""Largest slope of GELU."""


def draw_case(rows: int, outputs: int, inputs: int, flag: bool, seed: int):
    """x, weight, bias and the gradient of an output; whether to compute the second result."""
    generator = torch.Generator().manual_seed(seed)
    x, bias = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, generator=generator)
    weight = 2 * torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    return x, weight, bias, torch.randn(rows, outputs, generator=generator), flag


sizes = st.integers(1, 150)
cases = st.builds(draw_case, st.integers(0, 150), sizes, sizes, st.booleans(), st.integers(0, 2**31))
EXAMPLES = [draw_case(0, 8, 8, True, 0), draw_case(1, 1, 1, True, 0), draw_case(140, 136, 72, True, 0)]


def with_examples(test):
    for case in EXAMPLES:
        test = example(case)(test)
    return test


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases)
@with_examples
def test_linear_gelu(dtype, case):
    x, weight, bias, _, keep_pre = case
    size = largest(x.abs() @ weight.abs().T + bias.abs())
    assert_close_to_reference(
        gelu_kernels.linear_gelu,
        ops.linear_gelu.definition,
        [x, weight, bias, keep_pre],
        dtype,
        magnitudes=[2 * STEEPEST * size, size],
    )


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases)
@with_examples
def test_hidden_gradient(dtype, case):
    pre, weight, _, grad, need_bias = case
    products = STEEPEST * grad.abs() @ weight.abs()
    assert_close_to_reference(
        gelu_kernels.hidden_gradient,
        ops.hidden_gradient.definition,
        [grad, weight, 2 * pre, need_bias],
        dtype,
        magnitudes=[2 * largest(products), 2 * largest(products.sum(0))],
    )


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases)
@with_examples
def test_weight_gradient(dtype, case):
    """Splits of 32 rows, tiles of 32 x 16, at most 12 programs: several of each, and none of them full."""
    x, _, _, grad, need_bias = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gradient_kernels.CONFIGS, ("sm_90", 2), ProductTile(32, 16, 16, 4, 2))
        patch.setitem(gradient_kernels.PROGRAMS, "sm_90", 12)
        patch.setattr(gradient_kernels, "LEAST_ROWS", 32)
        assert_close_to_reference(
            gradient_kernels.weight_gradient,
            ops.weight_gradient.definition,
            [grad, x, need_bias],
            dtype,
            magnitudes=[largest(grad.abs().T @ x.abs()), largest(grad.abs().sum(0))],
        )


def test_a_small_gradient_fills_the_gpu_and_a_large_one_is_left_to_cublas(monkeypatch):
    """Sizes of ViT-H/14's predictor and encoder on an H100: 264 programs, in tiles of 128 x 128."""
    tile, programs = gradient_kernels.CONFIGS["sm_90", 2], gradient_kernels.PROGRAMS["sm_90"]

    def splits(rows, outputs, inputs):
        number, per_split = gradient_kernels.split_rows(rows, outputs, inputs, tile, programs)
        assert per_split % tile.depth == 0 and (number - 1) * per_split < rows <= number * per_split
        return number

    assert splits(82995, 384, 384) == 29 and splits(82995, 1152, 384) == 9 and splits(82995, 1536, 384) == 7
    assert splits(15091, 5120, 1280) == splits(15091, 3840, 1280) == 1
    assert splits(700, 384, 384) == 2 and splits(512, 384, 384) == 1
    monkeypatch.setattr(gradient_kernels, "weight_gradient_kernel", None)
    _, _, _, grad, _ = EXAMPLES[2]
    (product, sums), x = gradient_kernels.weight_gradient(grad, grad, True), grad.double()
    torch.testing.assert_close(product, (x.T @ x).float())
    torch.testing.assert_close(sums, x.sum(0).float())


def test_splits_are_added_in_one_order():
    """1e8 absorbs what is added to it one by one, so another order would show: columns agree, and runs agree."""
    partials = torch.tensor([1e8, 1.0, -1e8, 1.0]).repeat(10)[:, None].repeat(1, 70).contiguous()
    outs = [torch.empty(70) for _ in range(2)]
    for out in outs:
        gradient_kernels.sum_splits_kernel[2,](partials, out, 40, SIZE=70, BLOCK_S=32, BLOCK_D=64)
    assert torch.equal(*outs) and outs[0].unique().numel() == 1


def test_rows_of_padding_add_nothing_to_gradients(monkeypatch):
    """Gradients of padding rows are zero; the activations there are finite, whatever they are."""
    monkeypatch.setattr(gradient_kernels, "LEAST_ROWS", 64)
    x, _, _, grad, _ = EXAMPLES[2]
    rows = torch.cat([x, torch.full((116, x.shape[1]), 1e4)])
    grads = torch.cat([grad, torch.zeros(116, grad.shape[1])])
    for padded, plain in zip(
        gradient_kernels.weight_gradient(grads, rows, True), ops.weight_gradient.definition(grad, x, True), strict=True
    ):
        torch.testing.assert_close(padded, plain)
    pre = torch.full((256, 136), 1e4)
    grad_pre, sums = gelu_kernels.hidden_gradient(grads, torch.ones(136, 136), pre, True)
    assert grad_pre[140:].eq(0).all()
    torch.testing.assert_close(sums, grad_pre.sum(0), rtol=1e-5, atol=1e-3)


def test_inference_gives_the_bits_of_training():
    x, weight, bias, _, _ = EXAMPLES[2]
    for dtype in (torch.float16, torch.float32):
        arguments = x.to(dtype), weight.to(dtype), bias
        trained, pre = gelu_kernels.linear_gelu(*arguments, True)
        inferred, nothing = gelu_kernels.linear_gelu(*arguments, False)
        assert torch.equal(trained, inferred) and nothing.numel() == 0 and pre.shape == trained.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_gelu_over_its_whole_range_and_in_the_tails(dtype):
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None].to(dtype)
    exact = torch.nn.functional.gelu(x.double())
    # fp16: half a unit in the last place of the result, and 1.5e-7 / 2 of the formula that stands for erf.
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + (
        x.abs() * 1.5e-7 / 2 + 2**-25 if dtype == torch.float16 else 1e-15
    )
    out, _ = gelu_kernels.linear_gelu(x, torch.ones(1, 1, dtype=dtype), torch.zeros(1), False)
    error = (out.double() - exact).abs()
    assert (error <= allowed).all(), float((error / allowed).max())


def test_fp32_bias_beside_fp16():
    x, weight, bias, grad, _ = EXAMPLES[2]
    x, weight, grad = x.half(), weight.half(), grad.half()
    # Sums in another order may round another way.
    torch.testing.assert_close(
        gelu_kernels.linear_gelu(x, weight, bias, True),
        ops.linear_gelu.definition(x, weight, bias, True),
        rtol=2e-3,
        atol=2e-3,
    )
    assert gelu_kernels.hidden_gradient(grad, weight, x, True)[1].dtype == torch.float32


def test_non_contiguous_inputs():
    x, weight, bias, grad, _ = EXAMPLES[2]
    turned = [value.T.contiguous().T for value in (x, weight, grad)]
    repeated = bias.repeat_interleave(2)[::2]
    assert torch.equal(
        gelu_kernels.linear_gelu(turned[0], turned[1], repeated, False)[0],
        gelu_kernels.linear_gelu(x, weight, bias, False)[0],
    )
    assert torch.equal(
        gelu_kernels.hidden_gradient(turned[2], turned[1], turned[0], True)[0],
        gelu_kernels.hidden_gradient(grad, weight, x, True)[0],
    )


def test_offsets_beyond_int32(monkeypatch):
    rows, width = rows_beyond_int32(2048), 2048
    x = huge(rows, width, torch.float16)
    x[-1, 128:] = 20
    allocate_huge_outputs(monkeypatch)
    for name in ("linear_gelu_kernel", "hidden_gradient_kernel"):
        monkeypatch.setattr(gelu_kernels, name, LastProgram(getattr(gelu_kernels, name), monkeypatch))
    monkeypatch.setattr(gelu_kernels, "sum_rows", lambda partials: [partials])
    identity = torch.eye(width, dtype=torch.float16)
    for out in gelu_kernels.linear_gelu(x, identity, identity[0], True):
        assert out[-1, -64:].eq(20).all() and out[-2, -64:].eq(0).all()
    grad_pre, sums = gelu_kernels.hidden_gradient(x, identity, x, True)
    assert grad_pre[-1, -64:].eq(20).all() and sums[-1, 0, -64:].eq(20).all()


def test_offsets_of_sums_beyond_int32(monkeypatch):
    rows, width = rows_beyond_int32(2048), 2048
    grad, x = huge(rows, width, torch.float16), huge(rows, 16, torch.float16)
    grad[-1, -64:], x[-1] = 20, 3
    allocate_huge_outputs(monkeypatch)
    monkeypatch.setitem(gradient_kernels.PROGRAMS, "sm_90", rows)
    kernel = LastProgram(gradient_kernels.weight_gradient_kernel, monkeypatch)
    monkeypatch.setattr(gradient_kernels, "weight_gradient_kernel", kernel)
    partials = []

    class Sum:
        def __getitem__(self, grid):
            return lambda values, *_, **__: partials.append(values)

    monkeypatch.setattr(gradient_kernels, "sum_splits_kernel", Sum())
    gradient_kernels.weight_gradient(grad, x, False)
    assert partials[0].numel() > 2**25 and partials[0][-1].view(width, 16)[-64:].eq(60).all()


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.zeros(4, 8), torch.zeros(3, 8).half(), torch.zeros(3), "weight is torch.float16, x is torch.float32"),
        (torch.zeros(4, 8), torch.zeros(3, 7), torch.zeros(3), r"weight must have shape \[3, 8\], got \[3, 7\]"),
        (torch.zeros(4, 8), torch.zeros(3, 8), torch.zeros(4), r"bias must have shape \[3\], got \[4\]"),
        (torch.zeros(4, 8), torch.zeros(3, 8), torch.zeros(3, device="meta"), "on one device, .* bias on meta"),
    ],
)
def test_unsupported_arguments_raise(x, weight, bias, message):
    with pytest.raises(ValueError, match=f"linear_gelu: .*{message}"):
        gelu_kernels.linear_gelu(x, weight, bias, True)


def test_a_gpu_takes_16_bits_only(monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    x = torch.zeros(4, 8)
    for call in (
        lambda: gelu_kernels.linear_gelu(x, x, x[:, 0], True),
        lambda: gelu_kernels.hidden_gradient(x, torch.zeros(8, 8), x, True),
        lambda: gradient_kernels.weight_gradient(x, x, True),
    ):
        with pytest.raises(ValueError, match="must be bfloat16 or float16 on a GPU, got torch.float32"):
            call()
