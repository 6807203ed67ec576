"""Sizes of the networks, and the networks from their sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ijepa_fast.model.blocks import Init
from ijepa_fast.model.jepa import IJEPA, Objective
from ijepa_fast.model.vit import IMAGENET_MEAN, IMAGENET_STD, Predictor, VisionTransformer


def common(default: Any) -> Any:
    """A setting that ``--help`` shows; the others are shown by ``--help-all``."""
    return field(default=default, metadata={"common": True})


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and predictor.

    Args:
        img_size: side of the training crops in pixels, or [height, width].
        patch_size: side of a patch in pixels; divides img_size.
        in_chans: channels of the crops. 3 is RGB and 1 is grey, to which all images are converted, with transparency
            laid on white; of any other number an image must have as many bands, transparency counting as one.
        embed_dim: width of the encoder, a multiple of 4.
        depth: blocks of the encoder.
        num_heads: attention heads of encoder and predictor; divides both widths.
        mlp_ratio: hidden width of the encoder's MLPs over its width.
        predictor_embed_dim: width of the predictor, a multiple of 4.
        predictor_depth: blocks of the predictor.
        predictor_mlp_ratio: the same ratio of the predictor; null for the encoder's. The official code always has 4.
        projector_dim: width of the two layers between the pooled context features and the terms of variance, covariance
            and invariance; null for none. It belongs to the predictor.
        init: flat (std 0.02 at all depths, as the published models were trained), depth_scaled, or whitened (flat
            but for the patch embedding, which sees fine detail from the start; for small sets and short runs).
        mean_std: mean, then standard deviation, of each channel, for images in [0, 1]; or auto: measured on a sample at
            the start, and written down. ImageNet's for three channels, auto for another number.
    """

    img_size: int | tuple[int, int] = common(224)
    patch_size: int = common(16)
    in_chans: int = common(3)
    embed_dim: int = common(768)
    depth: int = common(12)
    num_heads: int = common(12)
    mlp_ratio: float = 4.0
    predictor_embed_dim: int = 384
    predictor_depth: int = 6
    predictor_mlp_ratio: float | None = None
    projector_dim: int | None = None
    init: Init = "flat"
    mean_std: Literal["auto"] | tuple[tuple[float, ...], tuple[float, ...]] = (IMAGENET_MEAN, IMAGENET_STD)

    def __post_init__(self) -> None:
        if isinstance(self.img_size, (list, tuple)):
            if len(self.img_size) != 2:
                raise ValueError(f"model.img_size must be one number or [height, width], got {list(self.img_size)}")
            square = self.img_size[0] == self.img_size[1]
            object.__setattr__(self, "img_size", self.img_size[0] if square else tuple(self.img_size))
        if self.in_chans != 3 and self.mean_std == (IMAGENET_MEAN, IMAGENET_STD):
            object.__setattr__(self, "mean_std", "auto")
        if self.mean_std != "auto":
            pair = isinstance(self.mean_std, (list, tuple)) and len(self.mean_std) == 2
            if not pair or not all(isinstance(values, (list, tuple)) for values in self.mean_std):
                raise ValueError(f"model.mean_std must be auto or [means, deviations], got {self.mean_std}")
            mean, std = self.mean_std
            if {len(mean), len(std)} != {self.in_chans}:
                raise ValueError(
                    f"model.mean_std holds {len(mean)} means and {len(std)} deviations for model.in_chans "
                    f"{self.in_chans}; --model.mean_std auto measures them"
                )
        for name, network in (("embed_dim", "encoder"), ("predictor_embed_dim", "predictor")):
            width = getattr(self, name)
            if self.num_heads < 1 or width % self.num_heads:
                raise ValueError(
                    f"model.{name} {width}, the width of the {network}, cannot be split into {self.num_heads} heads "
                    "(model.num_heads)"
                )
        for name, width in (("mlp_ratio", self.embed_dim), ("predictor_mlp_ratio", self.predictor_embed_dim)):
            ratio = getattr(self, name)
            if ratio is not None and 0 < ratio * width < 1:
                raise ValueError(f"model.{name} {ratio} leaves no hidden units at width {width}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the training crops in pixels."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns of the training crops."""
        height, width = self.size
        return height // self.patch_size, width // self.patch_size

    @property
    def patches(self) -> int:
        """Number of patches of a training crop."""
        return self.grid[0] * self.grid[1]

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel; 0.5 where they are still to be measured."""
        return ((0.5,) * self.in_chans,) * 2 if self.mean_std == "auto" else self.mean_std

    def build(self, objective: Objective) -> IJEPA:
        """The networks, with fresh weights from torch's global generator."""
        mean, std = self.normalisation
        encoder = VisionTransformer(
            self.img_size,
            self.patch_size,
            self.in_chans,
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            init=self.init,
            mean=mean,
            std=std,
        )
        predictor = Predictor(
            encoder.grid,
            self.embed_dim,
            predictor_embed_dim=self.predictor_embed_dim,
            depth=self.predictor_depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio if self.predictor_mlp_ratio is None else self.predictor_mlp_ratio,
            init=self.init,
            target_dim=self.in_chans * self.patch_size**2 if objective.targets == "pixels" else None,
            projector_dim=self.projector_dim,
        )
        return IJEPA(encoder, predictor, objective)
