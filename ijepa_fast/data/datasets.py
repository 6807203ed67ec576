"""The images a run's configuration names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ijepa_fast.data.bands import Pixels
from ijepa_fast.data.folder import ImageFiles, ImageFolder, find_split
from ijepa_fast.data.indexed import SUFFIX, IndexedShards
from ijepa_fast.data.lists import ImageList, label_from, names_list
from ijepa_fast.data.loader import TrainLoader
from ijepa_fast.data.mixture import Mixture, check_weight
from ijepa_fast.data.remote import RemoteLoader, RemoteShards
from ijepa_fast.data.shards import TarShards, expand_shards, is_remote, names_shards
from ijepa_fast.data.source import Source
from ijepa_fast.data.tables import TableImages, names_table, open_table

log = logging.getLogger(__name__)

RENDERED = "rendered"


Data = str | Sequence[Mapping[str, str | float]] | None
"""What a run's images are named by: a place, or several with weights."""


class Sources(NamedTuple):
    """Images to train on, and labelled images to test on (None where there are none)."""

    train: Source
    test: Source | None


def open_sources(data: Data, evaluation_data: str | None = None, labels: str | None = None, **pixels) -> Sources:
    """The training and test images of a run.

    Args:
        data: "rendered" for the embedded set; a folder (of one with train/ and val/ or test/, these); a list of files
            (.txt, .csv); a data set of Hugging Face that was saved to the disk, or a folder of parquet files; tar
            shards (a path that ends in .tar, braces and "*" included, or URLs, of which classes and test images are not
            used); an index of shards beside it (a path or URL that ends in .index.npz); or several of these as
            ``[{"path": PATH, "weight": 2}, ...]``, see ``Mixture``.
        evaluation_data: folder, list or shards of labelled test images, instead of the ones found beside the training
            images.
        labels: table of paths and classes for images in folders and lists.
        pixels: see `Pixels`.

    Raises:
        ValueError, OSError: no data is given; as ``ImageFolder``, ``ImageList``, ``label_from`` and ``TarShards``; or
            the images of ``evaluation_data`` have classes that the training images lack (those found beside are left
            out).
    """
    if data is None:
        raise ValueError('no images are given: set data to a folder of images (--data PATH), or to "rendered"')
    Pixels(**pixels).check()
    if data == RENDERED:
        from ijepa_fast.data.rendered import RenderedTextures

        return Sources(RenderedTextures("train", **pixels), RenderedTextures("test", **pixels))
    if labels is not None:
        return _labelled_by_table(data, evaluation_data, labels, pixels)
    train, beside = _open_training(data, pixels)
    if train.labels is None:
        if evaluation_data:
            raise ValueError(f"{evaluation_data} cannot be used for evaluation: the images of {data} have no classes")
        log.info(
            "the images of %s have no classes (a folder for each, or --labels FILE.csv): k-NN and linear probe are left"
            " out",
            data,
        )
        return Sources(train, None)
    if evaluation_data:
        return Sources(train, _open_labelled(evaluation_data, train.classes, pixels))
    if beside is None:
        log.info("there are no test images beside those of %s: probe and final k-NN are left out", data)
        return Sources(train, None)
    try:
        return Sources(train, _open_labelled(beside, train.classes, pixels))
    except ValueError as error:
        log.warning("probe and final k-NN are left out: %s", error)
        return Sources(train, None)


def _labelled_by_table(
    data: str | Sequence[Mapping], evaluation_data: str | None, labels: str, pixels: dict
) -> Sources:
    if not isinstance(data, str) or names_table(data):
        kind = "a mixture takes those of its places" if not isinstance(data, str) else "tables have a column of them"
        raise ValueError(f"labels are for folders and lists of images; {kind}: {data}")
    train, beside = _open_training(data, pixels)
    place = evaluation_data or beside
    test = None if place is None else _open_labelled(place, None, pixels)
    for source, where in ((train, data), (test, place)):
        if source is not None and not isinstance(source, ImageFiles):
            raise ValueError(f"labels are for folders and lists of images; shards have their own: {where}")
    label_from(labels, train, test)
    for source, where in ((train, data), (test, place)):
        if test is not None and source.labels is None:
            log.warning("probe and final k-NN are left out: %s names no two classes of the images of %s", labels, where)
            test = None
    return Sources(train, test)


