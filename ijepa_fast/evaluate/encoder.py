"""What a run's encoder is worth: the figures and pictures made before and after training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ijepa_fast import plots
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
from ijepa_fast.masks.sampler import MaskSampler
from ijepa_fast.model.vit import VisionTransformer

EVALUATION_BATCH = 256
PICTURE_IMAGES = 8


def judge(encoder: VisionTransformer, sources: Sources, config: RunConfig, baselines: bool = False) -> dict:
    """k-NN and linear-probe accuracy (in [0, 1]) of the encoder's pooled features on the test images, and their rank.

    Args:
        encoder: frozen; the target encoder is what the paper evaluates.
        sources: labelled; the training images fit k-NN and probe.
        config: image size, number of images and layers.
        baselines: also "pixels" and "colours", the same figures for raw pixels and colour histograms.

    Returns:
        {"knn", "probe", "rank"}, and with baselines "pixels" and "colours" with {"knn", "probe"} each.
    """
    settings = config.evaluation

    def train() -> EvalLoader:
        return _loader(sources.train, settings.train_images, config)

    def test() -> EvalLoader:
        return _loader(sources.test, settings.test_images, config)

    fit = extract_features(encoder, train(), layers=settings.layers)
    tested = extract_features(encoder, test(), layers=settings.layers)
    figures = _figures(fit, tested, config.seed) | {"rank": round(rank_me(tested[0]), 2)}
    if baselines:
        for name, features in (("pixels", pixel_features), ("colours", colour_histogram)):
            fit, tested = collect_features(features, train()), collect_features(features, test())
            figures[name] = _figures(fit, tested, config.seed)
    return figures


def _figures(fit: tuple[Tensor, Tensor], tested: tuple[Tensor, Tensor], seed: int) -> dict[str, float]:
    probe = linear_probe(*fit, *tested, seed=seed)
    return {"knn": round(knn_accuracy(*fit, *tested), 4), "probe": round(probe.accuracy, 4)}


def _loader(source: Source, at_most: int, config: RunConfig, workers: int | None = None) -> EvalLoader:
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
        timeout=config.loader.timeout,
    )


def picture_images(source: Source, config: RunConfig, count: int = PICTURE_IMAGES) -> Tensor:
    """uint8 [count, 3, h, w]: images spread evenly over the source."""
    batch = next(iter(_loader(source, min(count, len(source)), config, workers=0)))
    return batch.images[:count]


def draw_masks(config: RunConfig, source: Source, out: Path, count: int = PICTURE_IMAGES) -> None:
    """A sheet of images with the context and target blocks of step 0."""
    height = config.model.img_size // config.model.patch_size
    sampler = MaskSampler(config.masks, (height, height))
    group = config.masks.group_size if config.masks.context == "batch_min" else 1
    drawn = -(-count // group) * group
    masks = sampler.sample(drawn, seed=config.seed, step=0)
    plots.plot_masks(picture_images(source, config, count), masks, (height, height), out)


def draw_pictures(config: RunConfig, encoder: VisionTransformer, sources: Sources, folder: Path) -> None:
    """curves.png, masks.png and pca.png of a finished run."""
    plots.plot_curves(folder / "metrics.jsonl", folder / "curves.png")
    draw_masks(config, sources.train, folder / "masks.png")
    source = sources.test if sources.test is not None else sources.train
    images = picture_images(source, config)
    torch.manual_seed(config.seed)
    untrained = config.model.anywhere().build(config.objective).target_encoder
    with torch.no_grad():
        device = encoder.pos_embed.device
        after = encoder(images.to(device)).float().cpu()
        before = untrained(images)
    plots.plot_pca(images, after, encoder.grid, folder / "pca.png", before=before)
