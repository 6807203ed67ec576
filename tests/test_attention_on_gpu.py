"""varlen_attention on a GPU, at the lengths of ViT-H/14 and ViT-B/16: accuracy, determinism, no host sync, CUDA graphs.

The same cases run small and on the CPU too, where the op's CPU function stands for the kernels, so that this file is
known to work before a GPU sees it.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from attention_oracle import AttentionCase, finite, magnitudes, plain
from gpu_checks import check_capture_without_host_sync, check_determinism
from kernel_testing import assert_close_to_reference, cast
from torch import Tensor

from ijepa_fast import ops


class Shapes(NamedTuple):
    """Images, patches per image, and width and heads of encoder and predictor."""

    images: int
    patches: int
    heads: int
    head_dim: int
    predictor_head_dim: int


MODELS = {
    "h14": Shapes(images=16, patches=256, heads=16, head_dim=80, predictor_head_dim=24),
    "b16": Shapes(images=16, patches=196, heads=12, head_dim=64, predictor_head_dim=32),
}
SMALL = Shapes(images=2, patches=24, heads=2, head_dim=80, predictor_head_dim=24)


def attention_cases(shapes: Shapes) -> dict[str, AttentionCase]:
    """What a step calls, with masks of the usual sizes; rows are rounded up to 128."""
    generator = torch.Generator().manual_seed(0)

    def sizes(count: int, low: float, high: float) -> list[int]:
        bounds = int(low * shapes.patches), int(high * shapes.patches) + 1
        return torch.randint(*bounds, (count,), generator=generator).tolist()

    def case(lengths_q: list[int], lengths_k: list[int], head_dim: int, padded: bool = True) -> AttentionCase:
        padding = [-sum(lengths) % 128 if padded else 0 for lengths in (lengths_q, lengths_k)]
        return AttentionCase(lengths_q, lengths_k, head_dim, shapes.heads, *padding)

    context, blocks = sizes(shapes.images, 0.3, 0.6), sizes(4 * shapes.images, 0.13, 0.22)
    whole = [shapes.patches] * shapes.images
    both = [context[i // 4] + block for i, block in enumerate(blocks)]
    read = [min(4 * block, shapes.patches) for block in blocks[::4]]
    return {
        "context": case(context, context, shapes.head_dim),
        "target": case(whole, whole, shapes.head_dim, padded=False),
        "target, rows that are read": case(read, whole, shapes.head_dim),
        "predictor": case(both, both, shapes.predictor_head_dim),
        "predictor, rows that are read": case(blocks, both, shapes.predictor_head_dim),
        "empty sequences": case([0, 70, 0, 5], [33, 0, 0, 129], shapes.head_dim),
    }


def attend(case: AttentionCase, device: str) -> Callable[..., tuple[Tensor, ...]]:
    """Forward and backward op on q, k, v and the output's gradient."""
    cu_q, cu_k, *longest = case.bounds()
    bounds = cu_q.to(device), cu_k.to(device), *longest

    def run(q, k, v, grad):
        out, lse = ops.varlen_attention(q, k, v, *bounds)
        return out, finite(lse), *ops.varlen_attention_backward(grad, q, k, v, out, lse, *bounds)

    return run


def attend_packed(case: AttentionCase, device: str) -> Callable[..., tuple[Tensor, ...]]:
    """The ops for packed queries, keys and values."""
    cu_seqlens, _, longest, _ = case.bounds()
    bounds = cu_seqlens.to(device), longest

    def run(q, k, v, grad):
        qkv = torch.stack([q, k, v], 1)
        out, lse = ops.varlen_self_attention(qkv, *bounds)
        dqkv = ops.varlen_self_attention_backward(grad, qkv, out, lse, *bounds)
        return out, finite(lse), *dqkv.unbind(1)

    return run


class Call(NamedTuple):
    case: AttentionCase
    attend: Callable[[AttentionCase, str], Callable]


def calls(shapes: Shapes) -> dict[str, Call]:
    found = {}
    for name, case in attention_cases(shapes).items():
        found[name] = Call(case, attend)
        if case.lengths_q == case.lengths_k:
            found[f"{name}, packed"] = Call(case, attend_packed)
    return found


def check_accuracy(call: Call, dtype: torch.dtype, device: str) -> None:
    values = [x.to(device) for x in call.case.values()]
    run = call.attend(call.case, device)
    assert_close_to_reference(run, plain(call.case), values, dtype, magnitudes=magnitudes(call.case, dtype))
    for result, used in zip(run(*cast(values, dtype)), [call.case.used[i] for i in (0, 0, 0, 1, 1)], strict=True):
        assert result[used:].eq(0).all()


NAMES = list(calls(SMALL))
on_each_model = pytest.mark.parametrize(("model", "name"), [(model, name) for model in MODELS for name in NAMES])


@pytest.mark.parametrize("name", NAMES)
def test_cases_are_sound_on_the_cpu(name):
    call = calls(SMALL)[name]
    check_accuracy(call, torch.float32, "cpu")
    check_determinism(call.attend(call.case, "cpu"), call.case.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@on_each_model
def test_accuracy(model, name, dtype):
    check_accuracy(calls(MODELS[model])[name], dtype, "cuda")


@pytest.mark.gpu
@on_each_model
def test_ten_runs_give_the_same_bits(model, name):
    call = calls(MODELS[model])[name]
    check_determinism(call.attend(call.case, "cuda"), [x.bfloat16().cuda() for x in call.case.values()])


@pytest.mark.gpu
@on_each_model
def test_capture_without_host_sync(model, name):
    call = calls(MODELS[model])[name]
    check_capture_without_host_sync(call.attend(call.case, "cuda"), [x.bfloat16().cuda() for x in call.case.values()])
