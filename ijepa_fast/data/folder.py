"""Images in a folder: found, put in order, labelled by class folder."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ijepa_fast.data.decode import image_extensions, open_image

_EVALUATION_NAMES = ("val", "valid", "validation", "test")


class ImageFolder:
    """All images below a folder, in the byte order of their relative paths. A `Source`.

    A file is an image if its extension, in any case, is one that Pillow reads. Links are followed, loops of links are
    not, and names that begin with a dot are passed over.

    Where all images lie in subfolders, of which there are two or more, the first-level subfolders are the classes,
    sorted by name; folders below them belong to the class. Otherwise there are no labels.

    Args:
        root: the folder.
        class_folders: False ignores class folders.
        classes: names and order of the classes, such as those of the training folder when this is the test folder.

    Attributes:
        root: absolute path.
        labels: int64 [n] or None. classes: list of names or None.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is missing or no folder.
        ValueError: no images; or `classes` is given and an image lies in none of them.
    """

    def __init__(self, root, *, class_folders: bool = True, classes: Sequence[str] | None = None):
        self.root = _existing_folder(root)
        paths, others = _scan(self.root)
        if not paths:
            raise ValueError(f"no images below {self.root}: {_seen(others)}")
        self._paths = PackedStrings(os.fsencode(path) for path in sorted(paths, key=os.fsencode))
        self.labels: np.ndarray | None = None
        self.classes: list[str] | None = None
        if class_folders:
            self._label(classes)

    def _label(self, wanted: Sequence[str] | None) -> None:
        folders = [path.partition("/")[0] if "/" in path else None for path in self._relative_paths()]
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
        return open_image(self.path(index))

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
    """The train and val (valid, validation, test: the first of these that exists) folders of an image set.

    A folder without both is all training data, unless `train` is the only thing in it: `train` alone beside others
    may be a class.
    """
    root = _existing_folder(root)
    folders = {entry.name.lower(): Path(entry.path) for entry in _visible_entries(root) if entry.is_dir()}
    train = folders.pop("train", None)
    evaluation = next((folders[name] for name in _EVALUATION_NAMES if name in folders), None)
    if train is None or (evaluation is None and folders):
        return Splits(root, None)
    return Splits(train, evaluation)


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


def _visible_entries(folder) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


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
            else:
                others[extension or "no extension"] += 1
    return images, others


def _identity(folder) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _seen(others: Counter) -> str:
    if not others:
        return "it holds no files"
    kinds = ", ".join(f"{count} {extension}" for extension, count in others.most_common(5))
    return f"its {others.total()} other files are {kinds}{', ...' if len(others) > 5 else ''}"
