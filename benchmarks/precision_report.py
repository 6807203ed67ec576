"""The part of docs/precision.md that has figures, and its chart, from results of ``benchmarks/precision_curves.py``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.results_files import Report, mean_and_deviation, on, table

NAMES = {"fp32": "fp32", "bf16": "bf16", "tensor": "FP8, tensor", "row": "FP8, row"}
COLOURS = ("#6b7280", "#1f2328", "#2f9e44", "#e8590c", "#1f5fa8")
LAST_ROWS = 5
"""Points of a curve whose mean stands for its end: one alone swings with its masks."""


def section(reports: Mapping[str, Sequence[Report]]) -> str:
    """Tables of the newest results, in Markdown."""
    if not reports.get("precision"):
        return "Training curves and the likeness of FP8 targets: not measured yet."
    report = reports["precision"][-1]
    settings, file = report["settings"], report["file"]
    about_curves = (
        f"The demo's networks ({settings['model.depth']} encoder blocks of width {settings['model.embed_dim']}) on the "
        f"embedded set, {settings['train.steps']} steps of {settings['train.batch_size']} images, from "
        f"[{file}](../benchmarks/results/{file}) ({on(report['machine'])}): mean and sample standard deviation over "
        f"{len(report['variants'][0]['runs'])} seeds, also of what each seed differs by from bf16 with the same seed. "
        f"The loss is the mean over the last {LAST_ROWS} points of the curve. Accuracy is that of the target "
        "encoder on held-out images, without FP8; chance is 12.5 %."
    )
    about_likeness = (
        "Cosine similarity of the target encoder's features in two precisions, layer-normalised as in the loss, from "
        "the same bf16 weights: after the first and after the last block, mean and least over all patches. *Centred* "
        "is the mean after the last block for features less their mean over patches, which leaves out what all "
        "patches have in common."
    )
    picture = "![Loss over steps, the same less that of bf16, and probe accuracy of each seed](images/precision.png)"
    return "\n\n".join([about_curves, picture, curves_table(report), about_likeness, likeness_table(report)])


def ends(run: Report, name: str) -> float:
    """Mean of a curve's last points."""
    return statistics.mean(row[name] for row in run["curve"][-LAST_ROWS:])


def curves_table(report: Report) -> str:
    runs = {entry["variant"]: entry["runs"] for entry in report["variants"]}

    def less_bf16(name: str, value: Callable[[Report], float], digits: int) -> str:
        if name == "bf16":
            return ""
        pairs = zip(runs[name], runs["bf16"], strict=True)
        differences = [value(run) - value(other) for run, other in pairs]
        above = sum(difference > 0 for difference in differences)
        return f"{mean_and_deviation(differences, digits)} ({above} of {len(differences)} above)"

    def loss(run: Report) -> float:
        return ends(run, "loss")

    def probe(run: Report) -> float:
        return 100 * run["probe"]

    rows = [
        (
            name,
            mean_and_deviation(map(loss, of), 4),
            less_bf16(name, loss, 4),
            mean_and_deviation(map(probe, of)),
            less_bf16(name, probe, 1),
            mean_and_deviation(100 * run["knn"] for run in of),
            mean_and_deviation(run["rank"] for run in of),
        )
        for name, of in runs.items()
    ]
    head = ["precision", "loss", "loss - bf16", "probe, %", "probe - bf16, points", "k-NN, %", "rank"]
    return table(head, rows)


def likeness_table(report: Report) -> str:
    rows = []
    for entry in report["likeness"]:
        for pair in entry["compared"]:
            first, last = pair["blocks"][0], pair["blocks"][-1]
            cosines = [f"{block['mean']:.5f} ({block['min']:.5f})" for block in (first, last)]
            between = f"{NAMES[pair['a']]} and {NAMES[pair['b']]}"
            rows.append((entry["encoder"], len(pair["blocks"]), between, *cosines, f"{last['centred_mean']:.5f}"))
    return table(["encoder", "blocks", "between", "after the first (least)", "after the last (least)", "centred"], rows)


def draw(report: Report, path: Path) -> Path:
    """Loss over steps, and less that of bf16 with the same seed: means over the seeds. Probe accuracy, a dot a seed."""
    import matplotlib.pyplot as plt

    figure, (losses, gaps, probes) = plt.subplots(
        1, 3, figsize=(11, 3.4), layout="constrained", gridspec_kw={"width_ratios": (4, 4, 3)}
    )
    entries = report["variants"]
    base = next(_loss_curves(entry) for entry in entries if entry["variant"] == "bf16")
    for row, (entry, colour) in enumerate(zip(entries, COLOURS, strict=True)):
        steps, curves = [point["step"] for point in entry["runs"][0]["curve"]], _loss_curves(entry)
        losses.plot(steps, np.mean(curves, 0), color=colour, linewidth=1.3, label=entry["variant"])
        gaps.plot(steps, np.mean(curves - base, 0), color=colour, linewidth=1.3)
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
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path


def _loss_curves(entry: Report) -> np.ndarray:
    """[seed, point]."""
    return np.array([[point["loss"] for point in run["curve"]] for run in entry["runs"]])
