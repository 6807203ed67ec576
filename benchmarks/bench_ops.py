"""Every op beside its peers under pytest-benchmark.

    pytest benchmarks/bench_ops.py                          what this machine can run: tiny shapes on the CPU
    pytest benchmarks/bench_ops.py -k "ours and H_14"       on a GPU: B/16, L/16, H/14 and g/16 at batch 128

Cases, providers, checks and floors are those of ``ijepa_fast/bench``. A provider is checked before it is timed. On a
GPU the table's own clock runs over one eager call; device times, percentiles and rates stand in ``extra_info``.
"""

import gc
from functools import lru_cache

import pytest
import torch

from ijepa_fast.bench import table as ops_table
from ijepa_fast.bench.cases.floors import MODELS, TINY
from ijepa_fast.bench.cases.rows import Batch
from ijepa_fast.bench.measure import side_stream
from ijepa_fast.bench.rows import best_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
CPU = torch.device("cpu")


def parameters():
    """Model, op, part, mode and provider. They are the same for every model, so they are read off the smallest."""
    for case in ops_table.cases(Batch.draw(TINY["tiny"], 1, CPU)):
        for model in MODELS if ON_GPU else TINY:
            for mode in case.costs:
                for provider, found in case.providers.items():
                    # On a CPU the compiler takes 20 seconds for each: once is enough to know that it works.
                    once = case.op == "gather_add" and case.name == "context" and mode == "both"
                    if ON_GPU or (once if provider == "compile" else not found.unavailable):
                        name = "-".join([case.op, case.name, mode, provider, model.replace("/", "_")])
                        yield pytest.param(model, case.op, case.name, mode, provider, id=name)


@lru_cache(maxsize=1)
def cases_of(model):
    batch = Batch.draw({**MODELS, **TINY}[model], ops_table.BATCH[DEVICE.type], DEVICE)
    return {(case.op, case.name): case for case in ops_table.cases(batch)}


@lru_cache(maxsize=1)
def floors():
    return ops_table.Floors(DEVICE)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if ON_GPU:
        gc.collect()
        torch.cuda.empty_cache()


@pytest.mark.benchmark(min_rounds=5, max_time=0.2, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize(("model", "op", "part", "mode", "provider"), parameters())
def test_op(benchmark, model, op, part, mode, provider):
    case = cases_of(model)[op, part]
    if reason := case.providers[provider].unavailable:
        pytest.skip(reason)
    benchmark.group = f"{model} {case.key}, {mode}"
    with ops_table.settings(), side_stream(DEVICE):
        ops_table.check(case, provider, mode, DEVICE)
        if not ON_GPU:
            benchmark(ops_table.prepare(case, case.providers[provider], mode, 2, DEVICE))
            return
        times, uncaptured = ops_table.time_provider(case, provider, mode, DEVICE)
        floor, kind = floors().of(case, mode)
    best = best_of(times)
    benchmark.extra_info.update(
        times={method: value.as_dict() for method, value in times.items()},
        not_captured=uncaptured,
        gb_per_s=round(case.costs[mode].bytes / best.p50 / 1e3, 1),
        tflop_per_s=round(case.costs[mode].flops / best.p50 / 1e6, 2),
        of_floor=round(floor / best.p50, 3),
        floor=kind,
    )
    call = ops_table.prepare(case, case.providers[provider], mode, 2, DEVICE)

    def run():
        call()
        torch.cuda.synchronize()

    benchmark(run)
