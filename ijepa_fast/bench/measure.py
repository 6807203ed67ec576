"""Times, the floors of the same run, and the machine they were taken on.

GPU times are of two kinds. ``graph_times`` is device time: many calls on different data are captured in one CUDA graph,
so that neither the host nor a warm L2 cache counts. ``event_times`` is what an eager caller sees: events around one
call, after the L2 cache was overwritten; where the host launches more slowly than the device works, it includes that.
CPU times are wall-clock.

A results file is JSON:

    {"schema": 1, "kind": "ops" | "masks" | ..., "machine": machine(...), ...}

where every time is a ``Times`` as a dict: microseconds per call, 20th, 50th and 80th percentile over ``runs`` samples,
and its method ("graph", "events" or "cpu").
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ijepa_fast.run.environment import machine as machine  # results name it as their own

SCHEMA = 1
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
"""Side of the square product whose rate stands for the peak of the matrix units."""
L2_SHARES = 4
"""Data that passes between two uses of the same buffer, in sizes of the L2 cache."""
MOST_SETS = 32
"""Copies of a case's data, at most: tiny cases stay in the cache, and are not what device times are for."""
WARM_UP = 3


@dataclass(frozen=True)
class Times:
    """Microseconds per call."""

    p20: float
    p50: float
    p80: float
    runs: int
    method: str

    @staticmethod
    def of(samples: Sequence[float], method: str) -> Times:
        """From at least two samples in microseconds."""
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        values = deciles[1], statistics.median(samples), deciles[7]
        return Times(*(round(value, 4) for value in values), len(samples), method)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """On CUDA, a stream of its own: autograd runs a backward pass on the stream of its forward pass, and a CUDA graph
    cannot be captured on the default one, so whatever is captured must have been prepared here."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def cpu_times(call: Callable[[], Any], seconds: float = 0.2, least: int = 5) -> Times:
    """Wall-clock time of a call, repeated for about ``seconds`` and at least ``least`` times."""
    call()
    samples: list[float] = []
    until = time.perf_counter() + seconds
    while len(samples) < least or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    return Times.of(samples, "cpu")


def event_times(call: Callable[[], Any], runs: int = 20) -> Times:
    """Time between two events around one eager call on the current stream, with a cold L2 cache."""
    for _ in range(WARM_UP):
        call()
    flush = torch.empty(L2_SHARES * l2_bytes(), dtype=torch.uint8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return Times.of([start.elapsed_time(end) * 1e3 for start, end in events], "events")


def graph_times(calls: Sequence[Callable[[], Any]], runs: int = 30) -> Times:
    """Device time of one call: all ``calls``, which use different data, in one CUDA graph.

    Call it within ``side_stream``, in which the calls were prepared; ``cold_sets`` says how many keep the cache cold.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        # Kept until the end, so that no call writes where another just did.
        results = [call() for call in calls]
    for _ in range(WARM_UP):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    del results
    return Times.of([start.elapsed_time(end) * 1e3 / len(calls) for start, end in events], "graph")


def cold_sets(num_bytes: float) -> int:
    """How many sets of data, of ``num_bytes`` each, must take turns for each to find a cold L2 cache."""
    return max(1, min(MOST_SETS, -(-L2_SHARES * l2_bytes() // max(int(num_bytes), 1))))


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def copy_times(num_bytes: float, device: torch.device) -> Times:
    """Time of a plain copy that moves ``num_bytes`` in all, half of them read and half written.

    On CUDA the faster of the driver's copy and of a kernel that reads and writes the same: a node of a CUDA graph that
    copies may start later than one that runs a kernel.
    """
    count = max(int(num_bytes) // 8, 1)  # of int32, in each half
    sets = cold_sets(num_bytes) if device.type == "cuda" else 1
    pairs = [
        [torch.randint(1 << 30, (count,), dtype=torch.int32, device=device) for _ in range(2)] for _ in range(sets)
    ]
    copies = [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]
    if device.type != "cuda":
        return cpu_times(copies[0])
    kernels = [lambda pair=pair: torch.bitwise_not(pair[1], out=pair[0]) for pair in pairs]
    with side_stream(device):
        return min((graph_times(calls) for calls in (copies, kernels)), key=lambda times: times.p50)


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large product of random matrices: bf16 on CUDA, fp32 on the CPU."""
    side = MATMUL_SIDE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    # Not in a graph, whose capture would give back the memory that a training step between two calls has cached.
    times = event_times(lambda: a @ b, runs=10) if device.type == "cuda" else cpu_times(lambda: a @ b)
    return 2 * side**3 / (times.p50 * 1e-6)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Replace ``path`` at once, so that a run that is cut off leaves whole files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)