def train_loader(source: Source, *, epoch_images: int | None, **settings) -> TrainLoader | RemoteLoader:
    """The loader that this source needs; ``settings`` as in ``TrainLoader``, the other as in ``RemoteLoader``.

    Raises:
        ValueError: as the loaders, or ``epoch_images`` is set for a source whose images are counted.
    """
    if isinstance(source, RemoteShards):
        return RemoteLoader(source, epoch_images=epoch_images, **settings)
    if epoch_images is not None:
        raise ValueError(
            f"loader.epoch_images is for images from URLs; there are {len(source)} images (got {epoch_images})"
        )
    return TrainLoader(source, **settings)


def _are_shards(data: str) -> bool:
    return names_shards(data) and not Path(data).is_dir() and not data.endswith(SUFFIX)


def _mixed(parts: Sequence[Mapping[str, str | float]], pixels: dict) -> tuple[Source, str | None]:
    """The sources of several places as one, and the first place of test images beside one of them."""
    paths, weights = [part["path"] for part in parts], [part.get("weight", 1) for part in parts]
    for path, weight in zip(paths, weights, strict=True):
        check_weight(path, weight)
    opened = []
    for path in paths:
        opened.append(_open_training(path, pixels))
        if isinstance(opened[-1][0], RemoteShards):
            raise ValueError(f"{path} is read front to back and cannot be mixed: write an index (docs/data.md)")
    mixture = Mixture([source for source, _ in opened], weights, paths)
    for path, (source, _), share in zip(paths, opened, mixture.shares, strict=True):
        log.info("%.4g %% of the images come from %s, which has %d", 100 * share, path, len(source))
    return mixture, next((beside for _, beside in opened if beside), None)


def _open_training(data: str | Sequence[Mapping], pixels: dict) -> tuple[Source, str | None]:
    """Training images, and where test images lie beside them."""
    if not isinstance(data, str):
        return _mixed(data, pixels)
    if names_list(data):
        listed = ImageList(data, **pixels)
        return listed, data if listed.names_test_images else None
    if data.endswith(SUFFIX):
        return IndexedShards(data, **pixels), None
    if names_table(data):
        table, has_test = open_table(data, training=True)
        return TableImages(table, name=data, **pixels), data if has_test else None
    if not _are_shards(data):
        split = find_split(data)
        return ImageFolder(split.train, **pixels), split.evaluation and str(split.evaluation)
    shards = expand_shards(data)
    return (RemoteShards if is_remote(shards[0]) else TarShards)(shards, **pixels), None


def _open_labelled(data: str, classes: list[str] | None, pixels: dict) -> Source:
    """Test images; without ``classes`` they are yet to be labelled."""
    if names_list(data):
        return ImageList(data, training=False, classes=classes, **pixels)
    if data.endswith(SUFFIX):
        return IndexedShards(data, classes=classes, **pixels)
    if names_table(data):
        table = TableImages(open_table(data, training=False)[0], classes=classes, name=data, **pixels)
        if table.labels is None:
            raise ValueError(f"{data} cannot be used for evaluation: it has no labels")
        return table
    if not _are_shards(data):
        return ImageFolder(data, class_folders=classes is not None, classes=classes, **pixels)
    shards = expand_shards(data)
    if is_remote(shards[0]):
        raise ValueError(f"{data} cannot be used for evaluation, which reads images in any order: use local shards")
    source = TarShards(shards, classes=classes, **pixels)
    if source.labels is None:
        raise ValueError(f"{data} cannot be used for evaluation: its images have no .cls")
    return source
