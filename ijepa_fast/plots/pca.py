"""PCA maps of patch features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ijepa_fast.plots.sheet import Sheet, aspect, pictures_of, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_pca(
    images: Tensor,
    features: Tensor,
    grid: tuple[int, int],
    out: str | Path | None = None,
    before: Tensor | None = None,
    *,
    columns: int = 8,
    remove_positions: bool = False,
) -> Figure:
    """Pictures above their PCA maps: of ``before`` (an untrained encoder), if given, and of ``features``.

    Args:
        images: [B, 3, h, w], uint8 or float in [0, 1].
        features, before: [B, N, D] patch features.
        grid: patch rows and columns, (H, W).
        out: where to write the figure.
        columns: images side by side; more go below.
        remove_positions: as in ``pca_maps``.
    """
    pictures = pictures_of(images)
    kinds = [("image", pictures)]
    if before is not None:
        kinds.append(("before\ntraining", pca_maps(before, grid, remove_positions).numpy()))
    name = "patch\nfeatures" if before is None else "after\ntraining"
    kinds.append((name, pca_maps(features, grid, remove_positions).numpy()))
    for _, panels in kinds[1:]:
        if len(panels) != len(pictures):
            raise ValueError(f"there are {len(pictures)} images, but features of {len(panels)}")
    columns = min(columns, len(pictures))
    bands = -(-len(pictures) // columns)

    sheet = Sheet(bands * len(kinds), columns, aspect(pictures), left=0.56, row_gap=0.06, band=len(kinds))
    for place in range(len(pictures)):
        band, column = divmod(place, columns)
        for offset, (name, panels) in enumerate(kinds):
            row = band * len(kinds) + offset
            sheet.panel(row, column, panels[place], "nearest" if offset else "auto")
            if column == 0:
                sheet.row_title(row, name)
    return written(sheet.figure, out)


def pca_maps(features: Tensor, grid: tuple[int, int], remove_positions: bool = False) -> Tensor:
    """The first three principal components of patch features as colours: [B, N, D] -> fp32 [B, H, W, 3] in [0, 1].

    The components are common to all images, so that one colour means the same in all of them. Each is stretched from
    its 2nd to its 98th percentile; its sign makes its largest loading positive. Components that do not vary are grey.

    Args:
        features: [B, N, D].
        grid: (H, W).
        remove_positions: first subtract, at every position, the mean over the images. What an encoder says about
            where a patch is can outweigh what it says about what it shows. Wants many images.

    Raises:
        ValueError: features are not [B, H * W, D], or not finite; or positions are to be removed from one image.
    """
    height, width = grid
    if features.dim() != 3 or features.shape[1] != height * width or not len(features):
        raise ValueError(
            f"features must be [B, {height * width}, D] on a {height} x {width} grid, got {list(features.shape)}"
        )
    x = features.detach().cpu().double()
    if not x.isfinite().all():
        raise ValueError("features must be finite")
    if remove_positions:
        if len(x) == 1:
            raise ValueError("removing positions needs the features of at least two images, got one")
        x = x - x.mean(0)
    x = x.flatten(0, 1)
    x = x - x.mean(0)
    energy, axes = torch.linalg.eigh(x.T @ x)
    axes = axes.flip(1)[:, :3] * (energy.flip(0)[:3] > energy[-1] * 1e-10)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    components = x @ axes
    low, high = components.quantile(torch.tensor([0.02, 0.98], dtype=x.dtype), dim=0)
    colours = torch.where(high > low, (components - low) / (high - low), 0.5).clamp(0, 1).float()
    colours = torch.nn.functional.pad(colours, (0, 3 - colours.shape[1]), value=0.5)
    return colours.unflatten(0, (len(features), height, width))
