"""Pictures of a run: training curves, sampled masks, PCA maps of patch features.

Every function returns a matplotlib ``Figure`` and, given a path, writes it (the suffix says how). Figures are made
without pyplot, so nothing global changes and no display is needed; matplotlib is imported when the first one is drawn.

Legend: B images, H x W patch grid, N = H * W patches, D width, M target and C context blocks per image.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ijepa_fast.masks import Masks
    from ijepa_fast.ragged import Ragged

_INK, _MUTED, _FAINT = "#1f2328", "#6b7280", "#e5e7eb"
_CONTEXT_COLOUR = "#2563eb"
_TARGET_COLOURS = ("#ea580c", "#16a34a", "#c026d3", "#0891b2", "#ca8a04", "#dc2626")
_HIDDEN_RGB = np.float32(0.93)
_HIDDEN_OPACITY = np.float32(0.12)
_DPI = 160
_PANEL_INCHES = 1.2
_BAND_GAP = 0.14
_TITLE_POINTS, _SMALL_POINTS = 9.5, 7.5

# Title, unit of the axis, and the lines of each panel: key in metrics.jsonl -> label.
_CURVES = (
    ("Loss", 1, {"loss": "total", "loss_prediction": "prediction"}),
    ("Feature rank (RankMe)", 1, {"rank": "uncentred", "rank_centered": "centred"}),
    ("Online k-NN accuracy, %", 100, {"knn": "k-NN"}),
)


def plot_curves(metrics: Sequence[dict] | str | Path, out: str | Path | None = None) -> Figure:
    """Loss, feature rank and k-NN accuracy over steps, one panel for each that was recorded.

    Args:
        metrics: dicts with "step" and some of "loss", "loss_prediction", "rank", "rank_centered", "knn"; or the path
            of a metrics.jsonl with one such dict per line (an unfinished last line is left out).
        out: where to write the figure.

    Raises:
        ValueError: nothing that is plotted was recorded, or a line is not JSON.
    """
    if isinstance(metrics, (str, Path)):
        metrics = _read_metrics(Path(metrics))
    panels = []
    for title, unit, names in _CURVES:
        lines = {label: _series(metrics, key, unit) for key, label in names.items()}
        lines = {label: line for label, line in lines.items() if len(line)}
        if lines:
            panels.append((title, lines))
    if not panels:
        raise ValueError(f"there is nothing to plot: {len(metrics)} records, none with a loss, rank or knn")

    figure = _figure(3.4 * len(panels), 2.7)
    for place, (title, lines) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        _plain_axes(axes, title)
        first, *others = lines.values()
        lines = {label: line for label, line in lines.items() if line is first or not np.array_equal(line, first)}
        for (label, line), colour in zip(lines.items(), (_CONTEXT_COLOUR, *_TARGET_COLOURS), strict=False):
            marker = "o" if len(line) == 1 else None
            axes.plot(line[:, 0], line[:, 1], color=colour, label=label, linewidth=1.6, marker=marker, markersize=4)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=_SMALL_POINTS, labelcolor=_INK, handlelength=1.4)
    figure.tight_layout(pad=0.8, w_pad=2.0)
    return _written(figure, out)


def plot_masks(
    images: Tensor, masks: Masks, grid: tuple[int, int], out: str | Path | None = None, *, max_images: int = 8
) -> Figure:
    """A sheet with one row per image: the picture, its context, and its targets, with their numbers of patches.

    Args:
        images: [B, 3, h, w], uint8 or float in [0, 1]; at most ``max_images`` of them are drawn.
        masks: of at least these images.
        grid: patch rows and columns, (H, W).
        out: where to write the figure.

    Raises:
        ValueError: the images cannot be cut into this grid, or there are fewer masks than images.
    """
    pictures = _pictures(images[:max_images])
    count = len(pictures)
    if masks.num_images < count:
        raise ValueError(f"there are masks of {masks.num_images} images, but {count} images to draw")
    contexts = _block_masks(masks.context, count, masks.num_contexts, grid)
    targets = _block_masks(masks.targets, count, masks.num_targets, grid)
    visible = np.concatenate([contexts, targets], axis=1)
    colours = [_CONTEXT_COLOUR] * masks.num_contexts
    colours += [_TARGET_COLOURS[m % len(_TARGET_COLOURS)] for m in range(masks.num_targets)]
    titles = ["image", *_numbered("context", masks.num_contexts), *_numbered("target", masks.num_targets)]

    sheet = _Sheet(count, len(titles), _aspect(pictures), top=0.24, row_gap=0.2)
    for column, title in enumerate(titles):
        sheet.title(column, title, _INK if column == 0 else colours[column - 1])
    for row, picture in enumerate(pictures):
        sheet.panel(row, 0, picture)
        for column, (mask, colour) in enumerate(zip(visible[row], colours, strict=True), start=1):
            sheet.panel(row, column, _faded(picture, mask))
            sheet.outline(row, column, mask, colour)
            sheet.caption(row, column, f"{mask.sum()} patches")
    return _written(sheet.figure, out)


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
    pictures = _pictures(images)
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

    sheet = _Sheet(bands * len(kinds), columns, _aspect(pictures), left=0.56, row_gap=0.06, band=len(kinds))
    for place in range(len(pictures)):
        band, column = divmod(place, columns)
        for offset, (name, panels) in enumerate(kinds):
            row = band * len(kinds) + offset
            sheet.panel(row, column, panels[place], "nearest" if offset else "auto")
            if column == 0:
                sheet.row_title(row, name)
    return _written(sheet.figure, out)


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


class _Sheet:
    """Panels of equal size in rows and columns, on one axes whose unit is the width of a panel.

    Every ``band`` rows there is some more room.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        aspect: float,
        *,
        top: float = 0.0,
        left: float = 0.0,
        row_gap: float,
        column_gap: float = 0.06,
        band: int | None = None,
    ) -> None:
        self.aspect, self.row_gap, self.column_gap = aspect, row_gap, column_gap
        self.band = band or rows
        margin = column_gap
        width = columns * (1 + column_gap) - column_gap + left + 2 * margin
        height = self._corner(rows - 1, 0)[1] + aspect + top + 2 * margin
        # The caption under the last row needs its gap too.
        height += row_gap if row_gap > margin else 0
        self.figure = _figure(width * _PANEL_INCHES, height * _PANEL_INCHES)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self._window = (-left - margin, width - left - margin, height - top - margin, -top - margin)
        self._keep_window()

    def panel(self, row: int, column: int, rgb: np.ndarray, interpolation: str = "auto") -> None:
        x, y = self._corner(row, column)
        extent = (x, x + 1, y + self.aspect, y)
        self.axes.imshow(rgb, extent=extent, interpolation=interpolation, aspect="auto")
        self._keep_window()

    def outline(self, row: int, column: int, mask: np.ndarray, colour: str) -> None:
        """The border of the true cells of a [H, W] mask."""
        from matplotlib.collections import LineCollection

        x, y = self._corner(row, column)
        scale = np.array([1 / mask.shape[1], self.aspect / mask.shape[0]])
        segments = _border_segments(mask) * scale + np.array([x, y])
        self.axes.add_collection(LineCollection(segments, colors=colour, linewidths=1.3, capstyle="projecting"))

    def title(self, column: int, text: str, colour: str = _INK) -> None:
        x, y = self._corner(0, column)
        self.axes.text(x + 0.5, y - 0.07, text, color=colour, fontsize=_TITLE_POINTS, ha="center", va="bottom")

    def row_title(self, row: int, text: str) -> None:
        x, y = self._corner(row, 0)
        y += self.aspect / 2
        self.axes.text(x - 0.07, y, text, color=_INK, fontsize=_SMALL_POINTS, ha="right", va="center")

    def caption(self, row: int, column: int, text: str) -> None:
        x, y = self._corner(row, column)
        self.axes.text(
            x + 0.5, y + self.aspect + 0.03, text, color=_MUTED, fontsize=_SMALL_POINTS, ha="center", va="top"
        )

    def _corner(self, row: int, column: int) -> tuple[float, float]:
        return column * (1 + self.column_gap), row * (self.aspect + self.row_gap) + row // self.band * _BAND_GAP

    def _keep_window(self) -> None:
        left, right, bottom, top = self._window
        self.axes.set_xlim(left, right)
        self.axes.set_ylim(bottom, top)


