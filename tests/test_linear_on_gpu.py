"""Linear ops and fused blocks on a GPU: accuracy in 16 bits, determinism, no host sync, CUDA graphs.

The same cases run small and on the CPU too, where the definitions stand for the kernels, so that this file is known to
work before a GPU sees it.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from gpu_checks import check_capture_without_host_sync, check_determinism
from kernel_testing import assert_close_to_reference, cast, definitions, largest
from torch import Tensor

from ijepa_fast import ops
from ijepa_fast.config import ModelConfig
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model.fused_blocks import fuse
from ijepa_fast.model.jepa import IJEPA, Objective
from ijepa_fast.model.vit import cast_weights

STEEPEST = 1.13
"""Largest slope of GELU."""


class Shapes(NamedTuple):
    """Rows, and width and hidden width of an MLP."""

    rows: int
    width: int
    hidden: int


ON_GPU = {
    "context encoder of H/14": Shapes(3840, 1280, 5120),
    "predictor": Shapes(20736, 384, 1536),
    "odd": Shapes(1001, 200, 328),
}
SMALL = Shapes(37, 24, 40)


class Case(NamedTuple):
    """``call(ops)`` is what runs on the arguments, ``call(definitions)`` what it is compared with."""

    call: Callable
    arguments: tuple
    magnitudes: list[float]


def cases(shapes: Shapes, device: str) -> dict[str, Case]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=generator)).to(device)

    rows, width, hidden = shapes
    x, grad, pre = normal(rows, width), normal(rows, width), normal(rows, hidden)
    weight, weight_2 = (normal(*shape, std=width**-0.5) for shape in ((hidden, width), (width, hidden)))
    bias = normal(hidden)
    of_pre = largest(x.abs() @ weight.abs().T + bias.abs())
    of_hidden = STEEPEST * grad.abs() @ weight_2.abs()
    of_weight = [largest(grad.abs().T @ x.abs()), largest(grad.abs().sum(0))]
    return {
        "linear_gelu": Case(
            lambda module: module.linear_gelu, (x, weight, bias, True), [2 * STEEPEST * of_pre, of_pre]
        ),
        "linear_gelu, inference": Case(
            lambda module: lambda *given: module.linear_gelu(*given)[0],
            (x, weight, bias, False),
            [2 * STEEPEST * of_pre],
        ),
        "hidden_gradient": Case(
            lambda module: module.hidden_gradient,
            (grad, weight_2, pre, True),
            [2 * largest(of_hidden), 2 * largest(of_hidden.sum(0))],
        ),
        "weight_gradient": Case(lambda module: module.weight_gradient, (grad, x, True), of_weight),
    }


def check_accuracy(case: Case, dtype: torch.dtype) -> None:
    assert_close_to_reference(case.call(ops), case.call(definitions), case.arguments, dtype, magnitudes=case.magnitudes)


NAMES = list(cases(SMALL, "cpu"))
on_each_shape = pytest.mark.parametrize(("shapes", "name"), [(shapes, name) for shapes in ON_GPU for name in NAMES])


@pytest.mark.parametrize("name", NAMES)
def test_cases_are_sound_on_the_cpu(name):
    case = cases(SMALL, "cpu")[name]
    check_accuracy(case, torch.float32)
    check_determinism(case.call(ops), cast(case.arguments, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@on_each_shape
def test_accuracy(shapes, name, dtype):
    check_accuracy(cases(ON_GPU[shapes], "cuda")[name], dtype)


@pytest.mark.gpu
@on_each_shape
def test_ten_runs_give_the_same_bits(shapes, name):
    case = cases(ON_GPU[shapes], "cuda")[name]
    check_determinism(case.call(ops), cast(case.arguments, torch.bfloat16))


@pytest.mark.gpu
@on_each_shape
def test_capture_without_host_sync(shapes, name):
    case = cases(ON_GPU[shapes], "cuda")[name]
    check_capture_without_host_sync(case.call(ops), cast(case.arguments, torch.bfloat16))


# Whole models. Head dims 64 and 32, which the attention kernels know.
MODEL = ModelConfig(
    img_size=96, patch_size=8, embed_dim=128, depth=3, num_heads=2, predictor_embed_dim=64, predictor_depth=2
)


def loss_and_gradients(model: IJEPA, device: str) -> dict[str, Tensor]:
    """Of 8 images, rows rounded up to 128, only needed rows of the last blocks."""
    sampler = MaskSampler(MaskConfig(), (12, 12))
    capacity = tuple(-(-rows // 128) * 128 for rows in sampler.counts(8, seed=0, step=0))
    masks = sampler.sample(8, seed=0, step=0, capacity=capacity).to(device)
    images = torch.randint(256, (8, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    loss = model(images.to(device), masks, all_targets=False)[0].total
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


def check_fused_model(device: str, compiled: bool = False, checkpointing: bool = False) -> None:
    """No further from fp64 on the CPU than 1.5 times plain blocks on the device, all gradients together."""

    def build() -> IJEPA:
        torch.manual_seed(0)
        model = MODEL.build(Objective())
        cast_weights(model, torch.bfloat16)
        return model

    exact = loss_and_gradients(build().double(), "cpu")
    plain, fused = build().to(device), build().to(device)
    for network in (fused.context_encoder, fused.target_encoder, fused.predictor):
        network.activation_checkpointing = checkpointing
        fuse(network)
        if compiled:
            network.compile_blocks()

    def distance(model: IJEPA) -> tuple[float, float]:
        found = loss_and_gradients(model, device)
        squares = {name: (found[name].double().cpu() - value).square().sum() for name, value in exact.items()}
        return float(squares.pop("loss")) ** 0.5, float(sum(squares.values())) ** 0.5

    (loss, gradient), (plain_loss, plain_gradient) = distance(fused), distance(plain)
    assert loss <= 2 * max(plain_loss, torch.finfo(torch.bfloat16).eps / 2 * float(exact["loss"]))
    assert gradient <= 1.5 * plain_gradient


def test_the_model_of_this_file_is_sound_on_the_cpu():
    check_fused_model("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_models_follow_plain_ones(compiled, checkpointing):
    check_fused_model("cuda", compiled, checkpointing)


@pytest.mark.gpu
def test_fused_models_in_fp32_are_refused():
    model = MODEL.build(Objective()).to("cuda")
    with pytest.raises(ValueError, match="need weights in bfloat16 or float16, got torch.float32"):
        fuse(model.predictor)
