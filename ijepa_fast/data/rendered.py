"""The embedded labelled image set: brush strokes in eight directions, all but buried under coloured noise.

The class of an image is the direction of its strokes, in steps of 22.5 degrees. Everything else is alike in all
classes: grey strokes of one width and contrast on one grey ground, at random places, under noise that is independent
in every pixel and channel. So neither the mean image nor the colours give the class away, a single patch hardly does,
and what the patches of an image share, the direction, is what predicting one from the others has to find. (Two images
with strokes in one direction do resemble each other in parts, so a nearest-neighbour vote on pixels is no bad guess;
a linear classifier on pixels is near chance.)

A patch grid of 8 x 8 (4 px) suits it. Images are functions of (seed, split, index) alone.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

from ijepa_fast.data.bands import Pixels
from ijepa_fast.philox import Stream

DIRECTIONS = 8
STROKE_PERIOD = 4.5
"""Pixels from one stroke to the next."""
PERIOD_SPREAD = 0.25
"""Standard deviation of the logarithm of the period."""
DIRECTION_SPREAD = np.deg2rad(15)
"""Standard deviation of the strokes' direction around the one of the class."""
STROKE_CONTRAST = 0.2 / 3**0.5
NOISE = 0.2
"""Standard deviations of strokes and of noise, in units of the range from black to white."""
NUM_IMAGES = {"train": 4000, "test": 2000}

_SPLITS = ("train", "test")
_CANVAS = 64
_BLOCK = 200


class RenderedTextures:
    """Source of the embedded set.

    Args:
        split: "train" or "test"; they share no image.
        num_images: how many; None for 4,000 and 2,000. Image i is the same however many there are.
        image_size: side in pixels, at most 64.
        seed: of the set.
        pixels: see `Pixels`.

    Attributes:
        images: uint8 [n, image_size, image_size, 3].
        labels, classes, fingerprint: see ``Source``.

    Raises:
        ValueError: an unknown split, or sizes out of range.
    """

    def __init__(
        self,
        split: Literal["train", "test"] = "train",
        num_images: int | None = None,
        image_size: int = 32,
        seed: int = 0,
        **pixels,
    ):
        if split not in _SPLITS:
            raise ValueError(f"split must be train or test, got {split!r}")
        num_images = NUM_IMAGES[split] if num_images is None else num_images
        if num_images < 1 or not 1 <= image_size <= _CANVAS:
            raise ValueError(
                f"num_images must be positive and image_size between 1 and {_CANVAS}, got {num_images}, {image_size}"
            )
        self.split, self.pixels = split, Pixels(**pixels)
        self.labels = np.arange(num_images, dtype=np.int64) % DIRECTIONS
        self.classes = [f"{number * 180 / DIRECTIONS:g} degrees" for number in range(DIRECTIONS)]
        self.fingerprint = f"rendered-textures-1-{split}-{num_images}-{image_size}-{seed}"
        blocks = range(-(-num_images // _BLOCK))
        self.images = np.concatenate([_render(seed, split, block, image_size) for block in blocks])[:num_images]

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def describe(self, index: int) -> str:
        return f"rendered {self.split} image {index}"


def _render(seed: int, split: str, block: int, size: int) -> np.ndarray:
    """uint8 [_BLOCK, size, size, 3]: images block * _BLOCK and following."""
    generator = np.random.Philox(key=seed, counter=[0, block, _SPLITS.index(split), int(Stream.RENDER)])
    labels = (block * _BLOCK + np.arange(_BLOCK)) % DIRECTIONS
    spectrum = np.fft.rfft2(_normal(generator, (_BLOCK, _CANVAS, _CANVAS)))
    strokes = np.fft.irfft2(spectrum * _stroke_filters()[labels])[:, :size, :size]
    noise = _normal(generator, (_BLOCK, size, size, 3))
    images = 0.5 + STROKE_CONTRAST * strokes[..., None] + NOISE * noise
    return (images.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _stroke_filters() -> np.ndarray:
    """[DIRECTIONS, _CANVAS, _CANVAS / 2 + 1]: filters that turn white noise into strokes of unit variance."""
    y, x = np.meshgrid(np.fft.fftfreq(_CANVAS), np.fft.fftfreq(_CANVAS), indexing="ij")
    frequency = np.hypot(x, y)
    frequency[0, 0] = np.inf
    octaves = np.log(frequency * STROKE_PERIOD)
    octaves[0, 0] = np.inf
    filters = []
    for number in range(DIRECTIONS):
        # Strokes run across the direction in which the brightness changes.
        turn = np.arctan2(y, x) - number * np.pi / DIRECTIONS
        turn = np.abs((turn + np.pi / 2) % np.pi - np.pi / 2)
        gain = np.exp(-0.5 * (octaves / PERIOD_SPREAD) ** 2 - 0.5 * (turn / DIRECTION_SPREAD) ** 2)
        filters.append(gain / np.sqrt(np.mean(gain**2)))
    return np.stack(filters)[:, :, : _CANVAS // 2 + 1]


def _normal(generator: np.random.Philox, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers by Box and Muller from raw words, whose stream no numpy version changes."""
    count = int(np.prod(shape))
    words = generator.random_raw(-(-count // 2))
    radius = np.sqrt(-2 * np.log(((words >> np.uint64(32)) + 0.5) / 2.0**32))
    angle = (words & np.uint64(0xFFFFFFFF)) * (2 * np.pi / 2.0**32)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].reshape(shape)
