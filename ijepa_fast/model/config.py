"""Sizes of the networks, and the networks from their sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
        img_size: side of the training crops in pixels.
        patch_size: side of a patch in pixels; divides img_size.
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
        mean_std: mean, then standard deviation, of each channel, for images in [0, 1].
    """

    img_size: int = common(224)
    patch_size: int = common(16)
    embed_dim: int = common(768)
    depth: int = common(12)
    num_heads: int = common(12)
    mlp_ratio: float = 4.0
    predictor_embed_dim: int = common(384)
    predictor_depth: int = common(6)
    predictor_mlp_ratio: float | None = None
    projector_dim: int | None = None
    init: Init = "flat"
    mean_std: tuple[tuple[float, float, float], tuple[float, float, float]] = (IMAGENET_MEAN, IMAGENET_STD)

    def __post_init__(self) -> None:
        for name, network in (("embed_dim", "encoder"), ("predictor_embed_dim", "predictor")):
            width = getattr(self, name)
            if self.num_heads < 1 or width % self.num_heads:
                raise ValueError(
                    f"model.{name} {width}, the width of the {network}, cannot be split into {self.num_heads} heads "
                    "(model.num_heads)"
                )

    def build(self, objective: Objective) -> IJEPA:
        """The networks, with fresh weights from torch's global generator."""
        mean, std = self.mean_std
        encoder = VisionTransformer(
            self.img_size,
            self.patch_size,
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
            target_dim=3 * self.patch_size**2 if objective.targets == "pixels" else None,
            projector_dim=self.projector_dim,
        )
        return IJEPA(encoder, predictor, objective)
