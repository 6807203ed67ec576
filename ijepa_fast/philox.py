"""Philox4x32-10: counter-based random numbers, the same bits in Python, numpy, torch, C++, CUDA and Triton.

Every random choice of this package is a pure function of a seed and a counter, so nothing depends on the number of
workers, ranks or restarts. One layout serves the whole project:

    key     = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    counter = (draw, index, step, stream)

`stream` (a `Stream`, below 256) says what the number is for, `step` is the training step or epoch, `index` the image,
group or sample within it, and `draw` numbers the calls made for that index. One call gives four 32-bit words. Where an
image has several masks, the number of the mask stands in the upper 24 bits of the stream's word.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; checked against the
known-answer vectors of its Random123 library.

Values are 32-bit words held in Python ints, numpy int64 arrays or torch int64 tensors (any mix that broadcasts; 0-dim
tensors on a device are never read back). The 64-bit product of two words wraps around in int64, which leaves all of
its 64 bits right: `>> 32` followed by a 32-bit mask gives the upper half, the mask alone the lower one.
"""

from enum import IntEnum
from numbers import Integral

WORD_MASK = 0xFFFFFFFF

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


class Stream(IntEnum):
    """What a random number is for. The values are part of the format: never renumber, only append."""

    MASK_SIZE = 0
    MASK_CONTEXT_SIZE = 1
    MASK_POSITION = 2
    MASK_CONTEXT_POSITION = 3
    MASK_SUBSET = 4
    ORDER = 5
    CROP = 6
    REFILL = 7
    RENDER = 8
    SPLIT = 9
    PROBE = 10
    SHUFFLE = 11
    SHOT = 12
    DENSE = 13
    CORRUPTION = 14
    MASK_COLOR = 15


def philox4x32(counter, key):
    """Philox4x32-10 of a counter of four words and a key of two words: four words.

    Words are values in [0, 2^32): ints, numpy int64 arrays (arrays, not scalars, whose overflow warns) or torch int64
    tensors. The result has the broadcast shape of the inputs.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        # c1 and c3 are only ever XORed, so the upper halves they carry can wait for the mask of the next round.
        c0 = ((product_1 >> 32) ^ c1 ^ k0) & WORD_MASK
        c2 = ((product_0 >> 32) ^ c3 ^ k1) & WORD_MASK
        c1, c3 = product_1, product_0
        k0 = (k0 + _WEYL_0) & WORD_MASK
        k1 = (k1 + _WEYL_1) & WORD_MASK
    return c0, c1 & WORD_MASK, c2, c3 & WORD_MASK


def _as_word(name, value):
    """An integer checked to be a word; an array or tensor as it is, cut to 32 bits."""
    if isinstance(value, Integral):
        if not 0 <= value <= WORD_MASK:
            raise ValueError(f"{name} must be in [0, 2^32), got {value}")
        return int(value)
    return value & WORD_MASK


def random_words(seed, stream, step, index, draw):
    """The four 32-bit words for draw number `draw` of item `index` at `step`, in the project's counter layout.

    Args:
        seed: 64-bit integer, signed or unsigned, or an int64 tensor.
        stream: a `Stream`, or `Stream | number << 8`.
        step: training step or epoch, in [0, 2^32).
        index: image, group or sample, in [0, 2^32).
        draw: number of the call for this index, in [0, 2^32).
    All may be int64 tensors or numpy int64 arrays; they broadcast.

    Raises:
        ValueError: an int is out of range (a tensor is cut to 32 bits instead: checking it would need its value).
    """
    if isinstance(seed, Integral):
        seed = int(seed)
        if not -(1 << 63) <= seed < 1 << 64:
            raise ValueError(f"seed must fit 64 bits, got {seed}")
    key = (seed & WORD_MASK, (seed >> 32) & WORD_MASK)
    counter = (_as_word("draw", draw), _as_word("index", index), _as_word("step", step), _as_word("stream", stream))
    return philox4x32(counter, key)


def below(word, n):
    """A uniform integer in [0, n) from one word, by multiply-shift: (word * n) >> 32.

    `n` is below 2^31 so that the product fits int64. The probabilities of two results differ by at most 2^-32.
    """
    return (word * n) >> 32
