"""What every run leaves to read: metrics.jsonl, a progress bar, lines of log."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ijepa_fast.run.callbacks import Callback
from ijepa_fast.run.diagnosis import NORMAL, diagnose
from ijepa_fast.run.files import write_text

log = logging.getLogger(__name__)

ESTIMATED_BY = 4
"""Steps after a start's first, which compiles and warms up, by which the time to the end is estimated."""
SHOWN = {"loss": "loss {:.4f}", "images_per_second": "{} img/s", "rank": "rank {:.1f}", "knn": "k-NN {:.1%}"}
"""What people are shown of the metrics, and how."""


class RunLog(Callback):
    """Metrics of a run, one dict per log interval.

    On a terminal and in a notebook a progress bar shows loss, images/s, feature rank and damaged files, and log lines
    appear above it; elsewhere each interval is a log line.

    Args:
        folder: of the run; gets ``metrics.jsonl``.
        total_steps: length of the bar.
        start_step: where a resumed run continues; metrics of later steps, from before it was stopped, are dropped.
        description: left of the bar.

    Attributes:
        records: all metrics written, of earlier starts too.
    """

    def __init__(self, folder: Path, total_steps: int, start_step: int, description: str):
        path = folder / "metrics.jsonl"
        self.records = _drop_lines_after(path, start_step)
        self._said: set[str] = set()
        self._start, self._steps, self._since = start_step, 0, 0.0
        self._open = contextlib.ExitStack()
        self._file = self._open.enter_context(path.open("a", encoding="utf-8"))
        terminal, notebook = sys.stderr.isatty(), in_notebook()
        self._bar = self._open.enter_context(
            tqdm(
                total=total_steps,
                initial=start_step,
                desc=description,
                unit="step",
                dynamic_ncols=True,
                miniters=1,
                disable=not (terminal or notebook),
            )
        )
        if not self._bar.disable:
            # Each logger gets a handler that writes above the bar: where there is none, lines would appear twice.
            loggers = (logging.root, logging.getLogger("ijepa_fast"))
            self._open.enter_context(logging_redirect_tqdm([logger for logger in loggers if logger.handlers]))
            if not notebook:  # whose bar is drawn by the browser
                self._open.enter_context(_ticking(self._bar))

    def on_step(self, run: Any = None, result: Any = None) -> None:
        """Count a step; some steps after the first, say how long the others will take."""
        self._bar.update()
        self._steps += 1
        if self._steps == 1:
            self._since = time.monotonic()
        left = self._bar.total - self._start - self._steps
        if self._steps == 1 + ESTIMATED_BY and left:
            seconds = (time.monotonic() - self._since) / ESTIMATED_BY
            log.info("about %s to go: %d steps of %.2g s, by the first ones", duration(left * seconds), left, seconds)

    def on_log(self, run: Any, metrics: dict[str, float | int]) -> None:
        """Record one interval. ``metrics["step"]`` counts the steps done."""
        self.records.append(metrics)
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        values = metrics | {"images_per_second": rate(metrics.get("images_per_second", 0.0))}
        shown = [text.format(values[name]) for name, text in SHOWN.items() if name in metrics]
        if bad := metrics.get("bad_files"):
            shown.append(f"{bad} damaged file{'s' if bad > 1 else ''} skipped")
        self._bar.set_postfix_str(", ".join(shown))
        if self._bar.disable:
            log.info("step %d/%d: %s", metrics["step"], self._bar.total, ", ".join(shown))
        for kind, sentence in diagnose(self.records).items():
            if kind not in self._said:
                self._said.add(kind)
                log.log(logging.INFO if kind == NORMAL else logging.WARNING, "%s", sentence)
        if metrics["step"] == self._bar.total:
            self.close()  # the bar does not stand below what comes after the last step

    def close(self) -> None:
        self._open.close()


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def rate(value: float) -> str:
    """A whole number where it is large, two digits where it is not: 1234, 12, 1.3, 0.021."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def known(metrics: dict[str, float | int | None]) -> dict[str, float | int]:
    """Metrics without those that are None or NaN."""
    return {k: v for k, v in metrics.items() if v is not None and not (isinstance(v, float) and math.isnan(v))}


def in_notebook() -> bool:
    """Whether the program is a cell of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ())


@contextlib.contextmanager
def _ticking(bar: tqdm) -> Iterator[None]:
    """The bar's clock moves while a step takes long."""
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(1.0):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Log lines of this package appear on stderr, as the command shows them, unless the program has its own logging."""
    logger = logging.getLogger("ijepa_fast")
    if logger.hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _drop_lines_after(path: Path, step: int) -> list[dict]:
    """Rewrite a file of metrics without later steps; returns the records that stay."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            if record["step"] <= step:
                kept.append(record)
        except (json.JSONDecodeError, KeyError, TypeError):
            # A killed run can leave half a line at the end.
            continue
    if path.exists():
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept
