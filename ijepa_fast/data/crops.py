"""Training and evaluation crops: from an image to a uint8 or uint16 tensor [C, H, W] (normalised later, on the device).

Legend: C channels, H height, W width.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ijepa_fast.data.bands import ArrayBands, Pixels
from ijepa_fast.data.decode import stored
from ijepa_fast.philox import Stream, below, random_words

OFFICIAL_SCALE = (0.3, 1.0)  # share of the image's area, the official recipe
ASPECT_RATIO = (3 / 4, 4 / 3)  # width : height of the crop
EVAL_RATIO = 256 / 224  # resize the shorter side to 256, cut 224 from the centre

_BOX_ATTEMPTS = 10
_FLIP_DRAW = _BOX_ATTEMPTS  # the draw after those of the box
_DRAWS_PER_VIEW = 16
_WORD = 1 / (1 << 32)


def as_height_width(size) -> tuple[int, int]:
    """Height and width in pixels from one number (a square) or two; ValueError where they are no positive integers."""
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"image size must be a positive integer or (height, width), got {size!r}")
    return sides


def check_crop(scale, ratio, flip: float) -> None:
    """ValueError unless 0 < scale[0] <= scale[1] <= 1, 0 < ratio[0] <= ratio[1] and 0 <= flip <= 1."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"crop scale must satisfy 0 < minimum <= maximum <= 1, got {tuple(scale)}")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"crop ratio must satisfy 0 < minimum <= maximum, got {tuple(ratio)}")
    if not 0 <= flip <= 1:
        raise ValueError(f"the chance of a flip must be between 0 and 1, got {flip}")


def random_box(width: int, height: int, *, scale, ratio, seed: int, epoch: int, index: int, view: int = 0):
    """A random box in a width x height image: (left, top, right, bottom), whole pixels.

    Area uniform in `scale` times the image's, logarithm of the aspect ratio uniform, position uniform (Szegedy et al.,
    "Going deeper with convolutions", section 6); a box that does not fit is drawn again. Attempt a uses the four words
    of draw 16 * view + a for area, ratio, left and top. After ten attempts: the largest central box whose aspect ratio
    is the allowed one nearest to the image's.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(_BOX_ATTEMPTS):
        words = random_words(seed, Stream.CROP, epoch, index, _DRAWS_PER_VIEW * view + attempt)
        area = width * height * (scale[0] + (scale[1] - scale[0]) * (words[0] * _WORD))
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * (words[1] * _WORD))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = below(words[2], width - box_width + 1)
            top = below(words[3], height - box_height + 1)
            return left, top, left + box_width, top + box_height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_width = max(1, min(width, round(height * aspect)))
    box_height = max(1, min(height, round(width / aspect)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def random_resized_crop(
    image: Image.Image | ArrayBands | np.ndarray,
    size,
    *,
    pixels: Pixels = Pixels(),  # noqa: B008, it is frozen
    scale=OFFICIAL_SCALE,
    ratio=ASPECT_RATIO,
    flip: float = 0.0,
    seed: int,
    epoch: int,
    index: int,
    view: int = 0,
    reduced_decode: bool = True,
) -> Tensor:
    """A random box of the upright image, resized: [C, H, W], a pure function of (seed, epoch, index, view).

    Args:
        image: as opened; a JPEG should not be decoded yet. Not to be used afterwards.
        pixels: channels and values of the crop.
        size: side of the crop, or (height, width), in pixels.
        scale: range of the box's share of the image's area.
        ratio: range of the box's width : height.
        flip: chance of a mirror image; the official recipe has none.
        index: of the image in its source.
        view: distinguishes several crops of one image in one epoch.
        reduced_decode: decode JPEGs at reduced scale where that suffices.

    Raises:
        Exception: whatever Pillow raises for a file it cannot decode; ValueError for bands or values that do not fit.
    """
    height, width = as_height_width(size)
    whole = stored(image, pixels)
    box = random_box(*whole.size, scale=scale, ratio=ratio, seed=seed, epoch=epoch, index=index, view=view)
    crop = whole.resample(box, (width, height), reduced_decode)
    if (
        flip > 0
        and random_words(seed, Stream.CROP, epoch, index, _DRAWS_PER_VIEW * view + _FLIP_DRAW)[0] * _WORD < flip
    ):
        crop = crop[:, ::-1]
    return _to_tensor(crop)


def eval_crop(
    image: Image.Image | ArrayBands | np.ndarray,
    size,
    *,
    pixels: Pixels = Pixels(),  # noqa: B008, it is frozen
    resize_ratio: float = EVAL_RATIO,
    reduced_decode: bool = True,
) -> Tensor:
    """The centre of the upright image: [C, H, W].

    The same as resizing the image until it just covers `resize_ratio` times `size`, then cutting `size` from the
    centre, in one resampling. `resize_ratio` 1 keeps all of a square image. Of an image that is read in part, and too
    large otherwise, as much of the middle as may be decoded.
    """
    height, width = as_height_width(size)
    whole = stored(image, pixels)
    full_width, full_height = whole.size
    enlargement = resize_ratio * max(width / full_width, height / full_height)
    box_width, box_height = width / enlargement, height / enlargement
    left, top = max(0.0, (full_width - box_width) / 2), max(0.0, (full_height - box_height) / 2)
    box = (left, top, min(left + box_width, full_width), min(top + box_height, full_height))
    box = whole.fitting(box, (width, height))
    return _to_tensor(whole.resample(box, (width, height), reduced_decode))


def _to_tensor(crop: np.ndarray) -> Tensor:
    crop = crop[..., None] if crop.ndim == 2 else crop
    return torch.from_numpy(crop.transpose(2, 0, 1).copy())
