"""A training step replayed as a CUDA graph: the host launches one graph in place of more than a thousand kernels.

A graph has fixed shapes, while the number of tokens differs from step to step. So there is one graph for each bucket of
token counts, and all of them share one pool of memory. The host knows the bucket of a step from its own sampler.

A bucket that is met for the first time runs eagerly, which also compiles whatever these shapes need; the second time it
is captured. Everything that varies lives in tensors that the graph reads: images, the step (from which the masks follow
on the device), and the scalars of the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ijepa_fast.masks.sampler import ROUND_ROWS, rounded_up
from ijepa_fast.model.jepa import Losses
from ijepa_fast.step.train_step import StepResult, TrainStep

MOST_GRAPHS = 32
BUCKETS_PER_BATCH = 64
"""A bucket is a 64th of all patches of a batch wide, times the masks of an image: 2 to 3 % of the tokens, half of which
is wasted on average."""

Work = Callable[[], StepResult]


class Graphs(Protocol):
    """Runs work, or captures it to run it again."""

    def run(self, work: Work) -> StepResult:
        """Once, eagerly."""
        ...

    def capture(self, work: Work) -> Work:
        """Without running it: what runs it again, on the same tensors, with its results in the same tensors."""
        ...


class CudaGraphs:
    """Graphs of one device, with one memory pool for all: they never run at the same time.

    Eager work runs on the stream that captures, because backward passes and cached memory keep to their stream. Work
    may fork to a ``SideStream`` and must join it: a capture takes that in, and a replay runs both branches.
    """

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs need a GPU, but the model is on {device.type}")
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def run(self, work: Work) -> StepResult:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        for tensor in (*result.losses, result.grad_norm, result.pooled):
            tensor.record_stream(current)
        return result

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._stream.device)
        # Only this thread must keep to what can be captured: the one that pins a loader's batches allocates meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()

        def replay() -> StepResult:
            graph.replay()
            return result

        return replay


class CapturedStep(TrainStep):
    """``TrainStep`` that replays graphs. The tensors of a result are overwritten by the next step.

    Activations take memory twice: once in the pool of the graphs, once for the steps of new buckets, which run eagerly.

    Args:
        graphs: what runs and captures; by default CUDA graphs on the model's device.
        most_graphs: buckets that are captured; steps of any further bucket run eagerly.
        The others are those of ``TrainStep``; round_rows is the width of a bucket, None for ``bucket_rows``.

    Raises:
        ValueError: what a graph cannot hold (several micro-batches, a loss scaler, ranks), or an optimizer without
            flat gradients.
    """

    def __init__(
        self,
        model,
        optimizer,
        sampler,
        schedules,
        *,
        graphs: Graphs | None = None,
        most_graphs: int = MOST_GRAPHS,
        **settings,
    ):
        super().__init__(model, optimizer, sampler, schedules, **settings)
        if self.accumulate > 1 or self.scaler is not None or self.wrapped is not self.model:
            raise ValueError("a captured step runs on one GPU, in one micro-batch, without a loss scaler")
        if not optimizer.flat_gradients:
            raise ValueError("a captured step needs an optimizer with flat_gradients=True")
        device = self.first_bad_step.device
        self._graphs, self._most_graphs = graphs or CudaGraphs(device), most_graphs
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._images: Tensor | None = None
        self._generation = optimizer.generation
        self._met: set[tuple] = set()
        self._replays: dict[tuple, Work] = {}

    def __call__(self, images: Tensor, step: int, first_image: int = 0, *, all_targets: bool = False) -> StepResult:
        """As ``TrainStep``; all calls must bring images of one shape."""
        self._fill_buffers(images, step)
        self._set_schedules(step)
        if self.optimizer.generation != self._generation:  # the graphs update a state that is no longer there
            self._generation = self.optimizer.generation
            self._replays.clear()
            self._met.clear()
        # Shapes follow from the counts, which the host finds by drawing the masks too; their contents are drawn by the
        # graph itself, from the step in device memory.
        counts = self.sampler.counts(len(images), seed=self.seed, step=step, first_image=first_image)
        seen = len(images) * self.sampler.per_image
        capacity = rounded_up(counts, self.round_rows or bucket_rows(seen, self.sampler.num_patches))
        tokens, bucket = counts[:2], (*capacity, first_image, all_targets)

        def work() -> StepResult:
            masks = self.sampler.sample(
                len(images),
                seed=self.seed,
                step=self._step,
                first_image=first_image,
                device=self._images.device,
                capacity=capacity,
            )
            losses, pooled = self.model(self._images, masks, all_targets=all_targets)
            losses.total.backward()
            losses = Losses(*(value.detach() for value in losses))
            self._note_bad(losses.total, self._step)
            self._update()
            return StepResult(losses, self.optimizer.grad_norm, pooled, tokens)

        if bucket in self._replays:
            self.optimizer.upload_scalars()
            result = self._replays[bucket]()
        elif bucket in self._met and len(self._replays) < self._most_graphs:
            self._replays[bucket] = self._graphs.capture(work)
            self.optimizer.upload_scalars()  # a capture runs nothing, so the first replay is this step
            result = self._replays[bucket]()
        else:
            self._met.add(bucket)
            result = self._graphs.run(work)
        self.optimizer.grad_norm = result.grad_norm
        return replace(result, tokens=tokens)

    def _fill_buffers(self, images: Tensor, step: int) -> None:
        if self._images is None:
            self._images = torch.empty_like(images)
        if images.shape != self._images.shape or images.dtype != self._images.dtype:
            raise ValueError(
                f"a captured step takes images like the first, {self._images.dtype} {list(self._images.shape)}, "
                f"got {images.dtype} {list(images.shape)}"
            )
        self._images.copy_(images)
        self._step.fill_(step)


def bucket_rows(images: int, patches: int) -> int:
    """Width of a bucket in rows, a multiple of ``ROUND_ROWS``: the same for every step of a run."""
    return max(1, images * patches // BUCKETS_PER_BATCH // ROUND_ROWS) * ROUND_ROWS
