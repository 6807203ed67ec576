"""What a run leaves to read: metrics.jsonl, TensorBoard events, a progress bar."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ijepa_fast.run.files import write_text

log = logging.getLogger(__name__)

SHOWN = {"loss": "loss {:.4f}", "images_per_second": "{:.0f} img/s", "rank": "rank {:.1f}", "knn": "k-NN {:.1%}"}
"""What people are shown of the metrics, and how."""


class RunLog:
    """Metrics of a run, one dict per log interval.

    On a terminal a progress bar shows loss, images/s, feature rank and damaged files; elsewhere each interval is a log
    line.

    Args:
        folder: of the run; gets ``metrics.jsonl`` and ``tensorboard/``.
        total_steps: length of the bar.
        start_step: where a resumed run continues; metrics of later steps, from before it was stopped, are dropped.
        description: left of the bar.
    """

    def __init__(self, folder: Path, total_steps: int, start_step: int, description: str):
        self.path = folder / "metrics.jsonl"
        _drop_lines_after(self.path, start_step)
        self._file = self.path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step or None)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            desc=description,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def advance(self) -> None:
        self._bar.update()

    def write(self, metrics: dict[str, float | int | None]) -> None:
        """Record one interval. ``metrics["step"]`` counts the steps done; None and NaN values are left out."""
        metrics = {k: v for k, v in metrics.items() if v is not None and not (isinstance(v, float) and math.isnan(v))}
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if name != "step":
                self._events.add_scalar(name, value, metrics["step"])
        shown = [text.format(metrics[name]) for name, text in SHOWN.items() if name in metrics]
        if bad := metrics.get("bad_files"):
            shown.append(f"{bad} damaged file{'s' if bad > 1 else ''} skipped")
        self._bar.set_postfix_str(", ".join(shown))
        if self._bar.disable:
            log.info("step %d/%d: %s", metrics["step"], self._bar.total, ", ".join(shown))

    def close(self) -> None:
        self._bar.close()
        self._events.close()
        self._file.close()


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            # A killed run can leave half a line at the end.
            continue
    write_text(path, "".join(line + "\n" for line in kept))
