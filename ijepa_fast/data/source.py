"""The interface of a set of images that is trained on or evaluated."""

import logging
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)


@runtime_checkable
class Source(Protocol):
    """A finite, ordered set of images. Instances are pickled into loader workers.

    Attributes:
        labels: int64 [n], class index of every image, or None where the images have no classes.
        classes: class names, indexed by label; None where `labels` is None.
        pixels: optional: channels and values of its crops, see ``Pixels``; 8-bit RGB where there is no such attribute.
        fingerprint: identity of the set. A resumed run refuses to continue on a source with another fingerprint.
    """

    labels: np.ndarray | None
    classes: list[str] | None
    fingerprint: str

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image | np.ndarray:
        """Image `index`; its pixels may still be undecoded. Whatever it raises marks the image as bad.

        An array is [h, w], [h, w, bands] or [bands, h, w].
        """
        ...

    def describe(self, index: int) -> str:
        """Path or name of image `index`, for logs."""
        ...


_told: WeakKeyDictionary[Source, set[str]] = WeakKeyDictionary()


def warn_once(source: Source, name: str, reason: str) -> None:
    """Log that an image is left out, unless that was said of this source before: a run loads it several times."""
    # A source of the user may be a dataclass, which cannot be a key.
    told = _told.setdefault(source, set()) if source.__hash__ else set()
    if name not in told:
        told.add(name)
        log.warning("skipped %s: %s", name, reason)
