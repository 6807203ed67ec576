"""Every op beside its peers under pytest-benchmark.

    pytest benchmarks/bench_ops.py --benchmark-only                    what this machine can run: tiny shapes on a CPU
    pytest benchmarks/bench_ops.py --benchmark-only -k "ours and H_14"    on a GPU: B/16, L/16, H/14 and g/16

Cases, providers and checks are those of ``ijepa_fast/bench``; nothing is timed before its result is checked. The clock
runs over one eager call, launch included; ``benchmarks.ops`` tells the time of the device beside the floors.
"""

from functools import lru_cache

import pytest
import torch

from ijepa_fast.bench import table
from ijepa_fast.bench.cases.floors import MODELS, TINY
from ijepa_fast.bench.cases.rows import Batch
from ijepa_fast.bench.measure import wait

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = MODELS if DEVICE.type == "cuda" else TINY


def parameters():
    """Model, key of a case, mode and provider. They are the same for all models, so the smallest one tells them."""
    for case in table.cases(Batch.draw(TINY["tiny"], 1, torch.device("cpu"))):
        for model in SIZES:
            for mode in case.costs:
                for name, provider in case.providers.items():
                    # On a CPU torch.compile takes 20 seconds for each op.
                    if DEVICE.type == "cuda" or not (name == "compile" or provider.unavailable):
                        text = "-".join([case.key, mode, name, model]).replace(", ", "-").replace("/", "_")
                        yield pytest.param(model, case.key, mode, name, id=text)


@lru_cache(maxsize=1)
def cases_of(model):
    batch = Batch.draw(SIZES[model], table.BATCH[DEVICE.type], DEVICE)
    return {case.key: case for case in table.cases(batch)}


@pytest.mark.benchmark(min_rounds=5, max_time=0.2, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize(("model", "key", "mode", "provider"), parameters())
def test_op(benchmark, model, key, mode, provider):
    case = cases_of(model)[key]
    if reason := case.providers[provider].unavailable:
        pytest.skip(reason)
    benchmark.group = f"{model} {key}, {mode}"
    with table.settings():
        table.check(case, provider, mode, DEVICE)
        call = table.prepare(case, case.providers[provider], mode, 2, DEVICE)

        def run():
            call()
            wait(DEVICE)

        benchmark(run)
