"""Padding rows around the attention of other libraries. ``test_attention.py`` has what holds for every backend."""

from types import SimpleNamespace

import pytest
import torch
from attention_oracle import AttentionCase, plain, prefix_sums
from flash_stand_in import cudnn_attention, flash_attention_2, loaded
from torch._dynamo.testing import CompileCounterWithBackend

from ijepa_fast.attention.backends import WHOLE_WINDOW
from ijepa_fast.attention.dispatch import BACKENDS, varlen_self_attention
from ijepa_fast.attention.padding import FLASH_BLOCK, covered, guarded

CASES = {
    "sequences of several blocks": AttentionCase([300, 0, 1, 129], [7, 260, 0, 384], padding_q=90, padding_k=500),
    "more padding than bound": AttentionCase([3, 5], [4, 2], padding_q=700, padding_k=1300),
    "one row more than a block": AttentionCase([2], [2], padding_q=FLASH_BLOCK - 1, padding_k=FLASH_BLOCK + 1),
    "only queries are padded": AttentionCase([2, 9], [3, 1], padding_q=300),
    "only keys are padded": AttentionCase([2, 9], [3, 1], padding_k=300),
    "a loose bound": AttentionCase([2, 9], [3, 1], padding_q=200, padding_k=200, slack=900),
    "no keys": AttentionCase([130, 4], [0, 0], padding_q=3),
    "no queries": AttentionCase([0, 0], [130, 4], padding_k=3),
    "no rows": AttentionCase([0, 0], [0, 0]),
    "no sequences": AttentionCase([], [], padding_q=140, padding_k=5),
    "nothing": AttentionCase([], []),
}


