"""The differentiable functions on top of the linear ops: gradients, what they keep, torch.compile, autocast, FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import ijepa_fast.step.flops  # noqa: F401  (registers the formulas)
from ijepa_fast import ops

T, K, H, N = 7, 6, 10, 5


def normal(*shape, dtype, seed):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def arguments(name, dtype, bias_dtype=None):
    """Leaves: x, weight and bias; of mlp the second weight and bias too."""
    mlp = name.startswith("mlp")
    outputs, bias_dtype = H if mlp else N, bias_dtype or dtype
    x, weight = normal(T, K, dtype=dtype, seed=0), normal(outputs, K, dtype=dtype, seed=1)
    bias = None if name == "linear without bias" else normal(outputs, dtype=bias_dtype, seed=2)
    bias_2 = None if name == "mlp without bias" else normal(N, dtype=bias_dtype, seed=4)
    return [x, weight, bias, *([normal(N, H, dtype=dtype, seed=3), bias_2] if mlp else [])]


def plain(name, x, weight, bias, *second):
    out = F.linear(x, weight, None if bias is None else bias.to(weight.dtype))
    return plain("linear", F.gelu(out), *second) if second else out


def ours(name, *leaves):
    return ops.mlp(*leaves) if name.startswith("mlp") else ops.linear(*leaves)


def with_gradients(function, name, leaves):
    out = function(name, *leaves)
    grad = normal(*out.shape, dtype=out.dtype, seed=9).detach()
    return [out, *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad)]


NAMES = ["linear", "linear without bias", "mlp", "mlp without bias"]


@pytest.fixture(autouse=True)
def compile_afresh():
    torch.compiler.reset()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
    leaves = arguments(name, torch.float64)
    assert torch.autograd.gradcheck(lambda *given: ours(name, *given), leaves)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_further_from_fp64_than_plain_torch(name, dtype):
    """Biases are fp32, as in training."""
    leaves = arguments(name, dtype, torch.float32)
    exact_leaves = [leaf if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves]
    results = [with_gradients(function, name, leaves) for function in (ours, plain)]
    for got, reference, exact in zip(*results, with_gradients(plain, name, exact_leaves), strict=True):
        assert got.dtype == reference.dtype
        error, allowed = ((value.double() - exact).abs().max() for value in (got, reference))
        assert error <= 2 * allowed.clamp(min=torch.finfo(got.dtype).eps / 2 * exact.abs().max())


@pytest.mark.parametrize("frozen", range(5))
def test_only_gradients_that_are_asked_for(frozen):
    leaves = arguments("mlp", torch.float32)
    leaves[frozen].requires_grad_(False)
    ours("mlp", *leaves).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(5)]


def test_without_gradients_nothing_but_the_hidden_layer_is_written():
    leaves = arguments("mlp", torch.float32)
    with torch.no_grad():
        inferred = ops.mlp(*leaves)
    assert torch.equal(inferred, ops.mlp(*leaves))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        ops.mlp(*leaves)
    assert sorted(map(tuple, kept)) == sorted([(T, K), (H, K), (N, H), (T, H), (T, H)])


@pytest.mark.parametrize("name", NAMES)
def test_compiles_in_one_graph(name):
    leaves = arguments(name, torch.float32)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for got, want in zip(with_gradients(compiled, name, leaves), with_gradients(ours, name, leaves), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    leaves = arguments(name, torch.float32)
    want = with_gradients(ours, name, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(ours, name, leaves)
    assert all(torch.equal(value, wanted) for value, wanted in zip(got, want, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_of_plain_layers(name):
    counts = []
    for function in (ours, plain):
        with FlopCounterMode(display=False) as counter:
            with_gradients(function, name, arguments(name, torch.float32))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * T * (K * H + H * N if name.startswith("mlp") else K * N)


def test_no_rows():
    leaves = arguments("mlp", torch.float32)
    leaves[0] = torch.zeros(0, K, requires_grad=True)
    out = ops.mlp(*leaves)
    out.sum().backward()
    assert out.shape == (0, N) and all(leaf.grad.eq(0).all() for leaf in leaves)
