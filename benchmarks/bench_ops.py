"""Every op beside its peers, and mask sampling, under pytest-benchmark: one row per model, op, pass and provider.

    pytest benchmarks/bench_ops.py --benchmark-only -k "gather_add and forward"

On a GPU these are the sizes of ViT-B/16, L/16, H/14 and g/16 at batch 128, and the times proper (device time by CUDA
graphs, cold caches, floors of the same run) stand in each benchmark's ``extra_info``: what pytest-benchmark itself
measures there includes the launch and a synchronisation. Without a GPU the sizes are small. No provider is timed before
its result agrees with the reference. ``python -m benchmarks.ops`` and ``benchmarks.masks`` write results files.
"""

from functools import lru_cache
from itertools import count

import pytest
import torch

from benchmarks.masks import CONFIGS, GRIDS, IMAGES, assert_equal
from ijepa_fast.bench import table
from ijepa_fast.bench.cases.floors import MODELS, TINY
from ijepa_fast.bench.cases.rows import Batch
from ijepa_fast.bench.measure import CPU, own_stream
from ijepa_fast.masks import extension
from ijepa_fast.masks.sampler import MaskSampler

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


def parameters():
    for case in table.cases(Batch.draw(TINY["tiny"], 1, CPU)):
        for model in MODELS if ON_GPU else TINY:
            for mode, provider in ((mode, provider) for mode in case.costs for provider in case.providers):
                # On a CPU the compiler takes 20 seconds for each: once is enough to know that it works.
                once = (case.op, mode) == ("target_loss", "both")
                if ON_GPU or (once if provider == "compile" else not case.providers[provider].unavailable):
                    name = "-".join([case.op, case.name, mode, provider, model.replace("/", "_")])
                    yield pytest.param(model, case.key, mode, provider, id=name)


@lru_cache(maxsize=1)
def cases_of(model):
    batch = Batch.draw({**MODELS, **TINY}[model], table.BATCH[DEVICE.type], DEVICE)
    return {case.key: case for case in table.cases(batch)}


floors = lru_cache(maxsize=1)(lambda: table.Floors(DEVICE))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(min_rounds=5, max_time=0.2, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize(("model", "key", "mode", "provider"), parameters())
def test_op(benchmark, model, key, mode, provider):
    case = cases_of(model)[key]
    benchmark.group = f"{model} {key}, {mode}"
    with table.settings(), own_stream(DEVICE):
        found = table.row(model, case, provider, mode, floors(), DEVICE)
        if "unavailable" in found:
            pytest.skip(found["unavailable"])
        assert "failed" not in found, found["failed"]
        benchmark.extra_info.update(found)
        call = table.prepare(case, case.providers[provider], mode, 2, DEVICE)
        benchmark(lambda: (call(), torch.cuda.synchronize()) if ON_GPU else call())


@pytest.mark.benchmark(group="masks", min_rounds=20, max_time=0.5)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("implementation", ["torch", "extension"])
def test_masks(benchmark, implementation, config, grid):
    refusal = extension.reason("cpu") if implementation == "extension" else None
    if refusal:
        pytest.skip(refusal)
    samplers = [MaskSampler(config, grid, implementation=name) for name in (implementation, "torch")]
    assert_equal(*(sampler.sample(IMAGES, seed=1, step=7) for sampler in samplers))
    steps = count()
    benchmark(lambda: samplers[0].sample(IMAGES, seed=0, step=next(steps)))
    benchmark.extra_info["images_per_second"] = round(IMAGES / benchmark.stats.stats.min)
