"""Images in WebDataset tar shards on local disks: indexed once, then read in any order, like a folder."""

from __future__ import annotations

import glob
import hashlib
import io
import logging
import os
import re
import tempfile
import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ijepa_fast.data.bands import ArrayBands, Pixels
from ijepa_fast.data.decode import open_image
from ijepa_fast.data.folder import PackedStrings, in_order
from ijepa_fast.data.tar import Damage, read_samples

log = logging.getLogger(__name__)

_INDEX_FORMAT = 4
_MOST_NUMBERED = 1_000_000
"""Classes given as numbers up to here are indices; larger numbers are names."""
_REMOTE = re.compile(r"^(pipe:|[A-Za-z][A-Za-z0-9+.-]*://)")
_TAR = re.compile(r"\.(tar|tgz|tar\.[a-z0-9]+)$", re.IGNORECASE)


def is_remote(shard: str) -> bool:
    """Whether a shard is a URL or a "pipe:" command, not a file."""
    return bool(_REMOTE.match(shard))


def names_shards(data: str) -> bool:
    """Whether a setting names tar shards (files, patterns or URLs) instead of a folder."""
    return is_remote(data) or bool(_TAR.search(data))


def expand_shards(data: str) -> list[str]:
    """Every shard that a setting names, in order: braces ("{000..009}") and "::" as in webdataset, local "*" sorted.

    Raises:
        ValueError: nothing fits a pattern, a shard is named twice, or local and remote shards are mixed.
        FileNotFoundError: a local shard that is named does not exist.
        RuntimeError: webdataset is not installed.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"tar shards need the package webdataset; in the checkout: pip install -e '.[shards]' ({error})"
        ) from error

    shards = []
    for url in expand_urls(data):
        if is_remote(url):
            shards.append(url)
            continue
        path = str(Path(url).expanduser().absolute())
        found = [path]
        if glob.has_magic(path) and not os.path.exists(path):  # brackets may be a pattern or part of a name
            found = sorted(glob.glob(path) or glob.glob(path.replace("[", "[[]")))
        if not found:
            raise ValueError(f"no shard fits the pattern {url}")
        if missing := [name for name in found if not os.path.isfile(name)]:
            raise FileNotFoundError(f"shard not found: {missing[0]}")
        shards += found
    if len(set(shards)) < len(shards):
        raise ValueError(f"a shard is named twice: {next(s for s in shards if shards.count(s) > 1)}")
    if len({is_remote(shard) for shard in shards}) > 1:
        raise ValueError(f"{data} mixes local shards, which are indexed, with URLs, which are streamed")
    return shards


class TarShards:
    """All images of local tar shards, shard after shard, in the order of their members. A `Source`.

    Where each image lies is looked up once per shard and kept in the folder ``cache``; a shard whose size or time of
    change is another one is looked through again. What is damaged is passed over and named in ``damaged`` (members that
    only turn out to be damaged when they are decoded are the loader's to name). See `data.tar` for what makes a sample.

    Args:
        shards: paths of plain (not compressed) tar files.
        classes: names of the classes, such as those of the training shards when these are the test shards.
        cache: folder for the index; by default ``ijepa_fast/shards`` in $XDG_CACHE_HOME or ~/.cache, if there is one.
        pixels: see `Pixels`.

    Attributes:
        labels: int64 [n], from ``.cls`` or ``.json`` members, -1 where an image has none; None where no image has one.
        classes: "0", "1", ... up to the largest label, the words sorted, or as given; None without labels.
        damaged: name of a shard -> what could not be used of it.

    Raises:
        ValueError: no shard holds an image, a shard is compressed, or a class lies outside ``classes``.
        OSError: a shard cannot be read at all.
    """

    def __init__(
        self,
        shards: Sequence[str],
        *,
        classes: Sequence[str] | None = None,
        cache: str | None = None,
        **pixels,
    ):
        self.pixels = Pixels(**pixels)
        folder = Path(cache) if cache is not None else _default_cache()
        self.shards = [str(shard) for shard in shards]
        indexes = [_index_of(shard, folder) for shard in self.shards]
        self._take(indexes, classes)

    def _take(self, indexes: Sequence[Index], classes: Sequence[str] | None) -> None:
        """Hold the images of the shards, of which there is one index each."""
        self.damaged = {s: "; ".join(i.damage) for s, i in zip(self.shards, indexes, strict=True) if i.damage}
        self._counts = np.array([len(index.offsets) for index in indexes])
        if not self._counts.sum():
            reasons = "".join(f"\n  {shard}: {reason}" for shard, reason in list(self.damaged.items())[:5])
            raise ValueError(f"no images in {len(self.shards)} shards, the first being {self.shards[0]}{reasons}")
        self._ends = self._counts.cumsum()
        self._offsets = np.concatenate([index.offsets for index in indexes])
        self._sizes = np.concatenate([index.sizes for index in indexes])
        self._names = PackedStrings(name for index in indexes for name in index.names)
        self.labels = self.classes = None
        self._label([os.fsdecode(label) for index in indexes for label in index.labels], classes)
        for shard, reason in self.damaged.items():
            log.warning("damaged shard %s: %s", shard, reason)

    def _label(self, names: list[str], classes: Sequence[str] | None) -> None:
        """Numbers are indices where most classes are numbers, unless all are names of given classes; else names."""
        found = set(names) - {""}
        if not found:
            return
        numbers = {name for name in found if name.isdecimal() and int(name) < _MOST_NUMBERED}
        if 2 * len(numbers) > len(found) and not (classes is not None and found <= set(classes)):
            largest = max(map(int, numbers))
            self.classes = [str(number) for number in range(largest + 1)] if classes is None else list(classes)
            if largest >= len(self.classes):
                raise ValueError(f"{self.shards[0]} ... has label {largest}, but there are {len(self.classes)} classes")
            label_of = {name: int(name) for name in numbers}
            self._tell_words([index for index, name in enumerate(names) if name and name not in numbers], names)
        else:
            self.classes = in_order(found) if classes is None else list(classes)
            label_of = {name: label for label, name in enumerate(self.classes)}
            if strangers := sorted(found - set(label_of)):
                raise ValueError(
                    f"{self.shards[0]} ... has images outside the classes {self.classes[:10]}: in {strangers[:10]}"
                )
        self.labels = np.array([label_of.get(name, -1) for name in names], dtype=np.int64)

    def _tell_words(self, indices: list[int], names: list[str]) -> None:
        words_of: dict[str, list[int]] = {}
        for index in indices:
            words_of.setdefault(self._shard_of(index), []).append(index)
        for shard, words in words_of.items():
            image = os.fsdecode(self._names[words[0]])
            more = f" (and {len(words) - 1} more like it)" if len(words) > 1 else ""
            told = f"the class of {image} is no number: {names[words[0]]!r}{more}"
            self.damaged[shard] = f"{self.damaged[shard]}; {told}" if shard in self.damaged else told

    def __len__(self) -> int:
        return len(self._offsets)

    def __repr__(self) -> str:
        classes = "no classes" if self.classes is None else f"{len(self.classes)} classes"
        return f"TarShards({len(self.shards)} shards from {self.shards[0]!r}: {len(self)} images, {classes})"

    def open(self, index: int) -> Image.Image | ArrayBands:
        """The image, not decoded yet. EOFError where the shard has become shorter."""
        content = self._read(self._shard_of(index), int(self._offsets[index]), int(self._sizes[index]))
        if len(content) < self._sizes[index]:
            raise EOFError(f"the shard ends within {self.describe(index)}")
        return open_image(io.BytesIO(content), self.pixels)

    def _read(self, shard: str, offset: int, size: int) -> bytes:
        with open(shard, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def describe(self, index: int) -> str:
        return f"{self._shard_of(index)}: {os.fsdecode(self._names[index])}"

    @cached_property
    def fingerprint(self) -> str:
        """Count of images and a hash of shard names, member names and sizes, in order."""
        digest = hashlib.sha256()
        for shard, count in zip(self.shards, self._counts, strict=True):
            digest.update(b"%s\0%d\n" % (os.fsencode(os.path.basename(shard)), count))
        for index in range(len(self)):
            digest.update(self._names[index] + b"\0%d\n" % self._sizes[index])
        return f"shards:{len(self)}:{digest.hexdigest()[:32]}"

    def _shard_of(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self.shards[int(np.searchsorted(self._ends, index, side="right"))]


class Index(NamedTuple):
    """Where the images of one shard lie."""

    names: list[bytes]
    offsets: np.ndarray  # int64 [n]
    sizes: np.ndarray  # int64 [n]
    labels: list[bytes]  # as text, empty without a class
    damage: list[str]


def _default_cache() -> Path | None:
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # there is no HOME, and the user is unknown to the system
        return None
    return Path(base, "ijepa_fast", "shards")


def _index_of(shard: str, cache: Path | None) -> Index:
    """The index from the cache, or else from the shard itself."""
    if cache is None:
        return build_index(shard)
    status = os.stat(shard)
    identity = f"{_INDEX_FORMAT} {os.path.realpath(shard)} {status.st_size} {status.st_mtime_ns}"
    path = cache / f"{hashlib.sha256(os.fsencode(identity)).hexdigest()[:40]}.npz"
    try:
        with np.load(path) as saved:
            texts = ("names", "labels", "damage")
            names, labels, damage = (saved[key].tobytes().split(b"\0")[:-1] for key in texts)
            return Index(names, saved["offsets"], saved["sizes"], labels, [reason.decode() for reason in damage])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there, or broken: made anew
    log.info("indexing %s", shard)
    index = build_index(shard)
    _save_index(index, path)
    return index


def build_index(shard: str) -> Index:
    samples, damage = [], []
    with open(shard, "rb") as file:
        for found in read_samples(file, contents=False):
            if isinstance(found, Damage):
                damage.append(found.reason)
            else:
                samples.append(found)
        file.seek(0)
        if not samples and file.read(3) in (b"\x1f\x8b\x08", b"BZh", b"\xfd7z", b"\x28\xb5\x2f"):
            raise ValueError(f"{shard} is compressed, so its images cannot be found at once; unpack it to a plain tar")

    def column(name: str) -> np.ndarray:
        return np.array([getattr(sample, name) for sample in samples], dtype=np.int64)

    names = [os.fsencode(sample.name) for sample in samples]
    labels = [os.fsencode(sample.label) for sample in samples]
    return Index(names, column("offset"), column("size"), labels, damage)


def _save_index(index: Index, path: Path) -> None:
    """Write the index whole or not at all, for other ranks may read it meanwhile; a cache is no must."""

    def joined(strings: list[bytes]) -> np.ndarray:
        return np.frombuffer(b"".join(string + b"\0" for string in strings), dtype=np.uint8)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            np.savez(
                file,
                names=joined(index.names),
                damage=joined([reason.encode("utf-8", "backslashreplace") for reason in index.damage]),
                offsets=index.offsets,
                sizes=index.sizes,
                labels=joined(index.labels),
            )
        os.replace(file.name, path)
    except OSError as error:
        log.warning("the index of the shards cannot be kept in %s: %s", path.parent, error)
