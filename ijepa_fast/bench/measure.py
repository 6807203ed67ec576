"""The timer of all benchmarks, and the floors of the same run.

``repeat`` and ``in_turns`` take wall-clock and processor time of calls, with the device idle before and after; a
``Clock`` says which part of a call took how long. GPU times of single ops are of two kinds. ``graph_times`` is device
time: many calls on different data are captured in one CUDA graph, so that neither the host nor a warm L2 cache counts.
``event_times`` is what an eager caller sees: events around one call, after the L2 cache was overwritten; where the host
launches more slowly than the device works, it includes that.

A results file is JSON:

    {"schema": 1, "kind": "ops" | "masks" | ..., "machine": run.environment.machine(...), ...}

where every time is a ``Times`` as a dict: microseconds per call, 20th, 50th and 80th percentile over ``runs`` samples,
and its method ("graph", "events", "cpu", "steps" or "rounds").
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ijepa_fast.run.environment import machine
from ijepa_fast.run.files import write_json

SCHEMA = 1
CPU = torch.device("cpu")
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
"""Side of the square product whose rate stands for the peak of the matrix units."""
L2_SHARES = 4
"""Data that passes between two uses of the same buffer, in sizes of the L2 cache."""
MOST_SETS = 32
"""Copies of a case's data, at most: tiny cases stay in the cache, and device times are not made for them."""
WARM_UP = 3


class Took(NamedTuple):
    """Seconds of wall-clock and of the process on all cores. Busy neighbours disturb the second less."""

    wall: float
    cpu: float


@contextmanager
def stopwatch(samples: list[Took], device: torch.device = CPU) -> Iterator[None]:
    """Append the time that the body takes to ``samples``. The device is idle before and after it."""
    wait(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    yield
    wait(device)
    samples.append(Took(time.perf_counter() - start, time.process_time() - cpu_start))


def repeat(
    call: Callable[[int], Any],
    device: torch.device = CPU,
    *,
    seconds: float = 0.0,
    least: int = 5,
    warm_up: int = 1,
    patience: float = float("inf"),
) -> list[Took]:
    """Times of a call, which gets the number of the repetition.

    Args:
        seconds: it is repeated for so long at least.
        least: samples at least.
        warm_up: first calls that are not among the samples.
        patience: seconds after which two samples are enough, and warm-up is over.
    """
    samples: list[Took] = []
    began, number = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds or len(samples) < (least if spent < patience else 2):
        with stopwatch(samples if number >= warm_up or spent > patience else [], device):
            call(number)
        number += 1
    return samples


def in_turns(
    calls: Mapping[str, Callable[[int], Any]],
    rounds: int,
    device: torch.device = CPU,
    *,
    first: int = 0,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, list[Took]]:
    """Times of several calls, one after another in every round. Each gets the number of the round, from ``first`` on.

    Each starts a round equally often: a disturbance that grows within a round hits all alike. ``before`` is called at
    the start of every round.
    """
    taken: dict[str, list[Took]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        before()
        for turn in range(len(names)):
            name = names[(number + turn) % len(names)]
            with stopwatch(taken[name], device):
                calls[name](first + number)
    return taken


def wait(device: torch.device) -> None:
    """Let a GPU finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Marks in the stream of work. The time from one mark to the next belongs to the name of the first."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        self.marks.append((name, _event() if self.on_gpu else time.perf_counter()))

    def milliseconds(self) -> dict[str, float]:
        """Time by name since the clock was last read."""
        if self.on_gpu:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (name, start), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            took = start.elapsed_time(end) if self.on_gpu else (end - start) * 1e3
            spent[name] = spent.get(name, 0.0) + took
        self.marks.clear()
        return spent


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


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
        """Percentiles of at least two samples in microseconds."""
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        values = deciles[1], statistics.median(samples), deciles[7]
        return Times(*(round(value, 4) for value in values), len(samples), method)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cpu_times(call: Callable[[], Any], seconds: float = 0.2, least: int = 5) -> Times:
    """Wall-clock time of a call on the CPU."""
    return Times.of([took.wall * 1e6 for took in repeat(lambda _: call(), seconds=seconds, least=least)], "cpu")


def event_times(call: Callable[[], Any], runs: int = 20) -> Times:
    """Time between two events around one eager call on the current stream, with a cold L2 cache."""
    for _ in range(WARM_UP):
        call()
    flush = torch.empty(L2_SHARES * l2_bytes(), dtype=torch.uint8, device="cuda")
    return Times.of(_between_events(call, runs, flush.zero_), "events")


def graph_times(calls: Sequence[Callable[[], Any]], runs: int = 30) -> Times:
    """Device time of one call: all ``calls``, which use different data, in one CUDA graph.

    Call it within ``own_stream``, in which the calls were prepared; ``cold_sets`` says how many keep the cache cold.
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
    samples = _between_events(graph.replay, runs)
    del results
    return Times.of([sample / len(calls) for sample in samples], "graph")


def _between_events(call: Callable[[], Any], runs: int, before: Callable[[], Any] = lambda: None) -> list[float]:
    """Microseconds of the device for each call; ``before`` is called before each, and not timed."""
    pairs = []
    for _ in range(runs):
        before()
        start = _event()
        call()
        pairs.append((start, _event()))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairs]


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A CUDA stream other than the default one, on a GPU: autograd runs a backward pass on the stream of its forward
    pass, and a CUDA graph cannot be captured on the default stream, so what is captured must be prepared here."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def cold_sets(num_bytes: float) -> int:
    """Number of sets of data, of ``num_bytes`` each, that must take turns for each to find a cold L2 cache."""
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
    with own_stream(device):
        return min((graph_times(calls) for calls in (copies, kernels)), key=lambda times: times.p50)


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large product of random matrices: bf16 on CUDA, fp32 on the CPU."""
    side = MATMUL_SIDE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    # Not in a graph, whose capture would give back the memory that a training step between two calls has cached.
    times = event_times(lambda: a @ b, runs=10) if device.type == "cuda" else cpu_times(lambda: a @ b)
    return 2 * side**3 / (times.p50 * 1e-6)


def results(kind: str, device: torch.device | str, **more: Any) -> dict[str, Any]:
    """The beginning of a results file."""
    return {"schema": SCHEMA, "kind": kind, "machine": machine(device), **more}


def save(path: Path | None, report: dict[str, Any]) -> None:
    """Write a results file whole, if there is a path for it. Missing folders are made."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report)
