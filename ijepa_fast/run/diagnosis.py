"""What the curves of a run mean, in words: the same sentences in its log and in its report."""

from __future__ import annotations

import math
from collections.abc import Sequence

COLLAPSED_SHARE = 0.2
"""1 - cosine between images of a batch is the room that features have to differ in. Learning widens it, from some
thousandths in random networks, after a dip to a third at most that was seen; collapse leaves a tenth and less."""
COLLAPSED_RANK = 2.0
"""For records without that cosine. RankMe is 1 when all features lie on a line; below 2 they do not fill a plane."""
RANK_LOSS = 0.5
"""Half the directions that there were are lost for other reasons than noise, which moves the rank by a few percent."""
LOSS_RISE = 1.5
"""A prediction loss begins near that of predicting nothing. Above it by half, steps overshoot."""
WINDOW = 5
"""Log intervals whose mean is compared: a single online k-NN, of 512 images, has an error of two points."""
PAST_BEST = {"knn": lambda best, now: best - now > 0.05, "rank": lambda best, now: now < 0.8 * best}
"""Five points are four errors of a window's mean; ranks have no unit, so theirs is a share."""
BETTER = {"knn": lambda before, now: now - before > 0.03, "rank": lambda before, now: now > 1.1 * before}
HARDER = 1.2
"""A prediction loss that has risen by a fifth since its lowest is seen in the chart, and asked about."""
NAMES = {"knn": ("online k-NN", "{:.1%}"), "rank": ("rank", "{:.1f}")}

NORMAL = "normal"
"""Kind of the one sentence that asks for nothing to be done."""


def diagnose(metrics: Sequence[dict]) -> dict[str, str]:
    """Kind -> sentence for each thing that the records of metrics.jsonl show, the most serious first."""
    if collapse := _collapse(metrics):
        return {"collapse": collapse}
    found = {"rank": _rank(metrics), "rate": _rate(metrics)}
    by = "knn" if _series(metrics, "knn") else "rank"
    name, form = NAMES[by]
    scores = _windows(_series(metrics, by))
    losses = _windows(_series(metrics, "loss_prediction"))
    if len(scores) > 2 * WINDOW:
        (step, best), (_, now) = max(scores, key=lambda point: point[1]), scores[-1]
        if PAST_BEST[by](best, now) and not (by == "rank" and found["rank"]):
            found["past"] = (
                f"The features are past their best: their {name} is {form.format(now)} now, after {form.format(best)} "
                f"around step {step:,.0f}. checkpoints/best is from the best steps; training on as now adds nothing."
            )
        (low_step, low), (_, loss) = min(losses, key=lambda point: point[1], default=(0, 0)), (losses or [(0, 0)])[-1]
        before = next((score for step, score in scores if step >= low_step), now)
        if loss > HARDER * low and BETTER[by](before, now):
            found[NORMAL] = (
                f"The prediction loss has risen from {low:.3g} around step {low_step:,.0f} to {loss:.3g} while the "
                f"features became better ({name} {form.format(before)} to {form.format(now)}). That is normal: richer "
                "targets are harder to predict."
            )
    return {kind: text for kind, text in found.items() if text}


def _collapse(metrics: Sequence[dict]) -> str | None:
    alike = [(step, 1 - cosine) for step, cosine in _series(metrics, "cosine")]
    if alike:
        (step, now), (peak_step, peak) = alike[-1], max(alike, key=lambda point: point[1])
        if now < COLLAPSED_SHARE * peak:
            return (
                f"The features have collapsed: those of different images are alike, their mean cosine is {1 - now:.5f} "
                f"at step {step:,.0f} ({1 - peak:.5f} at step {peak_step:,.0f}). A low loss then means nothing. Raise "
                "optim.momentum, lower optim.lr, or set objective.variance_weight."
            )
        return None
    ranks = _series(metrics, "rank")
    if ranks and ranks[-1][1] < COLLAPSED_RANK:
        step, last = ranks[-1]
        return f"The features have collapsed: their rank is {last:.2f} at step {step:,.0f}, where 1 is a single line."
    return None


def _rank(metrics: Sequence[dict]) -> str | None:
    ranks = _series(metrics, "rank")
    if not ranks:
        return None
    (step, last), (peak_step, peak) = ranks[-1], max(ranks, key=lambda point: point[1])
    if last >= RANK_LOSS * peak:
        return None
    return (
        f"The features are losing dimensions: their rank is {last:.1f} at step {step:,.0f}, after {peak:.1f} at "
        f"step {peak_step:,.0f}."
    )


def _rate(metrics: Sequence[dict]) -> str | None:
    losses = _series(metrics, "loss_prediction")
    if len(losses) < 2 or losses[-1][1] <= LOSS_RISE * losses[0][1]:
        return None
    return (
        f"The learning rate looks too high: the prediction loss is {losses[-1][1]:.3g} at step {losses[-1][0]:,.0f}, "
        f"above the {losses[0][1]:.3g} that it began with. Lower optim.lr, or set optim.max_grad_norm."
    )


def _series(metrics: Sequence[dict], key: str) -> list[tuple[float, float]]:
    """(step, value) of the records with a finite value."""
    values = ((record["step"], record.get(key)) for record in metrics)
    return [(s, v) for s, v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]


def _windows(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(step in the middle, mean) of every ``WINDOW`` points in a row."""
    runs = (points[i : i + WINDOW] for i in range(len(points) - WINDOW + 1))
    return [(run[WINDOW // 2][0], sum(value for _, value in run) / WINDOW) for run in runs]
