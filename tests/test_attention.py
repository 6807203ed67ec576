"""Attention backends against softmax over one sequence and one head at a time, and the registry that picks them.

Legend: Tq, Tk packed rows of queries and keys, H heads, Dh head dim.
"""

import logging
import math
import re
import sys

import pytest
import torch
from flash_stand_in import loaded
from gpu_checks import check_capture_without_host_sync
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_fast import ops
from ijepa_fast.attention import backends as attention_backends
from ijepa_fast.attention import dispatch as attention
from ijepa_fast.attention.dispatch import (
    BACKENDS,
    BackendUnavailable,
    Preference,
    Request,
    check_backend,
    resolve,
    varlen_attention,
    varlen_self_attention,
)
from ijepa_fast.kernels import varlen_attention_launch
from ijepa_fast.model.vit import VisionTransformer

EVERYWHERE = ("cpu", "sdpa", "reference")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = {"triton", "flash_attn", "xformers", "torch_varlen", "cudnn", "cpu", "sdpa", "reference"}


def prefix_sums(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def naive(q, k, v, lengths_q, lengths_k):
    """softmax(q k^T / sqrt(Dh)) v of every sequence and head; zeros on padding rows and where there is no key."""
    outputs, first_q, first_k = [], 0, 0
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        rows_q, rows_k = slice(first_q, first_q + length_q), slice(first_k, first_k + length_k)
        for head in range(q.shape[1]):
            scores = q[rows_q, head] @ k[rows_k, head].T / math.sqrt(q.shape[2])
            outputs.append(torch.softmax(scores, dim=1) @ v[rows_k, head])
        first_q, first_k = first_q + length_q, first_k + length_k
    packed = [torch.stack(outputs[s : s + q.shape[1]], dim=1) for s in range(0, len(outputs), q.shape[1])]
    return torch.cat([*packed, q.new_zeros(q.shape[0] - first_q, *q.shape[1:])])


def with_op(q, k, v, *bounds):
    """The registered op and its own backward formula, which backends without kernels do not reach."""
    return ops.varlen_attention(q, k, v, *bounds)[0]


def with_backend(name):
    def attend(q, k, v, *bounds):
        return varlen_attention(q, k, v, *bounds, backend=name)

    return attend


def with_stand_in(name):
    attend = loaded(name)
    return lambda *arguments: attend(*arguments, False)


ON_GPUS = ("torch_varlen", "flash_attn")
ATTEND = {"op": with_op} | {name: with_backend(name) for name in EVERYWHERE}
ATTEND |= {name: with_stand_in(name) for name in ON_GPUS}


@st.composite
def cases(draw):
    """Lengths of queries and keys, heads, head dim, padding rows of both, and how loose the bounds are."""
    pairs = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4))
    pairs.append((1, 1))  # what happens when there is nothing at all is a test of its own
    lengths_q, lengths_k = zip(*pairs, strict=True)
    heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8]))
    rows = st.integers(0, 3) | st.integers(120, 400)
    padding, slack = draw(st.tuples(rows, rows)), draw(st.integers(0, 2))
    return lengths_q, lengths_k, heads, head_dim, padding, slack, draw(st.integers(0, 2**16))


def poisoned(x, used):
    """A leaf whose rows from ``used`` on are NaN."""
    x = x.detach().clone()
    x[used:] = math.nan
    return x.requires_grad_()


@pytest.mark.parametrize("attend", ATTEND.values(), ids=ATTEND)
@settings(max_examples=50)
@given(case=cases())
def test_equals_naive_softmax_whatever_stands_in_padding_rows(attend, case):
    lengths_q, lengths_k, heads, head_dim, (padding_q, padding_k), slack, seed = case
    generator = torch.Generator().manual_seed(seed)

    def random(rows):
        return torch.randn(rows, heads, head_dim, generator=generator, dtype=torch.float64).requires_grad_()

    used_q, used_k = sum(lengths_q), sum(lengths_k)
    q, k, v = random(used_q + padding_q), random(used_k + padding_k), random(used_k + padding_k)
    grad = random(used_q + padding_q)
    want = naive(q, k, v, lengths_q, lengths_k)
    want_grads = torch.autograd.grad(want, (q, k, v), grad, materialize_grads=True)

    leaves = poisoned(q, used_q), poisoned(k, used_k), poisoned(v, used_k)
    bounds = prefix_sums(lengths_q), prefix_sums(lengths_k), max(lengths_q) + slack, max(lengths_k) + slack
    out = attend(*leaves, *bounds)
    grads = torch.autograd.grad(out, leaves, poisoned(grad, used_q).detach(), materialize_grads=True)

    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
    for got, wanted in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    assert out[used_q:].eq(0).all()
    for got, used in zip(grads, (used_q, used_k, used_k), strict=True):
        assert got[used:].eq(0).all()


