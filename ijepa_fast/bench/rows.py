"""Rows of the table of ops after they were measured: ratios to peers, and lines for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

METHODS = ("graph", "cpu", "events")
"""Device time is the best. Events include what the host takes to launch."""

MOST_SPREAD, MOST_SHARE = 2.0, 1.5
"""Of steady times: the 80th percentile over the 20th, and the floor's time over the measured one."""


def best_of(times: Mapping[str, Any]) -> Any:
    """By the best method there is."""
    return next(times[method] for method in METHODS if method in times)


def with_ratios(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of "ours" get "faster_than": peer -> its median time over ours, by the best method that both have."""

    def place(row):
        return row["model"], row["op"], row["case"], row["mode"]

    def ratio(theirs, ours):
        method = next(method for method in METHODS if method in theirs and method in ours)
        return round(theirs[method]["p50"] / ours[method]["p50"], 3)

    timed: dict[tuple, dict[str, Any]] = {}
    for row in table:
        if "times" in row:
            timed.setdefault(place(row), {})[row["provider"]] = row["times"]
    found = []
    for row in table:
        if row["provider"] == "ours" and "times" in row:
            peers = {name: times for name, times in timed[place(row)].items() if name != "ours"}
            row = row | {"faster_than": {name: ratio(times, row["times"]) for name, times in peers.items()}}
        found.append(row)
    return found


NAMES = f"{'op':<18}{'case':<23}{'pass':<10}{'provider':<13}"


def header() -> str:
    """Of the table for a person. "floor" is the floor's time over the measured one."""
    head = f"{NAMES}{'us':>11}{'GB/s':>9}{'TFLOP/s':>9}{'floor':>8}"
    return f"{head}\n{'-' * len(head)}"


def line(row: Mapping[str, Any]) -> str:
    """Of a row that was measured, or failed."""
    start = f"{row['op']:<18}{row['case']:<23}{row['mode']:<10}{row['provider']:<13}"
    if "failed" in row:
        return f"{start}  failed: {row['failed']}"
    flops = f"{row['tflop_per_s']:>9.1f}" if "tflop_per_s" in row else " " * 9
    return f"{start}{best_of(row['times'])['p50']:>11.1f}{row['gb_per_s']:>9.1f}{flops}{row['of_floor']:>8.0%}"


def remarks(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was not measured, and why; and how many times look disturbed."""
    found: dict[str, list[str]] = {}
    for row in table:
        if "unavailable" in row:
            found.setdefault(f"no {row['provider']}: {row['unavailable']}", []).append(row["case"])
        elif "left_out" in row:
            found.setdefault(f"left out: {row['left_out']}", []).append(row["op"])
    said = [f"{reason} ({', '.join(dict.fromkeys(what))})" for reason, what in found.items()]
    timed = [row for row in table if "times" in row]
    if disturbed := sum(map(looks_disturbed, timed)):
        said.append(
            f"{disturbed} of {len(timed)} times vary more than twofold, or are far below what can be: something else "
            "runs on this machine, measure again without it"
        )
    return said


def looks_disturbed(row: Mapping[str, Any]) -> bool:
    """Whether a row's times vary more than ``MOST_SPREAD`` from the 20th to the 80th percentile, or beat their floor by
    as much as only a floor that was measured at another speed explains."""
    times = best_of(row["times"])
    return times["p80"] > MOST_SPREAD * times["p20"] or row["of_floor"] > MOST_SHARE
