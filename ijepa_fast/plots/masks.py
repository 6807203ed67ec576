"""Sampled masks on their images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ijepa_fast.plots.sheet import COLOURS, Sheet, aspect, numbered, pictures_of, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ijepa_fast.masks.sampler import Masks
    from ijepa_fast.ragged import Ragged

_HIDDEN_RGB = np.float32(0.93)
_HIDDEN_OPACITY = np.float32(0.12)


def plot_masks(
    images: Tensor, masks: Masks, grid: tuple[int, int], out: str | Path | None = None, *, max_images: int = 8
) -> Figure:
    """A sheet with one row per mask: the picture, its context, and its targets, with their numbers of patches.

    Args:
        images: [B, 3, h, w], uint8 or float in [0, 1]; at most ``max_images`` of them are drawn.
        masks: of at least these images.
        grid: patch rows and columns, (H, W).
        out: where to write the figure.

    Raises:
        ValueError: the images cannot be cut into this grid, or there are fewer masks than images.
    """
    pictures = pictures_of(images[:max_images])
    if masks.num_images < len(pictures):
        raise ValueError(f"there are masks of {masks.num_images} images, but {len(pictures)} images to draw")
    pictures = pictures.repeat(masks.per_image, axis=0)
    count = len(pictures)
    contexts = _block_masks(masks.context, count, masks.num_contexts, masks.per_image, grid)
    targets = _block_masks(masks.targets, count, masks.num_targets, masks.per_image, grid)
    visible = np.concatenate([contexts, targets], axis=1)
    context_colour, *target_colours = COLOURS
    colours = [context_colour] * masks.num_contexts
    colours += [target_colours[m % len(target_colours)] for m in range(masks.num_targets)]
    titles = ["image", *numbered("context", masks.num_contexts), *numbered("target", masks.num_targets)]

    sheet = Sheet(count, len(titles), aspect(pictures), top=0.24, row_gap=0.2)
    for column, title in enumerate(titles):
        sheet.title(column, title)
    for row, picture in enumerate(pictures):
        sheet.panel(row, 0, picture)
        for column, (mask, colour) in enumerate(zip(visible[row], colours, strict=True), start=1):
            sheet.panel(row, column, _faded(picture, mask))
            sheet.outline(row, column, mask, colour)
            sheet.caption(row, column, f"{mask.sum()} patches")
    return written(sheet.figure, out)


def _block_masks(blocks: Ragged, count: int, per_mask: int, per_image: int, grid: tuple[int, int]) -> np.ndarray:
    """bool [count, per_mask, H, W]: which patches each sequence of the first ``count`` masks holds."""
    height, width = grid
    bounds = blocks.cu_seqlens.tolist()
    indices = blocks.indices.cpu().numpy()
    shown = np.zeros((count, per_mask, height * width), dtype=bool)
    for sequence in range(count * per_mask):
        mask, block = divmod(sequence, per_mask)
        first = mask // per_image * height * width
        shown[mask, block, indices[bounds[sequence] : bounds[sequence + 1]] - first] = True
    return shown.reshape(count, per_mask, height, width)


def _faded(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture [h, w, 3] with the patches outside ``mask`` [H, W] nearly gone."""
    rows, columns = (side // cells for side, cells in zip(picture.shape, mask.shape, strict=False))
    if (mask.shape[0] * rows, mask.shape[1] * columns) != picture.shape[:2]:
        raise ValueError(f"an image of {picture.shape[:2]} px cannot be cut into {mask.shape} patches")
    shown = mask.repeat(rows, axis=0).repeat(columns, axis=1)[..., None]
    return np.where(shown, picture, _HIDDEN_OPACITY * picture + (1 - _HIDDEN_OPACITY) * _HIDDEN_RGB)
