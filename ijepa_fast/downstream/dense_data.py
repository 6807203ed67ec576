"""Images with a class or a depth for every pixel: found, checked, and loaded at the size of the encoder.

Legend: B images, h x w pixels of an image, H x W of the input that is made of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ijepa_fast.data.datasets import Sources
from ijepa_fast.data.decode import flatten, image_extensions, open_image
from ijepa_fast.data.folder import find_split
from ijepa_fast.data.workers import batches, loading_options, worker_count
from ijepa_fast.downstream.store import spread
from ijepa_fast.downstream.subject import Options
from ijepa_fast.philox import Stream, below, random_words

IMAGE_FOLDERS = ("images", "image", "rgb", "JPEGImages")
TARGET_FOLDERS = {
    "masks": ("annotations", "masks", "labels", "SegmentationClass"),
    "depth": ("depth", "depths", "annotations"),
}
NO_DEPTH, IGNORED = 0.0, -1
_TIMEOUT = 600.0
"""Seconds that a batch may take."""


@dataclass(frozen=True)
class Pairs:
    """Images and their masks or depth maps, by the order of the images' paths.

    Attributes:
        depth_scale: metres for each unit of a depth map; by default 0.001 in PNG and 1 in npy files.
        ids: class ids that count, rising.
    """

    images: Sequence[Path]
    targets: Sequence[Path]
    kind: Literal["masks", "depth"]
    depth_scale: float | None = None
    ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fingerprint(self) -> str:
        """Hash of all file names and sizes, and of what is made of the targets."""
        told = f"{self.depth_scale}{self.ids}" + "".join(
            f"{p}{p.stat().st_size}" for p in (*self.images, *self.targets)
        )
        return f"{self.kind}:{len(self)}:{hashlib.sha256(told.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"

    def part(self, rows: Sequence[int]) -> Pairs:
        return replace(self, images=[self.images[row] for row in rows], targets=[self.targets[row] for row in rows])

    def image(self, index: int) -> Image.Image:
        """The image as it is stored: masks are not turned by the orientation tag either."""
        with open_image(self.images[index]) as image:
            image.load()
            return flatten(image).convert("RGB")

    def stored(self, index: int) -> np.ndarray:
        """The numbers [h, w] of a mask or of a depth map.

        Raises:
            ValueError: the file holds colours, or a mask no integers.
        """
        path = self.targets[index]
        if path.suffix == ".npy":
            values = np.load(path)
        else:
            with Image.open(path) as image:
                values = np.asarray(image)
        if values.ndim != 2:
            raise ValueError(f"{path} has {values.ndim} dimensions: one number for each pixel is needed, no colours")
        if self.kind == "masks" and values.dtype.kind not in "iub":
            raise ValueError(f"{path} holds {values.dtype}, no class ids")
        return values

    def target(self, index: int) -> Tensor:
        """[h, w]: int64 places of the classes among ``ids``, -1 for what does not count; or fp32 metres, 0 where
        nothing was measured."""
        values = self.stored(index)
        if self.kind == "masks":
            place = np.searchsorted(self.ids, values).clip(max=len(self.ids) - 1)
            return torch.from_numpy(np.where(np.take(self.ids, place) == values, place, IGNORED))
        scale = self.depth_scale or (1.0 if self.targets[index].suffix == ".npy" else 0.001)
        metres = values.astype(np.float32) * np.float32(scale)
        return torch.from_numpy(np.where(np.isfinite(metres) & (metres > 0), metres, NO_DEPTH).astype(np.float32))


def open_masks(data: str, evaluation_data: str | None, options: Options, images: dict) -> Sources:
    """Images with class ids: ADE20K's folders, Pascal VOC's, or images/ and masks/ within or above train/ and val/.

    Raises:
        ValueError: a mask is missing, of another size or not of class ids; there is one class only; or a test mask has
            a class that no training mask has.
    """
    splits = _checked(data, "masks", options, images)
    train, test = (
        set().union(*(np.unique(p.stored(i)).tolist() for i in range(len(p)))) - {options.ignore} for p in splits
    )
    if len(train) < 2:
        raise ValueError(
            f"the training masks of {data} hold one class only ({sorted(train)}, ignoring {options.ignore})"
        )
    if unseen := sorted(test - train)[:5]:
        raise ValueError(
            f"test masks of {data} hold class ids that no training mask has: {unseen}; --ignore names the one that "
            f"does not count (now {options.ignore})"
        )
    if not test:
        raise ValueError(f"no test mask of {data} has a pixel that counts (ignoring {options.ignore})")
    return Sources(*(replace(pairs, ids=tuple(sorted(train))) for pairs in splits))


def open_depth(data: str, evaluation_data: str | None, options: Options, images: dict) -> Sources:
    """Images with metres: images/ and depth/ within or above train/ and val/; 16-bit PNG or npy.

    Raises:
        ValueError: a depth map is missing, of another size or not of numbers.
    """
    splits = _checked(data, "depth", options, images)
    for pairs in splits:
        if not any((pairs.target(index) > 0).any() for index in range(len(pairs))):
            raise ValueError(f"no depth map of {data} has a value above 0")
    return Sources(*splits)


def _checked(data: str, kind: str, options: Options, images: dict) -> list[Pairs]:
    if images.get("channels", 3) != 3 or "value_range" in images:
        raise ValueError(f"tasks with {kind} are for encoders of 8-bit RGB images, this one takes {images}")
    splits = []
    for split, files in zip(("training", "test"), _layout(Path(data), kind), strict=True):
        found = sorted(image for image in files if image.suffix.lower() in image_extensions())
        if not found:
            raise ValueError(f"{data} has no {split} images")
        found = [found[row] for row in spread(len(found), options.limit)]
        pairs = Pairs(found, [_beside(image, files[image]) for image in found], kind, options.depth_scale)
        for image, target in zip(pairs.images, pairs.targets, strict=True):
            with open_image(image) as opened:
                wanted = opened.size
            if (size := _size(target)) != wanted:
                raise ValueError(f"{target} is {size[0]} x {size[1]} px, its image {wanted[0]} x {wanted[1]}")
        pairs.stored(0)
        splits.append(pairs)
    return splits


def _size(path: Path) -> tuple[int, int]:
    """Width and height of a mask or depth map, which files say in their first bytes."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r").shape[1::-1]
    with Image.open(path) as image:
        return image.size


