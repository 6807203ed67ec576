"""Charts of the results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.report.sections import TITLES, of_contender
from benchmarks.results_files import Report, Reports, of_kind

OURS, THEIRS = "#1f5fa8", "#b9c2cc"
PRECISIONS = ("#6b7280", "#1f2328", "#2f9e44", "#e8590c", "#1f5fa8")


def draw(reports: Reports, folder: Path) -> list[Path]:
    """A chart for each kind of result there is. Returns the files that were written."""
    folder.mkdir(parents=True, exist_ok=True)
    rates = [report for report in reports.get("masks", []) if report["machine"]["device"] == "cpu"]
    charts = {
        "bench_masks": (_masks, rates),
        "bench_accuracy": (_accuracy, of_kind(reports, "train_to_accuracy")),
        "precision": (_precision, reports.get("precision", [])),
    }
    drawn = []
    for name, (chart, results) in charts.items():
        if results:
            drawn.append(folder / f"{name}.png")
            chart(results, drawn[-1])
    return drawn


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def _bars(bars: Sequence[tuple[str, float, bool]], axis: str, title: str, path: Path) -> None:
    """One bar for each (label, value, whether it is ours)."""
    labels, values, ours = zip(*bars, strict=True)
    figure, axes = plt.subplots(figsize=(7.5, 0.9 + 0.3 * len(bars)), layout="constrained")
    drawn = axes.barh(range(len(bars)), values, color=[OURS if own else THEIRS for own in ours])
    axes.bar_label(drawn, [f"{value:,.0f}" if value >= 10 else f"{value:.2f}" for value in values], padding=3)
    axes.set_yticks(range(len(bars)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(axis)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _masks(reports: Sequence[Report], path: Path) -> None:
    rates = [r for r in reports[0]["rates"] if (r["recipe"], r["grid"]) == ("official", "14x14")]
    names = {"extension": "C++ extension", "torch": "torch sampler", "loop": "loop over images"}
    bars = [(names[r["implementation"]], r["images_per_second"] / 1000, r["implementation"] != "loop") for r in rates]
    bars.sort(key=lambda bar: -bar[1])
    _bars(bars, "thousand images/s on one CPU core", "Drawing masks, official recipe at 14 x 14", path)


def _accuracy(reports: Sequence[Report], path: Path) -> None:
    bars = []
    for report in reports:
        kind = "" if report["settings"]["regularised"] else ", prediction alone"
        judged = [(f"{report['settings']['data']}{kind}: untrained", report["untrained"], False)]
        for comparison, counts in report["steps"].items():
            for name in counts:
                runs = of_contender(report, comparison, name)
                judged.append((f"{TITLES[comparison]}: {name}", runs, name in ("exact", "batch_min")))
        bars += [(label, 100 * statistics.mean(r["probe"] for r in runs), ours) for label, runs, ours in judged if runs]
    _bars(bars, "% of held-out images that a linear probe names, mean over seeds", "What training bought", path)


def _precision(reports: Sequence[Report], path: Path) -> None:
    """Loss over steps, and less that of bf16 with the same seed: means over the seeds. Probe accuracy, a dot a seed."""
    ratios = {"width_ratios": (4, 4, 3)}
    figure, (losses, gaps, probes) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", gridspec_kw=ratios)
    entries = reports[-1]["recipes"]
    curves = {
        entry["recipe"]: np.array([[point["loss"] for point in run["curve"]] for run in entry["runs"]])
        for entry in entries
    }
    for row, (entry, colour) in enumerate(zip(entries, PRECISIONS, strict=False)):
        name, steps = entry["recipe"], [point["step"] for point in entry["runs"][0]["curve"]]
        losses.plot(steps, np.mean(curves[name], 0), color=colour, linewidth=1.3, label=name)
        gaps.plot(steps, np.mean(curves[name] - curves["bf16"], 0), color=colour, linewidth=1.3)
        values = [100 * run["probe"] for run in entry["runs"]]
        probes.plot(values, [row] * len(values), "o", color=colour, markersize=4, alpha=0.7, markeredgewidth=0)
        probes.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=1.6)
    titles = {losses: "Loss", gaps: "Loss less that of bf16", probes: "Linear probe, %"}
    for axes, title in titles.items():
        axes.set_title(title, loc="left", fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not probes:
            axes.set_xlabel("steps", fontsize=8)
    losses.legend(frameon=False, fontsize=8)
    probes.set_yticks([])
    probes.invert_yaxis()
    _save(figure, path)
