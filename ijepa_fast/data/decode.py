"""Opening of image files, and decoding to RGB or grey 8-bit pixels, for everything that Pillow reads.

What becomes of unusual images where crops are RGB or grey: CMYK, YCbCr and palettes are converted to RGB; transparent
ones are laid on white, as a viewer shows them; of a TIFF the first three bands (or the only one) are used, because a
fourth is as often near-infrared as transparency, whatever its tags say; 12- and 16-bit grey is scaled to 8 bits (not
clipped) and inverted where white is zero; of animations and multi-page files the first frame is used; colour profiles
are ignored.
Floating-point images and 32-bit ones beyond the 16-bit range are refused, for their scale is unknown, and so are
images with more pixels than the limit. Where a range is stated, or crops have another number of channels, `data.bands`
says what becomes of the values.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from os import PathLike

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLESPERPIXEL, TiffImageFile
from torch.nn.functional import interpolate

from ijepa_fast.data.bands import (
    LARGEST_16,
    NPY_MAGIC,
    SCANNER_EXTENSIONS,
    TIFF_MAGIC,
    ArrayBands,
    Pixels,
    StoredBands,
    open_bands,
    upright,
)

# EPS starts Ghostscript on the file, WMF needs Windows; the others are containers that Pillow names but cannot decode.
_UNREADABLE_FORMATS = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"})

_ARRAY_EXTENSIONS = SCANNER_EXTENSIONS | {".npy"}

_FRAME_HEADERS = frozenset({0xC0, 0xC1, 0xC2})
"""Markers before the size of a JPEG: baseline, extended, progressive (ITU-T T.81, table B.1)."""
_LEAST_PIXELS = 128 * 128
"""Pixels of a box from which on torch resizes faster than Pillow."""


@cache
def readable_formats() -> tuple[str, ...]:
    """Names of the image formats that Pillow reads, the usual ones first; HEIC and its kin with pillow-heif."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    usual = ("JPEG", "PNG", "WEBP")
    others = sorted(set(Image.OPEN) - _UNREADABLE_FORMATS - set(usual))
    return tuple(name for name in usual if name in Image.OPEN) + tuple(others)


@cache
def image_extensions() -> frozenset[str]:
    """File name extensions of the readable formats, in lower case and with the dot; ``.npy`` is not among them."""
    formats = set(readable_formats())
    extensions = {extension for extension, name in Image.registered_extensions().items() if name in formats}
    return frozenset(extensions | (SCANNER_EXTENSIONS if find_spec("tifffile") else set()))


def open_image(file, pixels: Pixels = Pixels()) -> Image.Image | ArrayBands:  # noqa: B008, it is frozen
    """Open a path or binary file without decoding it.

    Args:
        file: the path or file.
        pixels: what is made of it; decides what reads it, and up to which size.

    Raises:
        Exception: whatever Pillow or tifffile raises for a file that is no image; ValueError for one with too many
            pixels.
    """
    named = isinstance(file, (str, PathLike))
    extension = os.path.splitext(file)[1].lower() if named else None
    # Of files by name whose extension says what they are, nothing is read twice.
    magic = b"" if named and pixels.plain and extension not in _ARRAY_EXTENSIONS else _magic(file)
    array = not pixels.plain or extension in _ARRAY_EXTENSIONS or magic.startswith(NPY_MAGIC)
    if array and (bands := open_bands(file, magic, pixels.channels)) is not None:
        return bands
    try:
        image = _open_by_pillow(file)
    except UnidentifiedImageError as error:
        if not (magic or _magic(file)).startswith(TIFF_MAGIC):
            raise
        if (bands := open_bands(file, TIFF_MAGIC[0], pixels.channels)) is None:
            raise ValueError(f"{error}; tifffile may read this TIFF: pip install 'ijepa_fast[images]'") from error
        return bands
    if image.width * image.height > pixels.limit:
        image.close()
        # Tiles of a large TIFF are read one by one, and the limit then is that of a crop.
        if isinstance(image, TiffImageFile) and (bands := open_bands(file, TIFF_MAGIC[0], pixels.channels)) is not None:
            return bands
        hint = "; with tifffile only the part of a crop is read" if isinstance(image, TiffImageFile) else ""
        raise ValueError(
            f"{image.width}x{image.height} pixels are more than loader.max_pixels ({pixels.limit}) allows{hint}"
        )
    if isinstance(image, TiffImageFile):
        _keep_bands_apart(image)
    return image


def _open_by_pillow(file) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # its errors cannot be told from a broken file's, and name no setting
    try:
        return Image.open(file, formats=readable_formats())
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _magic(file) -> bytes:
    """The first bytes of a path or binary file."""
    if isinstance(file, (str, PathLike)):
        with open(file, "rb") as there:
            return there.read(len(NPY_MAGIC))
    start = file.read(len(NPY_MAGIC))
    file.seek(0)
    return start


