"""The results of an evaluation as a table and as a chart."""

from __future__ import annotations

from pathlib import Path

from ijepa_fast.plots.sheet import COLOURS, FAINT, INK, MUTED, SMALL_POINTS, blank_figure, written

COLUMNS = ("task", "figure", "encoder", "untrained", "chance", "images")


def cells(report: dict) -> list[tuple[str, ...]]:
    """One row of ``COLUMNS`` for each figure of each task, as text."""
    rows = []
    for name, label, entry in lines(report):
        shares = [shown(label, figure(entry, whose, label)) for whose in ("trained", "untrained", "chance")]
        if (deviation := entry["trained"].get("deviation", {}).get(label)) is not None:
            shares[0] += f" +- {100 * deviation:.1f}"
        rows.append((name, label, *shares, entry["data"]))
    return rows


def table(report: dict) -> str:
    """The figures in Markdown that reads as text, too."""
    rows = [COLUMNS, *cells(report)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    step = f", step {report['step']}" if "step" in report else ""
    which = f", {report['encoder']} encoder" if report["encoder"] else ""
    return "\n".join([f"{report['weights']} ({report['kind']}{which}{step})", "", *text, ""])


def chart(report: dict, out: Path) -> None:
    """Every share as a bar, with a mark at the untrained encoder's and at chance."""
    drawn = [(name, label, entry) for name, label, entry in lines(report) if not label.endswith(")")]
    height = 0.3 * len(drawn) + 0.8
    drawing = blank_figure(6.4, height)
    axes = drawing.add_axes((0.3, 0.45 / height, 0.66, 1 - 0.7 / height))
    for place, (_, label, entry) in enumerate(drawn):
        axes.barh(place, 100 * figure(entry, "trained", label), 0.62, color=COLOURS[0])
        deviation = entry["trained"].get("deviation", {}).get(label, 0)
        axes.errorbar(100 * figure(entry, "trained", label), place, xerr=100 * deviation, color=INK, linewidth=1)
        for whose, colour, marker in (("untrained", COLOURS[1], "D"), ("chance", INK, "|")):
            if (value := figure(entry, whose, label)) is not None:
                axes.plot(100 * value, place, marker=marker, color=colour, markersize=6, linestyle="none", label=whose)
    axes.set_yticks(range(len(drawn)), [f"{name}, {label}" for name, label, _ in drawn])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(axis="x", color=FAINT)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL_POINTS, colors=MUTED, length=0)
    axes.set_xlabel("%", fontsize=SMALL_POINTS, color=MUTED)
    for side in axes.spines.values():
        side.set_visible(False)
    known = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if known:
        axes.legend(known.values(), known.keys(), fontsize=SMALL_POINTS, frameon=False, ncols=2, loc=(0, 1.0))
    written(drawing, out)


def lines(report: dict) -> list[tuple[str, str, dict]]:
    """(task, name of a figure, entry) for all figures of tasks that are done."""
    done = {name: entry for name, entry in report["tasks"].items() if "trained" in entry}
    return [(name, label, entry) for name, entry in done.items() for label in entry["trained"]["figures"]]


def figure(entry: dict, whose: str, label: str) -> float | None:
    """A figure of the trained or the untrained encoder, or that of chance; None where it is not known."""
    if whose == "chance":
        return entry["trained"].get("chance", {}).get(label)
    return entry.get(whose, {}).get("figures", {}).get(label)


def shown(label: str, value: float | None) -> str:
    """A share in per cent; a number as it is where the label ends in its unit."""
    if value is None:
        return ""
    return f"{value:.3g}" if label.endswith(")") else f"{100 * value:.1f} %"
