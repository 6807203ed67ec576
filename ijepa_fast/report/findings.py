"""What deserves a second look in a run."""

from __future__ import annotations

import math
from statistics import median

from ijepa_fast.report.record import RunRecord, number
from ijepa_fast.run.diagnosis import diagnose

SLOW_LOADING = 0.2
"""Share of the time spent waiting for images from which a faster loader would pay."""
_EXAMPLES = 5


def findings(run: RunRecord) -> list[str]:
    """One sentence for each thing to look at, the most serious first; empty if there is none."""
    curves = diagnose(run.metrics).values()
    return [*_unfinished(run), *_not_finite(run), *curves, *_accuracy(run), *_losses_of_data(run)]


def _unfinished(run: RunRecord) -> list[str]:
    if run.summary is not None:
        return list(run.problems)
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    saved = "no checkpoint yet" if run.checkpoint_step is None else f"newest checkpoint at step {run.checkpoint_step:,}"
    return [
        f"The run has not finished: {run.last_step:,}{of} steps are recorded, {saved}. It may still be running, or was "
        "stopped or broke off; the folder does not say which.",
        *run.problems,
    ]


def _not_finite(run: RunRecord) -> list[str]:
    bad = sorted(
        {
            name
            for record in run.metrics
            for name, value in record.items()
            if isinstance(value, float) and not math.isfinite(value)
        }
    )
    return [f"Infinite or NaN values were recorded: {', '.join(bad)}."] if bad else []


def _accuracy(run: RunRecord) -> list[str]:
    found = []
    after = figures(run, "after")
    for key, name in (("probe", "linear probe"), ("knn", "k-NN vote")):
        for other, whose in (("before", f"the {run.start} encoder"), ("pixels", "raw pixels"), ("colours", "colours")):
            reached, compared = number(after.get(key)), number(figures(run, other).get(key))
            if reached is not None and compared is not None and reached <= compared:
                found.append(
                    f"A {name} on the features is no better than one on {whose}: {reached:.1%} against {compared:.1%}."
                )
    return found


def _losses_of_data(run: RunRecord) -> list[str]:
    found = []
    bad = (run.summary or {}).get("bad_files")
    bad = bad if isinstance(bad, dict) else {}
    count = len(bad) or int(max((value for _, value in run.series("bad_files")), default=0))
    if count:
        listed = "; ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:_EXAMPLES])
        found.append(f"{count:,} images could not be decoded and were skipped" + (f": {listed}." if listed else "."))
    if skipped := max((value for _, value in run.series("skipped")), default=0):
        found.append(f"{skipped:,.0f} updates were skipped, because their gradients were not finite.")
    # The first interval waits for the loader to start.
    waits = [value for _, value in run.series("data_wait_share")][1:]
    if waits and (share := median(waits)) > SLOW_LOADING:
        found.append(f"The loop waited for images {share:.0%} of the time: raise loader.workers.")
    return found


def figures(run: RunRecord, whose: str) -> dict:
    """Accuracies and rank of "after", "before", "pixels" or "colours"; empty where they were not taken."""
    source = run.summary or {}
    if whose not in source:
        source = {**run.before, "before": run.before}
    found = source.get(whose)
    return found if isinstance(found, dict) else {}
