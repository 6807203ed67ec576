"""Images per second of mask sampling on one CPU core, beside the per-image loop that data loaders run.

    pytest benchmarks/bench_masks.py -s

Every case draws masks of 2,048 images and packs them. The bars for the official recipe at 14 x 14: 100,000 images/s for
the torch sampler, 1,000,000 for the C++ extension (`make ext` builds it). On a GPU the extension's device time is
stated, by replay of a CUDA graph; the bar on an H200 is 50 microseconds for 2,048 images at 16 x 16.
"""

import math
import random

import pytest
import torch

from ijepa_fast import extension
from ijepa_fast.masks import MaskConfig, MaskSampler

IMAGES, GROUP_SIZE = 2048, 128
CONFIGS = {
    "official": MaskConfig.official(GROUP_SIZE),
    "exact": MaskConfig(),
    "fixed": MaskConfig(context="fixed"),
}
GRIDS = {"14x14": (14, 14), "16x16": (16, 16), "28x28": (28, 28)}
CALLS_PER_GRAPH = 20


def checked_sampler(config, grid, implementation, device="cpu"):
    """A sampler that draws what the torch sampler draws. Skips, with the reason, where it cannot run."""
    refusal = extension.reason(device) if implementation == "extension" else None
    if refusal:
        pytest.skip(refusal)
    samplers = [MaskSampler(config, grid, implementation=name) for name in (implementation, "torch")]
    ours, theirs = (sampler.sample(IMAGES, seed=1, step=7, device=device) for sampler in samplers)
    for kind in ("context", "targets"):
        assert torch.equal(getattr(ours, kind).indices, getattr(theirs, kind).indices)
        assert torch.equal(getattr(ours, kind).cu_seqlens, getattr(theirs, kind).cu_seqlens)
    return samplers[0]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def per_image_loop(grid, steps):
    """The official recipe as a collator draws it, image by image: lists of int64 index tensors, context and targets.

    Written from the paper; sizes once per step, contexts truncated to the shortest of each GROUP_SIZE images.
    """
    height, width = grid
    contexts, targets = [], []
    for step in steps:
        sizes = random.Random(step)
        share = sizes.random()
        area, aspect = int(height * width * (0.15 + 0.05 * share)), 0.75 + 0.75 * share
        block = min(round(math.sqrt(area * aspect)), height - 1), min(round(math.sqrt(area / aspect)), width - 1)
        side = round(math.sqrt(int(height * width * (0.85 + 0.15 * sizes.random()))))
        context_block = min(side, height - 1), min(side, width - 1)

        def place(size):
            top = int(torch.randint(0, height - size[0], (1,)))
            left = int(torch.randint(0, width - size[1], (1,)))
            return slice(top, top + size[0]), slice(left, left + size[1])

        group = []
        for _ in range(GROUP_SIZE):
            visible = torch.ones(height, width, dtype=torch.int32)
            for _ in range(4):
                target, where = torch.zeros(height, width, dtype=torch.int32), place(block)
                target[where] = 1
                visible[where] = 0
                targets.append(target.flatten().nonzero().squeeze(1))
            context = torch.zeros(height, width, dtype=torch.int32)
            where = place(context_block)
            context[where] = visible[where]
            group.append(context.flatten().nonzero().squeeze(1))
        shortest = min(map(len, group))
        contexts += [context[:shortest] for context in group]
    return contexts, targets


def state_rate(benchmark, images):
    rate = images / benchmark.stats.stats.min
    benchmark.extra_info["images_per_second"] = round(rate)
    print(f"\n{benchmark.name}: {rate:,.0f} images/s")


def test_the_loop_and_the_sampler_draw_the_same_recipe():
    """No rate without a check that both do the same work: mean context and target tokens agree."""
    steps = range(100)
    contexts, targets = per_image_loop((14, 14), steps)
    sampler = MaskSampler(MaskConfig.official(GROUP_SIZE), (14, 14))
    counts = torch.tensor([sampler.counts(GROUP_SIZE, seed=0, step=step) for step in steps], dtype=torch.float64)
    loop_context = torch.tensor([float(len(c)) for c in contexts]).view(100, GROUP_SIZE).sum(1).double()
    loop_targets = torch.tensor([float(len(t)) for t in targets]).view(100, GROUP_SIZE * 4).sum(1).double()
    for ours, loop in ((counts[:, 0], loop_context), (counts[:, 1], loop_targets)):
        error = math.sqrt((ours.var() + loop.var()) / 100)
        assert abs(ours.mean() - loop.mean()) < 4 * error


@pytest.mark.benchmark(group="masks", min_rounds=20)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("implementation", ["torch", "extension"])
def test_sampler(benchmark, implementation, config, grid):
    sampler = checked_sampler(config, grid, implementation)
    steps = iter(range(2**32))
    benchmark(lambda: sampler.sample(IMAGES, seed=0, step=next(steps)))
    state_rate(benchmark, IMAGES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.benchmark(group="masks-cuda", min_rounds=20)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("images", [128, 2048])
def test_extension_on_cuda(benchmark, images, config, grid):
    sampler = checked_sampler(config, grid, "extension", "cuda")
    capacity = images * sampler.max_context, images * sampler.num_targets * sampler.max_target
    seed, step = (torch.full((), value, dtype=torch.int64, device="cuda") for value in (1, 7))
    call = {"seed": seed, "step": step, "device": "cuda", "capacity": capacity}
    sampler.sample(images, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # many calls, so that the host's launch of a graph does not count
        for _ in range(CALLS_PER_GRAPH):
            sampler.sample(images, **call)

    def replay():
        graph.replay()
        torch.cuda.synchronize()

    benchmark(replay)
    microseconds = benchmark.stats.stats.median / CALLS_PER_GRAPH * 1e6
    benchmark.extra_info["device_microseconds"] = round(microseconds, 2)
    print(f"\n{benchmark.name}: {microseconds:.1f} us of device time")


@pytest.mark.benchmark(group="masks", min_rounds=3)
def test_per_image_loop(benchmark):
    steps = iter(range(2**32))
    benchmark(lambda: per_image_loop((14, 14), [next(steps)]))
    state_rate(benchmark, GROUP_SIZE)
