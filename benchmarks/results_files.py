"""Results files, and the words and tables that every section of the results makes of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Report = dict[str, Any]
PREFERRED_GPU = "H200"
"""The one that docs/kernels.md has floors for."""
NOT_MEASURED = "not measured yet"
PHASES = ("masks and images", "target encoder", "context encoder", "predictor", "loss and backward", "update")
"""What a step is timed in, one after the other."""


def load(folder: Path) -> dict[str, list[Report]]:
    """Results by kind, in the order of their file names, each with its "file". What has no kind is left out."""
    found: dict[str, list[Report]] = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if isinstance(report, dict) and "kind" in report:
            found.setdefault(report["kind"], []).append(report | {"file": path.name})
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines])


def mean_and_deviation(values: Iterable[float], digits: int = 1) -> str:
    """Mean ± sample standard deviation; of one value the value alone, and of none nothing."""
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


def failures(check: Report) -> list[str]:
    """Why times of a GPU run may not be shown; empty if they may."""
    tests = check["parts"].get("tests")
    if tests is None:
        return ["its tests were not run"]
    if not tests.get("passed") and not tests.get("failed"):
        return ["no test ran"]
    return tests.get("failed", [])


def gpu_checks(reports: dict[str, list[Report]]) -> list[Report]:
    """Runs of gpu_check.sh, but for dry ones."""
    return [check for check in reports.get("gpu_check", []) if gpu_of(check)]


def trusted(reports: dict[str, list[Report]]) -> list[Report]:
    """GPU runs whose tests passed, those of ``PREFERRED_GPU`` first."""
    passed = [check for check in gpu_checks(reports) if not failures(check)]
    return sorted(passed, key=lambda check: PREFERRED_GPU not in (gpu_of(check) or ""))


def gpu_of(check: Report) -> str | None:
    return next((part["machine"]["gpu"] for part in check["parts"].values() if "gpu" in part["machine"]), None)


def picture(name: str, words: str) -> str:
    return f"![{words}](../docs/images/{name}.png)"


def target_table(targets: Iterable[tuple[str, str, str, bool | None]]) -> str:
    words = {True: "met", False: "missed", None: NOT_MEASURED}
    return table(["target", "wanted", "measured", ""], [(*rest, words[met]) for *rest, met in targets])