def check(attend, case):
    """Output and gradients against plain attention, exactly zero on padding rows, which are NaN in all inputs."""
    *leaves, grad = (x.double() for x in case.values())
    want, _, *want_grads = plain(case)(*leaves, grad)
    leaves = [x.requires_grad_() for x in leaves]
    out = attend(*leaves, *case.bounds())
    used_q, used_k = case.used
    grads = torch.autograd.grad(out, leaves, grad)
    for got, wanted, used in zip((out, *grads), (want, *want_grads), (used_q, used_q, used_k, used_k), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
        assert got[used:].eq(0).all()


@pytest.mark.parametrize("name", CASES)
def test_further_sequences_leave_no_row_unwritten(name):
    attend = covered(flash_attention_2)
    check(lambda *arguments: attend(*arguments, False), CASES[name])


@pytest.mark.parametrize("name", sorted(set(CASES) - {"no keys", "no queries", "no rows", "no sequences", "nothing"}))
def test_copies_leave_no_row_unwritten(name):
    attend = guarded(flash_attention_2)
    check(lambda *arguments: attend(*arguments, False), CASES[name])


@pytest.mark.parametrize("around", [covered, guarded])
def test_rows_without_padding_are_handed_over_as_they_are(around):
    seen = []
    arguments = (*torch.zeros(3, 4, 1, 8).unbind(), *[prefix_sums([2, 2])] * 2, 2, 2)
    around(lambda *handed: seen.extend(handed))(*arguments, True)
    assert all(got is given for got, given in zip(seen, arguments, strict=True))


def test_further_sequences_need_no_copy_of_rows_and_no_value_from_the_device():
    """Tensors of the meta device have no values to read."""
    qkv = torch.zeros(500, 3, 2, 8, device="meta")
    cu_seqlens = torch.zeros(4, dtype=torch.int32, device="meta")
    q, k, v = qkv.unbind(1)
    seen = []
    covered(lambda *handed: seen.extend(handed))(q, k, v, cu_seqlens, cu_seqlens, 200, 200, False)
    assert seen[0] is q and seen[1] is k and seen[2] is v
    assert seen[3].shape == seen[4].shape
    assert seen[5:] == [256, 256]


@pytest.mark.parametrize(("rows", "bound"), [(0, 1), (1, 1), (500, 128), (512, 128), (1000, 200), (15104, 256)])
@pytest.mark.parametrize("used", [0, 1, 128, 250, 499])
def test_further_sequences_are_few_and_no_longer_than_the_bound(rows, bound, used):
    used = min(used, rows)
    seen = []
    x = torch.zeros(rows, 1, 8)
    covered(lambda *handed: seen.extend(handed))(x, x, x, *[prefix_sums([used])] * 2, bound, bound, False)
    *_, cu_q, cu_k, max_q, max_k = seen
    for cu_seqlens, longest in ((cu_q, max_q), (cu_k, max_k)):
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens[:2].tolist() == [0, used] and cu_seqlens[-1] == rows
        assert bound <= longest < bound + FLASH_BLOCK
        lengths = cu_seqlens.diff()[1:]
        assert lengths.min() >= 0 and lengths.max() <= longest
    lengths_q, lengths_k = cu_q.diff()[1:], cu_k.diff()[1:]
    assert (lengths_q * lengths_k).eq(0).all()
    assert len(lengths_q) == 2 * (rows // max_q + 1)


@pytest.fixture
def torch_varlen(monkeypatch):
    """The backend of that name with the stand-in for its library, on the CPU."""
    monkeypatch.setattr(BACKENDS["torch_varlen"], "refuse", lambda request: None)
    monkeypatch.setattr(BACKENDS["torch_varlen"], "attend", loaded("torch_varlen"))


def packed_case(case):
    """Packed queries, keys and values of a case whose queries and keys have the same lengths, and the gradient."""
    q, k, v, grad = (x.double() for x in case.values())
    return torch.stack([q, k, v], 1).requires_grad_(), grad


PACKED = [
    AttentionCase(lengths, lengths, padding_q=padding, padding_k=padding)
    for lengths, padding in (([5, 0, 2], 250), ([3, 200, 1], 117), ([100, 100, 99], 0), ([130, 4, 0], 1500))
]


def check_packed(attend, case):
    qkv, grad = packed_case(case)
    out = attend(qkv, *case.bounds()[1:3], backend="torch_varlen")
    got = [out, *torch.autograd.grad(out, qkv, grad)[0].unbind(1)]
    want, _, *want_grads = plain(case)(*qkv.detach().unbind(1), grad)
    for result, wanted in zip(got, (want, *want_grads), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-10, atol=1e-12)
        assert result[case.used[0] :].eq(0).all()


@pytest.mark.parametrize("case", PACKED)
def test_packed_queries_keys_and_values(case, torch_varlen):
    check_packed(varlen_self_attention, case)


def test_one_graph_for_all_numbers_of_rows(torch_varlen):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(varlen_self_attention, fullgraph=True, dynamic=True, backend=counter)
    for case in PACKED:
        check_packed(compiled, case)
    assert counter.frame_count == 1


def covers(name, **library):
    """Whether a backend covers padding rows by sequences, rather than zero them by copies."""
    handed = []

    def library_function(q, k, v, *bounds, **named_bounds):
        handed.append((bounds or tuple(named_bounds.values()))[0])
        return q

    rows, cu_seqlens = torch.zeros(3, 1, 8), prefix_sums([2])
    loaded(name, library_function, **library)(rows, rows, rows, cu_seqlens, cu_seqlens, 2, 2, False)
    return len(handed[0]) > len(cu_seqlens)


def test_torchs_flash_attention_2_gets_further_sequences():
    assert covers("torch_varlen")


@pytest.mark.parametrize("version", ["2.10.0", "2.13.1+cu130", "2.14.1"])
def test_it_is_known_in_these_versions(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert covers("torch_varlen")


@pytest.mark.parametrize("version", ["2.15.0.dev20261201", "2.15.0", "3.0.0"])
def test_what_later_versions_take_gets_copies(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert not covers("torch_varlen")


@pytest.mark.parametrize(("version", "cudnn"), [("2.14.1", False), ("2.15.0", True)])
def test_padding_rows_where_torch_would_take_cudnn(version, cudnn, monkeypatch):
    """2.14 is told to take FlashAttention-2; what later versions take is not known, and need not be."""
    monkeypatch.setattr(torch, "__version__", version)
    seen = []
    attend = loaded("torch_varlen", cudnn=lambda *arguments: seen.append(1) or cudnn_attention(*arguments))
    check(lambda *arguments: attend(*arguments, False), CASES["more padding than bound"])
    assert bool(seen) == cudnn


@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_torchs_rule_leaves_windows_to_flash_attention_2(tokens, monkeypatch):
    """In both directions: backward is asked with the window alone."""
    from torch.nn.attention import varlen

    if not hasattr(varlen, "_can_use_cudnn"):
        pytest.skip("this torch never takes cuDNN")
    monkeypatch.setattr(varlen, "_should_use_cudnn", lambda device_index: True)
    shape = torch.zeros(0, 2, 80, dtype=torch.bfloat16)
    rows = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), dtype=shape.dtype, shape=shape.shape)
    rows.size = shape.size
    assert varlen._can_use_cudnn(rows, rows, rows, tokens, [-1, -1]) == (tokens > FLASH_BLOCK)
    assert not varlen._can_use_cudnn(rows, rows, rows, tokens, list(WHOLE_WINDOW))


def test_another_flash_attention_that_torch_is_told_to_take_gets_copies(monkeypatch):
    from torch.nn.attention import _registry

    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_ACTIVE", ("FA4", object()))
    assert not covers("torch_varlen")


@pytest.mark.parametrize(
    ("module", "expected"), [("flash_attn", True), ("flash_attn_interface", False), ("flash_attn.cute", False)]
)
def test_of_flash_attns_versions_the_second_alone_gets_further_sequences(module, expected):
    assert covers("flash_attn", module=module) == expected


@pytest.mark.parametrize(
    ("version", "expected"), [("2.4.0.post1", True), ("2.8.4", True), ("2.3.6", False), ("2.9.0", False)]
)
def test_versions_of_the_second_that_were_not_read_get_copies(version, expected):
    assert covers("flash_attn", version=version) == expected


@pytest.mark.parametrize("name", ["torch_varlen", "flash_attn"])
def test_kernels_of_amd_gpus_get_copies(name, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not covers(name)


def test_the_stand_in_shows_rows_that_nobody_covered():
    """Else it could not show that all are."""
    case = CASES["more padding than bound"]
    *leaves, grad = (x.double() for x in case.values())
    leaves = [x.requires_grad_() for x in leaves]
    out = flash_attention_2(*leaves, *case.bounds())
    for result, used in zip((out, *torch.autograd.grad(out, leaves, grad)), (8, 8, 6, 6), strict=True):
        assert result[:used].isfinite().all() and result[used:].isnan().all()
    too_long = torch.ones(5, 1, 8)
    assert flash_attention_2(too_long, too_long, too_long, *[prefix_sums([5])] * 2, 3, 5)[3:].isnan().all()
