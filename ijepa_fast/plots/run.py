"""The pictures of a run: its masks, its curves, and PCA maps of its features."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ijepa_fast.config import RunConfig
from ijepa_fast.data import Source
from ijepa_fast.data.datasets import Sources
from ijepa_fast.evaluate.encoder import image_loader
from ijepa_fast.masks.sampler import MaskSampler
from ijepa_fast.model.vit import VisionTransformer
from ijepa_fast.plots import plot_curves, plot_masks, plot_pca

PICTURE_IMAGES = 8


def picture_images(source: Source, config: RunConfig, count: int = PICTURE_IMAGES) -> Tensor:
    """uint8 or uint16 [count, C, h, w]: images spread evenly over the source."""
    batch = next(iter(image_loader(source, min(count, len(source)), config, workers=0)))
    return batch.images[:count]


def draw_masks(config: RunConfig, source: Source, out: Path, count: int = PICTURE_IMAGES) -> None:
    """A sheet of images with the context and target blocks of step 0."""
    sampler = MaskSampler(config.masks, config.model.grid)
    group = config.masks.group_size if config.masks.context == "batch_min" else 1
    drawn = -(-count // group) * group
    masks = sampler.sample(drawn, seed=config.seed, step=0)
    plot_masks(picture_images(source, config, count), masks, config.model.grid, out)


def draw_run(config: RunConfig, encoder: VisionTransformer, sources: Sources, folder: Path) -> None:
    """curves.png, masks.png and pca.png of a finished run."""
    plot_curves(folder / "metrics.jsonl", folder / "curves.png")
    draw_masks(config, sources.train, folder / "masks.png")
    source = sources.test if sources.test is not None else sources.train
    images = picture_images(source, config)
    torch.manual_seed(config.seed)
    untrained = config.model.build(config.objective).target_encoder
    with torch.no_grad():
        device = encoder.pos_embed.device
        after = encoder(images.to(device)).float().cpu()
        before = untrained(images)
    plot_pca(images, after, encoder.grid, folder / "pca.png", before=before)
