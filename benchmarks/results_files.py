"""Results files, which of them may be shown, and the words and tables that every section of the results uses."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Report = dict[str, Any]
Reports = dict[str, list[Report]]
"""Results files by kind."""
NOT_MEASURED = "not measured yet"
PHASES = ("masks and images", "target encoder", "context encoder", "predictor", "loss and backward", "update")
"""Parts of a step, in their order, that are timed apart."""


def load(folder: Path) -> Reports:
    """Results by kind, in the order of their file names, each with its "file". Files without a kind are left out."""
    by_kind: Reports = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if isinstance(report, dict) and "kind" in report:
            by_kind.setdefault(report["kind"], []).append(report | {"file": path.name})
    return by_kind


def gpu_of(check: Report) -> str | None:
    return next((part["machine"]["gpu"] for part in check["parts"].values() if "gpu" in part["machine"]), None)


def gpu_checks(reports: Reports) -> list[Report]:
    """Runs of gpu_check.sh on a GPU."""
    return [check for check in reports.get("gpu_check", []) if gpu_of(check)]


def failures(check: Report) -> list[str]:
    """Reasons why the times of a GPU run may not be shown; empty if they may."""
    tests = check["parts"].get("tests")
    if tests is None:
        return ["its tests were not run"]
    if not tests.get("passed") and not tests.get("failed"):
        return ["no test ran"]
    return tests.get("failed", [])


def trusted(reports: Reports) -> list[Report]:
    """GPU runs whose tests passed."""
    return [check for check in gpu_checks(reports) if not failures(check)]


def of_kind(reports: Reports, kind: str) -> list[Report]:
    """Reports of a kind, for instance "step": those of GPU runs whose tests passed, and those in files of their own;
    such a file from a GPU counts only if the tests passed on that GPU with the same commit."""
    runs = trusted(reports)
    parts = [part for check in runs for name, part in check["parts"].items() if name != "quick"]
    inside = [report for part in parts for report in part.get("reports", []) if report["kind"] == kind]
    passed = {(m["gpu"], m["commit"]) for m in (check["parts"]["tests"]["machine"] for check in runs)}

    def shown(machine: Report) -> bool:
        return machine["device"] == "cpu" or (machine["gpu"], machine["commit"]) in passed

    return [*inside, *(report for report in reports.get(kind, []) if shown(report["machine"]))]


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines])


def between(text: str, start: str, end: str, content: str) -> str:
    """``text`` with ``content`` between two marks. ValueError unless the first is there once, and the second behind."""
    head, *rest = text.split(start)
    if len(rest) != 1 or end not in rest[0]:
        raise ValueError(f"the marks must be there once: {start.strip()} ... {end}")
    return head + start + content + rest[0][rest[0].index(end) :]


def mean_and_deviation(values: Iterable[float], digits: int = 1) -> str:
    """Mean ± sample standard deviation; the value alone if there is one, and nothing if there is none."""
    values = list(values)
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def accuracies(runs: Sequence[Report]) -> list[str]:
    """Cells of a table: probe in %, k-NN in % and rank over runs."""
    figures = {"probe": 100, "knn": 100, "rank": 1}
    return [mean_and_deviation(unit * run[figure] for run in runs) for figure, unit in figures.items()]


def on(machine: Report) -> str:
    """Machine, versions and commit, in words."""
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    versions = [f"torch {machine['torch']}"]
    if machine.get("gpu"):
        versions += [f"Triton {machine['triton']}", f"CUDA {machine['cuda']}", f"driver {machine['driver']}"]
    changed = " with changes" if machine.get("dirty") else ""
    commit = f"commit {machine['commit'][:12]}{changed}" if machine.get("commit") else "commit unknown"
    return f"{where}; {', '.join(versions)}, Python {machine['python']}; {commit}"
