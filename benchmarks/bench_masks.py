"""Mask sampling under pytest-benchmark; ``python -m benchmarks.masks`` writes the figures of the documentation.

    pytest benchmarks/bench_masks.py -s

Every case draws masks of 2,048 images and packs them (`make ext` builds the extension). On a GPU the extension's device
time is stated, by replay of a CUDA graph.
"""

import itertools

import pytest
import torch

from benchmarks.masks import (
    CALLS_PER_GRAPH,
    CONFIGS,
    GRIDS,
    GROUP_SIZE,
    IMAGES,
    assert_equal,
    captured_call,
    check_the_loop,
    per_image_loop,
)
from ijepa_fast.masks import extension
from ijepa_fast.masks.sampler import MaskSampler


def checked_sampler(config, grid, implementation, device="cpu"):
    """A sampler that draws what the torch sampler draws. Skips, with the reason, where it cannot run."""
    refusal = extension.reason(device) if implementation == "extension" else None
    if refusal:
        pytest.skip(refusal)
    samplers = [MaskSampler(config, grid, implementation=name) for name in (implementation, "torch")]
    assert_equal(*(sampler.sample(IMAGES, seed=1, step=7, device=device) for sampler in samplers))
    return samplers[0]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def state_rate(benchmark, images):
    rate = images / benchmark.stats.stats.min
    benchmark.extra_info["images_per_second"] = round(rate)
    print(f"\n{benchmark.name}: {rate:,.0f} images/s")


def test_the_loop_and_the_sampler_draw_the_same_recipe():
    """No rate without a check that both do the same work."""
    check_the_loop()


@pytest.mark.benchmark(group="masks", min_rounds=20, max_time=0.5)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("implementation", ["torch", "extension"])
def test_sampler(benchmark, implementation, config, grid):
    sampler = checked_sampler(config, grid, implementation)
    steps = itertools.count()
    benchmark(lambda: sampler.sample(IMAGES, seed=0, step=next(steps)))
    state_rate(benchmark, IMAGES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.benchmark(group="masks-cuda", min_rounds=20)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("images", [128, 2048])
def test_extension_on_cuda(benchmark, images, config, grid):
    call = captured_call(checked_sampler(config, grid, "extension", "cuda"), images, "cuda")
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # many calls, so that the host's launch of a graph does not count
        for _ in range(CALLS_PER_GRAPH):
            call()

    def replay():
        graph.replay()
        torch.cuda.synchronize()

    benchmark(replay)
    microseconds = benchmark.stats.stats.median / CALLS_PER_GRAPH * 1e6
    benchmark.extra_info["device_microseconds"] = round(microseconds, 2)
    print(f"\n{benchmark.name}: {microseconds:.1f} us of device time")


@pytest.mark.benchmark(group="masks", min_rounds=3)
def test_per_image_loop(benchmark):
    steps = itertools.count()
    benchmark(lambda: per_image_loop((14, 14), [next(steps)]))
    state_rate(benchmark, GROUP_SIZE)
