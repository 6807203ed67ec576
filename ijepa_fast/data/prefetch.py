"""Batches on the device: the copy of the next one runs while the device works on the step before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import cycle

import torch
from torch import Tensor

from ijepa_fast.data.loader import Batch
from ijepa_fast.side_stream import SideStream


class DevicePrefetcher:
    """The batches of a loader with their images on the device; labels and indices stay on the host.

    The host asks for a batch while the device is still busy with the step before. So the copy (from page-locked memory,
    see ``pin_memory`` of `TrainLoader`) goes to a stream of its own, and only what is launched after the batch was
    handed out waits for it. Nothing is taken from the loader before it is asked for: what the loader counts, raises or
    ends with comes at the same step as without this class. On the CPU the batches pass through as they are.

    Images lie in one of two buffers. They are for work launched on the current stream until the next batch is asked
    for; then their buffer is overwritten as soon as that work is done.

    Args:
        loader: of batches.
        device: where images are wanted.
        side: stream of the copies; by default a new one on a GPU, none on the CPU.
    """

    def __init__(self, loader: Iterable[Batch], device: torch.device, side: SideStream | None = None):
        self._loader, self._device = loader, device
        self._side = SideStream(device) if side is None and device.type == "cuda" else side

    def __iter__(self) -> Iterator[Batch]:
        if self._side is None:
            yield from self._loader
            return
        # Two: one is filled while the step before reads the other. More would only grow with the host's lead.
        buffers = cycle([_Buffer(self._device, self._side) for _ in range(2)])
        for batch, buffer in zip(self._loader, buffers, strict=False):
            yield batch._replace(images=buffer.fill(batch.images))
            buffer.release()


class _Buffer:
    """Images of one batch on the device."""

    def __init__(self, device: torch.device, side: SideStream):
        self._device, self._side = device, side
        self._images: Tensor | None = None

    def fill(self, images: Tensor) -> Tensor:
        if self._images is None or self._images.shape != images.shape or self._images.dtype != images.dtype:
            self._images = torch.empty_like(images, device=self._device)
            self.release()  # new memory may be what earlier work on the current stream still reads
        filled = self._images
        self._side.run(lambda: filled.copy_(images, non_blocking=True), after=self._read)
        self._side.join()
        return filled

    def release(self) -> None:
        """Say that nothing reads the images any more."""
        self._read = self._side.mark()