@pytest.mark.parametrize(
    ("name", "slack"),
    [(name, slack) for name in ("op", "reference", "sdpa", *ON_GPUS) for slack in (0, 1)],
)
def test_nothing_but_padding(name, slack):
    q, k, v = leaves = [poisoned(torch.zeros(2, 1, 3), 0) for _ in range(3)]
    empty = prefix_sums([0, 0])
    out = ATTEND[name](q, k, v, empty, empty, slack, slack)
    grads = torch.autograd.grad(out, leaves, torch.full_like(out, math.nan), materialize_grads=True)
    for result in (out, *grads):
        assert result.eq(0).all()


@pytest.mark.parametrize("attend", ATTEND.values(), ids=ATTEND)
def test_gradcheck(attend):
    lengths_q, lengths_k = [2, 0, 3], [3, 2, 1]
    bounds = prefix_sums(lengths_q), prefix_sums(lengths_k), 3, 3
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, 2, 3, generator=generator, dtype=torch.float64).requires_grad_() for rows in (6, 7, 7))
    torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, *bounds), (q, k, v))


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_uniform_promise_changes_nothing(backend):
    generator = torch.Generator().manual_seed(0)
    bounds = prefix_sums([2, 2, 2]), prefix_sums([4, 4, 4]), 2, 4
    results = []
    inputs = [torch.randn(rows, 2, 8, generator=generator, dtype=torch.float64) for rows in (6, 12, 12)]
    for uniform in (False, True):
        q, k, v = leaves = [x.clone().requires_grad_() for x in inputs]
        out = varlen_attention(q, k, v, *bounds, backend=backend, uniform=uniform)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ragged, uniform in zip(*results, strict=True):
        torch.testing.assert_close(uniform, ragged, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_self_attention_unpacks_queries_keys_and_values(backend):
    qkv = torch.randn(9, 3, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = [4, 0, 5]
    out = varlen_self_attention(qkv, prefix_sums(lengths), 5, backend=backend)
    torch.testing.assert_close(out, naive(*qkv.unbind(1), lengths, lengths), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_attention_in_the_same_dtype(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 17, 40]
    exact = torch.randn(3, sum(lengths), 2, 24, generator=generator, dtype=torch.float64).to(dtype).double()
    want = naive(*exact, lengths, lengths)
    plain = naive(*exact.to(dtype), lengths, lengths)
    cu_seqlens = prefix_sums(lengths)
    out = varlen_attention(*exact.to(dtype), cu_seqlens, cu_seqlens, 40, 40, backend=backend)
    assert out.dtype == dtype
    assert (out - want).norm() <= 2 * (plain - want).norm()


def test_every_backend_is_listed():
    assert set(BACKENDS) == NAMES
    for name in EVERYWHERE:
        assert BACKENDS[name].reason(Request(CPU, torch.float32, 64, 256)) is None


@pytest.mark.parametrize("name", ["flash_attn", "xformers", "torch_varlen", "cudnn"])
def test_named_backend_that_cannot_run_says_why(name):
    q = torch.zeros(2, 1, 8)
    cu_seqlens = prefix_sums([2])
    with pytest.raises(BackendUnavailable, match=f"'{name}' cannot run .*float32.*runs on cuda, not on cpu"):
        varlen_attention(q, q, q, cu_seqlens, cu_seqlens, 2, 2, backend=name)


def test_unknown_backend_is_a_value_error_that_lists_the_known():
    q = torch.zeros(2, 1, 8)
    cu_seqlens = prefix_sums([2])
    with pytest.raises(ValueError, match="auto, .*sdpa.*got 'flash'"):
        varlen_attention(q, q, q, cu_seqlens, cu_seqlens, 2, 2, backend="flash")


def test_head_dims_and_dtypes_that_a_library_lacks_are_refused():
    cuda = torch.device("cuda")
    assert "multiple of 8 up to 256, got 20" in BACKENDS["torch_varlen"].reason(Request(cuda, torch.bfloat16, 20, 64))
    assert "not torch.float32" in BACKENDS["torch_varlen"].reason(Request(cuda, torch.float32, 64, 64))
    assert BACKENDS["sdpa"].reason(Request(cuda, torch.float32, 20, 64)) is None


@pytest.mark.parametrize("head_dim", attention_backends.KERNEL_HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_takes_what_its_kernels_are_made_for(dtype, head_dim):
    assert BACKENDS["triton"].refuse(Request(CUDA, dtype, head_dim, 1024)) is None


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(CPU, torch.bfloat16, 64, 256), "runs on cuda, not on cpu"),
        (Request(CUDA, torch.float32, 64, 256), "computes in float16, bfloat16, not torch.float32"),
        (Request(CUDA, torch.bfloat16, 48, 256), "kernels for head dims 24, 32, 64, 80, 88, 96, 128, not 48"),
        (Request(CUDA, torch.bfloat16, 64, 1025), "kernels for up to 1024 tokens, not 1025"),
    ],
)
def test_triton_says_what_its_kernels_are_not_made_for(request_, message):
    assert message in BACKENDS["triton"].reason(request_)
    with pytest.raises(BackendUnavailable, match=message):
        resolve("triton", request_)


@pytest.mark.parametrize("head_dim", [8, 64, 80, 88, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cudnn_takes_sets_of_one_length(dtype, head_dim):
    assert BACKENDS["cudnn"].refuse(Request(CUDA, dtype, head_dim, 256, uniform=True)) is None


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(CPU, torch.bfloat16, 64, 256, True), "runs on cuda, not on cpu"),
        (Request(CUDA, torch.float32, 64, 256, True), "computes in float16, bfloat16, not torch.float32"),
        (Request(CUDA, torch.bfloat16, 20, 256, True), "multiple of 8 up to 128, got 20"),
        (Request(CUDA, torch.bfloat16, 136, 256, True), "multiple of 8 up to 128, got 136"),
        (Request(CUDA, torch.bfloat16, 64, 256), "sets of any length up to 256 tokens: needs sets of one length"),
        (Request(CUDA, torch.bfloat16, 64, 1, True), "at least 2 tokens in a set, got 1"),
    ],
)
def test_cudnn_says_what_it_does_not_take(request_, message):
    with pytest.raises(BackendUnavailable, match=message):
        resolve("cudnn", request_)


