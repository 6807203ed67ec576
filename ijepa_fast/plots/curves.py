"""Training curves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ijepa_fast.plots.sheet import COLOURS, FAINT, INK, MUTED, SMALL_POINTS, TITLE_POINTS, blank_figure, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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

    figure = blank_figure(3.4 * len(panels), 2.7)
    for place, (title, lines) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        _plain_axes(axes, title)
        first, *others = lines.values()
        lines = {label: line for label, line in lines.items() if line is first or not np.array_equal(line, first)}
        for (label, line), colour in zip(lines.items(), COLOURS, strict=False):
            marker = "o" if len(line) == 1 else None
            axes.plot(line[:, 0], line[:, 1], color=colour, label=label, linewidth=1.6, marker=marker, markersize=4)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=SMALL_POINTS, labelcolor=INK, handlelength=1.4)
    figure.tight_layout(pad=0.8, w_pad=2.0)
    return written(figure, out)


def _plain_axes(axes: Axes, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=TITLE_POINTS, color=INK, loc="left", pad=8)
    axes.set_xlabel("step", fontsize=SMALL_POINTS + 0.5, color=MUTED)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=SMALL_POINTS, length=0, pad=4)
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
