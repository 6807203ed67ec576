"""One line about the images of a run: their number, classes, format and values, and what is passed over."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np

from ijepa_fast.data.decode import bands_of, flatten, quietly
from ijepa_fast.data.folder import kinds
from ijepa_fast.data.remote import RemoteShards
from ijepa_fast.data.source import Source

log = logging.getLogger(__name__)

LOOKED_AT = 16
"""Images that are decoded for the line, spread evenly."""
DARK = 64
"""Highest value, of 255, up to which a set is called too dark: 14-bit values in 16 bits reach 64, 12-bit ones 16."""
# Images to those who have them, but not to Pillow.
_UNREAD_IMAGES = {
    *(".heic", ".heif", ".dcm", ".dicom", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".raf", ".orf", ".rw2", ".raw"),
    *(".jxl", ".exr", ".hdr", ".svs", ".ndpi", ".czi", ".nii", ".npy", ".fits", ".fit", ".hdf", ".h5", ".svg"),
}


def announce(train: Source, test: Source | None) -> None:
    """Log the line, and a warning for each thing that would otherwise go wrong unseen."""
    if isinstance(train, RemoteShards):
        log.info("images: read from %d shards at URLs, not counted", len(train.shards))
        return
    parts = [_counted(train)]
    if test is not None:
        parts.append(f"test images: {_counted(test)}")
    warnings = []
    looked = [look for index in _spread(len(train)) if (look := _look(train, index)) is not None]
    if looked:
        formats, bands, bits, lows, highs = zip(*looked, strict=True)
        low, high = min(lows), max(highs)
        parts.append(
            f"{_listed(formats)}, {_listed(bands)} x {_listed(bits)} bits, values {low} to {high} of 255 in the "
            f"{len(looked)} looked at"
        )
        if high <= DARK:
            warnings.append(
                f"the images are dark: no value is above {high} of 255 in the {len(looked)} looked at. 16-bit files "
                "are taken to reach 65535; if yours hold 10, 12 or 14 bits, multiply their values by 64, 16 or 4 first"
            )
        elif high == low:
            warnings.append(f"the images show nothing: every value is {high} in the {len(looked)} looked at")
        if max(bands) > 3 and "TIFF" in formats:
            warnings.append(
                f"TIFF files with {max(bands)} bands: the first three are used as red, green and blue, no others"
            )
    if passed_over := Counter(getattr(train, "passed_over", {})):
        parts.append(f"passed over: {kinds(passed_over)}")
        unread = Counter({kind: n for kind, n in passed_over.items() if kind in _UNREAD_IMAGES})
        if unread:
            warnings.append(f"{kinds(unread)} files are not trained on, for Pillow cannot read them: convert them")
        if broken := passed_over["dangling link"]:
            warnings.append(f"the images of {kinds(Counter({'dangling link': broken}))} are missing")
    log.info("images: %s", "; ".join(parts))
    for warning in warnings:
        log.warning("%s", warning)


def _counted(source: Source) -> str:
    classes = f" in {len(source.classes)} classes" if source.classes is not None else ""
    place = f" below {source.root}" if hasattr(source, "root") else ""
    return f"{len(source)}{classes}{place}"


def _spread(count: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, LOOKED_AT)).round().astype(int).tolist()


def _listed(values: tuple) -> str:
    return "/".join(map(str, sorted(set(values))))


def _look(source: Source, index: int) -> tuple[str, int, int, int, int] | None:
    """Format, bands, bits per value, lowest and highest value (of 255) of an image; None if it cannot be decoded."""
    try:
        with quietly(), source.open(index) as image:
            bands, file_format = bands_of(image), image.format or "images in memory"
            image.draft("RGB", (512, 512))
            bits = 16 if image.mode.startswith("I") or ";16" in str(getattr(image, "tile", "")) else 8
            image.load()
            extrema = flatten(image).getextrema()
    except Exception:  # the loader names and counts what it cannot decode
        return None
    lows, highs = zip(*(extrema if isinstance(extrema[0], tuple) else [extrema]), strict=True)
    return file_format, bands, bits, min(lows), max(highs)
