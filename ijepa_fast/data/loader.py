"""Batches of crops, decoded in the background: for training (endless, random) and for evaluation (in order).

A training batch depends on (seed, step) alone. The main process decides which images make up a step and hands whole
batches to the workers; a worker keeps no state and draws nothing that is not a function of its request.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ijepa_fast.data.bands import pixels_of
from ijepa_fast.data.crops import (
    ASPECT_RATIO,
    EVAL_RATIO,
    OFFICIAL_SCALE,
    as_height_width,
    check_crop,
    eval_crop,
    random_resized_crop,
)
from ijepa_fast.data.decode import opened, quietly
from ijepa_fast.data.mixture import Mixture
from ijepa_fast.data.order import StepSamples, sample_indices, steps_per_epoch
from ijepa_fast.data.source import Source, warn_once
from ijepa_fast.data.workers import (
    LoaderError,
    StopRequested,
    batches,
    check_loading,
    loading_options,
    never,
    shared,
    worker_count,
)
from ijepa_fast.philox import Stream, below, random_words

REFILL_ATTEMPTS = 32
_UNFILLED = -1
_EXAMPLES = 5


class Batch(NamedTuple):
    images: Tensor  # uint8 or uint16 [b, C, H, W], see `Pixels`
    labels: Tensor  # int64 [b], -1 where the source has no labels
    indices: Tensor  # int64 [b], positions in the source
    failures: Sequence[tuple[int | str, str]] = ()  # (index, or name in a stream; reason) of what was bad on the way


class BadFilesError(LoaderError):
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
        workers: decoding processes, see `worker_count`; 0 decodes in this process.
        start_step: first step, 0 or where a resumed run continues.
        num_steps: batches to yield; None for no end.
        scale, ratio, flip: see `random_resized_crop`.
        max_bad_share: share of the distinct images that may be bad.
        min_seen: distinct images to be seen before their bad share is taken for that of the whole source.
        prefetch: batches kept ready by each worker.
        pin_memory: put batches in page-locked memory, for asynchronous copies to a GPU.
        reduced_decode: decode JPEGs at reduced scale where that suffices.
        timeout: seconds after which waiting for a batch is given up.
        stop: asked at least once per second while a batch is awaited, and between the images of one that is decoded in
            this process; when it returns True, `StopRequested` is raised and no batch is handed out.

    Attributes:
        bad: description -> reason of every image found bad by this rank so far, and of the source's damaged shards.

    Raises:
        ValueError: settings that cannot work, at construction.
        LoaderError: while iterating: a worker died, shared memory is full, or no batch came in time.
        StopRequested: while iterating, see `stop`.
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
        workers: int | Literal["auto"] = 0,
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
        timeout: float = 600.0,
        stop: Callable[[], bool] = never,
    ):
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} does not exist")
        if global_batch % world_size:
            raise ValueError(f"a global batch of {global_batch} cannot be split evenly over {world_size} ranks")
        if start_step < 0:
            raise ValueError(f"start_step must not be negative, got {start_step}")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be between 0 and 1, got {max_bad_share}")
        check_loading(workers, timeout)
        workers = worker_count(workers, world_size)
        check_crop(scale, ratio, flip)
        self.steps_per_epoch = steps_per_epoch(len(source), global_batch)
        crop = {"size": as_height_width(image_size), "scale": tuple(scale), "ratio": tuple(ratio), "flip": flip}
        # A worker cannot ask `stop`: it belongs to this process.
        here = stop if workers == 0 else never
        self._samples = _TrainSamples(source, seed, crop | {"reduced_decode": reduced_decode}, here)
        self._requests = _TrainRequests(source, global_batch, seed, rank, world_size, start_step, num_steps)
        self._loading = loading_options(workers, prefetch, pin_memory)
        self._timeout, self._stop = timeout, stop
        self._bad = _BadFiles(source, max_bad_share, min_seen)
        self._damaged = getattr(source, "damaged", {})

    def start_at(self, step: int, num_steps: int | None = None) -> None:
        """Begin at ``step`` the next time this is iterated over, instead of at what was given at construction."""
        self._requests.start_step, self._requests.num_steps = step, num_steps

    @property
    def bad(self) -> dict[str, str]:
        return self._damaged | self._bad.reasons

    def __iter__(self) -> Iterator[Batch]:
        options = self._loading | {"sampler": self._requests}
        for batch in batches(self._samples, options, self._timeout, self._stop):
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
        workers, prefetch, pin_memory, reduced_decode, timeout: see `TrainLoader`.

    Attributes:
        bad: description -> reason of every image found bad so far.

    Raises:
        ValueError: settings that cannot work, at construction.
        LoaderError: while iterating: a worker died, shared memory is full, or no batch came in time.
        BadFilesError: after the last batch, if no image at all could be decoded.
    """

    def __init__(
        self,
        source: Source,
        image_size,
        batch_size: int,
        workers: int | Literal["auto"] = 0,
        *,
        indices: Sequence[int] | None = None,
        resize_ratio: float = EVAL_RATIO,
        prefetch: int = 2,
        pin_memory: bool = False,
        reduced_decode: bool = True,
        timeout: float = 600.0,
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
        check_loading(workers, timeout)
        self._timeout = timeout
        self._loading = loading_options(worker_count(workers, ranks=1), prefetch, pin_memory)
        self._bad = _BadFiles(source, max_share=1.0, min_seen=len(source))

    @property
    def bad(self) -> dict[str, str]:
        return self._bad.reasons

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Batch]:
        decoded = 0
        for batch in batches(self._samples, self._loading | {"sampler": self._requests}, self._timeout):
            self._bad.note(batch)
            decoded += len(batch.indices)
            if len(batch.indices):
                yield batch
        if self._requests and not decoded:
            raise BadFilesError(self._bad.summary("no image can be decoded"))


