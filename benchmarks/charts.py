"""Pictures of the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import precision_report
from ijepa_fast.bench.rows import best_of

OURS, THEIRS = "#1f5fa8", "#b9c2cc"
MODEL = "ViT-H/14"
DPI = 150


def draw(reports: dict[str, list[dict[str, Any]]], folder: Path) -> list[Path]:
    """A chart for each kind of result there is. The files that were written."""
    from benchmarks.report_training import accuracy_reports, scaling_reports, step_reports
    from benchmarks.results_files import trusted

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    rates = [report for report in reports.get("masks", []) if report["machine"]["device"] == "cpu"]
    if rates:
        drawn.append(_masks(rates[0], folder / "bench_masks.png"))
    rows = [row for check in trusted(reports)[:1] for row in check["parts"].get("ops", {}).get("rows", [])]
    if rows := [row for row in rows if row["model"] == MODEL]:
        drawn.append(_floors(rows, folder / "bench_ops.png"))
        drawn.append(_attention(rows, folder / "bench_attention.png"))
    if steps := [report for report in step_reports(reports) if report["machine"]["device"] == "cuda"]:
        drawn.append(_steps(steps, folder / "bench_steps.png"))
    if found := scaling_reports(reports):
        drawn.append(_scaling(found, folder / "bench_scaling.png"))
    if found := accuracy_reports(reports):
        drawn.append(_accuracy(found, folder / "bench_accuracy.png"))
    if found := reports.get("precision"):
        drawn.append(precision_report.draw(found[-1], folder / "precision.png"))
    return drawn


def _bars(
    labels: Sequence[str], values: Sequence[float], ours: Sequence[bool], axis: str, title: str, path: Path
) -> Path:
    figure, axes = plt.subplots(figsize=(7.5, 0.9 + 0.3 * len(labels)), layout="constrained")
    bars = axes.barh(range(len(labels)), values, color=[OURS if own else THEIRS for own in ours])
    axes.bar_label(bars, [f"{value:,.0f}" if value >= 10 else f"{value:.2f}" for value in values], padding=3)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(axis)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return path


def _masks(report: dict[str, Any], path: Path) -> Path:
    rates = [r for r in report["rates"] if (r["recipe"], r["grid"]) == ("official", "14x14")]
    rates.sort(key=lambda rate: -rate["images_per_second"])
    names = {"extension": "C++ extension", "torch": "torch sampler", "loop": "loop over images"}
    return _bars(
        [names[rate["implementation"]] for rate in rates],
        [rate["images_per_second"] / 1000 for rate in rates],
        [rate["implementation"] != "loop" for rate in rates],
        "thousand images/s on one CPU core",
        "Drawing masks, official recipe at 14 x 14",
        path,
    )


def _floors(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    ours = [row for row in rows if row["provider"] == "ours" and "times" in row and row["mode"] != "both"]
    return _bars(
        [f"{row['op']}, {row['case']}, {row['mode']}" for row in ours],
        [100 * row["of_floor"] for row in ours],
        [True] * len(ours),
        "% of the floor measured in the same run",
        f"{MODEL}, batch 128",
        path,
    )


def _attention(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    found = [row for row in rows if row["op"] == "varlen_attention" and row["mode"] == "both" and "times" in row]
    return _bars(
        [f"{row['case']}, {row['provider']}" for row in found],
        [best_of(row["times"])["p50"] for row in found],
        [row["provider"] == "ours" for row in found],
        "microseconds, less is better",
        f"Attention forward and backward, {MODEL}, batch 128",
        path,
    )


def _steps(reports: Sequence[dict[str, Any]], path: Path) -> Path:
    found = [(r["settings"], name, result) for r in reports for name, result in r["implementations"].items()]
    return _bars(
        [f"{settings['model']}, {settings['masks']}, {name}" for settings, name, _ in found],
        [result["images_per_second"] for _, _, result in found],
        [name.split("+")[0] == "ours" for _, name, _ in found],
        "images/s",
        "Whole training steps",
        path,
    )


def _scaling(reports: Sequence[dict[str, Any]], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for report in reports:
        settings = report["settings"]
        where = report["machine"].get("gpu", "CPU")
        for side in dict.fromkeys(point["img_size"] for point in report["points"]):
            points = [p for p in report["points"] if p["img_size"] == side and "us_per_token" in p]
            tokens = [point["batch"] * point["tokens_per_image"] for point in points]
            label = f"{settings['model']}, {settings['impl']}, {side} px, {where}"
            axes.plot(tokens, [point["us_per_token"] for point in points], marker="o", label=label)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of a step")
    axes.set_ylabel("µs per token")
    axes.set_title("Time per token, without update and attention", loc="left")
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return path


def _accuracy(reports: Sequence[dict[str, Any]], path: Path) -> Path:
    from benchmarks.report_training import TITLES, of_contender

    rows = []
    for report in reports:
        kind = "" if report["settings"]["regularised"] else ", prediction alone"
        data = f"{report['settings']['data']}{kind}"
        rows.append((f"{data}: untrained", [run["probe"] for run in report["untrained"]], False))
        for comparison, steps in report["steps"].items():
            for name in steps:
                values = [run["probe"] for run in of_contender(report, comparison, name)]
                rows.append((f"{TITLES[comparison]}: {name}", values, name in ("exact", "batch_min")))
    rows = [row for row in rows if row[1]]
    return _bars(
        [label for label, *_ in rows],
        [100 * sum(values) / len(values) for _, values, _ in rows],
        [ours for *_, ours in rows],
        "% of held-out images that a linear probe names, mean over seeds",
        "What training bought",
        path,
    )
