"""A second stream of a GPU, for work that may run beside what the current stream does.

Work goes to the side stream behind a mark of the current one, and the current stream waits for it later (``join``).
With that alone, memory may be shared between the two:

- What the work reads, and buffers that it fills, belong to the current stream. They are held until the join, so whoever
  gets their memory next runs after the work.
- What the work makes belongs to the side stream. The current stream reads it after the join. It may be freed at any
  time: its memory goes to later work on the side stream, which starts behind a mark set after those reads.

So nothing calls ``Tensor.record_stream``: freed memory is used again at once, however far the host is ahead. While a
CUDA graph is captured, memory marked by ``record_stream`` would be kept until the capture ends; and since fork and join
are events, a capture of the current stream takes the side stream in, and its memory from the graph's pool.

cuBLAS has a workspace for each stream, so products give the same bits beside others as alone. Whoever keeps scratch
memory from call to call must keep it for each stream, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")


class SideStream:
    """One more stream of a CUDA device. The current stream is the one that is current when a method is called."""

    def __init__(self, device: torch.device | str):
        self._stream = torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        """The point of the current stream behind all that was launched on it so far."""
        return self._current().record_event()

    def run(self, work: Callable[[], Result], after: torch.cuda.Event) -> Result:
        """Launch ``work`` on the side stream, where it starts once ``after`` is passed. The host waits for nothing."""
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            return work()

    def join(self) -> None:
        """Hold what is launched on the current stream from now on until all work on the side stream is done."""
        self._current().wait_stream(self._stream)

    @contextmanager
    def beside(self, work: Callable[[], Result]) -> Iterator[Result]:
        """Launch ``work`` now, to run while what the block launches does. Its result may be read after the block.

        Whatever ends the block, the streams are joined: no memory that the work reads is freed before.
        """
        start = self.mark()
        try:
            yield self.run(work, start)
        finally:
            self.join()

    def _current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._stream.device)
