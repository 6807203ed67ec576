"""What all pictures share: colours, figures of a given size, and sheets of equal panels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ijepa_fast.evaluate.features import in_unit_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, FAINT = "#1f2328", "#6b7280", "#e5e7eb"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's, which stay apart for colour-blind people, without the two that are too light on white."""
TITLE_POINTS, SMALL_POINTS = 9.5, 7.5
_DPI = 160
_PANEL_INCHES = 1.2
_BAND_GAP = 0.14
_SCALE_HEIGHT = 0.07


class Sheet:
    """Panels of equal size in rows and columns, on one axes whose unit is the width of a panel.

    Every ``band`` rows there is some more room; ``top``, ``left`` and ``bottom`` leave it for titles and a scale.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        aspect: float,
        *,
        top: float = 0.0,
        left: float = 0.0,
        bottom: float = 0.0,
        row_gap: float,
        column_gap: float = 0.06,
        band: int | None = None,
    ) -> None:
        self.aspect, self.row_gap, self.column_gap = aspect, row_gap, column_gap
        self.band = band or rows
        margin = column_gap
        width = columns * (1 + column_gap) - column_gap + left + 2 * margin
        # The caption under the last row needs its gap too.
        self._below = self._corner(rows - 1, 0)[1] + aspect + (row_gap if row_gap > margin else 0)
        height = self._below + bottom + top + 2 * margin
        self.figure = blank_figure(width * _PANEL_INCHES, height * _PANEL_INCHES)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self._window = (-left - margin, width - left - margin, height - top - margin, -top - margin)
        self._keep_window()

    def panel(self, row: int, column: int, rgb: np.ndarray, interpolation: str = "auto") -> None:
        x, y = self._corner(row, column)
        extent = (x, x + 1, y + self.aspect, y)
        self.axes.imshow(rgb, extent=extent, interpolation=interpolation, aspect="auto")
        self._keep_window()

    def outline(
        self, row: int, column: int, mask: np.ndarray, colour: str, *, halo: bool = False, dashed: bool = False
    ) -> None:
        """The border of the true cells of a [H, W] mask; a white halo makes it stand out on any picture."""
        from matplotlib.collections import LineCollection

        x, y = self._corner(row, column)
        scale = np.array([1 / mask.shape[1], self.aspect / mask.shape[0]])
        segments = border_segments(mask) * scale + np.array([x, y])
        style = {"linestyles": "dashed"} if dashed else {"capstyle": "projecting"}
        for ink, width in [("white", 3.0)] * halo + [(colour, 1.3)]:
            self.axes.add_collection(LineCollection(segments, colors=ink, linewidths=width, **style))

    def title(self, column: int, text: str) -> None:
        x, y = self._corner(0, column)
        self._text(x + 0.5, y - 0.07, text, INK, TITLE_POINTS, "center", "bottom")

    def row_title(self, row: int, text: str) -> None:
        x, y = self._corner(row, 0)
        y += self.aspect / 2
        self._text(x - 0.07, y, text, INK, SMALL_POINTS, "right", "center")

    def caption(self, row: int, column: int, text: str) -> None:
        x, y = self._corner(row, column)
        self._text(x + 0.5, y + self.aspect + 0.03, text, MUTED, SMALL_POINTS, "center", "top")

    def scale(self, rgb: np.ndarray, low: str, high: str) -> None:
        """A colour scale [n, 3] under the first columns, with the meaning of its ends."""
        y = self._below + 0.06
        self.axes.imshow(rgb[None], extent=(0, 1, y + _SCALE_HEIGHT, y), interpolation="bilinear", aspect="auto")
        self._text(0, y + _SCALE_HEIGHT + 0.03, low, MUTED, SMALL_POINTS, "left", "top")
        self._text(1, y + _SCALE_HEIGHT + 0.03, high, MUTED, SMALL_POINTS, "right", "top")
        self._keep_window()

    def _text(self, x: float, y: float, text: str, colour: str, points: float, ha: str, va: str) -> None:
        # Names of classes come from folders, and a dollar sign in one begins no formula.
        self.axes.text(x, y, text, color=colour, fontsize=points, ha=ha, va=va, parse_math=False)

    def _corner(self, row: int, column: int) -> tuple[float, float]:
        return column * (1 + self.column_gap), row * (self.aspect + self.row_gap) + row // self.band * _BAND_GAP

    def _keep_window(self) -> None:
        left, right, bottom, top = self._window
        self.axes.set_xlim(left, right)
        self.axes.set_ylim(bottom, top)


def blank_figure(width: float, height: float) -> Figure:
    """An empty white figure of this many inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib; in the checkout: pip install -e '.[train]'") from error
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def viridis(values: np.ndarray) -> np.ndarray:
    """Colours fp32 [..., 3] of values in [0, 1]."""
    from matplotlib import colormaps

    return colormaps["viridis"](values)[..., :3].astype(np.float32)


def written(figure: Figure, out: str | Path | None) -> Figure:
    if out is not None:
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=_DPI)
    return figure


def numbered(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name} {i}" for i in range(1, count + 1)]


def pictures_of(images: Tensor) -> np.ndarray:
    """[B, C, h, w] uint8, uint16, or float in [0, 1] -> float32 [B, h, w, 3]: three channels, or the first."""
    if images.dim() != 4 or not images.shape[1] or not len(images):
        raise ValueError(f"images must be [B, C, h, w] with B > 0, got {list(images.shape)}")
    channels = [0, 1, 2] if images.shape[1] > 2 else [0, 0, 0]
    pictures = in_unit_range(images.detach().cpu()[:, channels]).permute(0, 2, 3, 1)
    low, high = pictures.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"float images must be in [0, 1], got values from {low.item():g} to {high.item():g}")
    return pictures.numpy()


def aspect(pictures: np.ndarray) -> float:
    """Height over width."""
    return pictures.shape[1] / pictures.shape[2]


def border_segments(mask: np.ndarray) -> np.ndarray:
    """[segments, 2, 2]: ends (x, y), in cells, of the edges between true and false cells."""
    padded = np.pad(mask, 1)
    upright = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])[:, ::-1]
    level = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])[:, ::-1]
    upright = np.stack([upright, upright + [0, 1]], axis=1)
    level = np.stack([level, level + [1, 0]], axis=1)
    return np.concatenate([upright, level]).astype(np.float64)
