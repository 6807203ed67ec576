"""Which image is seen when: a pure function of (seed, step), whatever the workers, ranks and restarts."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ijepa_fast.philox import Stream, random_words

_BLOCKS_PER_CHUNK = 1 << 16  # Philox temporaries of half a megabyte each stay in the cache


class StepSamples(NamedTuple):
    """The images of one global step.

    A slot is a position in the epoch's order; row k of the global batch is slot `first_slot + k`. Crops are drawn by
    the epoch, or by the epoch of each image where those differ.
    """

    epoch: int
    first_slot: int
    indices: np.ndarray  # int64 [global_batch]
    epochs: np.ndarray | None = None  # int64 [global_batch]


@lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of `n` images in an epoch: read-only int32 or int64 [n], a permutation of 0..n-1.

    Images are sorted by independent 64-bit keys; images 2i and 2i+1 take the two halves of Philox block i of stream
    ORDER. Equal keys (chance below n^2 / 2^65) keep the order of the images.
    """
    draw, step = np.array([0]), np.array([epoch])
    keys = np.empty((n + 1) // 2 * 2, dtype=np.uint64)
    for first in range(0, len(keys) // 2, _BLOCKS_PER_CHUNK):
        blocks = np.arange(first, min(first + _BLOCKS_PER_CHUNK, len(keys) // 2), dtype=np.int64)
        words = [word.astype(np.uint64) for word in random_words(seed, Stream.ORDER, step, blocks, draw)]
        pairs = keys[2 * first : 2 * (first + len(blocks))].reshape(-1, 2)
        pairs[:, 0] = words[0] << np.uint64(32) | words[1]
        pairs[:, 1] = words[2] << np.uint64(32) | words[3]
    order = np.argsort(keys[:n], kind="stable")
    if n <= np.iinfo(np.int32).max:
        order = order.astype(np.int32)
    order.flags.writeable = False
    return order


def steps_per_epoch(n: int, global_batch: int) -> int:
    """Global batches in an epoch of `n` images; the rest of the epoch's order is dropped.

    Raises:
        ValueError: there are fewer images than one global batch needs.
    """
    if global_batch < 1:
        raise ValueError(f"the global batch must hold at least one image, got {global_batch}")
    if n < global_batch:
        raise ValueError(
            f"{n} images cannot fill one global batch of {global_batch}: "
            f"set the batch size to {n} or less, or add images"
        )
    return n // global_batch


def sample_indices(step: int, global_batch: int, n: int, seed: int) -> StepSamples:
    """The images of global step `step` (from 0): batch `step % steps_per_epoch` of its epoch's permutation."""
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    epoch, batch = divmod(step, steps_per_epoch(n, global_batch))
    first_slot = batch * global_batch
    chosen = epoch_permutation(seed, epoch, n)[first_slot : first_slot + global_batch]
    return StepSamples(epoch, first_slot, chosen.astype(np.int64))
