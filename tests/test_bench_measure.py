"""Timing: what is counted, percentiles, and the order of what happens on a GPU (stand-ins for CUDA)."""

import inspect
import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from ijepa_fast.bench import measure
from ijepa_fast.bench.measure import CPU, Times, Took


def test_percentiles():
    times = Times.of([float(i) for i in range(101)], "cpu")
    assert times.as_dict() == {"p20": 20, "p50": 50, "p80": 80, "runs": 101, "method": "cpu"}


def test_calls_are_repeated_until_there_are_enough():
    calls = []
    assert len(measure.repeat(calls.append, least=7, warm_up=2)) == 7 and calls == list(range(9))
    assert len(measure.repeat(calls.append, least=7, warm_up=3, patience=0.0)) == 2  # slow ones
    assert len(measure.repeat(lambda _: None, seconds=0.02, least=1)) > 1


def test_calls_in_turns_each_begin_a_round_equally_often():
    order, rounds = [], []
    calls = {name: lambda number, name=name: order.append((name, number)) for name in "abc"}
    taken = measure.in_turns(calls, 3, first=5, before=lambda: rounds.append(len(order)))
    assert [name for name, _ in order] == [*"abc", *"bca", *"cab"] and rounds == [0, 3, 6]
    assert [number for _, number in order] == [5] * 3 + [6] * 3 + [7] * 3
    assert all(len(times) == 3 and isinstance(times[0], Took) for times in taken.values())


def test_a_clock_gives_the_time_to_the_mark_before(monkeypatch):
    now = iter((1.0, 1.5, 3.5, 3.75, 4.0))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))
    clock = measure.Clock(CPU)
    for name in ("masks", "forward", "masks", "end"):
        clock.mark(name)
    assert clock.milliseconds() == {"masks": 750.0, "forward": 2000.0} and clock.milliseconds() == {}


class FakeCuda:
    """Stands for the device: a clock that only work moves, by one millisecond a call."""

    def __init__(self, monkeypatch, l2=1000):
        self.log, self.now, self.capturing = [], 0.0, False
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.now

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            def replay(self):
                fake.log.append("replay")
                fake.now += self.work

        @contextmanager
        def graph(cuda_graph, stream):
            assert stream == "stream"
            fake.capturing, before = True, fake.now
            yield
            cuda_graph.work, fake.now, fake.capturing = fake.now - before, before, False

        stand_ins = {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
            "current_stream": lambda: "stream",
            "synchronize": lambda: None,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=l2),
        }
        # The stand-ins have the signatures of torch.
        assert {"cuda_graph", "stream"} <= set(inspect.signature(torch.cuda.graph.__init__).parameters)
        assert "enable_timing" in inspect.signature(torch.cuda.Event.__new__).parameters
        for name, stand_in in stand_ins.items():
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def work(self, name):
        self.log.append(f"{'captured ' if self.capturing else ''}{name}")
        self.now += 1.0


def test_graph_times_are_per_call_and_every_call_is_captured_once(monkeypatch):
    fake = FakeCuda(monkeypatch)
    calls = [lambda name=name: fake.work(name) for name in ("a", "b", "c", "d")]
    times = measure.graph_times(calls, runs=5)
    assert (times.p50, times.runs, times.method) == (1000.0, 5, "graph")
    assert fake.log == [*"abcd", *(f"captured {x}" for x in "abcd"), *["replay"] * (measure.WARM_UP + 5)]


def test_event_times_begin_with_a_cold_cache(monkeypatch):
    fake = FakeCuda(monkeypatch, l2=1000)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: SimpleNamespace(zero_=lambda: flushed.append(size)))
    flushed = []
    times = measure.event_times(lambda: fake.work("call"), runs=4)
    assert flushed == [measure.L2_SHARES * 1000] * 4
    assert times.p50 == 1000.0 and fake.log == ["call"] * (measure.WARM_UP + 4)


def test_sets_of_data_outgrow_the_cache(monkeypatch):
    FakeCuda(monkeypatch, l2=1000)
    assert measure.cold_sets(4000) == measure.cold_sets(1e9) == 1
    assert measure.cold_sets(3999) == 2 and measure.cold_sets(400) == 10
    assert measure.cold_sets(0) == measure.MOST_SETS


def test_floors_on_the_cpu():
    assert measure.copy_times(1 << 20, CPU).p50 > 0
    assert measure.matmul_rate(CPU) > 1e8


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "report.json"
    measure.save(None, {"a": 0})
    measure.save(path, {"a": 1})
    with pytest.raises(TypeError):
        measure.save(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
