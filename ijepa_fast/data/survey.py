"""One line about the images of a run: their number, classes, format and values, and what is passed over."""

from __future__ import annotations

import logging
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from ijepa_fast.data.bands import SCANNER_EXTENSIONS, pixels_of
from ijepa_fast.data.decode import as_bands, bands_of, flatten, opened, quietly
from ijepa_fast.data.folder import kinds
from ijepa_fast.data.loader import EvalLoader
from ijepa_fast.data.mixture import Mixture
from ijepa_fast.data.remote import RemoteShards
from ijepa_fast.data.source import Source

log = logging.getLogger(__name__)

LOOKED_AT = 16
"""Images that are decoded for the line, spread evenly."""
DARK = 64
"""Highest value, of 255, up to which a set is called too dark: 14-bit values in 16 bits reach 64, 12-bit ones 16."""
MEASURED = 256
"""Images that mean and standard deviation are measured on, spread evenly."""
LITTLE = 0.1
"""Share of a stated range that values fill at least, without a warning."""
# Images to those who have them -> the package that reads them.
_UNREAD_IMAGES = {
    **dict.fromkeys((".heic", ".heif", ".avif"), "install pillow-heif"),
    **dict.fromkeys(SCANNER_EXTENSIONS, "install tifffile and imagecodecs"),
    **dict.fromkeys((".dcm", ".dicom", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".raf", ".orf", ".rw2", ".raw"), ""),
    **dict.fromkeys((".jxl", ".exr", ".hdr", ".czi", ".nii", ".fits", ".fit", ".hdf", ".h5", ".svg"), ""),
}


class _Look(NamedTuple):
    """What a look at an image shows; values as its crops would have them, or as its file has them (not ``plain``)."""

    file_format: str
    bands: int
    values: str
    low: float
    high: float
    misfit: str | None = None
    plain: bool = True


def announce(train: Source, test: Source | None) -> None:
    """Log the line, and a warning for each thing that would otherwise go wrong unseen.

    Raises:
        ValueError: none of the images that are looked at has the bands and values that the settings say.
    """
    if isinstance(train, RemoteShards):
        log.info("images: read from %d shards at URLs, not counted", len(train.shards))
        return
    parts = [_counted(train)]
    if test is not None:
        parts.append(f"test images: {_counted(test)}")
    warnings = []
    looked = [look for index in _spread(train, LOOKED_AT) if (look := _look(train, index)) is not None]
    if looked:
        low, high = min(look.low for look in looked), max(look.high for look in looked)
        values = f"values {low:g} to {high:g}{' of 255' if looked[0].plain else ''} in the {len(looked)} looked at"
        misfits = [look.misfit for look in looked if look.misfit]
        if len(misfits) == len(looked):
            raise ValueError(f"{misfits[0]}; {values}")
        if misfits:
            warnings.append(f"{len(misfits)} of the {len(looked)} images looked at cannot be used: {misfits[0]}")
        formats, bands, kinds_of_values = zip(*(look[:3] for look in looked), strict=True)
        parts.append(f"{_listed(formats)}, {_listed(bands)} x {_listed(kinds_of_values)}, {values}")
        warnings += _of_values(train, looked, low, high)
        if max(bands) > 3 and "TIFF" in formats and (looked[0].plain or pixels_of(train).channels == 3):
            warnings.append(
                f"TIFF files with {max(bands)} bands: the first three are used as red, green and blue, no others; "
                f"--model.in_chans {max(bands)} uses all"
            )
    if passed_over := Counter(getattr(train, "passed_over", {})):
        parts.append(f"passed over: {kinds(passed_over)}")
        for remedy in dict.fromkeys(_UNREAD_IMAGES.values()):
            if unread := Counter({k: n for k, n in passed_over.items() if _UNREAD_IMAGES.get(k) == remedy}):
                way = f"{remedy}, or convert them" if remedy else "convert them"
                warnings.append(f"{kinds(unread)} files are not trained on, for Pillow cannot read them: {way}")
        if broken := passed_over["dangling link"]:
            warnings.append(f"the images of {kinds(Counter({'dangling link': broken}))} are missing")
    log.info("images: %s", "; ".join(parts))
    for warning in warnings:
        log.warning("%s", warning)


