"""The registered ops: schema, fake tensors, gradients, torch.compile, autocast, and one signature everywhere.

What an op computes is tested in test_kernel_*.py, kernels and definitions alike.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ijepa_fast import ops
from ijepa_fast.model.predictor_layout import predictor_layout
from ijepa_fast.ragged import Ragged

WIDTH = 6


@dataclass(frozen=True)
class Case:
    """Arguments of an op; ``make`` takes the dtype of the floating tensors and returns them in order."""

    op: torch.library.CustomOpDef
    make: Callable[[torch.dtype], tuple]
    module: str | None = None  # of ijepa_fast.kernels, if a kernel is registered
    differentiable: bool = True
    backward_module: str | None = None  # if it is another one


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype)


def indices(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def gather_patches(dtype):
    images = normal(2, 3, 4, 6, dtype=dtype)
    return images, indices(5, -1, 11, 0), 2, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7], dtype


def gather_add(dtype):
    return normal(5, WIDTH, dtype=dtype), normal(4, WIDTH, dtype=dtype, seed=1), indices(7, 3, -1, 3, 0)


def predictor_tokens(dtype):
    context = Ragged.from_lists([[1, 3], [4, 5, 6]]).padded(6)
    targets = Ragged.from_lists([[0, 2], [], [7], [5, 6, 7]])
    layout = predictor_layout(context, targets, 1, 2)
    values = (normal(6, WIDTH, dtype=dtype), normal(WIDTH, dtype=dtype, seed=1), normal(4, WIDTH, dtype=dtype, seed=2))
    return *values, layout.tokens.indices, layout.sources, layout.copies


def target_loss(dtype, kind="smooth_l1"):
    values = (normal(6, WIDTH, dtype=dtype), normal(9, WIDTH, dtype=dtype, seed=1))
    return *values, indices(8, 0, 3, 3, 5, -1), indices(0, 2, 2, 5), kind, True, 1e-5


def varlen_attention(dtype):
    q, k, v = (normal(7, 2, 8, dtype=dtype, seed=i) for i in range(3))
    return q, k, v, indices(0, 3, 3, 6), indices(0, 2, 4, 7), 3, 3


def varlen_self_attention(dtype):
    return normal(7, 3, 2, 8, dtype=dtype), indices(0, 3, 3, 6), 3


def varlen_attention_backward(dtype):
    arguments = varlen_attention(dtype)
    out, lse = ops.varlen_attention.definition(*arguments)
    q, k, v, *bounds = arguments
    return normal(*q.shape, dtype=dtype, seed=3), q, k, v, out, lse, *bounds


def varlen_self_attention_backward(dtype):
    qkv, *bounds = varlen_self_attention(dtype)
    out, lse = ops.varlen_self_attention.definition(qkv, *bounds)
    return normal(*out.shape, dtype=dtype, seed=3), qkv, out, lse, *bounds


def layer_norm(dtype):
    rows = (normal(5, WIDTH, dtype=dtype, seed=i) for i in range(2))
    return *rows, *(normal(WIDTH, dtype=dtype, seed=2 + i) for i in range(3)), 1e-6


def plain_layer_norm(dtype):
    return normal(5, WIDTH, dtype=dtype), None, None, normal(WIDTH, dtype=dtype, seed=1), None, 1e-6


def quantize_fp8(dtype):
    return normal(5, WIDTH, dtype=dtype), True


def quantize_fp8_together(dtype):
    return normal(5, WIDTH, dtype=dtype), False


def linear_gelu(dtype, keep_pre=True):
    x, weight = normal(5, WIDTH, dtype=dtype), normal(8, WIDTH, dtype=dtype, seed=1)
    return x, weight, normal(8, dtype=dtype, seed=2), keep_pre


def hidden_gradient(dtype, need_bias=True):
    grad, weight, pre = (normal(*shape, dtype=dtype, seed=sum(shape)) for shape in ((5, WIDTH), (WIDTH, 8), (5, 8)))
    return grad, weight, pre, need_bias


def weight_gradient(dtype, need_bias=True):
    return normal(5, WIDTH, dtype=dtype), normal(5, 8, dtype=dtype, seed=1), need_bias


CASES = {
    "gather_patches": Case(ops.gather_patches, gather_patches, "gather_patches", differentiable=False),
    "gather_add": Case(ops.gather_add, gather_add, "gather_add"),
    "predictor_tokens": Case(ops.predictor_tokens, predictor_tokens, "predictor_tokens"),
    "target_loss": Case(ops.target_loss, target_loss, "target_loss"),
    "target_loss_l2": Case(ops.target_loss, lambda dtype: target_loss(dtype, "l2"), "target_loss"),
    "target_loss_l1": Case(ops.target_loss, lambda dtype: target_loss(dtype, "l1"), "target_loss"),
    "varlen_attention": Case(
        ops.varlen_attention, varlen_attention, "varlen_attention", backward_module="varlen_attention_backward"
    ),
    "varlen_attention_backward": Case(
        ops.varlen_attention_backward, varlen_attention_backward, "varlen_attention_backward", differentiable=False
    ),
    "varlen_self_attention": Case(
        ops.varlen_self_attention,
        varlen_self_attention,
        "varlen_attention",
        backward_module="varlen_attention_backward",
    ),
    "varlen_self_attention_backward": Case(
        ops.varlen_self_attention_backward,
        varlen_self_attention_backward,
        "varlen_attention_backward",
        differentiable=False,
    ),
    "layer_norm": Case(ops.layer_norm, layer_norm, "layer_norm"),
    "layer_norm_plain": Case(ops.layer_norm, plain_layer_norm, "layer_norm"),
    "quantize_fp8": Case(ops.quantize_fp8, quantize_fp8, "quantize_fp8", differentiable=False),
    "quantize_fp8_together": Case(ops.quantize_fp8, quantize_fp8_together, "quantize_fp8", differentiable=False),
    "linear_gelu": Case(ops.linear_gelu, linear_gelu, "linear_gelu", differentiable=False),
    "linear_gelu_inference": Case(
        ops.linear_gelu, lambda dtype: linear_gelu(dtype, False), "linear_gelu", differentiable=False
    ),
    "hidden_gradient": Case(ops.hidden_gradient, hidden_gradient, "linear_gelu", differentiable=False),
    "hidden_gradient_alone": Case(
        ops.hidden_gradient, lambda dtype: hidden_gradient(dtype, False), "linear_gelu", differentiable=False
    ),
    "weight_gradient": Case(ops.weight_gradient, weight_gradient, "weight_gradient", differentiable=False),
    "weight_gradient_alone": Case(
        ops.weight_gradient, lambda dtype: weight_gradient(dtype, False), "weight_gradient", differentiable=False
    ),
}
DIFFERENTIABLE = {name: case for name, case in CASES.items() if case.differentiable}
WITHOUT_GRADIENT = {"gather_add": (1,), "predictor_tokens": (2,), "target_loss": (1,)}
"""Tables of positions, and targets: they get none."""


def trained(case: Case, dtype: torch.dtype) -> tuple:
    """The arguments of a case; floating tensors that the op has a gradient for require one."""
    frozen = WITHOUT_GRADIENT.get(case.op._opoverload._schema.name.split("::")[1], ())
    return tuple(
        value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() and i not in frozen else value
        for i, value in enumerate(case.make(dtype))
    )


def outputs_and_gradients(function: Callable, arguments: tuple) -> list[Tensor]:
    """Every differentiable output, and the gradient of a fixed weighted sum of them."""
    results = function(*arguments)
    results = [results] if isinstance(results, Tensor) else [r for r in results if r.requires_grad]
    loss = sum((r * normal(*r.shape, dtype=r.dtype, seed=9)).sum() for r in results)
    inputs = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    return [*results, *torch.autograd.grad(loss, inputs)]


@pytest.fixture(autouse=True)
def compile_afresh():
    torch.compiler.reset()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_opcheck(case):
    arguments = trained(case, torch.float32) if case.differentiable else case.make(torch.float32)
    torch.library.opcheck(case.op, arguments)


def test_opcheck_of_optimizer_ops():
    params, grads = [normal(3, 2, dtype=torch.float32)], [normal(3, 2, dtype=torch.float32, seed=1)]
    momentum = torch.tensor(0.9)
    torch.library.opcheck(ops.grad_norm, (grads,))
    torch.library.opcheck(ops.ema_, (params, grads, momentum))


@pytest.mark.parametrize("case", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_gradients_are_those_of_finite_differences(case):
    arguments = trained(case, torch.float64)

    def differentiable_outputs(*values):
        results = case.op(*values)
        return results if isinstance(results, Tensor) else tuple(r for r in results if r.requires_grad)

    assert torch.autograd.gradcheck(differentiable_outputs, arguments)


@pytest.mark.parametrize("case", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_low_precision_are_close_to_fp64(case, dtype):
    actual = outputs_and_gradients(case.op, trained(case, dtype))
    rounded = [a.detach().double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in case.make(dtype)]
    inputs = [
        a.requires_grad_() if isinstance(given, Tensor) and given.requires_grad else a
        for a, given in zip(rounded, trained(case, dtype), strict=True)
    ]
    for low, exact in zip(actual, outputs_and_gradients(case.op, tuple(inputs)), strict=True):
        # Outputs and what flows back are rounded a few times each.
        scale = exact.abs().max()
        assert (low.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("case", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_compiles_in_one_graph(case):
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")
    arguments = trained(case, torch.float32)
    expected = outputs_and_gradients(case.op, arguments)
    for actual, wanted in zip(outputs_and_gradients(compiled, arguments), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_gather_patches_compiles_in_one_graph():
    images, rows, patch_size, mean, std, dtype = gather_patches(torch.float32)
    compiled = torch.compile(ops.gather_patches, fullgraph=True, backend="aot_eager")
    arguments = ((images * 255).byte(), rows, patch_size, mean, std, dtype)
    assert torch.equal(compiled(*arguments), ops.gather_patches(*arguments))


@pytest.mark.parametrize("case", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_autocast_changes_nothing(case):
    """An op computes in the dtypes it is given: what autocast casts are the projections around it."""
    arguments = trained(case, torch.float32)
    expected = outputs_and_gradients(case.op, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        actual = outputs_and_gradients(case.op, arguments)
    assert all(a.dtype == e.dtype and torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fake_cuda_tensors_give_the_shapes_and_dtypes_of_the_reference(case):
    arguments = case.make(torch.float32)
    real = case.op(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [torch.empty(a.shape, dtype=a.dtype, device="cuda") if isinstance(a, Tensor) else a for a in arguments]
        fake = case.op(*fakes)
    for made, wanted in zip(*([r] if isinstance(r, Tensor) else r for r in (fake, real)), strict=True):
        assert made.device.type == "cuda"
        assert (made.shape, made.dtype, made.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


def kernel_functions() -> list[tuple[str, str]]:
    found = set()
    for case in CASES.values():
        name = case.op._opoverload._schema.name.split("::")[1]
        if case.module:
            found.add((name, case.module))
        if case.module and hasattr(ops, f"{name}_backward"):
            found.add((f"{name}_backward", case.backward_module or case.module))
    return sorted(found)


@pytest.mark.parametrize(("name", "module"), kernel_functions())
def test_reference_kernel_and_op_have_one_signature(name, module):
    launcher = getattr(importlib.import_module(f"ijepa_fast.kernels.{module}"), name)
    schema = getattr(ops, name)._opoverload._schema
    wanted = [argument.name for argument in schema.arguments]
    assert list(inspect.signature(launcher).parameters) == wanted
    assert list(inspect.signature(getattr(ops, name).definition).parameters) == wanted
    assert torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CUDA")


def test_empty_inputs():
    nothing = torch.zeros(0, dtype=torch.int32)
    x = torch.zeros(0, WIDTH, requires_grad=True)
    table = torch.ones(4, WIDTH)
    out = ops.gather_add(x, table, nothing)
    out.sum().backward()
    assert out.shape == (0, WIDTH) and x.grad.shape == (0, WIDTH)
    loss = ops.target_loss(x, table, nothing, indices(0, 0), "l2", True, 1e-5)
    loss.backward()
    assert loss == 0
    half = torch.zeros(0, WIDTH, dtype=torch.float16, requires_grad=True)
    out, h, _, _ = ops.layer_norm(half, x, None, None, None, 1e-6)
    (out.sum() + h.sum()).backward()
    assert half.grad.dtype == torch.float16


def test_padding_of_predictions_gets_no_gradient_even_from_nan():
    prediction, *rest = trained(CASES["target_loss"], torch.float32)
    with torch.no_grad():
        prediction[5] = float("nan")
    loss = ops.target_loss(prediction, *rest)
    loss.backward()
    assert loss.isfinite() and prediction.grad[5].eq(0).all() and prediction.grad.isfinite().all()


def test_unknown_loss_raises():
    with pytest.raises(ValueError, match="loss must be one of smooth_l1, l2, l1, got 'huber'"):
        ops.target_loss(*target_loss(torch.float32, "huber"))