def opened(image: Image.Image | ArrayBands | np.ndarray, pixels: Pixels = Pixels()) -> Image.Image | ArrayBands:  # noqa: B008
    """What a source's ``open`` gave, as a context manager: a source may give a plain array."""
    return ArrayBands(image, pixels.channels) if isinstance(image, np.ndarray) else image


def stored(image: Image.Image | ArrayBands | np.ndarray, pixels: Pixels) -> StoredImage | StoredBands:
    """The image to be cropped."""
    if pixels.plain and isinstance(image, Image.Image):
        return StoredImage(image, "RGB" if pixels.channels == 3 else "L")
    return StoredBands(as_bands(image, pixels), pixels)


def as_bands(image: Image.Image | ArrayBands | np.ndarray, pixels: Pixels) -> ArrayBands:
    """The bands of an image; those of Pillow's are decoded for it."""
    if not isinstance(image, Image.Image):
        return opened(image, pixels)
    values, white = _values_of(image, pixels.channels)
    return ArrayBands(values, pixels.channels, white)


def _values_of(image: Image.Image, channels: int) -> tuple[np.ndarray, int | None]:
    """All values of an image that Pillow has opened, upright, and the one that is white if their type does not say it.

    Other colours are converted to grey and RGB only where crops are grey or RGB.
    """
    upper_half = ";16" in str(getattr(image, "tile", ""))  # of colours with 16 bits Pillow keeps 8
    image.load()
    orientation, white = _orientation(image), None
    if image.mode.startswith("I;16"):
        values, white = _sixteen_bit_values(image)
        values = values.astype(np.uint16)
    elif image.mode in ("I", "F"):
        values = np.asarray(image)
    else:
        if channels in (1, 3):
            image = flatten(image).convert("L" if channels == 1 else "RGB")
        elif image.mode in ("P", "PA", "1"):
            image = image.convert("L" if image.mode == "1" else "RGBA" if image.has_transparency_data else "RGB")
        values = np.asarray(image).astype(np.uint16) * 257 if upper_half else np.asarray(image)
    return upright(values, orientation), white