def _of_values(train: Source, looked: list[_Look], low: float, high: float) -> list[str]:
    """Warnings about the range of values."""
    seen = f"in the {len(looked)} looked at"
    stated = pixels_of(train).value_range
    if high == low:
        return [f"the images show nothing: every value is {high:g} {seen}"]
    if stated is None:
        if high > DARK or not looked[0].plain:
            return []
        return [
            f"the images are dark: no value is above {high} of 255 {seen}. 16-bit files are taken to reach 65535; if "
            "yours hold 10, 12 or 14 bits, state it: --loader.value_range '[0, 1023]', 4095 or 16383"
        ]
    if low < stated[0] or high > stated[1]:
        return [f"values outside of loader.value_range {list(stated)} are clipped: they are {low:g} to {high:g} {seen}"]
    if high - low < LITTLE * (stated[1] - stated[0]):
        return [f"values of {low:g} to {high:g} {seen} fill little of loader.value_range {list(stated)}"]
    return []


def measured(source: Source, image_size, workers: int | str = 0) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, for crops in [0, 1], over a sample of the images.

    Raises:
        ValueError: a channel has one value everywhere.
    """
    loader = EvalLoader(source, image_size, 32, workers, indices=_spread(source, MEASURED), resize_ratio=1.0)
    count, sums, squares = 0, 0.0, 0.0
    for batch in loader:
        values = batch.images.double() / torch.iinfo(batch.images.dtype).max
        count += values.numel() // values.shape[1]
        sums, squares = sums + values.sum((0, 2, 3)), squares + values.square().sum((0, 2, 3))
    mean = sums / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    for channel, (middle, spread) in enumerate(zip(mean.tolist(), std.tolist(), strict=True)):
        if spread < 1e-5:
            raise ValueError(
                f"channel {channel} of the images is {middle:.4g} (in [0, 1]) everywhere, so its standard deviation "
                "cannot be measured: state model.mean_std, or another loader.value_range"
            )
    return tuple(tuple(float(f"{x:.4g}") for x in each.tolist()) for each in (mean, std))


def _counted(source: Source) -> str:
    classes = f" in {len(source.classes)} classes" if source.classes is not None else ""
    place = f" below {source.root}" if hasattr(source, "root") else ""
    return f"{len(source)}{classes}{place}"


def _spread(source: Source, wanted: int) -> list[int]:
    """Images from all over a source, and as many from each part of a mixture as a run sees."""
    count = len(source)
    if isinstance(source, Mixture):
        return source.sample_indices(0, min(count, wanted), seed=0).indices.tolist()
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(int).tolist()


def _listed(values: tuple) -> str:
    return "/".join(map(str, sorted(set(values))))


def _look(source: Source, index: int) -> _Look | None:
    """What an image is like; None if it cannot be decoded."""
    pixels = pixels_of(source)
    try:
        with quietly(), opened(source.open(index), pixels) as image:
            file_format = image.format or "images in memory"
            if not pixels.plain or not hasattr(image, "draft") or image.mode == "F":
                bands = as_bands(image, pixels)
                low, high = bands.extrema()
                return _Look(file_format, bands.bands, bands.dtype.name, low, high, bands.misfit(pixels), False)
            bands = bands_of(image)
            image.draft("RGB", (512, 512))
            bits = 16 if image.mode.startswith("I") or ";16" in str(getattr(image, "tile", "")) else 8
            image.load()
            extrema = flatten(image).getextrema()
    except Exception:  # the loader names and counts what it cannot decode
        return None
    lows, highs = zip(*(extrema if isinstance(extrema[0], tuple) else [extrema]), strict=True)
    return _Look(file_format, bands, f"{bits} bits", min(lows), max(highs))
