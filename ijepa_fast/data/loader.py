"""Batches of crops, decoded in the background: for training (endless, random) and for evaluation (in order).

A training batch depends on (seed, step) alone. The main process decides which images make up a step and hands whole
batches to the workers; a worker keeps no state and draws nothing that is not a function of its request.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ijepa_fast.data.crops import (
    ASPECT_RATIO,
    EVAL_RATIO,
    OFFICIAL_SCALE,
    as_height_width,
    check_crop,
    eval_crop,
    random_resized_crop,
)
from ijepa_fast.data.order import sample_indices, steps_per_epoch
from ijepa_fast.data.source import Source, warn_once
from ijepa_fast.philox import Stream, below, random_words

REFILL_ATTEMPTS = 32
_UNFILLED = -1
_EXAMPLES = 5


class Batch(NamedTuple):
    images: Tensor  # uint8 [b, 3, H, W]
    labels: Tensor  # int64 [b], -1 where the source has no labels
    indices: Tensor  # int64 [b], positions in the source
    failures: Sequence[tuple[int | str, str]] = ()  # (index, or name in a stream; reason) of what was bad on the way


class BadFilesError(RuntimeError):
    """Too many images of a source cannot be decoded."""


class TrainLoader:
    """Endless random-resized crops, the same for any number of workers and ranks and after any restart.

    Step s takes the next `global_batch` images of its epoch's permutation (the incomplete last batch of an epoch is
    dropped); rank r gets the r-th of `world_size` equal, consecutive parts. An image that cannot be decoded is
    replaced in its slot by a random one, drawn from (seed, epoch, slot, attempt), so the batch size never changes.
    Iterating again starts again at `start_step`.

    Args:
        source: what to load.
        image_size: side of the crops, or (height, width), in pixels.
        global_batch: images per step on all ranks together.
        seed: of order, crops and refills.
        workers: decoding processes; 0 decodes in this process.
        start_step: first step, 0 or where a resumed run continues.
        num_steps: batches to yield; None for no end.
        scale, ratio, flip: see `random_resized_crop`.
        max_bad_share: share of the distinct images that may be bad.
        min_seen: distinct images to be seen before their bad share is taken for that of the whole source.
        prefetch: batches kept ready by each worker.
        pin_memory: put batches in page-locked memory, for asynchronous copies to a GPU.
        reduced_decode: decode JPEGs at reduced scale where that suffices.

    Attributes:
        bad: description -> reason of every image found bad by this rank so far, and of the source's damaged shards.

    Raises:
        ValueError: settings that cannot work, at construction.
        BadFilesError: while iterating: more than `max_bad_share` of the images are bad (of all of them, or of those
            seen once `min_seen` were), or no good one was found for a slot.
    """

    def __init__(
        self,
        source: Source,
        *,
        image_size,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        start_step: int = 0,
        num_steps: int | None = None,
        scale=OFFICIAL_SCALE,
        ratio=ASPECT_RATIO,
        flip: float = 0.0,
        max_bad_share: float = 0.05,
        min_seen: int = 1000,
        prefetch: int = 2,
        pin_memory: bool = False,
        reduced_decode: bool = True,
    ):
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} does not exist")
        if global_batch % world_size:
            raise ValueError(f"a global batch of {global_batch} cannot be split evenly over {world_size} ranks")
        if start_step < 0:
            raise ValueError(f"start_step must not be negative, got {start_step}")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be between 0 and 1, got {max_bad_share}")
        check_crop(scale, ratio, flip)
        self.steps_per_epoch = steps_per_epoch(len(source), global_batch)
        crop = {"size": as_height_width(image_size), "scale": tuple(scale), "ratio": tuple(ratio), "flip": flip}
        self._samples = _TrainSamples(source, seed, crop | {"reduced_decode": reduced_decode})
        self._requests = _TrainRequests(len(source), global_batch, seed, rank, world_size, start_step, num_steps)
        self._loading = loading_options(workers, prefetch, pin_memory)
        self._bad = _BadFiles(source, max_bad_share, min_seen)
        self._damaged = getattr(source, "damaged", {})

    @property
    def bad(self) -> dict[str, str]:
        return self._damaged | self._bad.reasons

    def __iter__(self) -> Iterator[Batch]:
        for batch in start_workers(DataLoader(self._samples, sampler=self._requests, **self._loading)):
            self._bad.note(batch)
            yield batch


class EvalLoader:
    """Central crops in the order of the source; images that cannot be decoded are left out.

    Args:
        source: what to load.
        image_size: side of the crops, or (height, width), in pixels.
        batch_size: images per batch; a batch with bad images, and the last one, hold fewer.
        indices: which images, in which order; None for all.
        resize_ratio: see `eval_crop`.
        workers, prefetch, pin_memory, reduced_decode: see `TrainLoader`.

    Attributes:
        bad: description -> reason of every image found bad so far.

    Raises:
        ValueError: settings that cannot work, at construction.
        BadFilesError: after the last batch, if no image at all could be decoded.
    """

    def __init__(
        self,
        source: Source,
        image_size,
        batch_size: int,
        workers: int = 0,
        *,
        indices: Sequence[int] | None = None,
        resize_ratio: float = EVAL_RATIO,
        prefetch: int = 2,
        pin_memory: bool = False,
        reduced_decode: bool = True,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        if not resize_ratio >= 1:
            raise ValueError(f"resize_ratio must be at least 1, got {resize_ratio}")
        wanted = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
        if len(wanted) and not (0 <= wanted.min() and wanted.max() < len(source)):
            raise ValueError(f"indices must be within the {len(source)} images, got {wanted.min()} to {wanted.max()}")
        crop = {"size": as_height_width(image_size), "resize_ratio": resize_ratio, "reduced_decode": reduced_decode}
        self._samples = _EvalSamples(source, crop)
        self._requests = [wanted[first : first + batch_size] for first in range(0, len(wanted), batch_size)]
        self._loading = loading_options(workers, prefetch, pin_memory)
        self._bad = _BadFiles(source, max_share=1.0, min_seen=len(source))

    @property
    def bad(self) -> dict[str, str]:
        return self._bad.reasons

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Batch]:
        decoded = 0
        for batch in start_workers(DataLoader(self._samples, sampler=self._requests, **self._loading)):
            self._bad.note(batch)
            decoded += len(batch.indices)
            if len(batch.indices):
                yield batch
        if self._requests and not decoded:
            raise BadFilesError(self._bad.summary("no image can be decoded"))


class _TrainRequest(NamedTuple):
    epoch: int
    first_slot: int
    indices: np.ndarray  # int64 [b]


class _TrainRequests:
    """The sampler of the DataLoader: this rank's part of every step, decided in the main process."""

    def __init__(self, n, global_batch, seed, rank, world_size, start_step, num_steps):
        self._n, self._global_batch, self._seed = n, global_batch, seed
        self._local_batch = global_batch // world_size
        self._offset = rank * self._local_batch
        self._start_step, self._num_steps = start_step, num_steps

    def __iter__(self) -> Iterator[_TrainRequest]:
        step = self._start_step
        while self._num_steps is None or step < self._start_step + self._num_steps:
            epoch, first_slot, indices = sample_indices(step, self._global_batch, self._n, self._seed)
            mine = indices[self._offset : self._offset + self._local_batch]
            yield _TrainRequest(epoch, first_slot + self._offset, mine)
            step += 1