@pytest.mark.parametrize(("warn_only", "refused"), [(False, True), (True, False)])
def test_cudnn_is_refused_where_torch_would_refuse_it_as_not_deterministic(warn_only, refused):
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        reason = BACKENDS["cudnn"].refuse(Request(CUDA, torch.bfloat16, 64, 256, uniform=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert (reason is not None and "not deterministic" in reason) == refused


def test_cudnn_is_the_only_kernel_that_torch_may_take(monkeypatch, nothing_loaded):
    """With the CPU's attention for cuDNN's. Packed queries, keys and values stay where they are."""
    calls = []
    dense = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v):
        calls.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(), k.stride()))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return dense(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(BACKENDS["cudnn"], "refuse", lambda request: None)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    qkv = torch.randn(6, 3, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = varlen_self_attention(qkv, prefix_sums([3, 3]), 3, backend="cudnn", uniform=True)
    torch.testing.assert_close(out, naive(*qkv.unbind(1), [3, 3], [3, 3]), rtol=1e-10, atol=1e-12)
    assert calls == [(True, False, (3 * 48, 8, 48, 1))]
    assert torch.backends.cuda.math_sdp_enabled()


def test_cudnn_compiles_in_one_graph(monkeypatch, nothing_loaded):
    """Its checks and the choice of the kernel, with the kernel that a CPU has in its place."""
    torch.compiler.reset()
    backend, refuse = BACKENDS["cudnn"], BACKENDS["cudnn"].refuse

    def on_cuda(request):
        return refuse(Request(CUDA, torch.bfloat16, request.head_dim, request.max_seqlen, request.uniform))

    monkeypatch.setattr(backend, "refuse", on_cuda)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    with monkeypatch.context() as patch:
        choice = type("SDPBackend", (), {"CUDNN_ATTENTION": torch.nn.attention.SDPBackend.MATH})
        patch.setattr(torch.nn.attention, "SDPBackend", choice)
        assert backend.reason() is None
    compiled = torch.compile(varlen_self_attention, fullgraph=True, backend="aot_eager")
    for length in (3, 4, 5):
        qkv = torch.randn(2 * length, 3, 2, 8, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
        out = compiled(qkv, prefix_sums([length] * 2), length, backend="cudnn", uniform=True)
        torch.testing.assert_close(out, naive(*qkv.unbind(1), [length] * 2, [length] * 2), rtol=1e-10, atol=1e-12)


def test_cudnn_needs_a_torch_that_has_it(monkeypatch, nothing_loaded):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="'cudnn' cannot run here: this torch has no cuDNN"):
        check_backend("cudnn")


def test_limits_are_those_of_the_kernels():
    assert attention_backends.KERNEL_HEAD_DIMS == tuple(varlen_attention_launch.HEAD_DIM_PARTS)
    assert attention_backends.KERNEL_MAX_SEQLEN == varlen_attention_launch.MAX_SEQLEN
    assert set(attention_backends.HALF) == set(varlen_attention_launch.DTYPES)


@pytest.mark.parametrize("name", ["triton", "cpu"])
def test_backends_of_the_package_take_packed_queries_keys_and_values_as_they_are(name, monkeypatch):
    """Where the kernels cannot run, the op's CPU function stands for them behind the name "triton"."""
    monkeypatch.setattr(BACKENDS[name], "refuse", lambda request: None)
    qkv, cu_seqlens = torch.randn(5, 3, 2, 24), prefix_sums([2, 3])
    separate = varlen_attention(*qkv.unbind(1), cu_seqlens, cu_seqlens, 3, 3, backend=name)
    seen = []
    op = ops.varlen_self_attention
    monkeypatch.setattr(ops, "varlen_self_attention", lambda *a: seen.append(a) or op(*a))
    out = varlen_self_attention(qkv, cu_seqlens, 3, backend=name)
    assert torch.equal(out, separate)
    assert seen[0][0] is qkv


@pytest.fixture
def nothing_loaded(monkeypatch):
    """A process in which no backend was loaded and no choice logged."""
    for backend in BACKENDS.values():
        monkeypatch.setattr(backend, "attend", None)
        monkeypatch.setattr(backend, "missing", None)
    monkeypatch.setattr(attention, "_logged", set())


@pytest.mark.parametrize(
    ("hip", "capability", "reason"),
    [("6.4", None, "made for NVIDIA GPUs"), (None, (7, 5), "compute capability 8.0 or later, this one has 7.5")],
)
def test_triton_says_which_gpus_it_lacks_kernels_for(hip, capability, reason, monkeypatch, nothing_loaded):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(BackendUnavailable, match=reason):
        check_backend("triton")


def test_a_backend_that_cannot_be_imported_raises_when_the_model_is_built(monkeypatch, nothing_loaded):
    monkeypatch.setitem(sys.modules, "xformers", None)  # makes `import xformers` fail, installed or not
    with pytest.raises(BackendUnavailable, match="'xformers' cannot run here: .*xformers"):
        VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1, attention="xformers")
    VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1, attention="sdpa")


