"""The row-wise kernels on a GPU, at ViT-H/14 shapes: accuracy in bf16, determinism, no host sync, CUDA graphs.

The same cases run small and on the CPU too, where the reference stands for the kernels, so that this file is known to
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
from ijepa_fast.model.predictor_layout import predictor_layout
from ijepa_fast.ragged import Ragged


class Shapes(NamedTuple):
    images: int
    grid: int
    patch_size: int
    width: int
    predictor_width: int


H14 = Shapes(images=32, grid=16, patch_size=14, width=1280, predictor_width=384)
SMALL = Shapes(images=2, grid=4, patch_size=14, width=40, predictor_width=24)


class Case(NamedTuple):
    """``call(ops)`` is what runs on the arguments, ``call(definitions)`` what it is compared with."""

    name: str
    call: Callable
    arguments: tuple
    magnitudes: Callable[[], list[float]] = list


def named(name: str, arguments: tuple, magnitudes: Callable[[], list[float]] = list) -> Case:
    return Case(name, lambda module: getattr(module, name), arguments, magnitudes)


def layer_norm_backward(module) -> Callable:
    def run(grad, grad_h, h, weight):
        mean, rstd = ops.layer_norm.definition(h, None, None, None, None, 1e-6)[2:]
        return module.layer_norm_backward(grad, grad_h, h, mean, rstd, weight, True, True, True)

    return run


def quantize_fp8(per_row: bool) -> Callable:
    """Its values as fp32: they are the very numbers of the reference, or the error is far beyond what fp32 explains."""
    return lambda module: lambda x: [result.float() for result in module.quantize_fp8(x, per_row)]


def draw_tokens(shapes: Shapes, share: tuple[float, float], blocks: int, generator: torch.Generator) -> Ragged:
    """Of each image ``blocks`` random sets of patches, each of a size between the given shares of the grid."""
    patches = shapes.grid**2
    low, high = (int(s * patches) for s in share)
    sizes = torch.randint(low, high + 1, (shapes.images * blocks,), generator=generator).tolist()
    return Ragged.from_lists(
        [
            (i // blocks * patches + torch.randperm(patches, generator=generator)[:size].sort().values).tolist()
            for i, size in enumerate(sizes)
        ]
    )


def cases(shapes: Shapes, device: str) -> list[Case]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    context = draw_tokens(shapes, (0.3, 0.6), 1, generator)
    targets = draw_tokens(shapes, (0.13, 0.22), 4, generator)
    context = context.padded(-(-context.num_rows // 128) * 128).to(device)
    targets = targets.padded(-(-targets.num_rows // 128) * 128).to(device)
    layout = predictor_layout(context, targets, 1, 4)
    indices, patches, width, side = context.indices, shapes.grid**2, shapes.width, shapes.grid * shapes.patch_size
    tokens = (layout.tokens.indices, layout.sources, layout.copies)
    compared = (layout.target_tokens, layout.predicted.cu_seqlens)

    pixels = torch.randint(0, 256, (shapes.images, 3, side, side), generator=generator, dtype=torch.uint8).to(device)
    to_rows = (indices, shapes.patch_size, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], torch.float32)
    x, grad, residual = (normal(indices.shape[0], width) for _ in range(3))
    everything, table = normal(shapes.images * patches, width), normal(patches, width)
    weight, bias, x_bias = (normal(width) for _ in range(3))
    narrow, positions = (normal(rows, shapes.predictor_width) for rows in (indices.shape[0], patches))
    grad_tokens = normal(tokens[0].shape[0], shapes.predictor_width)
    prediction = normal(compared[0].shape[0], width)
    hidden = normal(indices.shape[0], 4 * width)

    # For results that are sums over rows, the sum of the sizes of what is summed.
    def of_tokens():
        return [largest(sums) for sums in ops.predictor_tokens_backward.definition(grad_tokens.abs(), *tokens)]

    def of_layer_norm():
        weight_sum = largest(grad.abs().sum(0)) * largest(x)
        return [0, 0, weight_sum, weight_sum, 4 * largest((grad.abs() + residual.abs()).sum(0))]

    return [
        named("gather_patches", (pixels, *to_rows), lambda: [13.5]),
        named("gather_patches", (pixels / 255, *to_rows), lambda: [13.5]),
        named("gather_add", (x, table, indices)),
        named("gather_add_backward", (grad, indices)),
        named("predictor_tokens", (narrow, positions[0], positions, *tokens)),
        named("predictor_tokens_backward", (grad_tokens, *tokens), of_tokens),
        named("target_loss", (prediction, everything, *compared, "smooth_l1", True, 1e-5)),
        named("target_loss_backward", (prediction[0, 0], prediction, everything, *compared, "l2", True, 1e-5)),
        named("layer_norm", (x, None, None, weight, bias, 1e-6)),
        named("layer_norm", (x, residual, x_bias, weight, bias, 1e-6)),
        Case("layer_norm_backward", layer_norm_backward, (grad, residual, x, weight), of_layer_norm),
        Case("quantize_fp8", quantize_fp8(True), (hidden,)),
        Case("quantize_fp8", quantize_fp8(False), (x,)),
    ]


def check_accuracy(case: Case, dtype: torch.dtype) -> None:
    assert_close_to_reference(
        case.call(ops), case.call(definitions), case.arguments, dtype, magnitudes=case.magnitudes()
    )


CASE_IDS = [f"{case.name}-{i}" for i, case in enumerate(cases(SMALL, "cpu"))]


@pytest.mark.parametrize("i", range(len(CASE_IDS)), ids=CASE_IDS)
def test_cases_are_sound_on_the_cpu(i):
    case = cases(SMALL, "cpu")[i]
    check_accuracy(case, torch.float32)
    check_determinism(case.call(ops), cast(case.arguments, torch.float32))


@pytest.fixture(scope="module")
def cases_on_gpu() -> list[Case]:
    return cases(H14, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("i", range(len(CASE_IDS)), ids=CASE_IDS)
def test_accuracy(cases_on_gpu, i, dtype):
    check_accuracy(cases_on_gpu[i], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("i", range(len(CASE_IDS)), ids=CASE_IDS)
def test_ten_runs_give_the_same_bits(cases_on_gpu, i):
    case = cases_on_gpu[i]
    check_determinism(case.call(ops), cast(case.arguments, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("i", range(len(CASE_IDS)), ids=CASE_IDS)
def test_capture_without_host_sync(cases_on_gpu, i):
    case = cases_on_gpu[i]
    check_capture_without_host_sync(case.call(ops), cast(case.arguments, torch.bfloat16))
