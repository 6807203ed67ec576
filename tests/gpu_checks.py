"""What every op must do on a GPU besides being right: the same bits every time, no wait for the device, capture."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

RUNS = 10


def flat(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def assert_same(results: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


def check_determinism(run: Callable, arguments: Sequence[Any]) -> None:
    """Ten runs give the same bits; works on any device."""
    first, *others = (flat(run(*arguments)) for _ in range(RUNS))
    for other in others:
        assert_same(first, other)


def check_capture_without_host_sync(run: Callable, arguments: Sequence[Any]) -> None:
    """The op can be captured in a CUDA graph, whose replay sees new inputs and equals the eager result."""
    run(*arguments)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flat(run(*arguments))
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.is_floating_point():
            argument.mul_(-0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, flat(run(*arguments)))
