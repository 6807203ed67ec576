"""The tasks there are, and what they are given."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ijepa_fast.config import did_you_mean
from ijepa_fast.data import Source
from ijepa_fast.downstream.encoders import training_size
from ijepa_fast.downstream.store import Features, extract
from ijepa_fast.evaluate.features import evaluation_mode, pool_features
from ijepa_fast.model.vit import VisionTransformer

Kind = Literal["classes", "masks", "depth"]


class Task(NamedTuple):
    """One way to judge an encoder.

    Attributes:
        function: "module.name" in this package. It takes a ``Subject`` and returns "figures", a dict of shares in
            [0, 1] by name (a name that ends in a unit in brackets is of another range); the same for "chance" and
            "deviation" where they are known; and whatever else explains the figures.
        data: what the images are labelled with.
        about: what it does, in words.
        needs: package that it imports, of an extra.
    """

    function: str
    data: Kind
    about: str
    needs: str | None = None

    def run(self, subject: Subject) -> dict:
        module, _, name = self.function.partition(".")
        function = getattr(importlib.import_module(f"ijepa_fast.downstream.{module}"), name)
        with torch.random.fork_rng(devices=[]):  # heads begin with the same weights whatever was run before
            torch.manual_seed(subject.options.seed)
            return function(subject)


TASKS = {
    "knn": Task("classify.knn", "classes", "20 nearest neighbours vote"),
    "linear": Task("classify.linear", "classes", "quick linear probe on features of central crops"),
    "linear_protocol": Task(
        "heads.linear_protocol", "classes", "linear layer as in the paper: LARS, 50 epochs of crops"
    ),
    "attentive": Task("heads.attentive", "classes", "one cross-attention block with a learned query"),
    "lowshot": Task("classify.lowshot", "classes", "logistic regression on few labelled images", "sklearn"),
    "robustness": Task("robustness.robustness", "classes", "linear probe on corrupted test images (ImageNet-C)"),
    "segmentation": Task("dense.segmentation", "masks", "linear layer and nearest neighbours on patch features"),
    "depth": Task("dense.depth", "depth", "linear layer on patch features"),
}
OPENED_BY = {
    "classes": "classify.open_classes",
    "masks": "dense_data.open_masks",
    "depth": "dense_data.open_depth",
}
"""Kind of data -> the function that opens and checks it."""


def named_tasks(names: str) -> dict[str, Task]:
    """Tasks by their names, separated by commas.

    Raises:
        ValueError: a name is unknown, none is given, or the tasks need images that are labelled in different ways.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if not chosen:
        raise ValueError(f"no task is named; there are {', '.join(TASKS)}")
    for name in chosen:
        if name not in TASKS:
            raise ValueError(f"there is no task {name!r}{did_you_mean(name, TASKS)}; there are {', '.join(TASKS)}")
    kinds = {name: TASKS[name].data for name in chosen}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise ValueError(f"these tasks need images labelled in different ways ({told}): run them one after the other")
    return {name: TASKS[name] for name in chosen}


def open_data(kind: Kind, path: str, evaluation_data: str | None, options: Options, images: dict | None = None) -> Any:
    """The training and test images of a task, checked: whatever is wrong with them is said before features are taken.

    Raises:
        ValueError, OSError: they cannot be used; the message says why.
    """
    module, _, name = OPENED_BY[kind].partition(".")
    images = {name: value for name, value in (images or {}).items() if value is not None}
    if kind == "classes":
        others = [images]
    elif images.get("channels", 3) != 3 or "value_range" in images:
        raise ValueError(f"tasks with {kind} are for encoders of 8-bit RGB images, this one takes {images}")
    else:
        others = []
    opener = getattr(importlib.import_module(f"ijepa_fast.downstream.{module}"), name)
    return opener(path, evaluation_data, options, *others)