class _TrainSamples(Dataset):
    """Request -> batch, in a worker."""

    def __init__(self, source: Source, seed: int, crop: dict):
        self._source, self._seed, self._crop = source, seed, crop

    def __getitem__(self, request: _TrainRequest) -> Batch:
        indices = request.indices.copy()
        images = torch.zeros(len(indices), 3, *self._crop["size"], dtype=torch.uint8)
        failures = []
        for row, wanted in enumerate(request.indices):
            slot = request.first_slot + row
            indices[row] = self._fill(images[row], int(wanted), request.epoch, slot, failures)
        return _batch(self._source, images, indices, failures)

    def _fill(self, out: Tensor, wanted: int, epoch: int, slot: int, failures: list) -> int:
        """Put a crop of image `wanted`, or else of a substitute, into `out`; returns the index of the image taken."""
        for attempt in range(REFILL_ATTEMPTS + 1):
            index = wanted if attempt == 0 else self._substitute(epoch, slot, attempt)
            # The attempt as view: a substitute that the epoch also shows in its own slot gets another crop here.
            choice = {"seed": self._seed, "epoch": epoch, "index": index, "view": attempt}
            pixels = _decode(self._source, index, random_resized_crop, self._crop | choice, failures)
            if pixels is not None:
                out.copy_(pixels)
                return index
        return _UNFILLED

    def _substitute(self, epoch: int, slot: int, attempt: int) -> int:
        return below(random_words(self._seed, Stream.REFILL, epoch, slot, attempt)[0], len(self._source))


