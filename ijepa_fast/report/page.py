"""The HTML of a report. Everything that comes from a run is escaped; the page loads nothing and runs no script."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from html import escape
from statistics import median

from ijepa_fast.config import RunConfig, flatten
from ijepa_fast.downstream.results import COLUMNS
from ijepa_fast.report.charts import chart, compact
from ijepa_fast.report.findings import figures
from ijepa_fast.report.pictures import Picture
from ijepa_fast.report.record import RunRecord, number
from ijepa_fast.report.style import CSS
from ijepa_fast.run.log import duration

_PERCENT = 100
# Title, factor to the unit in the title, and the lines: key in metrics.jsonl -> label.
_LEARNING = (
    ("Loss", 1, {"loss": "total", "loss_prediction": "prediction"}),
    ("Feature rank (RankMe)", 1, {"rank": "uncentred", "rank_centered": "centred"}),
    ("Online k-NN accuracy, %", _PERCENT, {"knn": "k-NN"}),
)
_RUNNING = (
    ("Spread of feature directions", 1, {"std_normalized": "normalised std"}),
    ("Gradient norm", 1, {"grad_norm": "mean of interval"}),
    ("Learning rate", 1, {"lr": "AdamW"}),
    ("Momentum of the target encoder", 1, {"momentum": "EMA"}),
    ("Images per second", 1, {"images_per_second": "all ranks"}),
    ("Waiting for images, % of time", _PERCENT, {"data_wait_share": "share"}),
)
_TABLE_ROWS = 20
_TABLE = {
    "step": "step",
    "loss": "loss",
    "rank": "rank",
    "rank_centered": "rank, centred",
    "knn": "online k-NN",
    "images_per_second": "images/s",
}


def page(
    run: RunRecord,
    warnings: Sequence[str],
    pictures: Sequence[Picture],
    *,
    facts: dict[str, str],
    made_with: dict[str, str],
    classes: int | None,
) -> str:
    """The whole document, in ASCII.

    Args:
        run: what its folder says.
        warnings: sentences to put first.
        pictures: in the order of the page.
        facts: name -> value, about model and data.
        made_with: name -> version.
        classes: number of classes of the labelled images, for the level of chance; None if unknown.
    """
    name = run.folder.resolve().name
    sections = [
        ("results", "Results", _results(run, classes) + _evaluation(run)),
        ("curves", "Curves", _curves(run)),
        ("pictures", "Pictures", "".join(map(_picture, pictures))),
        ("configuration", "Configuration", _configuration(run)),
        ("about", "Model, data and versions", _facts(facts) + _versions(run.environment, made_with)),
    ]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{html}</section>' for key, title, html in sections)
    document = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(name)} - ijepa_fast</title>
<style>{CSS}</style>
</head>
<body>
<header><h1>{escape(name)}</h1><p class="lead">{escape(_status(run))}</p>
<nav aria-label="Sections">{links}</nav></header>
<main>
{_warnings(warnings)}
{_tiles(run)}
{body}
</main>
<footer>Made by <code>ijepa-fast report</code>. This file needs no other.</footer>
</body>
</html>
"""
    # No encoding to get wrong, and a file name that is no text cannot break the page.
    return document.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _status(run: RunRecord) -> str:
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    epochs = number(run.metrics[-1].get("epoch")) if run.metrics else None
    state = "Finished" if run.summary is not None else "Unfinished"
    status = f"{state}: {run.last_step:,}{of} steps" + (f", {epochs:.3g} epochs" if epochs else "")
    seconds = number((run.summary or {}).get("seconds"))
    return status + (f", {duration(seconds)} in all" if seconds else "")


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in warnings)
    return (
        f'<section class="warnings" aria-label="Look at this"><strong>Look at this</strong><ul>{items}</ul></section>'
    )


def _tiles(run: RunRecord) -> str:
    tiles = []
    before, after = figures(run, "before"), figures(run, "after")
    for key, name, form in (("probe", "Linear probe", "{:.1%}"), ("knn", "k-NN", "{:.1%}"), ("rank", "Rank", "{:.1f}")):
        if (value := number(after.get(key))) is not None:
            untrained = number(before.get(key))
            note = "" if untrained is None else f"{run.start} {form.format(untrained)}"
            tiles.append((name, form.format(value), note))
    for key, name, unit, form in (
        ("loss", "Loss", 1, "{:.4g}"),
        ("knn", "Online k-NN", 1, "{:.1%}"),
        ("rank", "Rank while training", 1, "{:.1f}"),
    ):
        line = run.series(key, unit)
        if line and (key == "loss" or not after):
            first = f"{form.format(line[0][1])} at step {line[0][0]:,.0f}" if len(line) > 1 else ""
            tiles.append((name, form.format(line[-1][1]), first))
    if speeds := [value for _, value in run.series("images_per_second")]:
        # The first interval also compiles kernels and starts loaders.
        tiles.append(("Images per second", f"{median(speeds[1:] or speeds):,.0f}", "median of the log intervals"))
    if not tiles:
        return ""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{items}</dl>'


def _evaluation(run: RunRecord) -> str:
    """The figures of ``ijepa-fast evaluate``, where there are some."""
    if not run.evaluation:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in run.evaluation)
    return f"""<div class="wide" role="region" aria-label="Evaluation" tabindex="0"><table class="figures">
<caption>Tasks on frozen features, by <code>ijepa-fast evaluate</code>.</caption>
<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"""


