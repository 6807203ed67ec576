"""What others may do while a run goes on: the loggers of this package, and callbacks of people's own."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ijepa_fast.step.train_step import StepResult

log = logging.getLogger(__name__)


class Callback:
    """Base class of what ``pretrain(config, callbacks=[...])`` calls, on the first rank.

    ``run`` is an ``ijepa_fast.start.Run``, to be read and not to be changed: ``config``, ``model``, ``folder``,
    ``done`` (number of steps done), ``total_steps``, ``records`` (metrics of all log intervals so far) and more.

    Attributes:
        optional: whether the run goes on without the callback when it raises; otherwise the run ends with that error.
    """

    optional: bool = False

    def on_start(self, run: Any) -> None:
        """Called before the first step of this start; ``run.done`` is above 0 where a run is continued."""

    def on_step(self, run: Any, result: StepResult) -> None:
        """Called after every step. The losses in ``result`` are on the device: to read one waits for it."""

    def on_log(self, run: Any, metrics: dict) -> bool | None:
        """Called with the metrics of every log interval. True ends the training here: the run is saved and evaluated.

        Started again, it goes on to its full length.
        """

    def on_save(self, run: Any, path: Path) -> None:
        """Called when a checkpoint has been written."""

    def on_end(self, run: Any, summary: dict) -> None:
        """Called when the trained encoder has been evaluated and drawn; ``summary`` is what summary.json holds."""

    def close(self) -> None:
        """Called once at the very end, however the run ends."""


class Callbacks:
    """The callbacks of a run, in their order."""

    def __init__(self, callbacks: Iterable[Callback] | Callback = ()):
        self.all = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
        for callback in self.all:
            if not isinstance(callback, Callback):
                raise ValueError(f"callbacks must be objects of ijepa_fast.Callback, got {callback!r}")

    def call(self, event: str, *arguments: object) -> bool:
        """Call the method ``event`` of each; whether one of them asked to end the training."""
        end, failure = False, None
        for callback in list(self.all):
            try:
                end |= bool(getattr(callback, event)(*arguments))  # a bool of numpy or torch, too
            except Exception as error:  # of any kind: loggers are libraries of others, and servers
                if callback.optional:
                    self.all.remove(callback)
                    kind, text = type(error).__name__, " ".join(str(error).split())[:300]
                    log.warning("the logger %s fails and is left out from here on: %s: %s", callback, kind, text)
                elif event == "close":  # the others are closed all the same
                    failure = failure or error
                else:
                    raise
        if failure is not None:
            raise failure
        return end
