"""Images as arrays: any number of bands, values of any type, and only the part that a crop shows where files allow it.

How values become crops is one rule. Without a range that the user states, 8-bit values stay as they are and 16-bit ones
are divided by 257; other types are refused, for their range is unknown. With one, its lower end becomes 0 and its upper
end 1, what lies outside is clipped, and crops hold 16 bits (uint16, in units of 1/65535), so that nothing is lost.
"""

from __future__ import annotations

import io
import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NPY_MAGIC = b"\x93NUMPY"
SCANNER_EXTENSIONS = frozenset({".svs", ".ndpi", ".scn", ".bif"})
"""Slides of microscopes: TIFF files by another name, which only tifffile reads."""
LARGEST_8, LARGEST_16 = 255, 65535
MOST_OF_LIMIT = 0.8
"""Share of the largest number of pixels that an evaluation crop takes; the filter needs some around it."""


class Pixels(NamedTuple):
    """What is made of the images of a set.

    Attributes:
        channels: of the crops. 1 is grey and 3 is RGB, to which every image is converted; of any other number an image
            must have as many bands, transparency counting as one.
        value_range: the values that become 0 and 1; None where their type says it.
        max_pixels: width times height of what may be decoded at a time; None for PIL.Image.MAX_IMAGE_PIXELS.
    """

    channels: int = 3
    value_range: tuple[float, float] | None = None
    max_pixels: int | None = None

    @property
    def plain(self) -> bool:
        """Whether crops are 8-bit grey or RGB, as Pillow gives them."""
        return self.channels in (1, 3) and self.value_range is None

    @property
    def limit(self) -> float:
        limit = Image.MAX_IMAGE_PIXELS if self.max_pixels is None else self.max_pixels
        return math.inf if limit is None else limit

    def check(self) -> None:
        """ValueError for what cannot be."""
        if self.channels < 1:
            raise ValueError(f"model.in_chans must be at least 1, got {self.channels}")
        if self.value_range is not None and not -math.inf < self.value_range[0] < self.value_range[1] < math.inf:
            raise ValueError(f"loader.value_range must be [low, high], low below high, got {list(self.value_range)}")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ValueError(f"loader.max_pixels must be at least 1, got {self.max_pixels}")

    def empty(self, count: int, size: tuple[int, int]) -> Tensor:
        """Zeros for this many crops of (height, width)."""
        dtype = torch.uint8 if self.value_range is None else torch.uint16
        return torch.zeros(count, self.channels, *size, dtype=dtype)


def pixels_of(source) -> Pixels:
    """The ``pixels`` of a source; 8-bit RGB where it says nothing."""
    return getattr(source, "pixels", Pixels())


