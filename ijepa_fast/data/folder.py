"""Images in a folder: found, put in order, labelled by class folder."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ijepa_fast.data.bands import ArrayBands, Pixels
from ijepa_fast.data.decode import image_extensions, open_image

# Names such as train2017 and val_256. The order is that of preference.
_SPLIT_NAME = "(?:{})(?:[-_ ]?(?:[0-9]+|set|images|data))?$"
_TRAINING_NAMES = (re.compile(_SPLIT_NAME.format("train|training"), re.IGNORECASE),)
_EVALUATION_NAMES = tuple(
    re.compile(_SPLIT_NAME.format(name), re.IGNORECASE) for name in ("val", "valid|validation", "test|testing")
)
# What archive programs, file systems and storage devices leave beside data.
_NOT_DATA = {"__macosx", "lost+found", "@eadir", "$recycle.bin", "system volume information", "thumbnails", "thumbs"}
# Folders of what is to be predicted about images, where they lie beside a folder of the images.
_IMAGES = re.compile(r"(jpeg)?(images?|imgs?)$", re.IGNORECASE)
_ANSWERS = re.compile(
    r"(labels?|masks?|annotations?|targets?|gt|ground_?truth|segmentations?|segmentation(class|object))$", re.IGNORECASE
)
_DEEPEST_SPLIT, _MOST_FOLDERS, _MOST_FILES = 3, 20, 5000


class ImageFiles:
    """Image files below a folder, by their relative paths in byte order. A `Source`.

    Args:
        root: the folder.
        paths: of the files, relative to it.
        pixels: see `Pixels`.

    Attributes:
        labels: int64 [n], -1 where an image has none; or None. classes: list of names or None.
    """

    labels: np.ndarray | None = None
    classes: list[str] | None = None

    def __init__(self, root: Path, paths: Iterable[str], **pixels):
        self.root, self.pixels = root, Pixels(**pixels)
        self._paths = PackedStrings(os.fsencode(path) for path in sorted(paths, key=os.fsencode))

    def __len__(self) -> int:
        return len(self._paths)

    def __repr__(self) -> str:
        classes = "no classes" if self.classes is None else f"{len(self.classes)} classes"
        return f"{type(self).__name__}({str(self.root)!r}: {len(self)} images, {classes})"

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._paths[index]))

    def open(self, index: int) -> Image.Image | ArrayBands:
        """The image, not decoded yet. To be used as a context manager, which closes the file."""
        return open_image(self.path(index), self.pixels)

    def describe(self, index: int) -> str:
        return self.path(index)

    @cached_property
    def fingerprint(self) -> str:
        """Count of images and a hash of their sorted relative paths and sizes; the first use asks for every size."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self._paths[index] + b"\0%d\n" % self._size(index))
        return f"folder:{len(self)}:{digest.hexdigest()[:32]}"

    def _size(self, index: int) -> int:
        """Bytes of a file."""
        return os.stat(self.path(index)).st_size

    def relative_paths(self) -> list[str]:
        return [os.fsdecode(self._paths[index]) for index in range(len(self))]

    def label(self, names: Sequence[str | None], classes: Sequence[str] | None) -> None:
        """Give every image the class of this name, if there are two; ``classes`` prescribes names and order.

        Raises:
            ValueError: a name is none of the classes.
        """
        found = set(names) - {None}
        if classes is None and len(found) < 2:
            return
        self.classes = in_order(found) if classes is None else list(classes)
        label_of = {name: label for label, name in enumerate(self.classes)}
        # Where case does not count, Cat/ and cat/ are one folder, and elsewhere they may have become two.
        folded = {name.casefold(): label for name, label in label_of.items()}
        if len(folded) == len(label_of):
            label_of |= {name: folded[name.casefold()] for name in found if name.casefold() in folded}
        if strangers := sorted(name for name in found if name not in label_of):
            raise ValueError(f"{self.root} has images outside the classes {self.classes[:10]}: in {strangers[:10]}")
        self.labels = np.array([-1 if name is None else label_of[name] for name in names], dtype=np.int64)


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes, sorted: by their value where all are whole numbers."""
    names = sorted(set(names))
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


class ImageFolder(ImageFiles):
    """All images below a folder, in the byte order of their relative paths. A `Source`.

    A file is an image if its extension, in any case, is one that Pillow reads (of a slide scanner: tifffile), or
    ``.npy`` where there are no others. Links are followed, loops of links are not. Names that begin with a dot are
    passed over, and so are folders such as `__MACOSX` and `lost+found`, and `labels` or `masks` beside `images`.

    Where all images lie in subfolders, of which there are two or more, the first-level subfolders are the classes, in
    the order of `in_order`; folders below them belong to the class. A single folder around all others does not count.
    Otherwise there are no labels.

    Args:
        root: the folder.
        class_folders: False ignores class folders.
        classes: names and order of the classes, such as those of the training folder when this is the test folder.
        pixels: see `Pixels`.

    Attributes:
        root: absolute path.
        labels: int64 [n] or None. classes: list of names or None.
        passed_over: count of the other files by extension, "dangling link" among them.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is missing or no folder.
        ValueError: no images; or `classes` is given and an image lies in none of them.
    """

    def __init__(self, root, *, class_folders: bool = True, classes: Sequence[str] | None = None, **pixels):
        root = _existing_folder(root)
        paths, self.passed_over = _scan(root)
        if not paths:
            raise ValueError(f"no images below {root}: {_seen(self.passed_over)}")
        super().__init__(root, paths, **pixels)
        if class_folders:
            self._label_by_folders(classes)

    def _label_by_folders(self, wanted: Sequence[str] | None) -> None:
        paths = self.relative_paths()
        around = os.path.commonprefix(paths)
        depth = around.count("/")
        if wanted is None:
            folders = [_folder_at(path, depth) for path in paths]
            if None not in folders and len(set(folders)) > 1:
                self.label(folders, sorted(set(folders)))
            return
        known = {name.casefold() for name in wanted}
        for level in range(depth + 1):
            folders = [_folder_at(path, level) for path in paths]
            if all(folder is not None and folder.casefold() in known for folder in set(folders)):
                return self.label(folders, wanted)
        folders = [_folder_at(path, 0) for path in paths]
        if set(folders) == {None}:
            raise ValueError(
                f"the {len(self)} images of {self.root} lie in no class folders: sort them into folders named as those "
                "of the training images, or name their classes in a file, --labels FILE.csv"
            )
        self.label([folder or "(no folder)" for folder in folders], wanted)


def _folder_at(path: str, level: int) -> str | None:
    """The folder of this level that a relative path leads through, None where it does not."""
    parts = path.split("/")
    return _printable(parts[level]) if len(parts) > level + 1 else None


class Splits(NamedTuple):
    """Folders for pretraining and for evaluation; `evaluation` is None where the set has no such split."""

    train: Path
    evaluation: Path | None


def find_split(root) -> Splits:
    """The folders of training and of evaluation images of an image set.

    They are called train or training, and val, valid, validation or test (the first of these that exists), in any case
    and with a number or such behind: train2017, val_256. They may lie deeper, as in images/ or Data/CLS-LOC/. A folder
    without both is all training data, unless `train` is the only folder in it that holds images: `train` beside others
    may be a class.

    Raises:
        ValueError: there are several to choose from.
    """
    root = _existing_folder(root)
    pairs = list(_pairs(root, _DEEPEST_SPLIT))
    if len(pairs) > 1:
        names = ", ".join(sorted(str(pair.train.relative_to(root)) for pair in pairs)[:5])
        raise ValueError(
            f"{root} holds several folders of training images beside test images ({names}): name one of them as data, "
            "and its test images as evaluation.data"
        )
    if pairs:
        return pairs[0]
    folders = _folders(root)
    trains = _called(folders, _TRAINING_NAMES)
    if len(trains) == 1 and not any(holds_images(folder) for folder in folders if folder not in trains):
        return Splits(trains[0], None)
    return Splits(root, None)


def _pairs(folder: Path, depth: int) -> Iterator[Splits]:
    """Training and evaluation folders beside each other in this folder, or else below it."""
    folders = _folders(folder)
    trains = [train for train in _called(folders, _TRAINING_NAMES) if holds_images(train)]
    evaluation = next(iter(_called(folders, _EVALUATION_NAMES)), None)
    if trains and evaluation:
        yield from (Splits(train, evaluation) for train in trains)
    elif depth > 1 and len(folders) <= _MOST_FOLDERS:  # more are classes
        for below in folders:
            yield from _pairs(below, depth - 1)


def _folders(folder: Path) -> list[Path]:
    entries = _visible_entries(folder)
    answers = _answers(entries)
    return sorted(Path(entry.path) for entry in entries if entry.is_dir() and entry.name not in answers)


def _answers(entries: list[os.DirEntry]) -> set[str]:
    """Names of folders that hold labels or masks of images in a folder beside them."""
    names = {entry.name for entry in entries if entry.is_dir()}
    return {name for name in names if _ANSWERS.match(name)} if any(map(_IMAGES.match, names)) else set()


def _called(folders: list[Path], names: Iterable[re.Pattern]) -> list[Path]:
    return [folder for name in names for folder in folders if name.match(folder.name)]


def holds_images(folder: Path) -> bool:
    """Whether one of the first files below the folder is an image, so that trees of annotations are told apart."""
    extensions, seen = image_extensions() | {".npy"}, 0
    for _, below, files in os.walk(folder, followlinks=True):
        below[:] = [name for name in below if _is_visible(name)]
        if any(os.path.splitext(name)[1].lower() in extensions for name in files if _is_visible(name)):
            return True
        seen += len(files)
        if seen > _MOST_FILES:
            break
    return False


class PackedStrings:
    """Byte strings in one buffer: a list of millions of objects would be copied into every forked worker."""

    def __init__(self, strings: Iterable[bytes]):
        strings = list(strings)
        self._bytes = b"".join(strings)
        self._ends = np.cumsum([len(string) for string in strings], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start = self._ends[index - 1] if index else 0
        return self._bytes[start : self._ends[index]]


def _existing_folder(root) -> Path:
    path = Path(root).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"image folder not found: {path}")
    if not path.is_dir():
        hint = " (unpack it first)" if path.suffix.lower() in {".zip", ".tar", ".gz", ".tgz", ".npz"} else ""
        raise NotADirectoryError(f"image folder expected, this is a file: {path}{hint}")
    return path.resolve()


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name.casefold() not in _NOT_DATA


def _visible_entries(folder) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if _is_visible(entry.name)]


def _printable(name: str) -> str:
    """The name with bytes that are not UTF-8 read as Latin-1: no picture or page can show them otherwise."""
    return name if name.isprintable() else os.fsencode(name).decode("latin-1")


def _scan(root: Path) -> tuple[list[str], Counter]:
    """Relative paths of the images below `root`, and a count of the other files by extension."""
    extensions = image_extensions()
    images, arrays, others = [], [], Counter()
    pending = [(str(root), "", (_identity(root),))]
    while pending:
        folder, prefix, ancestors = pending.pop()
        entries = _visible_entries(folder)
        answers = _answers(entries)
        for entry in entries:
            if entry.name in answers:
                others[f"folder {entry.name}"] += 1
            elif entry.is_dir():
                identity = _identity(entry.path)
                if identity not in ancestors:  # else a link back up
                    pending.append((entry.path, f"{prefix}{entry.name}/", (*ancestors, identity)))
            elif (extension := os.path.splitext(entry.name)[1].lower()) in extensions and entry.is_file():
                images.append(prefix + entry.name)
            elif extension == ".npy" and entry.is_file():
                arrays.append(prefix + entry.name)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                others["dangling link"] += 1
            else:
                others[extension or "no extension"] += 1
    if images and arrays:  # arrays beside images say something about them
        others[".npy"] += len(arrays)
    return images or arrays, others


def _identity(folder) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _seen(others: Counter) -> str:
    return f"its {others.total()} other files are {kinds(others)}" if others else "it holds no files"


def kinds(counts: Counter) -> str:
    """The most frequent kinds of files with their numbers, as words."""
    named = [f"{count} {kind}{'s' * (kind == 'dangling link' and count > 1)}" for kind, count in counts.most_common(5)]
    return ", ".join([*named, "..."] if len(counts) > 5 else named)
