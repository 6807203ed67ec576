"""Images with a class or a depth for every pixel: found, checked, and loaded at the size of the encoder.

Legend: B images, h x w pixels of an image, H x W of the input that is made of it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ijepa_fast.data.decode import flatten, image_extensions, open_image
from ijepa_fast.data.folder import find_split
from ijepa_fast.data.workers import worker_count
from ijepa_fast.downstream.tasks import Kind, Options
from ijepa_fast.philox import Stream, below, random_words

log = logging.getLogger(__name__)

IMAGE_FOLDERS = ("images", "image", "rgb", "JPEGImages")
TARGET_FOLDERS = {
    "masks": ("annotations", "masks", "labels", "SegmentationClass"),
    "depth": ("depth", "depths", "annotations"),
}
NO_DEPTH = 0.0


@dataclass(frozen=True)
class Pairs:
    """Images and their masks or depth maps, by the order of the images' paths."""

    images: Sequence[Path]
    targets: Sequence[Path]
    kind: Kind
    depth_scale: float | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fingerprint(self) -> str:
        """Hash of all file names and sizes."""
        told = "".join(f"{p}{p.stat().st_size}" for p in (*self.images, *self.targets))
        return f"{self.kind}:{len(self)}:{hashlib.sha256(told.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"

    def image(self, index: int) -> Image.Image:
        """The image as it is stored: masks are not turned by the orientation tag either."""
        with open_image(self.images[index]) as image:
            image.load()
            return flatten(image).convert("RGB")

    def target(self, index: int) -> np.ndarray:
        """Class ids int64 [h, w], or metres float32 [h, w] with 0 where nothing was measured.

        Raises:
            ValueError: the file holds no such thing.
        """
        path = self.targets[index]
        if path.suffix == ".npy":
            values = np.load(path)
        else:
            with Image.open(path) as image:
                values = np.asarray(image)
        if values.ndim != 2:
            raise ValueError(f"{path} has {values.ndim} dimensions: one number for each pixel is needed, no colours")
        if self.kind == "masks":
            if not np.issubdtype(values.dtype, np.integer) and values.dtype != bool:
                raise ValueError(f"{path} holds {values.dtype}, no class ids")
            return values.astype(np.int64)
        scale = self.depth_scale or (1.0 if path.suffix == ".npy" else 0.001)
        metres = values.astype(np.float32) * scale
        return np.where(np.isfinite(metres) & (metres > 0), metres, NO_DEPTH).astype(np.float32)


class DenseData(NamedTuple):
    """Training and test images, and the class ids that count (empty for depth)."""

    train: Pairs
    test: Pairs
    ids: tuple[int, ...]


def open_masks(data: str, evaluation_data: str | None, options: Options) -> DenseData:
    """Images with class ids: ADE20K's folders, Pascal VOC's, or images/ and masks/ within or above train/ and val/.

    Raises:
        ValueError: a mask is missing, of another size or not of class ids; there is one class only; or a test mask has
            a class that no training mask has.
    """
    train, test = _checked(data, "masks", options)
    seen = [_ids(pairs, options.ignore) for pairs in (train, test)]
    if len(seen[0]) < 2:
        raise ValueError(
            f"the training masks of {data} hold one class only ({sorted(seen[0])}, ignoring {options.ignore})"
        )
    if unseen := sorted(seen[1] - seen[0])[:5]:
        raise ValueError(
            f"test masks of {data} hold class ids that no training mask has: {unseen}; --ignore names the one that "
            f"does not count (now {options.ignore})"
        )
    return DenseData(train, test, tuple(sorted(seen[0])))


def open_depth(data: str, evaluation_data: str | None, options: Options) -> DenseData:
    """Images with metres: images/ and depth/ within or above train/ and val/; 16-bit PNG or npy.

    Raises:
        ValueError: a depth map is missing, of another size or not of numbers.
    """
    train, test = _checked(data, "depth", options)
    for pairs in (train, test):
        if not any((pairs.target(index) > 0).any() for index in range(len(pairs))):
            raise ValueError(f"no depth map of {data} has a value above 0")
    return DenseData(train, test, ())


