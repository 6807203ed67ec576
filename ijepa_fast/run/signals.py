"""Signals that end a run early, after it has saved itself."""

from __future__ import annotations

import contextlib
import os
import signal
import time

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Windows has no SIGUSR1."""


class StopFlag:
    """Whether a signal asked to stop: SIGTERM, SIGUSR1 or the first Ctrl-C; a second Ctrl-C raises KeyboardInterrupt.

    Handlers are set between ``__enter__`` and ``__exit__``.

    Args:
        speak: whether this process says what a Ctrl-C does.

    Attributes:
        doing: what is going on, for that message; set by ``now``.
    """

    def __init__(self, speak: bool):
        self.doing, self._since = "the start", time.monotonic()
        self._asked = False
        self._speak, self._process, self._interrupts = speak, os.getpid(), 0
        self._previous = {}

    def __call__(self) -> bool:
        return self._asked

    def now(self, doing: str) -> None:
        self.doing, self._since = doing, time.monotonic()

    def __enter__(self) -> StopFlag:
        handlers = dict.fromkeys(STOP_SIGNALS, self._set)
        # A shell makes the commands that it puts into the background ignore Ctrl-C, which is meant for others.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            handlers[signal.SIGINT] = self._interrupt
        for number, handler in handlers.items():
            try:
                self._previous[number] = signal.signal(number, handler)
            except ValueError:
                # Only the main thread may handle signals; in another one the caller decides.
                break
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _set(self, *_) -> None:
        self._asked = True

    def _interrupt(self, *_) -> None:
        if os.getpid() != self._process:
            # Some library's worker, forked from this process: the signal is not for it.
            return
        self._asked = True
        self._interrupts += 1
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if self._speak:
            seconds = time.monotonic() - self._since
            text = f"\nstopping: {self.doing} has run for {seconds:.1f} s; what is done is saved first; "
            text += "Ctrl-C again stops at once\n"
            # Not print: the signal may have come in the middle of one.
            with contextlib.suppress(OSError):
                os.write(2, text.encode())
