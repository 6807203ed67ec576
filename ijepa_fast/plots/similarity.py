"""Which patches of an image have features like those of one chosen patch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.plots.sheet import COLOURS, Sheet, aspect, pictures_of, viridis, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_similarity(
    images: Tensor,
    features: Tensor,
    grid: tuple[int, int],
    patches: Sequence[tuple[int, int]],
    out: str | Path | None = None,
    before: Tensor | None = None,
) -> Figure:
    """One row per image: the picture with the chosen patches outlined, and a cosine-similarity map of each.

    All maps share one colour scale, from the lowest similarity in the sheet to 1, so that features that are alike
    everywhere look alike everywhere.

    Args:
        images: [B, 3, h, w], uint8 or float in [0, 1].
        features, before: [B, N, D] patch features; ``before`` (an untrained encoder), if given, is drawn left.
        grid: patch rows and columns, (H, W).
        patches: (row, column) of each chosen patch, counted from 0 at the top left.
        out: where to write the figure.

    Raises:
        ValueError: as ``cosine_maps``; or the numbers of images and features differ.
    """
    pictures = pictures_of(images)
    kinds = [] if before is None else [("\nbefore", cosine_maps(before, grid, patches).numpy())]
    kinds.append(("" if before is None else "\nafter", cosine_maps(features, grid, patches).numpy()))
    for _, maps in kinds:
        if len(maps) != len(pictures):
            raise ValueError(f"there are {len(pictures)} images, but features of {len(maps)}")
    names = [f"patch {row},{column}" for row, column in patches]
    lowest = min(float(maps.min()) for _, maps in kinds)
    # Rounding may leave a patch a little off 1 to itself; a scale needs two ends.
    low = min(math.floor(lowest * 20) / 20, 0.95)

    sheet = Sheet(
        len(pictures),
        1 + len(kinds) * len(patches),
        aspect(pictures),
        top=0.24 if before is None else 0.4,
        bottom=0.32,
        row_gap=0.06,
    )
    sheet.title(0, "image")
    for place, (when, name) in enumerate(((when, name) for when, _ in kinds for name in names), start=1):
        sheet.title(place, name + when)
    for row, picture in enumerate(pictures):
        sheet.panel(row, 0, picture)
        for number, patch in enumerate(patches):
            chosen, colour = np.zeros(grid, dtype=bool), _colour(number)
            chosen[patch] = True
            sheet.outline(row, 0, chosen, colour, halo=True)
            for kind, (_, maps) in enumerate(kinds):
                column = 1 + kind * len(patches) + number
                sheet.panel(row, column, viridis((maps[row, number] - low) / (1 - low)), "nearest")
                sheet.outline(row, column, chosen, colour, halo=True)
    sheet.scale(viridis(np.linspace(0, 1, 64)), f"{low:.2f}", "cosine 1")
    return written(sheet.figure, out)


def cosine_maps(features: Tensor, grid: tuple[int, int], patches: Sequence[tuple[int, int]]) -> Tensor:
    """Cosine similarity of chosen patches with every patch of their image: [B, N, D] -> fp32 [B, P, H, W] in [-1, 1].

    Args:
        features: [B, N, D].
        grid: (H, W).
        patches: P times (row, column), counted from 0 at the top left.

    Raises:
        ValueError: features are not [B, H * W, D], or not finite; or a patch is outside the grid, or there is none.
    """
    height, width = grid
    if features.dim() != 3 or features.shape[1] != height * width or not len(features):
        raise ValueError(
            f"features must be [B, {height * width}, D] on a {height} x {width} grid, got {list(features.shape)}"
        )
    if not patches:
        raise ValueError("no patch is chosen")
    for row, column in patches:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"patch {row},{column} is outside the {height} x {width} grid (rows, columns from 0)")
    x = features.detach().cpu().double()
    if not x.isfinite().all():
        raise ValueError("features must be finite")
    x = F.normalize(x, dim=2)
    chosen = x[:, [row * width + column for row, column in patches]]
    return (chosen @ x.transpose(1, 2)).clamp(-1, 1).float().unflatten(2, grid)


def _colour(number: int) -> str:
    """Of a chosen patch; green and blue are in the maps themselves."""
    colours = (COLOURS[1], COLOURS[3], "#000000", COLOURS[0])
    return colours[number % len(colours)]