@contextmanager
def quietly() -> Iterator[None]:
    """Without Pillow's warnings, of which a damaged EXIF block alone gives several; what cannot be decoded raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _keep_bands_apart(image: TiffImageFile) -> None:
    """Have colours not divided by the band that a TIFF declares to be premultiplied transparency."""

    def plain(arguments):
        return (arguments[0].replace("RGBa", "RGBA").replace("La", "LA"), *arguments[1:])

    image.tile = [
        tile._replace(args=plain(tile.args)) if isinstance(tile.args, tuple) and tile.args else tile
        for tile in image.tile
    ]


def bands_of(image: Image.Image) -> int:
    """Number of values that the file holds for each pixel, those that are not used included."""
    if isinstance(image, TiffImageFile):
        return image.tag_v2.get(SAMPLESPERPIXEL, 1)
    return len(image.getbands())


class StoredImage:
    """An image before its orientation tag is applied, and before a JPEG is decoded.

    Boxes are (left, top, right, bottom) in pixels of the upright image, the one a viewer shows.
    """

    def __init__(self, image: Image.Image, mode: str = "RGB"):
        # Only a JPEG's size and orientation can be trusted before decoding (a PNG may carry its EXIF block at the
        # end, an icon may change size), and only a JPEG gains from waiting: it can be decoded at reduced scale.
        if not isinstance(image, JpegImageFile):
            image.load()
        self._image, self._mode = image, mode
        self._orientation = _orientation(image)
        if min(image.size) < 1:
            raise ValueError(f"image without pixels: {image.width}x{image.height}")

    @property
    def _sideways(self) -> bool:
        return self._orientation >= 5

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright image."""
        width, height = self._image.size
        return (height, width) if self._sideways else (width, height)

    def fitting(self, box, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The box: images that are decoded whole were not opened if they were too large."""
        return box

    def resample(self, box, size: tuple[int, int], reduced_decode: bool) -> np.ndarray:
        """The values [h, w, 3] (grey: [h, w]) of `size` (width, height) that show `box`: antialiased bicubic, uint8.

        With `reduced_decode` a JPEG is decoded at 1/2, 1/4 or 1/8 of its scale (libjpeg's smaller inverse DCT) as
        long as the box still has at least `size` pixels. Pixels then differ by some 1.5 grey levels on average, as
        much as bicubic and Lanczos do. What of a JPEG lies below the box is not decoded. Decodes the file, hence to be
        called once.
        """
        box = self._stored_box(box)
        if self._sideways:
            size = size[::-1]
        image = _without_rows_below(self._image, box, size)
        if reduced_decode:
            box = _decode_reduced(image, box, size)
        image.load()
        return upright(_resized(flatten(image), box, size, self._mode), self._orientation)

    def _stored_box(self, box):
        left, top, right, bottom = box
        if self._sideways:
            left, top, right, bottom = top, left, bottom, right
        width, height = self._image.size
        if self._orientation in (2, 3, 7, 8):
            left, right = width - right, width - left
        if self._orientation in (3, 4, 6, 7):
            top, bottom = height - bottom, height - top
        return left, top, right, bottom


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none or the EXIF block cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block raises almost anything, and says nothing about the pixels
        return 1
    return orientation if orientation in range(2, 9) else 1


def _without_rows_below(image: Image.Image, box, size: tuple[int, int]) -> Image.Image:
    """The JPEG as if it ended a little below the box.

    Rows above are those of the whole image to the bit. Anything but an undecoded JPEG stays as it is.
    """
    # The resizing filter reaches two pixels of the result beyond the box, the interpolation of colours two blocks.
    height = math.ceil(box[3] + 2 * max(1, (box[3] - box[1]) / size[1])) + 32
    if type(image) is not JpegImageFile or not image.tile or height > image.height * 15 / 16:
        return image
    image.fp.seek(0)
    data, place = bytearray(image.fp.read()), 2
    stated = image.height.to_bytes(2, "big") + image.width.to_bytes(2, "big")
    while place + 9 < len(data) and data[place] == 0xFF:
        if data[place + 1] in _FRAME_HEADERS:
            # Without its end marker it was cut off, which only the decoder of all rows notices.
            if data[place + 5 : place + 9] != stated or data.rfind(b"\xff\xd9") < place:
                break
            data[place + 5 : place + 7] = height.to_bytes(2, "big")
            return _open_by_pillow(io.BytesIO(data))
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return image


def _resized(image: Image.Image, box, size: tuple[int, int], mode: str) -> np.ndarray:
    """The values of ``size`` that show ``box``, in mode RGB or L.

    Boxes of whole pixels are cut out and resized by torch, which needs a third of Pillow's time for the same integer
    arithmetic: of 500 values one differs by one level, and pixels outside the box no longer count at its edge.
    """
    left, top, right, bottom = box
    whole = all(float(edge).is_integer() for edge in box)
    if mode != "RGB" or image.mode != "RGB" or not whole or (right - left) * (bottom - top) < _LEAST_PIXELS:
        return np.array(image.resize(size, Image.Resampling.BICUBIC, box=box).convert(mode))
    values = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1)[None]
    return interpolate(values, size[::-1], mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def _decode_reduced(image: Image.Image, box, size: tuple[int, int]):
    """Tell an undecoded JPEG to decode at the smallest scale that suffices; returns the box at that scale."""
    left, top, right, bottom = box
    room = min((right - left) / size[0], (bottom - top) / size[1])
    reduction = next((factor for factor in (8, 4, 2) if factor <= room), 1)
    if reduction == 1:
        return box
    # Pillow picks the largest of 1, 2, 4, 8 that keeps the size asked for; this size makes that `reduction`.
    width, height = image.size
    drafted = image.draft(image.mode, (width // reduction, height // reduction))
    if drafted is None:  # not a JPEG, or decoded already
        return box
    # Not the ratio of image sizes: an incomplete last column or row of the reduced image counts as a whole one.
    _, (_, _, reduced_width, _) = drafted
    return tuple(edge * reduced_width / width for edge in box)


def flatten(image: Image.Image) -> Image.Image:
    """The decoded image in mode L or RGB, as the module says."""
    if image.mode.startswith("I"):
        return _sixteen_to_eight_bits(image)
    if isinstance(image, TiffImageFile) and image.mode in ("LA", "La", "RGBA"):
        bands = image.split()
        return Image.merge("RGB", bands[:3]) if len(bands) > 2 else bands[0]
    if image.mode == "F":
        raise ValueError("a floating-point image has no agreed range: state it, --loader.value_range '[LOW, HIGH]'")
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _sixteen_to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits (modes I;16 and I), or of the 12 bits that a TIFF declares, scaled and rounded, mode L."""
    values, white = _sixteen_bit_values(image)
    if values.min() < 0 or values.max() > LARGEST_16:
        raise ValueError(f"32-bit grey image with values {values.min()} to {values.max()}: only 0 to 65535 is scaled")
    return Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))


def _sixteen_bit_values(image: Image.Image) -> tuple[np.ndarray, int]:
    """Grey values int64 [h, w], and the one that is white."""
    values, white = np.asarray(image).astype(np.int64), LARGEST_16
    if isinstance(image, TiffImageFile):
        white = 4095 if image.tag_v2.get(BITSPERSAMPLE) == (12,) else white
        if image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:  # Pillow inverts up to 8 bits, and no more
            values = white - values
    return values, white
