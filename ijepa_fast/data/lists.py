"""Images and classes named in text files: ``list.txt`` with a path on each line, and tables of paths and classes."""

from __future__ import annotations

import csv
import logging
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from ijepa_fast.data.folder import ImageFiles

log = logging.getLogger(__name__)

_EXTENSIONS = (".txt", ".csv", ".tsv")
_PATH = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "img", "name", "id", "image_id")
_LABEL = ("label", "labels", "class", "class_name", "category", "target", "y")
_SPLIT = ("split", "set", "subset")
_TRAINING, _TEST = re.compile("train", re.IGNORECASE), re.compile("val|test", re.IGNORECASE)
_FOLDERS_ABOVE = 3
"""Folders around the images that paths in a table may begin with."""


def names_list(data: str) -> bool:
    """Whether a setting names a list of files instead of a folder."""
    return Path(data).suffix.lower() in _EXTENSIONS and not Path(data).is_dir()


class Table(NamedTuple):
    """The lines of a list: paths, and classes and splits where it has such columns (None where a field is empty)."""

    paths: list[str]
    labels: list[str | None] | None
    splits: list[str | None] | None


def read_table(file) -> Table:
    """Read a list of paths (.txt) or a table of paths and classes (.csv, .tsv; comma, semicolon or tab between).

    A first line with names of columns, such as path, label and split, says which is which; without one the first column
    is the path and the second the class.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, no text, its quotes do not match, or a line lacks a path.
    """
    path = Path(file).expanduser()
    columns, found = None, ([], [], [])
    with path.open(encoding="utf-8-sig") as lines:
        try:
            # Row by row: a list of all fields would take several times the room of what is kept.
            for row in _rows(path, lines):
                if columns is None:
                    columns, names_them = _columns(path, row)
                    if names_them:
                        continue
                if len(row) <= columns[0] or not row[columns[0]]:
                    raise ValueError(f"{path} has a line without a path: {','.join(row)!r}")
                for place, kept in zip(columns, found, strict=True):
                    if place is not None:
                        kept.append(sys.intern(row[place]) or None if len(row) > place else None)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    if not found[0]:
        raise ValueError(f"{path} names no images")
    return Table(*(None if place is None else kept for place, kept in zip(columns, found, strict=True)))


def _rows(path: Path, lines: TextIO) -> Iterator[list[str]]:
    """The fields of each line that is not empty."""
    if path.suffix.lower() == ".txt":
        yield from ([line.strip()] for line in lines if line.strip())
        return
    first = lines.readline()
    reader = csv.reader(chain([first], lines), delimiter=max(",;\t", key=first.count), strict=True)
    try:
        for row in reader:
            if any(fields := [field.strip() for field in row]):
                yield fields
    except csv.Error as error:
        raise ValueError(f"{path} is no table, line {reader.line_num}: {error}") from error


def _columns(path: Path, first: list[str]) -> tuple[list[int | None], bool]:
    """Where path, class and split stand (None where they do not), and whether the first row says so."""
    if path.suffix.lower() == ".txt":
        return [0, None, None], False
    names = [field.casefold() for field in first]
    columns = [next((names.index(name) for name in kind if name in names), None) for kind in (_PATH, _LABEL, _SPLIT)]
    if columns == [None, None, None]:
        return [0, 1 if len(names) > 1 else None, None], False
    if columns[0] is None:
        raise ValueError(f"{path} has no column of paths: call one of {', '.join(names)} path")
    return columns, True


class ImageList(ImageFiles):
    """The images that a list names, relative to its folder unless absolute, in the order of their paths. A `Source`.

    ``root`` is the folder around all of them, so that list and images may be moved.

    Args:
        file: see `read_table`. Without a column of classes there are no labels.
        training: of a list with a column of splits, whether the training images, or the validation (else test, else
            all) images.
        classes: as in `ImageFolder`.
        pixels: see `Pixels`.

    Attributes:
        names_test_images: whether there is a column of splits with validation or test images.

    Raises:
        FileNotFoundError: a file of the list does not exist.
        ValueError: an image is listed twice, a split is none, or a class is none of ``classes``.
    """

    def __init__(self, file, *, training: bool = True, classes: Sequence[str] | None = None, **pixels):
        table, beside = read_table(file), Path(file).expanduser().absolute().parent
        rows = range(len(table.paths)) if table.splits is None else _of_split(file, table.splits, training)
        self.names_test_images = any(map(_TEST.match, table.splits or []))
        wanted: dict[str, int] = {}
        for row in rows:
            place = os.path.normpath(os.path.join(beside, os.path.expanduser(table.paths[row]))).replace("//", "/", 1)
            if wanted.setdefault(place, row) != row:
                raise ValueError(f"{file} lists an image twice: {place}")
        sizes = {path: _size_of(path) for path in wanted}
        if missing := [path for path, size in sizes.items() if size is None]:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(wanted)} files in {file} do not exist, the first being {missing[0]}"
            )
        root = os.path.commonpath({os.path.dirname(path) for path in wanted})
        below = len(os.path.join(root, ""))
        relative = {path[below:].replace(os.sep, "/"): row for path, row in wanted.items()}
        super().__init__(Path(root), relative, **pixels)
        self._sizes = np.array([sizes[self.path(index)] for index in range(len(self))], dtype=np.int64)
        if table.labels is not None and any(table.labels[row] for row in rows):
            self.label([table.labels[relative[path]] for path in self.relative_paths()], classes)
        elif classes is not None:
            raise ValueError(f"{file} names no classes: a second column with them is needed")

    def _size(self, index: int) -> int:
        return int(self._sizes[index])  # as it was when the list was read, so that every file is asked once