class _EvalSamples(Dataset):
    """Indices -> batch of those that can be decoded, in a worker."""

    def __init__(self, source: Source, crop: dict):
        self._source, self._crop = source, crop

    def __getitem__(self, wanted: np.ndarray) -> Batch:
        images = torch.zeros(len(wanted), 3, *self._crop["size"], dtype=torch.uint8)
        decoded, failures = [], []
        for index in map(int, wanted):
            pixels = _decode(self._source, index, eval_crop, self._crop, failures)
            if pixels is not None:
                images[len(decoded)] = pixels
                decoded.append(index)
        return _batch(self._source, images[: len(decoded)], np.array(decoded, dtype=np.int64), failures)


def _decode(source: Source, index: int, crop, options: dict, failures: list) -> Tensor | None:
    """The crop of image `index`, or None and one more entry in `failures`."""
    try:
        with source.open(index) as image:
            return crop(image, **options)
    except Exception as error:  # damaged files make decoders raise nearly anything
        message = str(error).partition("\n")[0][:200]
        failures.append((index, f"{type(error).__name__}: {message}"))
        return None


def _batch(source: Source, images: Tensor, indices: np.ndarray, failures: list) -> Batch:
    labels = np.full(len(indices), -1, dtype=np.int64) if source.labels is None else source.labels[indices]
    return Batch(images, torch.from_numpy(labels), torch.from_numpy(indices), tuple(failures))


class _BadFiles:
    """Keeps count, in the main process, of the distinct images seen and of those that were bad."""

    def __init__(self, source: Source, max_share: float, min_seen: int):
        self.reasons: dict[str, str] = {}
        self._source, self._max_share, self._min_seen = source, max_share, min_seen
        self._seen = np.zeros(len(source), dtype=bool)

    def note(self, batch: Batch) -> None:
        """Count a batch and log its bad files that were not logged before; BadFilesError where there are too many."""
        indices = batch.indices.numpy()
        self._seen[indices[indices != _UNFILLED]] = True
        for index, reason in batch.failures:
            self._seen[index] = True
            name = self._source.describe(index)
            if name not in self.reasons:
                self.reasons[name] = reason
                warn_once(self._source, name, reason)
        bad, total = len(self.reasons), len(self._seen)
        if not bad:
            return
        seen = int(np.count_nonzero(self._seen))
        if bad > self._max_share * total or (seen >= self._min_seen and bad > self._max_share * seen):
            raise BadFilesError(self.summary(f"more than the allowed {self._max_share:.1%} of the images are bad"))
        if (indices == _UNFILLED).any():
            raise BadFilesError(self.summary(f"no good image found for a slot in {REFILL_ATTEMPTS} random draws"))

    def summary(self, what: str) -> str:
        examples = [f"\n  {name}: {reason}" for name, reason in list(self.reasons.items())[:_EXAMPLES]]
        counts = f"{len(self.reasons)} bad of {np.count_nonzero(self._seen)} seen, {len(self._seen)} in all"
        return f"{what} ({counts}), for example:{''.join(examples)}"


def loading_options(workers: int, prefetch: int, pin_memory: bool) -> dict:
    """What both loaders tell the DataLoader: requests are whole batches, workers stay out of the run's signals."""
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")
    if prefetch < 1:
        raise ValueError(f"prefetch must be at least 1, got {prefetch}")
    return {
        "batch_size": None,
        "collate_fn": _unchanged,
        "num_workers": workers,
        "prefetch_factor": prefetch if workers else None,
        "worker_init_fn": _set_up_worker,
        "pin_memory": pin_memory,
        # The DataLoader draws a seed for its workers: from its own generator, not from the global one of the run.
        "generator": torch.Generator(),
    }


def start_workers(loader: DataLoader) -> Iterator[Batch]:
    """``iter(loader)``, with the effect of a Ctrl-C put off until all workers are there.

    Python calls functions of logging, random and others around a fork, and drops what they raise: a KeyboardInterrupt
    that came just then would be printed and forgotten.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        return iter(loader)  # a Ctrl-C raises nothing here
    held = []  # without the frames, which would keep the workers alive
    signal.signal(signal.SIGINT, lambda number, _frame: held.append(number))
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGINT, handler)
        for number in held:
            handler(number, None)


def _unchanged(batch: Batch) -> Batch:
    return batch


def _set_up_worker(_worker: int) -> None:
    """Leave the signals that a terminal or a scheduler sends to the whole process group to the main process.

    It may need the next batches, or time to save, and a worker that dies meanwhile is an error there; it ends its
    workers itself, so a SIGTERM counts only if it comes from it (where the system tells: not on macOS).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says, daemon=True).start()


def _end_when_the_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
