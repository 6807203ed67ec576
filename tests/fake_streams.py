"""Streams of a GPU without one: work is put into queues, and done later in any order that the events allow.

A missing wait shows as a wrong result in some of these orders. The host is as far ahead as it can be: nothing is done
before everything was launched.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from ijepa_fast.side_stream import SideStream


class Event:
    def __init__(self):
        self.passed = False


class Stream:
    device = torch.device("cpu")

    def __init__(self):
        self.queue: deque[tuple[str, Callable | Event]] = deque()

    def record_event(self) -> Event:
        event = Event()
        self.queue.append(("record", event))
        return event

    def wait_event(self, event: Event) -> None:
        self.queue.append(("wait", event))

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    @property
    def can_go_on(self) -> bool:
        return bool(self.queue) and (self.queue[0][0] != "wait" or self.queue[0][1].passed)

    def go_on(self) -> None:
        kind, what = self.queue.popleft()
        if kind == "record":
            what.passed = True
        elif kind == "work":
            what()


class FakeGPU:
    """Stands for what ``ijepa_fast.side_stream`` uses of ``torch.cuda``."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self._streams = [Stream()]
        self._current = self._streams[0]
        patch.setattr(torch.cuda, "Stream", self._new)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self._current)
        patch.setattr(torch.cuda, "stream", self._switched)

    def _new(self, device=None) -> Stream:
        self._streams.append(Stream())
        return self._streams[-1]

    @contextmanager
    def _switched(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def launch(self, work: Callable[[], object]) -> None:
        """Put work on the current stream."""
        self._current.queue.append(("work", work))

    def finish(self, seed: int) -> None:
        """Do all that was launched, taking turns between streams by ``seed``."""
        choose = random.Random(seed)
        # Some orders favour one stream as long as it can go on, others take turns.
        weights = {id(stream): choose.choice((1, 1, 1000)) for stream in self._streams}
        while any(stream.queue for stream in self._streams):
            ready = [stream for stream in self._streams if stream.can_go_on]
            assert ready, "the streams wait for one another"
            choose.choices(ready, [weights[id(stream)] for stream in ready])[0].go_on()


class DeferredSide(SideStream):
    """A side stream whose work is one piece, done when the stream comes to it."""

    def __init__(self, gpu: FakeGPU):
        super().__init__("cpu")
        self._gpu = gpu

    def run(self, work, after):
        return super().run(lambda: self._gpu.launch(work), after)