def _figure(width: float, height: float) -> Figure:
    """An empty white figure of this many inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'ijepa_fast[train]'") from error
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _written(figure: Figure, out: str | Path | None) -> Figure:
    if out is not None:
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=_DPI)
    return figure


def _plain_axes(axes: Axes, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=_TITLE_POINTS, color=_INK, loc="left", pad=8)
    axes.set_xlabel("step", fontsize=_SMALL_POINTS + 0.5, color=_MUTED)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_MUTED)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=_SMALL_POINTS, length=0, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))


def _read_metrics(path: Path) -> list[dict]:
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON: {line[:80]!r}") from error
    return records


def _series(metrics: Iterable[dict], key: str, unit: float) -> np.ndarray:
    """[points, 2] of (step, value), for the records that have a value."""
    points = [(record["step"], record[key] * unit) for record in metrics if record.get(key) is not None]
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def _numbered(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name} {i}" for i in range(1, count + 1)]


def _pictures(images: Tensor) -> np.ndarray:
    """[B, 3, h, w] uint8, or float in [0, 1] -> float32 [B, h, w, 3]."""
    if images.dim() != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images must be [B, 3, h, w] with B > 0, got {list(images.shape)}")
    pictures = images.detach().cpu().float().permute(0, 2, 3, 1)
    pictures = pictures / 255 if images.dtype == torch.uint8 else pictures
    low, high = pictures.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"float images must be in [0, 1], got values from {low.item():g} to {high.item():g}")
    return pictures.numpy()


def _aspect(pictures: np.ndarray) -> float:
    """Height over width."""
    return pictures.shape[1] / pictures.shape[2]


def _block_masks(blocks: Ragged, num_images: int, per_image: int, grid: tuple[int, int]) -> np.ndarray:
    """bool [num_images, per_image, H, W]: which patches each sequence holds."""
    height, width = grid
    bounds = blocks.cu_seqlens.tolist()
    indices = blocks.indices.cpu().numpy()
    masks = np.zeros((num_images, per_image, height * width), dtype=bool)
    for sequence in range(num_images * per_image):
        image, block = divmod(sequence, per_image)
        masks[image, block, indices[bounds[sequence] : bounds[sequence + 1]] - image * height * width] = True
    return masks.reshape(num_images, per_image, height, width)


def _faded(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture [h, w, 3] with the patches outside ``mask`` [H, W] nearly gone."""
    rows, columns = (side // cells for side, cells in zip(picture.shape, mask.shape, strict=False))
    if (mask.shape[0] * rows, mask.shape[1] * columns) != picture.shape[:2]:
        raise ValueError(f"an image of {picture.shape[:2]} px cannot be cut into {mask.shape} patches")
    shown = mask.repeat(rows, axis=0).repeat(columns, axis=1)[..., None]
    return np.where(shown, picture, _HIDDEN_OPACITY * picture + (1 - _HIDDEN_OPACITY) * _HIDDEN_RGB)


def _border_segments(mask: np.ndarray) -> np.ndarray:
    """[segments, 2, 2]: ends (x, y), in cells, of the edges between true and false cells."""
    padded = np.pad(mask, 1)
    upright = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])[:, ::-1]
    level = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])[:, ::-1]
    upright = np.stack([upright, upright + [0, 1]], axis=1)
    level = np.stack([level, level + [1, 0]], axis=1)
    return np.concatenate([upright, level]).astype(np.float64)