class _TrainRequests:
    """The sampler of the DataLoader: this rank's part of every step, decided in the main process."""

    def __init__(self, source, global_batch, seed, rank, world_size, start_step, num_steps):
        self._source, self._global_batch, self._seed = source, global_batch, seed
        self._local_batch = global_batch // world_size
        self._offset = rank * self._local_batch
        self.start_step, self.num_steps = start_step, num_steps

    def __iter__(self) -> Iterator[StepSamples]:
        step = self.start_step
        mine = slice(self._offset, self._offset + self._local_batch)
        while self.num_steps is None or step < self.start_step + self.num_steps:
            if isinstance(self._source, Mixture):
                samples = self._source.sample_indices(step, self._global_batch, self._seed)
            else:
                samples = sample_indices(step, self._global_batch, len(self._source), self._seed)
            epochs = None if samples.epochs is None else samples.epochs[mine]
            yield StepSamples(samples.epoch, samples.first_slot + self._offset, samples.indices[mine], epochs)
            step += 1


class _TrainSamples(Dataset):
    """Request -> batch, in a worker."""

    def __init__(self, source: Source, seed: int, crop: dict, stop: Callable[[], bool]):
        self._source, self._seed, self._crop, self._stop = source, seed, crop, stop

    def __getitem__(self, request: StepSamples) -> Batch:
        indices = request.indices.copy()
        images = shared(pixels_of(self._source).empty(len(indices), self._crop["size"]))
        failures = []
        for row, wanted in enumerate(request.indices):
            if self._stop():
                raise StopRequested("asked to stop while a batch was decoded")
            slot = request.first_slot + row, request.epoch
            epoch = request.epoch if request.epochs is None else int(request.epochs[row])
            indices[row] = self._fill(images[row], int(wanted), epoch, slot, failures)
        return _batch(self._source, images, indices, failures)

    def _fill(self, out: Tensor, wanted: int, epoch: int, slot: tuple[int, int], failures: list) -> int:
        """Put a crop of image `wanted`, or else of a substitute, into `out`; returns the index of the image taken."""
        for attempt in range(REFILL_ATTEMPTS + 1):
            index = wanted if attempt == 0 else self._substitute(wanted, *slot, attempt)
            # The attempt as view: a substitute that the epoch also shows in its own slot gets another crop here.
            choice = {"seed": self._seed, "epoch": epoch, "index": index, "view": attempt}
            pixels = _decode(self._source, index, random_resized_crop, self._crop | choice, failures)
            if pixels is not None:
                out.copy_(pixels)
                return index
        return _UNFILLED

    def _substitute(self, wanted: int, slot: int, epoch: int, attempt: int) -> int:
        first, count = self._source.part_of(wanted) if isinstance(self._source, Mixture) else (0, len(self._source))
        return first + below(random_words(self._seed, Stream.REFILL, epoch, slot, attempt)[0], count)


class _EvalSamples(Dataset):
    """Indices -> batch of those that can be decoded, in a worker."""

    def __init__(self, source: Source, crop: dict):
        self._source, self._crop = source, crop

    def __getitem__(self, wanted: np.ndarray) -> Batch:
        images = shared(pixels_of(self._source).empty(len(wanted), self._crop["size"]))
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
        pixels = pixels_of(source)
        with quietly(), opened(source.open(index), pixels) as image:
            return crop(image, pixels=pixels, **options)
    except Exception as error:  # damaged files make decoders raise nearly anything
        message = str(error).partition("\n")[0][:200]
        failures.append((index, f"{type(error).__name__}: {message}"))
        return None


def _batch(source: Source, images: Tensor, indices: np.ndarray, failures: list) -> Batch:
    labels = np.full(len(indices), -1, dtype=np.int64) if source.labels is None else source.labels[indices]
    return Batch(images, shared(torch.from_numpy(labels)), shared(torch.from_numpy(indices)), tuple(failures))


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