@dataclass(frozen=True)
class Options:
    """Settings of an evaluation.

    Args:
        image_size: side of the crops in pixels, by default that of pretraining.
        layers: last, or last4 to try the last four blocks concatenated as well.
        limit: at most so many training and so many test images, spread evenly.
        shots: lowshot - shares of the training images (1%) and numbers of images of each class (5).
        draws: lowshot - how often these images are drawn.
        epochs: passes over the images for heads that see crops of them, by default each task's own number.
        ignore: segmentation - mask value of pixels that do not count.
        depth_scale: depth - metres for each unit of a map, by default 0.001 in PNG and 1 in npy files.
        precision: fp32, or bf16 for autocast.
        workers: decoding processes.
        seed: of heads, draws and crops.
    """

    image_size: int | None = None
    layers: Literal["last", "last4"] = "last"
    limit: int | None = None
    shots: str = "1%,10%,1,5"
    draws: int = 5
    epochs: int | None = None
    ignore: int = 255
    depth_scale: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int | Literal["auto"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("image_size", "limit", "draws", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def check(self, encoder: VisionTransformer) -> None:
        """ValueError for settings that the encoder cannot have."""
        if self.layers == "last4" and len(encoder.blocks) < 4:
            raise ValueError(f"layers last4 needs an encoder of 4 blocks, this one has {len(encoder.blocks)}")
        if self.image_size is not None:
            encoder.grid_of(self.image_size, self.image_size)


@dataclass
class Subject:
    """An encoder, the images it is judged on, and its features, which are taken when the first task asks for them.

    Attributes:
        encoder: on the device to compute on, frozen.
        weights: digest of the encoder.
        data: training and test images as ``open_data`` gives them.
        folder: for features and unfinished work.
    """

    encoder: VisionTransformer
    weights: str
    data: Any
    folder: Path
    options: Options
    resize_ratio: float
    _features: dict[str, Features] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.encoder.pos_embed.device

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side of the crops, or their height and width."""
        return self.options.image_size or training_size(self.encoder)

    def features(self, split: Literal["train", "test"]) -> Features:
        """Average-pooled features of a split: [n, D], or of four blocks [n, 4 * D], of which the last D are "last"."""
        if split not in self._features:
            source = getattr(self.data, split)
            folder = self.work({"split": split, "images": source.fingerprint, **self.key()})
            self._features[split] = self.extracted(folder, source, self.pooled, title=f"{split} features")
        return self._features[split]

    def extracted(self, folder: Path, source: Source, function: Callable, patches: bool = False, title="features"):
        """``Features`` of all images of a source, by one of this class's functions, kept in ``folder``."""
        return extract(
            folder,
            source,
            function,
            self.encoder,
            image_size=self.image_size,
            resize_ratio=self.resize_ratio,
            key=self.key() | {"patches": patches},
            workers=self.options.workers,
            title=title,
        )

    def key(self) -> dict:
        """What decides the features of an image."""
        options = {name: getattr(self.options, name) for name in ("layers", "precision")}
        return {"weights": self.weights, "size": self.image_size, "device": self.device.type, **options}

    def last(self, values: Tensor) -> Tensor:
        """Of features of several blocks those of the last one."""
        return values[:, -self.encoder.embed_dim :]

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """Average over patches, fp32 [B, D], or [B, 4 * D] with the last four blocks."""
        if self.options.layers == "last":
            return pool_features(self.tokens(images))
        return pool_features(self._autocast(partial(self.encoder.intermediate_layers, n=4), images))

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Patch features [B, N, D] of the last block."""
        with evaluation_mode(self.encoder):
            return self._autocast(self.encoder, images)

    @torch.no_grad()
    def outputs(self, images: Tensor) -> list[Tensor]:
        """Patch features [B, N, D] of the last four blocks, or of the last one of an encoder with fewer."""
        with evaluation_mode(self.encoder):
            if len(self.encoder.blocks) < 4:
                return [self._autocast(self.encoder, images)]
            return self._autocast(partial(self.encoder.intermediate_layers, n=4), images)

    def _autocast(self, function: Callable, images: Tensor):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            return function(images)

    def work(self, key: dict) -> Path:
        """Folder for what ``key`` decides."""
        return keyed(self.folder, key)


def keyed(folder: Path, key: dict) -> Path:
    """A path in a folder for what ``key`` decides, and nothing else."""
    return folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def on(device: torch.device, values: Tensor) -> Tensor:
    """The tensor on a GPU if it takes at most a quarter of its free memory, else as it is."""
    if device.type == "cuda" and 4 * values.nbytes < torch.cuda.mem_get_info(device)[0]:
        return values.to(device)
    return values
