"""varlen_attention kernels in Triton's interpreter against plain attention in fp64: output, log-sum-exp, all gradients.

Legend: Tq, Tk packed rows of queries and keys, H heads, Dh head dim.
"""

import math

import pytest
import torch
import triton
from attention_oracle import AttentionCase, finite, magnitudes, plain
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from kernel_testing import (
    INTERPRETED_DTYPES,
    allocate_huge_outputs,
    assert_close_to_reference,
    huge,
    interpreted,
    rows_beyond_int32,
)
from torch import Tensor
from triton.runtime import interpreter

from ijepa_fast.kernels import varlen_attention_launch as launch_file
from ijepa_fast.kernels.specs import ARCHITECTURES
from ijepa_fast.kernels.varlen_attention import varlen_attention, varlen_self_attention
from ijepa_fast.kernels.varlen_attention_backward import varlen_attention_backward, varlen_self_attention_backward

pytestmark = pytest.mark.interpreter

HEAD_DIMS = tuple(launch_file.HEAD_DIM_PARTS)
assert HEAD_DIMS == (24, 32, 64, 80, 88, 96, 128)


def kernels(case: AttentionCase):
    """Forward, then backward from its results; padding rows of what the backward is given are NaN too."""

    def run(q, k, v, grad):
        bounds = case.bounds()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch_file, "SHORT", 10**6 if case.lengths == "short" else 0)
            out, lse = varlen_attention(q, k, v, *bounds)
            saved_out, saved_lse = out.clone(), lse.clone()
            saved_out[case.used[0] :], saved_lse[case.used[0] :] = math.nan, math.nan
            grads = varlen_attention_backward(grad, q, k, v, saved_out, saved_lse, *bounds)
        for result, queries in zip((out, lse, *grads), (True, True, True, False, False), strict=True):
            assert result[case.used[0 if queries else 1] :].eq(0).all()
        return out, finite(lse), *grads

    return run


def check(case: AttentionCase, dtype: torch.dtype) -> None:
    assert_close_to_reference(kernels(case), plain(case), case.values(), dtype, magnitudes=magnitudes(case, dtype))


@st.composite
def cases(draw, longest: int):
    lengths = st.one_of(st.integers(0, 3), st.integers(0, longest))
    pairs = draw(st.lists(st.tuples(lengths, lengths), max_size=3))
    if draw(st.booleans()):  # self-attention
        pairs = [(length, length) for length, _ in pairs]
    lengths_q, lengths_k = ([pair[i] for pair in pairs] for i in range(2))
    few = st.integers(0, 3)
    return AttentionCase(
        lengths_q,
        lengths_k,
        draw(st.sampled_from(HEAD_DIMS)),
        draw(st.integers(1, 2)),
        *(draw(few) for _ in range(3)),
        draw(st.sampled_from(("short", "long"))),
        draw(st.integers(0, 2**31)),
    )


NO_SHRINKING = (Phase.explicit, Phase.generate)  # it takes minutes here, and the drawn cases are small as they are

EXAMPLES = (
    AttentionCase([], [], padding_q=2, padding_k=3),
    AttentionCase([0, 0], [0, 0], padding_q=1, padding_k=1),
    AttentionCase([1], [1]),
    AttentionCase([3, 0, 2], [0, 4, 1], head_dim=80, padding_q=1, padding_k=2),
    AttentionCase([66, 1], [65, 70], head_dim=24, slack=70, lengths="long"),
)


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@settings(interpreted, max_examples=3, phases=NO_SHRINKING)
@given(cases(20))
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
@example(EXAMPLES[4])
def test_any_lengths(dtype, case):
    check(case, dtype)


