"""What a task is given: an encoder, images, settings, and the features of the ones by the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ijepa_fast.data import EvalLoader, Source
from ijepa_fast.downstream.encoders import training_size
from ijepa_fast.downstream.store import BATCH, Features, Part, extract
from ijepa_fast.evaluate.features import evaluation_mode, pool_features
from ijepa_fast.model.vit import VisionTransformer


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
        if self.depth_scale is not None and not self.depth_scale > 0:
            raise ValueError(f"depth_scale must be positive, got {self.depth_scale}")

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
        data: images of the task: training and test images, or one set.
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
            self._features[split] = self.extracted(getattr(self.data, split), title=f"{split} features")
        return self._features[split]

    def extracted(
        self, source: Source, folder: Path | None = None, patches: bool = False, title: str = "features"
    ) -> Features:
        """Features of all images of a source, pooled or of patches; kept in ``folder``, by default one of ``work``."""
        key = self.key() | {"patches": patches}
        return extract(
            folder or self.work({"images": source.fingerprint, **key}),
            source,
            self.tokens if patches else self.pooled,
            self.device,
            image_size=self.image_size,
            resize_ratio=self.resize_ratio,
            key=key,
            workers=self.options.workers,
            title=title,
        )

    def crops(self, source: Source) -> EvalLoader:
        """Central crops of the labelled images of a source."""
        part = Part(source, np.flatnonzero(source.labels >= 0))
        return EvalLoader(part, self.image_size, BATCH, self.options.workers, resize_ratio=self.resize_ratio)

    def key(self) -> dict:
        """What decides the features of an image."""
        options = {name: getattr(self.options, name) for name in ("layers", "precision")}
        return {"weights": self.weights, "size": self.image_size, "device": self.device.type, **options}

    def last(self, values: Tensor) -> Tensor:
        """Of features of several blocks those of the last one."""
        return values[:, -self.encoder.embed_dim :]

    @torch.no_grad()
    def pooled(self, images: Tensor, blocks: int | None = None) -> Tensor:
        """Averages over patches of the last blocks, fp32 [B, blocks * D]; 4 blocks with ``layers`` last4, else 1."""
        blocks = blocks or (4 if self.options.layers == "last4" else 1)
        if blocks == 1:
            return pool_features(self.tokens(images))
        with evaluation_mode(self.encoder):
            return pool_features(self._autocast(partial(self.encoder.intermediate_layers, n=blocks), images))

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Patch features [B, N, D] of the last block."""
        with evaluation_mode(self.encoder):
            return self._autocast(self.encoder, images)

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
