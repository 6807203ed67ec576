"""How good a run's encoder is: the figures that are taken before and after training."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ijepa_fast.config import RunConfig
from ijepa_fast.data import EvalLoader, Source
from ijepa_fast.data.datasets import Sources
from ijepa_fast.evaluate import (
    collect_features,
    colour_histogram,
    extract_features,
    knn_accuracy,
    linear_probe,
    pixel_features,
    rank_me,
)
from ijepa_fast.model.vit import VisionTransformer

EVALUATION_BATCH = 256
RANK_IMAGES = 2048
"""Unlabelled images whose features' rank is taken."""


def evaluate(
    encoder: VisionTransformer, sources: Sources, config: RunConfig, *, layers: str = "last", baselines: bool = False
) -> dict:
    """k-NN and linear-probe accuracy (in [0, 1]) of the encoder's pooled features on the test images, and their rank.

    Args:
        encoder: frozen; the target encoder is what the paper evaluates.
        sources: the training images fit k-NN and probe. Without labelled test images only the rank is taken, of the
            features of training images.
        config: image size and number of images.
        layers: features of the "last" block, or of the last four ("last4"), concatenated.
        baselines: also "pixels" and "colours", the same figures for raw pixels and colour histograms.

    Returns:
        {"knn", "probe", "rank"}, and with baselines "pixels" and "colours" with {"knn", "probe"} each; or {"rank"}.
    """
    settings = config.evaluation
    if sources.test is None:
        images = image_loader(sources.train, min(RANK_IMAGES, settings.images[0]), config)
        return {"rank": round(rank_me(extract_features(encoder, images, layers=layers)[0]), 2)}

    def train() -> EvalLoader:
        return image_loader(sources.train, settings.images[0], config)

    def test() -> EvalLoader:
        return image_loader(sources.test, settings.images[1], config)

    fit = extract_features(encoder, train(), layers=layers)
    tested = extract_features(encoder, test(), layers=layers)
    figures = _figures(fit, tested, config.seed) | {"rank": round(rank_me(tested[0]), 2)}
    if baselines:
        for name, features in (("pixels", pixel_features), ("colours", colour_histogram)):
            fit, tested = collect_features(features, train()), collect_features(features, test())
            figures[name] = _figures(fit, tested, config.seed)
    return figures


def _figures(fit: tuple[Tensor, Tensor], tested: tuple[Tensor, Tensor], seed: int) -> dict[str, float]:
    probe = linear_probe(*fit, *tested, seed=seed)
    return {"knn": round(knn_accuracy(*fit, *tested), 4), "probe": round(probe.accuracy, 4)}


def evaluated_on(sources: Sources, config: RunConfig) -> str:
    """How ``evaluate`` goes about it, in words."""
    fitted = min(len(sources.train), config.evaluation.images[0])
    if sources.test is None:
        return f"by the rank of its features ({min(fitted, RANK_IMAGES)} training images)"
    tested = min(len(sources.test), config.evaluation.images[1])
    return f"by k-NN and linear probe ({fitted} training images, {tested} test images)"


def image_loader(source: Source, at_most: int, config: RunConfig, workers: int | None = None) -> EvalLoader:
    """Central crops of ``at_most`` images, spread evenly over the source."""
    indices = None
    if at_most < len(source):
        # Evenly spread, because folders list one class after the other.
        indices = np.linspace(0, len(source) - 1, at_most).round().astype(np.int64)
    return EvalLoader(
        source,
        config.model.img_size,
        EVALUATION_BATCH,
        config.loader.workers if workers is None else workers,
        indices=indices,
        resize_ratio=config.evaluation.resize_ratio,
    )