Q, BOUNDS = torch.zeros(5, 2, 8), prefix_sums([2, 3])
WRONG_CALLS = {
    r"q must be \[Tq, H, Dh\], k and v \[Tk, H, Dh\], got \(5, 16\)": (torch.zeros(5, 16), Q, BOUNDS, BOUNDS, 3, 3),
    r"got \(5, 2, 8\), \(5, 4, 8\)": (Q, torch.zeros(5, 4, 8), BOUNDS, BOUNDS, 3, 3),
    "one dtype, got torch.float32, torch.float16": (Q, Q.half(), BOUNDS, BOUNDS, 3, 3),
    r"cu_q has \(3,\) entries, but cu_k \(2,\)": (Q, Q, BOUNDS, prefix_sums([5]), 3, 5),
    r"cu_q must be int32 \[S \+ 1\], got torch.int64 \(3,\)": (Q, Q, BOUNDS.long(), BOUNDS, 3, 3),
    "cu_k must go from 0 to at most the 5 rows, got from 0 to 6": (Q, Q, BOUNDS, prefix_sums([2, 4]), 3, 4),
    "cu_q must go from 0 .* got from 1 to 5": (Q, Q, BOUNDS.clamp(min=1), BOUNDS, 3, 3),
    "cu_k must not fall, but one of its lengths is -1": (Q, Q, BOUNDS, prefix_sums([4, -1]), 3, 4),
    "longest sequence of cu_k has 3 rows, more than the 2 given": (Q, Q, BOUNDS, BOUNDS, 3, 2),
}