def _layout(root: Path, kind: str) -> list[dict[Path, Path]]:
    """Image files and, without their suffix, the files of their targets, of the training and of the test split."""
    names = TARGET_FOLDERS[kind]
    lists = root / "ImageSets" / "Segmentation"
    if lists.is_dir():
        wanted = [(lists / f"{split}.txt").read_text().split() for split in ("train", "val")]
        return [{root / "JPEGImages" / f"{n}.jpg": root / "SegmentationClass" / n for n in part} for part in wanted]
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
    return [
        {path: target / path.relative_to(image).parent / path.stem for path in image.rglob("*") if path.is_file()}
        for image, target in folders
    ]


def _first(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _beside(image: Path, target: Path) -> Path:
    for suffix in (".png", ".npy"):
        if (path := target.with_name(target.name + suffix)).is_file():
            return path
    raise ValueError(f"{image} has no {target}.png (or .npy)")


Sample = tuple[Tensor, list[Tensor]]
"""Images uint8 [B, 3, H, W], and targets: [H, W] of training crops, [h, w] as stored of a test image."""


class DenseLoader(Dataset):
    """Random crops for training, or whole images for testing, their shorter side resized to ``size``."""

    def __init__(self, pairs: Pairs, size: int, patch: int, workers: int | str, seed: int = 0):
        self.pairs, self.size, self.patch, self.seed = pairs, size, patch, seed
        self.workers = worker_count(workers, 1)

    def crops(self, batch: int, done: int, total: int) -> Iterator[Sample]:
        """Batches of the steps from ``done`` to ``total``; every epoch is another order, its rest is left out."""

        def requests() -> Iterator[list]:
            order, per_epoch = None, len(self.pairs) // batch
            for epoch, place in (divmod(step, per_epoch) for step in range(done, total)):
                if order is None or place == 0:
                    order = random_words(self.seed, Stream.DENSE, epoch, torch.arange(len(self.pairs)), 0)[0].argsort()
                yield [(epoch, index) for index in order[place * batch : (place + 1) * batch].tolist()]

        return self._load(requests())

    def whole(self) -> Iterator[Sample]:
        """Every image by itself, in order."""
        return self._load([[(None, index)] for index in range(len(self.pairs))])

    def _load(self, requests: Iterable[list]) -> Iterator[Sample]:
        options = loading_options(self.workers, prefetch=2, pin_memory=False)
        return batches(self, options | {"sampler": requests}, _TIMEOUT)

    def __getitem__(self, request: list) -> Sample:
        images, targets = zip(*(self._one(epoch, index) for epoch, index in request), strict=True)
        return torch.stack(images), list(targets)

    def _one(self, epoch: int | None, index: int) -> tuple[Tensor, Tensor]:
        image, target = self.pairs.image(index), self.pairs.target(index)
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
