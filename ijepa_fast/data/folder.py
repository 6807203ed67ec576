"""Images in a folder: found, put in order, labelled by class folder."""

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

from ijepa_fast.data.decode import image_extensions, open_image

# Names such as train2017 and val_256. The order is that of preference.
_SPLIT_NAME = "(?:{})(?:[-_ ]?(?:[0-9]+|set|images|data))?$"
_TRAINING_NAMES = (re.compile(_SPLIT_NAME.format("train|training"), re.IGNORECASE),)
_EVALUATION_NAMES = tuple(
    re.compile(_SPLIT_NAME.format(name), re.IGNORECASE) for name in ("val", "valid|validation", "test|testing")
)
# What archive programs, file systems and storage devices leave beside data.
_NOT_DATA = {"__MACOSX", "lost+found", "@eaDir", "$RECYCLE.BIN", "System Volume Information"}
_DEEPEST_SPLIT, _MOST_FOLDERS, _MOST_FILES = 3, 20, 5000


class ImageFolder:
    """All images below a folder, in the byte order of their relative paths. A `Source`.

    A file is an image if its extension, in any case, is one that Pillow reads. Links are followed, loops of links are
    not. Names that begin with a dot are passed over, and so are folders such as `__MACOSX` and `lost+found`.

    Where all images lie in subfolders, of which there are two or more, the first-level subfolders are the classes,
    sorted by name; folders below them belong to the class. Otherwise there are no labels.

    Args:
        root: the folder.
        class_folders: False ignores class folders.
        classes: names and order of the classes, such as those of the training folder when this is the test folder.
        max_pixels: see `open_image`.

    Attributes:
        root: absolute path.
        labels: int64 [n] or None. classes: list of names or None.
        passed_over: count of the other files by extension, "dangling link" among them.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is missing or no folder.
        ValueError: no images; or `classes` is given and an image lies in none of them.
    """

    def __init__(
        self,
        root,
        *,
        class_folders: bool = True,
        classes: Sequence[str] | None = None,
        max_pixels: int | None = None,
    ):
        self.root = _existing_folder(root)
        self._max_pixels = max_pixels
        paths, self.passed_over = _scan(self.root)
        if not paths:
            raise ValueError(f"no images below {self.root}: {_seen(self.passed_over)}")
        self._paths = PackedStrings(os.fsencode(path) for path in sorted(paths, key=os.fsencode))
        self.labels: np.ndarray | None = None
        self.classes: list[str] | None = None
        if class_folders:
            self._label(classes)

    def _label(self, wanted: Sequence[str] | None) -> None:
        folders = [_printable(path.partition("/")[0]) if "/" in path else None for path in self._relative_paths()]
        found = set(folders)
        if wanted is None:
            if None in found or len(found) < 2:
                return
            names = sorted(found)
        else:
            names = list(wanted)
            strangers = sorted(name or "(no folder)" for name in found - set(names))
            if strangers:
                raise ValueError(f"{self.root} has images outside the classes {names[:10]}: in {strangers[:10]}")
        label_of = {name: label for label, name in enumerate(names)}
        self.classes = names
        self.labels = np.array([label_of[folder] for folder in folders], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def __repr__(self) -> str:
        classes = "no classes" if self.classes is None else f"{len(self.classes)} classes"
        return f"ImageFolder({str(self.root)!r}: {len(self)} images, {classes})"

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._paths[index]))

    def open(self, index: int) -> Image.Image:
        """The image, not decoded yet. To be used as a context manager, which closes the file."""
        return open_image(self.path(index), self._max_pixels)

    def describe(self, index: int) -> str:
        return self.path(index)

    @cached_property
    def fingerprint(self) -> str:
        """Count of images and a hash of their sorted relative paths and sizes; the first use asks for every size."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self._paths[index] + b"\0%d\n" % os.stat(self.path(index)).st_size)
        return f"folder:{len(self)}:{digest.hexdigest()[:32]}"

    def _relative_paths(self) -> list[str]:
        return [os.fsdecode(self._paths[index]) for index in range(len(self))]


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
    if len(trains) == 1 and not any(_holds_images(folder) for folder in folders if folder not in trains):
        return Splits(trains[0], None)
    return Splits(root, None)


def _pairs(folder: Path, depth: int) -> Iterator[Splits]:
    """Training and evaluation folders beside each other in this folder, or else below it."""
    folders = _folders(folder)
    trains = [train for train in _called(folders, _TRAINING_NAMES) if _holds_images(train)]
    evaluation = next(iter(_called(folders, _EVALUATION_NAMES)), None)
    if trains and evaluation:
        yield from (Splits(train, evaluation) for train in trains)
    elif depth > 1 and len(folders) <= _MOST_FOLDERS:  # more are classes
        for below in folders:
            yield from _pairs(below, depth - 1)


def _folders(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in _visible_entries(folder) if entry.is_dir())


def _called(folders: list[Path], names: Iterable[re.Pattern]) -> list[Path]:
    return [folder for name in names for folder in folders if name.match(folder.name)]


def _holds_images(folder: Path) -> bool:
    """Whether one of the first files below the folder is an image, so that trees of annotations are told apart."""
    extensions, seen = image_extensions(), 0
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
    return not name.startswith(".") and name not in _NOT_DATA


def _visible_entries(folder) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if _is_visible(entry.name)]


def _printable(name: str) -> str:
    """The name with bytes that are not UTF-8 read as Latin-1: no picture or page can show them otherwise."""
    return name if name.isprintable() else os.fsencode(name).decode("latin-1")


def _scan(root: Path) -> tuple[list[str], Counter]:
    """Relative paths of the images below `root`, and a count of the other files by extension."""
    extensions = image_extensions()
    images, others = [], Counter()
    pending = [(str(root), "", (_identity(root),))]
    while pending:
        folder, prefix, ancestors = pending.pop()
        for entry in _visible_entries(folder):
            if entry.is_dir():
                identity = _identity(entry.path)
                if identity not in ancestors:  # else a link back up
                    pending.append((entry.path, f"{prefix}{entry.name}/", (*ancestors, identity)))
                continue
            extension = os.path.splitext(entry.name)[1].lower()
            if extension in extensions and entry.is_file():
                images.append(prefix + entry.name)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                others["dangling link"] += 1
            else:
                others[extension or "no extension"] += 1
    return images, others


def _identity(folder) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _seen(others: Counter) -> str:
    return f"its {others.total()} other files are {kinds(others)}" if others else "it holds no files"


def kinds(counts: Counter) -> str:
    """The most frequent kinds of files with their numbers, as words."""
    named = [f"{count} {kind}{'s' * (kind == 'dangling link' and count > 1)}" for kind, count in counts.most_common(5)]
    return ", ".join([*named, "..."] if len(counts) > 5 else named)
