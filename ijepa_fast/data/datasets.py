"""The images a run's configuration names."""

from __future__ import annotations

import logging
from typing import NamedTuple

from ijepa_fast.data.folder import ImageFolder, find_split
from ijepa_fast.data.source import Source

log = logging.getLogger(__name__)

RENDERED = "rendered"


class Sources(NamedTuple):
    """Images to train on, and labelled images to test on (None where there are none)."""

    train: Source
    test: Source | None


def open_sources(data: str | None, evaluation_data: str | None = None) -> Sources:
    """The training and test images of a run.

    Args:
        data: "rendered" for the embedded set, else a folder. Of a folder with train/ and val/ (or test/), these.
        evaluation_data: folder of labelled test images, instead of the one found beside the training images.

    Raises:
        ValueError, OSError: no data is given; as ``ImageFolder``; or the test images have classes that the training
            images lack.
    """
    if data is None:
        raise ValueError('no images are given: set data to a folder of images (--data PATH), or to "rendered"')
    if data == RENDERED:
        from ijepa_fast.data.rendered import RenderedTextures

        return Sources(RenderedTextures("train"), RenderedTextures("test"))
    split = find_split(data)
    train = ImageFolder(split.train)
    test_folder = evaluation_data or split.evaluation
    if train.labels is None:
        if evaluation_data:
            raise ValueError(f"{evaluation_data} cannot be used for evaluation: {split.train} has no class folders")
        log.info("%s has no class folders: k-NN and linear probe are left out", split.train)
        return Sources(train, None)
    if test_folder is None:
        log.info("%s has no val or test folder beside it: probe and final k-NN are left out", split.train)
        return Sources(train, None)
    return Sources(train, ImageFolder(test_folder, classes=train.classes))