@pytest.mark.parametrize("lengths", ["short", "long"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_over_more_than_one_tile(head_dim, lengths):
    tile = 65 if lengths == "short" else 129
    check(AttentionCase([tile], [66], head_dim, heads=1, padding_q=1, padding_k=1, lengths=lengths), torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@settings(interpreted, max_examples=20, phases=NO_SHRINKING)
@given(cases(200))
def test_any_lengths_thoroughly(dtype, case):
    check(case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", ["short", "long"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiles_of_every_architecture(arch, head_dim, lengths, monkeypatch):
    monkeypatch.setattr(launch_file, "architecture", lambda: arch)
    check(
        AttentionCase([130, 3], [67, 129], head_dim, heads=1, padding_q=1, padding_k=1, lengths=lengths), torch.float32
    )


def test_the_mean_length_chooses_the_row_of_the_table():
    def chosen(rows: int, sequences: int):
        return launch_file.tile_config(torch.empty(rows, 1, 64, dtype=torch.float16), torch.zeros(sequences + 1))

    short, long = (launch_file.CONFIGS["sm_90", torch.float16, 64, lengths] for lengths in ("short", "long"))
    assert short != long
    assert chosen(2 * launch_file.SHORT, 2) == chosen(0, 0) == short
    assert chosen(2 * launch_file.SHORT + 1, 2) == long


SELF = AttentionCase([5, 0, 9], [5, 0, 9], head_dim=80, padding_q=2, padding_k=2)


def packed(case: AttentionCase, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The queries, keys and values of a case as [T, 3, H, Dh], and the gradient of the output."""
    *parts, grad = (x.to(dtype) for x in case.values())
    return torch.stack(parts, 1), grad


def test_views_of_packed_rows_give_the_bits_of_contiguous_ones():
    qkv, grad = packed(SELF, torch.float16)
    views = kernels(SELF)(*qkv.unbind(1), grad)
    apart = kernels(SELF)(*(x.contiguous() for x in qkv.unbind(1)), grad)
    kv = torch.stack(qkv.unbind(1)[1:], 1)
    mixed = kernels(SELF)(qkv[:, 0].contiguous(), kv[:, 0], kv[:, 1].contiguous(), grad)
    for result, wanted, other in zip(views, apart, mixed, strict=True):
        assert torch.equal(result, wanted) and torch.equal(result, other)


def test_self_attention_gives_the_bits_of_three_tensors():
    qkv, grad = packed(SELF, torch.float16)
    cu_seqlens, _, longest, _ = SELF.bounds()
    out, lse = varlen_self_attention(qkv, cu_seqlens, longest)
    dqkv = varlen_self_attention_backward(grad, qkv, out, lse, cu_seqlens, longest)
    assert dqkv.shape == qkv.shape and dqkv.is_contiguous()
    wanted_out, wanted_lse, *wanted = kernels(SELF)(*qkv.unbind(1), grad)
    assert torch.equal(out, wanted_out) and torch.equal(lse, wanted_lse)
    assert torch.equal(dqkv, torch.stack(wanted, 1))


# Rows of dk and dv past the end, which are not stored, hold inf and NaN on the way.
overflows = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")


@overflows
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_apart_neither_overflow_nor_vanish(sign, dtype):
    """Scores of +-50 * 50 * sqrt(Dh): the largest weight is 1 and all others 0, or all scores are far below 0."""
    case = AttentionCase([2], [3], head_dim=32, heads=1)
    _, _, v, grad = (x.to(dtype) for x in case.values())
    q = torch.full((2, 1, 32), 50.0, dtype=dtype)
    k = sign * 50.0 * torch.tensor([1.0, 1.5, 0.5], dtype=dtype)[:, None, None].expand(3, 1, 32).contiguous()
    out, lse, dq, dk, dv = kernels(case)(q, k, v, grad)
    winner = 1 if sign > 0 else 2
    largest_score = sign * 50 * 50 * 32**0.5 * (1.5 if sign > 0 else 0.5)
    torch.testing.assert_close(lse.double(), torch.full((2, 1), largest_score, dtype=torch.float64))
    # Of scores of 2e4 fp32 knows 2e-3, so weights are 1 only as far as that.
    rtol = 1e-10 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(out, v[winner].expand_as(out), rtol=rtol, atol=0)
    torch.testing.assert_close(dv[winner], grad.sum(0), rtol=2 * rtol, atol=rtol)
    others = [key for key in range(3) if key != winner]
    assert dv[others].eq(0).all() and dk[others].eq(0).all()
    assert dq.isfinite().all() and dk.isfinite().all()


@overflows
def test_keys_past_the_end_do_not_overflow_where_every_score_is_far_below_zero():
    """exp2(0 - lse) of a key that is not there is infinite at lse = -200."""
    case = AttentionCase([3], [2], head_dim=24, heads=1)
    q, k, v, grad = case.values()
    q, k = torch.full_like(q, 20.0), torch.full_like(k, -2.0)
    k[1] *= 1.01
    for result, wanted in zip(kernels(case)(q, k, v, grad), plain(case)(q, k, v, grad), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


def test_more_sequences_than_one_launch_holds(monkeypatch):
    case = AttentionCase([2, 0, 1, 3, 1], [1, 2, 0, 1, 4], padding_q=2, padding_k=1)
    arguments = [x.half() for x in case.values()]
    wanted = kernels(case)(*arguments)
    for programs in (2, 3):  # six sequences with that of the padding: three launches, or two full ones
        monkeypatch.setattr(launch_file, "MAX_GRID_Z", programs)
        assert all(torch.equal(a, b) for a, b in zip(kernels(case)(*arguments), wanted, strict=True))


def test_offsets_beyond_int32(monkeypatch):
    """One sequence and padding at the very end of huge tensors: the rows before are never touched."""
    width = 128
    rows = rows_beyond_int32(width) + 8
    q, grad = (
        huge(rows, width, torch.float16).view(rows, 1, width),
        huge(rows, width, torch.float16).view(rows, 1, width),
    )
    small = AttentionCase([4], [4], head_dim=width, heads=1)
    values, _, _, small_grad = (x.half() for x in small.values())
    q[-6:-2], grad[-6:-2] = values, small_grad
    q[-2:], grad[-2:] = math.nan, math.nan
    cu_seqlens = torch.tensor([rows - 6, rows - 2], dtype=torch.int32)
    wanted = kernels(small)(values, values, values, small_grad)

    allocate_huge_outputs(monkeypatch)
    # CPU tensors are changed in place; copying them back would touch every page of a huge one.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    bounds = (cu_seqlens, cu_seqlens, 4, 4)
    out, lse = varlen_attention(q, q, q, *bounds)
    grads = varlen_attention_backward(grad, q, q, q, out, lse, *bounds)
    for result, expected in zip((out, lse, *grads), wanted, strict=True):
        assert torch.equal(result[-6:-2], expected)
        assert result[-2:].eq(0).all()


META = {name: torch.zeros(4, 2, 24, device="meta") for name in "kv"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 48)}, r"q must be \[Tq, H, Dh\] .* got q \[4, 48\], k \[4, 2, 24\]"),
        ({"v": torch.zeros(5, 2, 24)}, r"k, v \[Tk, H, Dh\], got .* k \[4, 2, 24\], v \[5, 2, 24\]"),
        ({"q": torch.zeros(4, 1, 24)}, r"got q \[4, 1, 24\], k \[4, 2, 24\]"),
        ({x: torch.zeros(4, 2, 40) for x in "qkv"}, "head dim must be one of 24, 32, 64, 80, 88, 96, 128, got 40"),
        ({"max_q": 1025}, "max_q must be from 0 to 1024, got 1025"),
        ({"max_k": -1}, "max_k must be from 0 to 1024, got -1"),
        ({"k": torch.zeros(4, 2, 24).half()}, "k is torch.float16 on cpu, q is torch.float32"),
        ({"v": torch.zeros(4, 2, 24, device="meta")}, "v is torch.float32 on meta"),
        ({"q": torch.zeros(2, 4, 24).transpose(0, 1)}, r"row of q must be contiguous .* got strides \(24, 96, 1\)"),
        ({"q": torch.zeros(4, 2, 48)[..., ::2]}, r"row of q must be contiguous .* got strides \(96, 48, 2\)"),
        (
            {"k": torch.zeros(4, 52)[:, :48].unflatten(1, (2, 24))},
            r"multiples of 8 elements, got strides \(52, 24, 1\)",
        ),
        (
            {"q": torch.zeros(1, device="meta").as_strided((4, 2, 24), (2**21, 24, 1))} | META,
            "less than 2097152 elements apart, got strides",
        ),
        ({"cu_q": torch.zeros(3)}, r"cu_q must be int32 \[S \+ 1\] on cpu, contiguous, got torch.float32 \[3\]"),
        ({"cu_k": torch.zeros(3, dtype=torch.int32, device="meta")}, r"cu_k must be int32 .* on meta"),
        ({"cu_k": torch.zeros(6, dtype=torch.int32)[::2]}, r"cu_k must be int32 .* contiguous"),
        ({"cu_k": torch.zeros(4, dtype=torch.int32)}, "cu_q has 3 entries and cu_k 4"),
        ({x: torch.zeros(0, dtype=torch.int32) for x in ("cu_q", "cu_k")}, "cu_q has 0 entries"),
    ],
)
def test_unsupported_arguments_raise(changes, message):
    arguments = {x: torch.zeros(4, 2, 24) for x in "qkv"}
    arguments |= {x: torch.zeros(3, dtype=torch.int32) for x in ("cu_q", "cu_k")} | {"max_q": 4, "max_k": 4}
    with pytest.raises(ValueError, match=message):
        varlen_attention(**arguments | changes)
    saved = {"grad": arguments["q"], "out": arguments["q"], "lse": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match=message):
        varlen_attention_backward(**saved | arguments | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_compiled_kernels_refuse_dtypes_without_a_matrix_unit(dtype, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    x, cu_seqlens = torch.zeros(4, 2, 24, dtype=dtype), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"must be bfloat16 or float16, got {dtype}"):
        varlen_attention(x, x, x, cu_seqlens, cu_seqlens, 4, 4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "grad",
            torch.zeros(4, 2, 24).half(),
            r"grad must be torch.float32 \[4, 2, 24\] on cpu, contiguous, got torch.float16",
        ),
        ("grad", torch.zeros(2, 4, 24).transpose(0, 1), r"grad must be .* with strides \(24, 96, 1\)"),
        ("out", torch.zeros(3, 2, 24), r"out must be .* got torch.float32 \[3, 2, 24\]"),
        ("lse", torch.zeros(2, 4), r"lse must be torch.float32 \[4, 2\] .* got torch.float32 \[2, 4\]"),
    ],
)
def test_what_the_forward_pass_cannot_have_saved_raises(name, value, message):
    x, cu_seqlens = torch.zeros(4, 2, 24), torch.zeros(3, dtype=torch.int32)
    arguments = {"grad": x, "q": x, "k": x, "v": x, "out": x, "lse": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match=message):
        varlen_attention_backward(**arguments | {name: value}, cu_q=cu_seqlens, cu_k=cu_seqlens, max_q=4, max_k=4)