@pytest.mark.parametrize("message", WRONG_CALLS)
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_arguments_that_do_not_fit_are_named(message, backend):
    q, k, *bounds = WRONG_CALLS[message]
    with pytest.raises(ValueError, match=message):
        varlen_attention(q, k, k, *bounds, backend=backend)


@pytest.mark.parametrize(
    ("qkv", "bounds", "longest", "message"),
    [
        (Q, BOUNDS, 3, r"qkv must be \[T, 3, H, Dh\], got \(5, 2, 8\)"),
        (torch.zeros(5, 2, 3, 8), BOUNDS, 3, r"qkv must be .* got \(5, 2, 3, 8\)"),
        (torch.zeros(4, 3, 2, 8), BOUNDS, 3, "cu_seqlens must go from 0 to at most the 4 rows, got from 0 to 5"),
        (torch.zeros(5, 3, 2, 8), BOUNDS, 2, "longest sequence of cu_seqlens has 3 rows, more than the 2 given"),
        (torch.zeros(5, 3, 2, 8, device="meta"), BOUNDS, 3, "cu_seqlens must be on meta, .* got cpu"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_packed_arguments_that_do_not_fit_are_named(qkv, bounds, longest, message, backend):
    with pytest.raises(ValueError, match=message):
        varlen_self_attention(qkv, bounds, longest, backend=backend)


def test_arguments_are_not_checked_in_compiled_code():
    """Their values are not known to the compiler: to ask for them would cut the graph."""

    @torch.compile(fullgraph=True, backend="eager")
    def attend(q, qkv, bounds):
        out = varlen_attention(q, q, q, bounds, bounds, 3, 3, backend="sdpa")
        return out + varlen_self_attention(qkv, bounds, 3)

    assert attend(Q, torch.zeros(5, 3, 2, 8), BOUNDS).shape == Q.shape


def test_no_sequences_are_fine():
    assert varlen_attention(Q, Q, Q, *[torch.zeros(1, dtype=torch.int32)] * 2, 0, 0).count_nonzero() == 0


def test_a_backend_is_loaded_once(monkeypatch, nothing_loaded):
    loads = []
    monkeypatch.setattr(BACKENDS["sdpa"], "load", lambda: loads.append(1) or ATTEND["sdpa"])
    for _ in range(2):
        assert resolve("sdpa", Request(CPU, torch.float32, 64, 128)) == "sdpa"
    assert loads == [1]


def test_auto_takes_the_first_that_can_run_and_logs_what_it_passed_over(monkeypatch, caplog, nothing_loaded):
    monkeypatch.setattr(attention, "PRIORITY", (Preference(("flash_attn", "reference", "sdpa")),))
    request = Request(CPU, torch.float32, 64, 128)
    with caplog.at_level(logging.INFO, logger=attention.__name__):
        assert resolve("auto", request) == "reference"
        assert resolve("auto", request) == "reference"
    (record,) = caplog.records
    assert record.message.startswith(
        "attention with heads of width 64 runs on the backend 'reference' (cpu, float32); "
    )
    assert "flash_attn" in record.message and "not on cpu" in record.message


def test_auto_uses_the_first_row_that_holds(monkeypatch):
    rows = (
        Preference(("reference",), device="cuda"),
        Preference(("reference",), dtypes=(torch.float16,)),
        Preference(("reference",), head_dims=(24, 80), longest=100),
        Preference(("sdpa",)),
    )
    monkeypatch.setattr(attention, "PRIORITY", rows)
    chosen = {
        Request(CUDA, torch.float32, 64, 128): "reference",
        Request(CPU, torch.float16, 64, 128): "reference",
        Request(CPU, torch.float32, 80, 100): "reference",
        Request(CPU, torch.float32, 80, 101): "sdpa",
        Request(CPU, torch.float32, 64, 100): "sdpa",
    }
    assert {request: resolve("auto", request) for request in chosen} == chosen


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_every_device_ends_at_backends_that_run_everywhere(device):
    request = Request(torch.device(device), torch.float32, 20, 4096)
    row = next(row for row in attention.PRIORITY if row.holds_for(request))
    assert set(row.backends) <= set(BACKENDS) and row.backends[-2:] == ("sdpa", "reference")


def test_auto_without_any_candidate_gives_every_reason(monkeypatch):
    monkeypatch.setattr(attention, "PRIORITY", (Preference(("flash_attn", "torch_varlen")),))
    with pytest.raises(BackendUnavailable, match="flash_attn.*torch_varlen"):
        resolve("auto", Request(CPU, torch.float32, 64, 128))


@pytest.mark.parametrize("loaded", [False, True])
def test_auto_compiles_in_one_graph_without_warnings(loaded, recwarn, nothing_loaded):
    torch.compiler.reset()
    qkv, cu_seqlens = torch.randn(5, 3, 2, 8), prefix_sums([2, 3])
    if loaded:
        varlen_self_attention(qkv, cu_seqlens, 3)
    compiled = torch.compile(varlen_self_attention, fullgraph=True, backend="aot_eager")
    for longest in (3, 4, 5):  # the third time the length is symbolic
        out = compiled(qkv, cu_seqlens, longest)
        assert torch.equal(out, varlen_self_attention(qkv, cu_seqlens, longest))
    assert not [str(w.message) for w in recwarn if "lru_cache" in str(w.message) or "dynamo" in str(w.message)]


SETS = {
    "packed": ([33, 0, 1, 130], [33, 0, 1, 130], 28, 28),
    "packed, much padding": ([33, 0, 1, 130], [33, 0, 1, 130], 700, 700),
    "without keys or queries": ([33, 0, 5, 130], [40, 50, 0, 150], 28, 700),
}
"""Lengths of queries and keys, and padding rows of both."""


def leave_nan_in_free_memory(device):
    """So that a row which a library does not write shows: it allocates in C++, where ``conftest.py`` cannot fill."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        sizes = [2**17] * 64 + [2**24] * 4  # small allocations and large ones have memory of their own
        blocks = [torch.full((size,), math.nan, device=device) for size in sizes]
        del blocks


def check_contract(name, sets, head_dim, device):
    """Against fp64, with NaN in padding rows and in memory that nobody wrote."""
    lengths_q, lengths_k, padding_q, padding_k = SETS[sets]
    used_q, used_k, dtype = sum(lengths_q), sum(lengths_k), torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    rows_q, rows_k, used = used_q + padding_q, used_k + padding_k, (used_q, used_k, used_k, used_q)
    exact = [
        torch.randn(rows, 3, head_dim, generator=generator).to(dtype).double().to(device)
        for rows in (rows_q, rows_k, rows_k, rows_q)
    ]

    def run(dtype, attend):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in exact[:3]]
        leave_nan_in_free_memory(device)
        out = attend(*leaves)
        leave_nan_in_free_memory(device)
        return [out, *torch.autograd.grad(out, leaves, exact[3].to(dtype))]

    def attend(q, k, v):
        cu_q, cu_k = prefix_sums(lengths_q).to(device), prefix_sums(lengths_k).to(device)
        if sets.startswith("packed"):
            return varlen_self_attention(torch.stack([q, k, v], 1), cu_q, max(lengths_q), backend=name)
        return varlen_attention(q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k), backend=name)

    want = run(torch.float64, lambda q, k, v: naive(q, k, v, lengths_q, lengths_k))
    plain = run(dtype, lambda q, k, v: naive(q, k, v, lengths_q, lengths_k))
    for x, first in zip(exact, used, strict=True):
        x[first:] = math.nan
    got = run(dtype, attend)
    for result, wanted, same_dtype, end in zip(got, want, plain, (used_q, *used[:3]), strict=True):
        assert (result - wanted)[:end].norm() <= 2 * (same_dtype - wanted)[:end].norm()
        assert result[end:].eq(0).all()


@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_backends_of_the_cpu_keep_the_contract(name, sets):
    check_contract(name, sets, 24, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("head_dim", [24, 64, 80])
@pytest.mark.parametrize("name", sorted(NAMES))
def test_backends_on_a_gpu_keep_the_contract(name, head_dim, sets):
    """A backend that cannot run must say why, and three always can.

    Nothing is skipped: benchmarks/gpu_check.py takes a skipped test for one that did not pass."""
    dtype, longest = torch.bfloat16, max(*SETS[sets][0], *SETS[sets][1])
    reason = BACKENDS[name].reason(Request(CUDA, dtype, head_dim, longest))
    if reason is None:
        check_contract(name, sets, head_dim, CUDA)
        return
    assert name not in ("torch_varlen", "sdpa", "reference"), reason
    rows, bounds = torch.zeros(3, 1, head_dim, dtype=dtype, device=CUDA), prefix_sums([3]).cuda()
    with pytest.raises(BackendUnavailable, match=re.escape(reason)):
        varlen_attention(rows, rows, rows, bounds, bounds, longest, longest, backend=name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch_varlen"])
def test_library_on_a_gpu_is_captured_without_host_sync(name):
    """With padding rows. No set has more than two blocks of keys: sums of more have no fixed order."""
    lengths, padding = [33, 0, 1, 130], 700
    rows = torch.randn(sum(lengths) + padding, 4, 2, 64, generator=torch.Generator().manual_seed(0))
    rows[sum(lengths) :] = math.nan
    cu_seqlens = prefix_sums(lengths).cuda()

    def run(qkv, grad):
        qkv = qkv.detach().requires_grad_()
        out = varlen_self_attention(qkv, cu_seqlens, max(lengths), backend=name)
        return out, torch.autograd.grad(out, qkv, grad)[0]

    check_capture_without_host_sync(run, [x.bfloat16().cuda() for x in (rows[:, :3], rows[:, 3])])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [24, 64, 80])
@pytest.mark.parametrize(("length_q", "length_k"), [(256, 256), (196, 196), (100, 256)])
def test_cudnn_on_a_gpu(length_q, length_k, head_dim):
    """Forward and backward against fp64, on packed queries, keys and values where they have one length."""
    cuda, dtype, sequences = torch.device("cuda"), torch.bfloat16, 3
    assert BACKENDS["cudnn"].reason(Request(cuda, dtype, head_dim, 256, uniform=True)) is None
    lengths_q, lengths_k = [length_q] * sequences, [length_k] * sequences
    generator = torch.Generator().manual_seed(0)
    rows = sum(lengths_q), sum(lengths_k), sum(lengths_k), sum(lengths_q)
    exact = [torch.randn(n, 4, head_dim, generator=generator).to(dtype).double().cuda() for n in rows]

    def run(dtype, attend):
        leaves = [x.to(dtype).requires_grad_() for x in exact[:3]]
        out = attend(*leaves)
        return [out, *torch.autograd.grad(out, leaves, exact[3].to(dtype))]

    def cudnn(q, k, v):
        if length_q == length_k:
            cu_seqlens = prefix_sums(lengths_q).cuda()
            packed = torch.stack([q, k, v], 1)
            return varlen_self_attention(packed, cu_seqlens, length_q, backend="cudnn", uniform=True)
        bounds = prefix_sums(lengths_q).cuda(), prefix_sums(lengths_k).cuda(), length_q, length_k
        return varlen_attention(q, k, v, *bounds, backend="cudnn", uniform=True)

    want = run(torch.float64, lambda q, k, v: naive(q, k, v, lengths_q, lengths_k))
    plain = run(dtype, lambda q, k, v: naive(q, k, v, lengths_q, lengths_k))
    for result, wanted, same_dtype in zip(run(dtype, cudnn), want, plain, strict=True):
        assert (result - wanted).norm() <= 2 * (same_dtype - wanted).norm()
