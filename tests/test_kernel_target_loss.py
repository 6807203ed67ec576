"""target_loss kernels in Triton's interpreter against the fp64 reference, forward and backward."""

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
from ijepa_fast.kernels import target_loss as kernels

pytestmark = pytest.mark.interpreter

EPS = 1e-5


def draw_case(lengths: list[int], width: int, padding: int, seed: int):
    """Prediction, target, rows and cu_seqlens of blocks of these lengths, with padding rows behind them."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    rows = torch.randint(0, count + 3, (count,), generator=generator, dtype=torch.int32)
    rows = torch.nn.functional.pad(rows, (0, padding), value=-1)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    target = 3 * torch.randn(count + 3, width, generator=generator) + 1
    return torch.randn(count + padding, width, generator=generator), target, rows, cu_seqlens


cases = st.builds(
    draw_case,
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.integers(2, 200),
    st.integers(0, 4),
    st.integers(0, 2**31),
)
# 1,100 columns are held in two parts.
EXAMPLES = [draw_case([0], 8, 0, 0), draw_case([1], 2, 0, 0), draw_case([0, 3, 0, 2, 0], 1100, 2, 0)]


def largest_terms(prediction: torch.Tensor, target: torch.Tensor, normalize: bool) -> float:
    """Bound of the values whose difference is the distance, each with its roundings."""
    wanted = largest(target)
    if normalize and target.numel():
        wanted *= 3 * largest((target.double().var(-1, correction=0) + EPS).rsqrt())
    return largest(prediction) + wanted


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases, st.sampled_from(kernels.KINDS), st.booleans())
@example(EXAMPLES[0], "smooth_l1", True)
@example(EXAMPLES[1], "l1", True)
@example(EXAMPLES[2], "l2", True)
def test_forward(dtype, case, kind, normalize):
    arguments = [*case, kind, normalize, EPS]
    size = largest_terms(*case[:2], normalize)
    assert_close_to_reference(
        kernels.target_loss, ops.target_loss.definition, arguments, dtype, magnitudes=[size * (1 + size)]
    )


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases, st.sampled_from(["smooth_l1", "l2"]), st.booleans())
@example(EXAMPLES[0], "smooth_l1", True)
@example(EXAMPLES[1], "l2", False)
@example(EXAMPLES[2], "smooth_l1", True)
def test_backward(dtype, case, kind, normalize):
    grad = torch.tensor(0.7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    prediction, target, _, cu_seqlens = case
    weight = 1 / (target.shape[1] * (len(cu_seqlens) - 1))

    def with_grad(function):
        return lambda *arguments: function(grad.to(ops.accumulation_dtype(arguments[0].dtype)), *arguments)

    assert_close_to_reference(
        with_grad(kernels.target_loss_backward),
        with_grad(ops.target_loss_backward.definition),
        [*case, kind, normalize, EPS],
        dtype,
        magnitudes=[2 * weight * largest_terms(prediction, target, normalize)],
    )


def test_slope_of_l1():
    _, target, rows, cu_seqlens = EXAMPLES[2]
    sign = torch.randint(-1, 2, (rows.shape[0], target.shape[1]), generator=torch.Generator().manual_seed(0))
    prediction = target[rows.clamp(min=0)] + 0.25 * sign
    arguments = (torch.ones(()), prediction, target, rows, cu_seqlens, "l1", False, EPS)
    expected = ops.target_loss_backward.definition(*arguments)
    torch.testing.assert_close(kernels.target_loss_backward(*arguments), expected)
    assert torch.equal(expected.sign(), torch.where((rows >= 0)[:, None], sign, 0).float())


def test_kinds_are_those_of_the_reference():
    assert kernels.KINDS == ops.LOSS_KINDS


def test_low_precision_prediction_beside_fp32_target():
    prediction, *rest = EXAMPLES[2]
    loss = kernels.target_loss(prediction.half(), *rest, "smooth_l1", True, EPS)
    expected = ops.target_loss.definition(
        prediction.half().double(), rest[0].double(), *rest[1:], "smooth_l1", True, EPS
    )
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(expected)) <= 2 * torch.finfo(torch.float32).eps * float(expected)


def test_padding_rows_neither_count_nor_get_gradient():
    prediction, target, rows, cu_seqlens = EXAMPLES[2]
    grad = torch.ones(())
    loss = kernels.target_loss(prediction, target, rows, cu_seqlens, "l2", True, EPS)
    prediction[rows < 0] = float("nan")
    assert torch.equal(kernels.target_loss(prediction, target, rows, cu_seqlens, "l2", True, EPS), loss)
    gradient = kernels.target_loss_backward(grad, prediction, target, rows, cu_seqlens, "l2", True, EPS)
    assert gradient[rows < 0].eq(0).all() and not gradient.isnan().any()


def test_non_contiguous_inputs():
    prediction, target, rows, cu_seqlens = EXAMPLES[2]
    turned = [x.T.contiguous().T for x in (prediction, target)]
    expected = kernels.target_loss(prediction, target, rows, cu_seqlens, "l2", True, EPS)
    assert torch.equal(kernels.target_loss(*turned, rows, cu_seqlens, "l2", True, EPS), expected)


def test_offsets_beyond_int32(monkeypatch):
    count, width = rows_beyond_int32(2048), 2048
    prediction, target = huge(count, width, torch.float16), huge(count, width, torch.float16)
    prediction[-1] = 2
    rows = torch.full((count,), count - 1, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, count], dtype=torch.int32)
    allocate_huge_outputs(monkeypatch)
    for name in ("target_loss_kernel", "target_loss_backward_kernel"):
        monkeypatch.setattr(kernels, name, LastProgram(getattr(kernels, name), monkeypatch))
    losses = []
    monkeypatch.setattr(kernels, "sum_kernel", {(1,): lambda values, *_, **__: losses.append(values)})
    kernels.target_loss(prediction, target, rows, cu_seqlens, "l2", False, EPS)
    assert losses[0][count - 1] == pytest.approx(4 / count)
    grad = torch.tensor(float(count))
    gradient = kernels.target_loss_backward(grad, prediction, target, rows, cu_seqlens, "l2", False, EPS)
    assert gradient[-1].eq(4 / width).all()


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(4, 8, dtype=torch.int8), "prediction must be bfloat16, .* got torch.int8"),
        (0, torch.zeros(3, 8), r"prediction \[3, 8\], target \[2, 8\] and 4 rows do not fit"),
        (1, torch.zeros(2, 7), r"prediction \[4, 8\], target \[2, 7\] and 4 rows do not fit"),
        (2, torch.zeros(4), "rows must be int32, got torch.float32"),
        (3, torch.zeros(2, dtype=torch.int32, device="meta"), "on one device, got .* cu_seqlens on meta"),
        (4, "huber", "one of smooth_l1, l2, l1, got 'huber'"),
    ],
)
def test_unsupported_arguments_raise(position, value, message):
    rows = torch.zeros(4, dtype=torch.int32)
    arguments = [torch.zeros(4, 8), torch.zeros(2, 8), rows, rows[:2], "l2", True, EPS]
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        kernels.target_loss(*arguments)