def _checked(data: str, kind: Kind, options: Options) -> list[Pairs]:
    splits = []
    for images, targets in _layout(Path(data), kind):
        names = sorted(path for path in images if path.suffix.lower() in image_extensions())
        step = max(1, -(-len(names) // options.limit)) if options.limit else 1
        pairs = Pairs(names[::step], [_beside(path, targets) for path in names[::step]], kind, options.depth_scale)
        for index, (image, target) in enumerate(zip(pairs.images, pairs.targets, strict=True)):
            with open_image(image) as opened:
                size = opened.size
            # npy files say their size in their first bytes, PNG does too.
            shape = np.load(target, mmap_mode="r").shape if target.suffix == ".npy" else Image.open(target).size[::-1]
            if tuple(shape[:2]) != size[::-1]:
                raise ValueError(f"{target} is {shape[1]} x {shape[0]} px, its image {size[0]} x {size[1]}")
            if index == 0:
                pairs.target(index)
        splits.append(pairs)
    for split, pairs in zip(("training", "test"), splits, strict=True):
        if not len(pairs):
            raise ValueError(f"{data} has no {split} images")
    return splits


def _layout(root: Path, kind: Kind) -> list[tuple[Sequence[Path], Path]]:
    """Image files and the folder of their targets, of the training and of the test split."""
    names = TARGET_FOLDERS[kind]
    lists = root / "ImageSets" / "Segmentation"
    if lists.is_dir():
        wanted = [(lists / f"{split}.txt").read_text().split() for split in ("train", "val")]
        return [([root / "JPEGImages" / f"{n}.jpg" for n in part], root / "SegmentationClass") for part in wanted]
    images = _first(root, IMAGE_FOLDERS)
    if images:
        splits, targets = find_split(images), _first(root, names)
        folders = [(split, targets and split and targets / split.relative_to(images.resolve())) for split in splits]
    else:
        folders = [
            (split and _first(split, IMAGE_FOLDERS), split and _first(split, names)) for split in find_split(root)
        ]
    if not all(image and target and target.is_dir() for image, target in folders):
        raise ValueError(
            f"{root} has no images with {kind}: images/training and {names[0]}/training, with validation beside "
            f"training, are looked for (or train/images and train/{names[0]}, with val beside train)"
        )
    return [([path for path in image.rglob("*") if path.is_file()], target) for image, target in folders]


def _first(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _beside(image: Path, folder: Path) -> Path:
    for suffix in (".png", ".npy"):
        if (path := folder / f"{image.stem}{suffix}").is_file():
            return path
    raise ValueError(f"{image} has no {folder / image.stem}.png (or .npy)")


def _ids(pairs: Pairs, ignore: int) -> set[int]:
    found: set[int] = set()
    for index in range(len(pairs)):
        found.update(np.unique(pairs.target(index)).tolist())
    return found - {ignore}


class DenseSample(NamedTuple):
    images: Tensor  # uint8 [B, 3, H, W]
    targets: list[Tensor]  # [H, W] of a training crop, [h, w] as stored of a test image


class DenseLoader(Dataset):
    """Random crops for training, or whole images for testing, their shorter side resized to ``size``."""

    def __init__(self, pairs: Pairs, size: int, patch: int, workers: int | str, seed: int = 0):
        self.pairs, self.size, self.patch, self.seed = pairs, size, patch, seed
        self.workers = worker_count(workers, 1)

    def crops(self, batch: int, done: int, total: int) -> Iterator[DenseSample]:
        """Batches of the steps from ``done`` to ``total``; every epoch is another order, its rest is left out."""
        per_epoch = len(self.pairs) // batch
        requests = []
        for step in range(done, total):
            epoch, first = step // per_epoch, step % per_epoch * batch
            order = random_words(self.seed, Stream.DENSE, epoch, torch.arange(len(self.pairs)), 0)[0].argsort()
            requests.append([(epoch, index) for index in order[first : first + batch].tolist()])
        return self._load(requests)

    def whole(self) -> Iterator[DenseSample]:
        """Every image by itself, in order."""
        return self._load([[(None, index)] for index in range(len(self.pairs))])

    def _load(self, requests: list) -> Iterator[DenseSample]:
        options = {"batch_size": None, "collate_fn": _as_is, "num_workers": self.workers}
        return iter(DataLoader(self, sampler=requests, generator=torch.Generator(), **options))

    def __getitem__(self, request: list) -> DenseSample:
        images, targets = zip(*(self._one(epoch, index) for epoch, index in request), strict=True)
        return DenseSample(torch.stack(images), list(targets))

    def _one(self, epoch: int | None, index: int) -> tuple[Tensor, Tensor]:
        image, target = self.pairs.image(index), torch.from_numpy(self.pairs.target(index))
        scale = self.size / min(image.size)
        width, height = (max(self.size, round(side * scale / self.patch) * self.patch) for side in image.size)
        pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC))).permute(2, 0, 1)
        if epoch is None:
            return pixels.contiguous(), target
        words = random_words(self.seed, Stream.DENSE, epoch, index, 1)
        top, left = below(words[0], height - self.size + 1), below(words[1], width - self.size + 1)
        # The nearest stored value: between two classes, or on either side of an edge, there is nothing to interpolate.
        rows = ((torch.arange(top, top + self.size) + 0.5) * target.shape[0] / height).long()
        columns = ((torch.arange(left, left + self.size) + 0.5) * target.shape[1] / width).long()
        pixels, target = pixels[:, top : top + self.size, left : left + self.size], target[rows][:, columns]
        if words[2] & 1:
            pixels, target = pixels.flip(-1), target.flip(-1)
        return pixels.contiguous(), target


def _as_is(batch):
    return batch
