"""What a set of images must offer to be trained on or evaluated."""

from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image


@runtime_checkable
class Source(Protocol):
    """A finite, ordered set of images. Instances are pickled into loader workers.

    Attributes:
        labels: int64 [n], class index of every image, or None where the images have no classes.
        classes: class names, indexed by label; None where `labels` is None.
        fingerprint: identity of the set. A resumed run refuses to continue on a source with another fingerprint.
    """

    labels: np.ndarray | None
    classes: list[str] | None
    fingerprint: str

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """Image `index`; its pixels may still be undecoded. Whatever it raises marks the image as bad."""
        ...

    def describe(self, index: int) -> str:
        """Path or name of image `index`, for logs."""
        ...
