"""Images in WebDataset shards at URLs: read front to back, mixed in a buffer, never indexed.

Every pass over the shards has its own order, shared out among ranks and their workers; each worker reads its shards one
after the other through a shuffle buffer and makes whole batches of what comes out. The result depends on the seed and
on the numbers of ranks and workers, which must stay as they are when a run is resumed: it then reads again from the
start what it has seen, without decoding it. A shard that can be read on one occasion and not on another changes what
follows.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import count
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from ijepa_fast.data.bands import Pixels
from ijepa_fast.data.crops import ASPECT_RATIO, OFFICIAL_SCALE, as_height_width, check_crop, random_resized_crop
from ijepa_fast.data.decode import open_image, quietly
from ijepa_fast.data.loader import BadFilesError, Batch
from ijepa_fast.data.order import epoch_permutation, steps_per_epoch
from ijepa_fast.data.tar import Damage, Sample, read_samples
from ijepa_fast.data.workers import batches, check_loading, loading_options, never, shared
from ijepa_fast.philox import Stream, below, random_words

log = logging.getLogger(__name__)

PREVIEW = 64


class RemoteShards:
    """Tar shards at URLs. As a `Source`, for pictures: the first 64 images. For training: see `RemoteLoader`.

    Args:
        shards: URLs, or "pipe:" with a command whose output is a tar.
        pixels: see `Pixels`.
    """

    labels = None
    classes = None

    def __init__(self, shards: Sequence[str], **pixels):
        self.shards, self.pixels = list(shards), Pixels(**pixels)
        self.fingerprint = f"stream:{len(shards)}:{hashlib.sha256(' '.join(shards).encode()).hexdigest()[:32]}"

    def __len__(self) -> int:
        return len(self._preview)

    def __repr__(self) -> str:
        return f"RemoteShards({len(self.shards)} shards from {self.shards[0]!r})"

    def open(self, index: int) -> Image.Image:
        return open_image(io.BytesIO(self._preview[index].content), self.pixels)

    def describe(self, index: int) -> str:
        return self._preview[index].name

    @cached_property
    def _preview(self) -> list[Sample]:
        found = []
        for shard in self.shards:
            for sample in read_remote(shard):
                if isinstance(sample, Sample):
                    found.append(sample)
                if len(found) == PREVIEW:
                    return found
        return found


def read_remote(shard: str) -> Iterator[Sample | Damage]:
    """Samples of a shard with their bytes; where reading fails, the reason, and no more of this shard."""
    from webdataset import gopen

    damage = []
    try:
        file = gopen(shard)
        for found in read_samples(file, contents=True):
            if isinstance(found, Damage):
                damage.append(found)
            else:
                yield found
        file.close()  # raises if the transfer failed; a reader who leaves early does not ask
    except (OSError, ValueError) as error:
        damage = [Damage(f"cannot be read to its end: {str(error)[:200]}")]
    yield from damage


class RemoteLoader:
    """Endless batches of random-resized crops from `RemoteShards`, exact for given numbers of ranks and workers.

    Step s comes from worker ``s % workers``; its crops, the order of shards and the shuffle buffer are functions of
    (seed, rank, worker, position). An image that cannot be decoded is replaced by another one of its batch, so that a
    resumed run can pass over images without decoding them.

    Args:
        source: what to stream.
        epoch_images: images that count as an epoch, for schedules that are given in epochs.
        shuffle: images in each worker's shuffle buffer.
        min_seen: images to be seen before their bad share is judged.
        workers: decoding processes per rank. "auto" takes 4, or as many as there are shards for: not a number of this
            machine's, because what is read depends on it.
        timeout: as in `TrainLoader`; the first batch of a resumed run may take longer.
        image_size, global_batch, seed, rank, world_size, start_step, num_steps, scale, ratio, flip, max_bad_share,
            prefetch, pin_memory, reduced_decode, stop: see `TrainLoader`.

    Attributes:
        bad: name -> reason of every image and shard found bad by this rank so far.

    Raises:
        ValueError: settings that cannot work, fewer shards than workers among them; at construction.
        BadFilesError: while iterating: more than `max_bad_share` of the images seen are bad, no image of a batch can be
            decoded, or no shard of a worker holds an image.
    """

    def __init__(
        self,
        source: RemoteShards,
        *,
        image_size,
        global_batch: int,
        seed: int,
        epoch_images: int | None,
        shuffle: int = 1000,
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
        if epoch_images is None:
            raise ValueError("images from URLs are not counted beforehand: set loader.epoch_images")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} does not exist")
        if start_step < 0:
            raise ValueError(f"start_step must not be negative, got {start_step}")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be between 0 and 1, got {max_bad_share}")
        if shuffle < 1:
            raise ValueError(f"the shuffle buffer must hold at least one image, got {shuffle}")
        if global_batch % world_size:
            raise ValueError(f"a global batch of {global_batch} cannot be split evenly over {world_size} ranks")
        check_loading(workers, timeout)
        if workers == "auto":
            workers = max(1, min(4, len(source.shards) // world_size))
        readers = world_size * max(workers, 1)
        if len(source.shards) < readers:
            raise ValueError(
                f"{len(source.shards)} shards cannot be shared by {world_size} ranks x {max(workers, 1)} workers: "
                "use fewer workers or more shards"
            )
        check_crop(scale, ratio, flip)
        self.steps_per_epoch = steps_per_epoch(epoch_images, global_batch)
        crop = {"size": as_height_width(image_size), "scale": tuple(scale), "ratio": tuple(ratio), "flip": flip}
        self._batches = _RemoteBatches(
            source,
            seed,
            rank,
            world_size,
            global_batch // world_size,
            shuffle,
            crop | {"reduced_decode": reduced_decode},
            start_step,
            num_steps,
        )
        self._loading = loading_options(workers, prefetch, pin_memory)
        self._timeout, self._stop, self._slow_start = timeout, stop, start_step > 0
        self._max_bad_share, self._min_seen = max_bad_share, min_seen
        self.bad: dict[str, str] = {}
        self._bad_images = self._seen = 0

    def start_at(self, step: int, num_steps: int | None = None) -> None:
        """See `TrainLoader.start_at`."""
        self._batches.start_at(step, num_steps)
        self._slow_start = step > 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in batches(self._batches, self._loading, self._timeout, self._stop, self._slow_start):
            self._note(batch)
            yield batch

    def _note(self, batch: Batch) -> None:
        self._seen += len(batch.indices)
        for name, reason in batch.failures:
            if name not in self.bad:
                self.bad[name] = reason
                log.warning("skipped %s: %s", name, reason)
        self._bad_images += int((batch.indices < 0).sum())
        if self._seen >= self._min_seen and self._bad_images > self._max_bad_share * self._seen:
            examples = "".join(f"\n  {name}: {reason}" for name, reason in list(self.bad.items())[:5])
            raise BadFilesError(f"{self._bad_images} of {self._seen} images are bad, for example:{examples}")


class _RemoteBatches(IterableDataset):
    """The batches of one rank, made in a worker."""

    def __init__(self, source, seed, rank, world_size, batch, shuffle, crop, start_step, num_steps):
        self._shards, self._pixels = source.shards, source.pixels
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._batch, self._shuffle, self._crop = batch, shuffle, crop
        self.start_at(start_step, num_steps)

    def start_at(self, step: int, num_steps: int | None) -> None:
        self._start, self._stop = step, None if num_steps is None else step + num_steps

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        place, workers = (0, 1) if info is None else (info.id, info.num_workers)
        # Whoever comes first makes the first step asked for; what a worker reads follows from the steps it makes.
        first = self._start + place
        worker = first % workers
        reader = self._rank * workers + worker
        failures: list[tuple[str, str]] = []
        samples = self._shuffled(reader, self._world_size * workers, failures)
        for _ in range(first // workers * self._batch):
            next(samples)
        position = first // workers * self._batch
        for _ in count(first, workers) if self._stop is None else range(first, self._stop, workers):
            yield self._decoded([next(samples) for _ in range(self._batch)], reader, position, failures)
            position += self._batch

    def _read(self, reader: int, readers: int, failures: list) -> Iterator[tuple[str, Sample]]:
        """The samples of this reader's share of the shards, pass after pass without end."""
        epoch = 0
        while True:
            found = False
            for number in epoch_permutation(self._seed, epoch, len(self._shards))[reader::readers].tolist():
                shard = self._shards[number]
                for sample in read_remote(shard):
                    if isinstance(sample, Damage):
                        failures.append((shard, sample.reason))
                    else:
                        found = True
                        yield shard, sample
            if not found:
                reasons = "".join(f"\n  {name}: {reason}" for name, reason in failures[:5])
                raise BadFilesError(f"none of the shards of one worker and pass holds an image{reasons}")
            epoch += 1

    def _shuffled(self, reader: int, readers: int, failures: list) -> Iterator[tuple[str, Sample]]:
        """The samples of ``_read`` through a buffer, which a random one leaves for each that comes."""
        buffer, drawn = [], 0
        for item in self._read(reader, readers, failures):
            if len(buffer) < self._shuffle:
                buffer.append(item)
                continue
            chosen = below(random_words(self._seed, Stream.SHUFFLE, reader, drawn, 0)[0], self._shuffle)
            drawn += 1
            buffer[chosen], item = item, buffer[chosen]
            yield item

    def _decoded(self, items: list[tuple[str, Sample]], reader: int, position: int, failures: list) -> Batch:
        images = shared(self._pixels.empty(self._batch, self._crop["size"]))
        indices = np.arange(position, position + self._batch)
        bad = []
        for row, (shard, sample) in enumerate(items):
            try:
                images[row] = self._crop_of(sample, reader, position + row, 0)
            except Exception as error:  # damaged files make decoders raise nearly anything
                failures.append((f"{shard}: {sample.name}", f"{type(error).__name__}: {str(error)[:200]}"))
                bad.append(row)
        good = [row for row in range(self._batch) if row not in bad]
        if not good:
            raise BadFilesError(f"no image of a batch can be decoded, the last being {failures[-1]}")
        for row in bad:
            substitute = good[(row + 1) % len(good)]
            images[row] = self._crop_of(items[substitute][1], reader, position + row, 1)
        classes = [sample.label for _, sample in items]
        labels = np.array(
            [int(name) if name.isdecimal() and len(name) < 10 else -1 for name in classes], dtype=np.int64
        )
        labels[bad], indices[bad] = labels[[good[(row + 1) % len(good)] for row in bad]], -1
        told, failures[:] = tuple(failures), ()
        return Batch(images, shared(torch.from_numpy(labels)), shared(torch.from_numpy(indices)), told)

    def _crop_of(self, sample: Sample, reader: int, index: int, view: int) -> torch.Tensor:
        with quietly(), open_image(io.BytesIO(sample.content), self._pixels) as image:
            choice = {"seed": self._seed, "epoch": reader, "index": index, "view": view}
            return random_resized_crop(image, pixels=self._pixels, **choice, **self._crop)