class ArrayBands:
    """An array [h, w], [h, w, bands] or [bands, h, w], in memory or mapped from a file.

    Attributes:
        size: width and height. bands: number of bands. dtype: of the values.
        white: value that is 1 where no range is stated, None for types that do not say it.
        levels: (height, width) of each resolution there is, the largest first.
        format: of the file, for people.
    """

    format = "array"

    def __init__(self, array: np.ndarray, channels: int, white: int | None = None):
        shape = array.shape
        if array.ndim == 2:
            array = array[..., None]
        elif array.ndim == 3 and shape[2] not in (channels, 1) and shape[0] in (channels, 1):
            array = np.moveaxis(array, 0, -1)
        if array.ndim != 3 or 0 in shape:
            raise ValueError(f"an image is an array [h, w] or [h, w, bands], got the shape {list(shape)}")
        self._array = array
        self._describe(array.shape, array.dtype, white)

    def _describe(self, shape: tuple[int, int, int], dtype: np.dtype, white: int | None) -> None:
        height, width, self.bands = shape
        self.size, self.levels, self.dtype = (width, height), [(height, width)], dtype
        self.white = {"bool": 1, "uint8": LARGEST_8, "uint16": LARGEST_16}.get(dtype.name) if white is None else white
        if dtype.kind not in "buif":
            raise ValueError(f"values of type {dtype} are none of an image")

    def read(self, _level: int, rows: slice, columns: slice) -> np.ndarray:
        """The values [h, w, bands] of a part of one of the levels."""
        return np.asarray(self._array[rows, columns])

    def misfit(self, pixels: Pixels) -> str | None:
        """Why no crops can be made of it, None if they can."""
        first_three = self.format == "TIFF" and self.bands > 3  # as where no range is stated
        if self.bands != pixels.channels and not (pixels.channels == 3 and (self.bands == 1 or first_three)):
            return f"the image has {_counted(self.bands, 'band')}, and model.in_chans is {pixels.channels}"
        if pixels.value_range is None and self.white is None:
            return f"values of type {self.dtype} have no agreed range: state it, --loader.value_range '[LOW, HIGH]'"
        return None

    def extrema(self) -> tuple[float, float]:
        """Lowest and highest number in the middle of the smallest level."""
        height, width = self.levels[-1]
        rows, columns = (slice(max(0, side // 2 - 512), side // 2 + 512) for side in (height, width))
        rows, columns = slice(rows.start, min(rows.stop, height)), slice(columns.start, min(columns.stop, width))
        values = _finite(self.read(len(self.levels) - 1, rows, columns))
        return values.min().item(), values.max().item()

    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


class TiffBands(ArrayBands):
    """A TIFF by tifffile: pages and planes are bands, tiles or strips that a crop does not show are not read.

    The reduced images of a pyramid are its further levels.
    """

    format = "TIFF"

    def __init__(self, file):
        import tifffile

        self._file = tifffile.TiffFile(file)
        try:
            self._levels = self._file.series[0].levels
            shape, page = self._shape_of(self._levels[0]), self._levels[0].keyframe
            if page.photometric == 3:
                raise ValueError("a TIFF with a palette has no bands")
            self._inverted = page.photometric == 0
            dtype, bits = self._levels[0].dtype, page.bitspersample
            declared = dtype.kind == "u" and isinstance(bits, int) and 8 < bits < 16
            self._describe(shape, dtype, 2**bits - 1 if declared else None)
            self.levels = [self._shape_of(level)[:2] for level in self._levels]
            self._orientation = page.tags.valueof(274, 1)
            if self._orientation >= 5:
                self.size, self.levels = self.size[::-1], [level[::-1] for level in self.levels]
            if self._inverted and self.white is None:
                raise ValueError(f"a TIFF in which white is zero has no values of type {self.dtype}")
        except Exception:
            self.close()
            raise

    @staticmethod
    def _shape_of(level) -> tuple[int, int, int]:
        if not {"Y", "X"} <= set(level.axes):
            raise ValueError(f"a TIFF with the axes {level.axes} is no image")
        sizes = dict(zip(level.axes, level.shape, strict=True))
        bands = math.prod(level.shape) // max(1, sizes["Y"] * sizes["X"])
        return sizes["Y"], sizes["X"], bands

    def read(self, level: int, rows: slice, columns: slice) -> np.ndarray:
        height, width = self.levels[level]
        if self._orientation in (3, 4, 7, 8):
            rows = slice(height - rows.stop, height - rows.start)
        if self._orientation in (2, 3, 6, 7):
            columns = slice(width - columns.stop, width - columns.start)
        stored = (columns, rows) if self._orientation >= 5 else (rows, columns)
        return upright(self._stored(level, *stored), self._orientation)

    def _stored(self, level: int, rows: slice, columns: slice) -> np.ndarray:
        series = self._levels[level]
        # ImageJ describes only the first page of a stack that lies in one piece.
        pages = list(series.pages)
        per_page = math.prod(pages[0].keyframe.shape) if pages and pages[0] is not None else 0
        if per_page * len(pages) == math.prod(series.shape) and None not in pages:
            parts = [_part_of(page, rows, columns) for page in pages]
            values = np.concatenate(parts, axis=-1)
        else:
            y, x = series.axes.index("Y"), series.axes.index("X")
            values = np.moveaxis(series.asarray(), (y, x), (0, 1))[rows, columns]
            values = values.reshape(*values.shape[:2], -1)
        return self.white - values if self._inverted else values

    def close(self) -> None:
        self._file.close()


def upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Values [h, w, ...] turned as an EXIF orientation says."""
    values = values.swapaxes(0, 1) if orientation >= 5 else values
    values = values[:, ::-1] if orientation in (2, 3, 6, 7) else values
    return values[::-1] if orientation in (3, 4, 7, 8) else values


def _part_of(page, rows: slice, columns: slice) -> np.ndarray:
    """A part of a TIFF's page, [h, w, bands], of the tiles or strips that it lies in."""
    keyframe = page.keyframe
    planes, depth, height, width, samples = keyframe.shaped
    if depth != 1:
        raise ValueError("a TIFF with volumes in its pages is no image")
    tall, wide = (keyframe.tilelength, keyframe.tilewidth) if keyframe.is_tiled else (keyframe.rowsperstrip, width)
    across, down = -(-width // wide), -(-height // tall)
    out = np.zeros((planes, rows.stop - rows.start, columns.stop - columns.start, samples), keyframe.dtype)
    file = page.parent.filehandle
    tables = {"jpegtables": page.jpegtables, "jpegheader": keyframe.jpegheader} if keyframe.compression != 1 else {}
    for plane in range(planes):
        for row in range(rows.start // tall, -(-rows.stop // tall)):
            for column in range(columns.start // wide, -(-columns.stop // wide)):
                index = (plane * down + row) * across + column
                file.seek(page.dataoffsets[index])
                if not page.databytecounts[index]:  # a tile that was never written
                    continue
                values = keyframe.decode(file.read(page.databytecounts[index]), index, **tables)[0]
                values = values[0]
                top, left = row * tall, column * wide
                y = slice(max(rows.start, top), min(rows.stop, top + values.shape[0]))
                x = slice(max(columns.start, left), min(columns.stop, left + values.shape[1]))
                target = out[plane, y.start - rows.start : y.stop - rows.start]
                target[:, x.start - columns.start : x.stop - columns.start] = values[
                    y.start - top : y.stop - top, x.start - left : x.stop - left
                ]
    return np.moveaxis(out, 0, 2).reshape(*out.shape[1:3], planes * samples)


def open_bands(file, magic: bytes, channels: int) -> ArrayBands | None:
    """A .npy file, or a TIFF where tifffile is installed; None for anything else."""
    if magic.startswith(NPY_MAGIC):
        array = np.load(file, mmap_mode=None if isinstance(file, io.BytesIO) else "r", allow_pickle=False)
        return ArrayBands(array, channels)
    if magic.startswith(TIFF_MAGIC):
        try:
            return TiffBands(_at_start(file))
        except ModuleNotFoundError:
            return None
    return None


def _at_start(file):
    if hasattr(file, "seek"):  # Pillow may have read some of it
        file.seek(0)
    return file


class StoredBands:
    """An image whose values are taken as the module says. Boxes as in ``StoredImage``."""

    def __init__(self, bands: ArrayBands, pixels: Pixels):
        self._bands, self._pixels, self.size = bands, pixels, bands.size
        if reason := bands.misfit(pixels):
            raise ValueError(reason)

    def resample(self, box, size: tuple[int, int], reduced_decode: bool) -> np.ndarray:
        """The values [h, w, channels] of `size` (width, height) that show `box`: antialiased bicubic, uint8 or uint16.

        With `reduced_decode` they come from the smallest level on which the box still has `size` pixels.
        """
        bands, pixels = self._bands, self._pixels
        level, (left, top, right, bottom) = self._level(box, size, reduced_decode)
        height, width = bands.levels[level]
        right, bottom = min(right, width), min(bottom, height)
        # The filter reaches two pixels of the result beyond the box.
        spans = (right - left, size[0]), (bottom - top, size[1])
        beyond = [math.ceil(2 * max(1.0, span / side)) + 1 for span, side in spans]
        columns = slice(max(0, math.floor(left) - beyond[0]), min(width, math.ceil(right) + beyond[0]))
        rows = slice(max(0, math.floor(top) - beyond[1]), min(height, math.ceil(bottom) + beyond[1]))
        wide, tall = columns.stop - columns.start, rows.stop - rows.start
        if wide * tall > pixels.limit:
            raise ValueError(
                f"a crop of {wide}x{tall} pixels is more than loader.max_pixels ({pixels.limit}) allows: make "
                "loader.crop_scale smaller, or raise it"
            )
        values = bands.read(level, rows, columns)
        inside = (left - columns.start, top - rows.start, right - columns.start, bottom - rows.start)
        out = np.stack(
            [_resized(self._numbers(band), inside, size) for band in np.moveaxis(values, -1, 0)[: pixels.channels]],
            axis=-1,
        )
        out = out if out.dtype == np.uint8 else self._scaled(out)
        return out.repeat(3, axis=-1) if out.shape[-1] == 1 and pixels.channels == 3 else out

    def fitting(self, box, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The box, or as much of its middle as may be decoded."""
        for _ in range(len(self._bands.levels) + 1):  # a smaller box may need a larger level
            _, (left, top, right, bottom) = self._level(box, size, True)
            share = MOST_OF_LIMIT * self._pixels.limit / ((right - left) * (bottom - top))
            if share >= 1:
                break
            cut = (1 - math.sqrt(share)) / 2
            wide, tall = (box[2] - box[0]) * cut, (box[3] - box[1]) * cut
            box = (box[0] + wide, box[1] + tall, box[2] - wide, box[3] - tall)
        return box

    def _level(self, box, size: tuple[int, int], reduced_decode: bool) -> tuple[int, tuple[float, float, float, float]]:
        """The smallest level on which the box still has `size` pixels, and the box on it."""
        levels = self._bands.levels
        chosen, found = 0, tuple(box)
        for number, (height, width) in enumerate(levels if reduced_decode else []):
            across, down = width / levels[0][1], height / levels[0][0]
            there = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
            if there[2] - there[0] >= size[0] and there[3] - there[1] >= size[1]:
                chosen, found = number, there
        return chosen, found

    def _numbers(self, band: np.ndarray) -> np.ndarray:
        """A band as it is resized: uint8 as it is, or fp32."""
        if self._pixels.value_range is not None:  # clipped before the filter, which would spread a mark such as -9999
            return _finite(band.astype(np.float32).clip(*self._pixels.value_range))
        return band if band.dtype == np.uint8 else band.astype(np.float32)

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        stated = self._pixels.value_range
        low, high = stated or (0, self._bands.white)
        largest, dtype = (LARGEST_8, np.uint8) if stated is None else (LARGEST_16, np.uint16)
        share = (values.astype(np.float64) - low) / (high - low)
        return (share.clip(0, 1) * largest + 0.5).astype(dtype)


def _resized(band: np.ndarray, box, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(band)).resize(size, Image.Resampling.BICUBIC, box=box))


def _finite(values: np.ndarray) -> np.ndarray:
    """The values with the lowest one where there is no number, as outside of what was recorded."""
    finite = np.isfinite(values)
    return values if finite.all() else np.where(finite, values, values[finite].min() if finite.any() else 0)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