def _results(run: RunRecord, classes: int | None) -> str:
    names = {
        "pixels": "raw pixels",
        "colours": "colour histogram",
        "before": f"{run.start} encoder",
        "after": "trained encoder",
    }
    rows = []
    for whose, name in names.items():
        if not (values := figures(run, whose)):
            continue
        cells = "".join(_share(number(values.get(key))) for key in ("knn", "probe"))
        rank = number(values.get("rank"))
        cells += f"<td>{'' if rank is None else f'{rank:.1f}'}</td>"
        rows.append(f'<tr{" class=own" if whose == "after" else ""}><th scope="row">{name}</th>{cells}</tr>')
    if not rows:
        return (
            "<p>No k-NN or linear probe: they need labelled images, and are taken before the first step and after the "
            "last (<code>evaluation.results</code>).</p>"
        )
    chance = f" Chance among {classes:,} classes is {1 / classes:.1%}." if classes else ""
    return f"""<div class="wide" role="region" aria-label="Results" tabindex="0"><table class="figures results">
<caption>Shares of held-out images that a k-nearest-neighbour vote and a linear classifier on frozen features get right.
{chance} Rank says in how many directions the features spread.</caption>
<thead><tr><th scope="col">features</th><th scope="col">k-NN</th><th scope="col">linear probe</th>
<th scope="col">rank</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>"""


def _share(value: float | None) -> str:
    if value is None:
        return "<td></td>"
    return f'<td class="bar" style="--share:{min(max(value, 0), 1):.3f}">{value:.1%}</td>'


def _curves(run: RunRecord) -> str:
    def charts(kinds) -> str:
        drawn = []
        for title, unit, keys in kinds:
            lines = {label: run.series(key, unit) for key, label in keys.items()}
            lines = {label: line for label, line in lines.items() if line}
            # Without a regulariser the prediction loss is all of the loss.
            distinct = {label: line for label, line in lines.items() if line not in list(lines.values())[:1]}
            if lines:
                drawn.append(chart(title, dict(list(lines.items())[:1]) | distinct))
        return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""

    learning, running = charts(_LEARNING), charts(_RUNNING)
    if not learning and not running:
        return (
            "<p>Nothing has been recorded yet: a run records its figures every <code>train.log_every</code> steps.</p>"
        )
    return f'{learning}<h3 class="more">Schedules, health and speed</h3>{running}{_metrics_table(run)}'


def _metrics_table(run: RunRecord) -> str:
    last = len(run.metrics) - 1
    picked = sorted({round(place * last / (_TABLE_ROWS - 1)) for place in range(_TABLE_ROWS)})
    keys = [key for key in _TABLE if any(number(record.get(key)) is not None for record in run.metrics)]
    head = "".join(f'<th scope="col">{_TABLE[key]}</th>' for key in keys)
    rows = "".join(
        "<tr>" + "".join(_metric(key, number(run.metrics[place].get(key))) for key in keys) + "</tr>"
        for place in picked
    )
    return f"""<details><summary>The figures as a table ({len(picked)} of {last + 1:,} log intervals)</summary>
<div class="wide" role="region" aria-label="Figures" tabindex="0"><table class="figures">
<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"""


def _metric(key: str, value: float | None) -> str:
    if value is None:
        return "<td></td>"
    if key == "step":
        return f'<th scope="row">{value:,.0f}</th>'
    return f"<td>{f'{value:.1%}' if key == 'knn' else compact(value)}</td>"


def _picture(picture: Picture) -> str:
    title = escape(picture.title)
    if picture.png is None:
        return f'<div class="picture"><h3>{title}</h3><p class="note">{escape(picture.caption)}</p></div>'
    # Width and height of a PNG stand behind its signature and the head of its first chunk.
    width, height = struct.unpack(">II", picture.png[16:24])
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure class="picture"><figcaption><h3>{title}</h3><p>{escape(picture.caption)}</p></figcaption>'
        f'<div class="wide" role="region" aria-label="{title}" tabindex="0">'
        f'<img alt="{escape(picture.alt)}" width="{width}" height="{height}" style="--full:{width}px" '
        f'src="data:image/png;base64,{data}"></div></figure>'
    )


def _configuration(run: RunRecord) -> str:
    settings, defaults = flatten(run.config), flatten(RunConfig())
    if not settings:
        return "<p>The settings are not known: config.yaml is missing or cannot be read.</p>"
    changed = {name for name, value in settings.items() if name not in defaults or value != defaults[name]}

    def row(name: str, mark: bool) -> str:
        value = _setting(settings[name])
        value = f"<mark>{value}</mark>" if mark and name in changed else value
        default = _setting(defaults[name]) if name in defaults else "<em>unknown to this version</em>"
        return f'<tr><th scope="row">{escape(name)}</th><td>{value}</td><td>{default}</td></tr>'

    def table(names, mark: bool, caption: str) -> str:
        rows = "".join(row(name, mark) for name in names)
        return f"""<div class="wide" role="region" aria-label="{caption}" tabindex="0"><table class="settings">
<thead><tr><th scope="col">setting</th><th scope="col">value</th><th scope="col">default</th></tr></thead>
<tbody>{rows}</tbody></table></div>"""

    differing = [name for name in settings if name in changed]
    same = f"{len(differing)} of {len(settings)} settings differ from the defaults."
    return f"""<p class="note">{same}</p>{table(differing, False, "Changed settings")}
<details><summary>All {len(settings)} settings, the changed ones marked</summary>
{table(settings, True, "All settings")}</details>"""


def _setting(value: object) -> str:
    return escape(value if isinstance(value, str) else json.dumps(value, default=str))


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in facts.items()
    )
    return f"<table><tbody>{rows}</tbody></table>" if rows else ""


def _versions(trained_with: dict, made_with: dict[str, str]) -> str:
    def listed(versions: dict) -> str:
        return escape(", ".join(f"{name} {version}" for name, version in versions.items()))

    trained = f"Trained (last start) with {listed(trained_with)}. " if trained_with else ""
    return f'<p class="note">{trained}This page and its pictures were made with {listed(made_with)}.</p>'