def _size_of(path: str) -> int | None:
    """Bytes of a file, None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _of_split(file, splits: list[str | None], training: bool) -> list[int]:
    for split in splits:
        if not (split and (_TRAINING.match(split) or _TEST.match(split))):
            raise ValueError(f"{file} has a split that is neither train, val nor test: {split!r}")
    for kind in ["train"] if training else ["val", "test", "train"]:
        if rows := [row for row, split in enumerate(splits) if split.casefold().startswith(kind)]:
            return rows
    raise ValueError(f"{file} has no images of the split train")


def label_from(file, train: ImageFiles, test: ImageFiles | None) -> None:
    """Give images the classes that a table names. Paths may begin at any of three folders around them, or be names.

    Raises:
        ValueError: no row fits an image, a row fits several (a training and a test image among them), or a test image
            has a class that no training image has.
    """
    table = read_table(file)
    if table.labels is None:
        raise ValueError(f"{file} names no classes: columns path and label are needed")
    rows: dict[str, str | None] = {}
    for path, label in zip(table.paths, table.labels, strict=True):
        key = os.path.normpath(path.replace("\\", "/")).replace("\\", "/")
        if rows.setdefault(key, label) != label:
            raise ValueError(f"{file} gives {path} two classes: {rows[key]} and {label}")
    folded: dict[str, str | None] = {}
    for key in rows:  # of two that differ in case alone neither stands for a third
        folded[key.casefold()] = None if key.casefold() in folded else key
    used: dict[str, str] = {}
    for source in filter(None, (train, test)):
        keys = _keys(source, rows, folded, used, file)
        names = [None if key is None else rows[key] for key in keys]
        if any(names):
            source.label(names, train.classes if source is test else None)
        if without := names.count(None):
            log.warning("%d of the %d images below %s have no class in %s", without, len(names), source.root, file)
    if not used:
        raise ValueError(
            f"none of the {len(rows)} rows of {file} fits an image below {train.root}: a row is {table.paths[0]!r}, "
            f"an image {train.relative_paths()[0]!r}"
        )
    if missing := [key for key in rows if key not in used]:
        log.warning(
            "%d of the %d rows of %s name no image that is there, the first being %s",
            *(len(missing), len(rows), file, missing[0]),
        )


def _keys(
    source: ImageFiles, rows: Mapping, folded: Mapping[str, str | None], used: dict[str, str], file
) -> list[str | None]:
    """The row of each image, None for those without; ``used`` gets the image of each row."""
    above = [part for part in source.root.parts[-_FOLDERS_ABOVE:] if part != source.root.anchor]
    # From the folder itself, from folders around it, from the root.
    prefixes = [
        "",
        *("/".join(above[-n:]) + "/" for n in range(1, len(above) + 1)),
        (source.root / "_").as_posix()[:-1],
    ]
    found = []
    for path in source.relative_paths():
        key = next((form for form in _forms(path, prefixes) if form in rows), None)
        if key is None:
            folds = (folded.get(form.casefold()) for form in _forms(path, prefixes))
            key = next((fold for fold in folds if fold is not None), None)
        whole = prefixes[-1] + path
        if key is not None and used.setdefault(key, whole) != whole:
            raise ValueError(f"the row {key!r} of {file} fits several images: {used[key]} and {whole}")
        found.append(key)
    return found


def _forms(path: str, prefixes: list[str]) -> Iterator[str]:
    """Ways to write an image's path: behind each of the prefixes, or by its name; without its extension, too."""
    for name in (*(prefix + path for prefix in prefixes), path.rpartition("/")[2]):
        yield name
        yield os.path.splitext(name)[0]
