"""Calls in a process of their own, so that a crash, a GPU in error or memory that is not given back stays there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

MOST_TEXT = 300
"""Characters of an error's message that are kept; those of compilers run to pages."""

AFTER_ANSWER = 5.0
"""Seconds that a process may take to end by itself once it has answered."""


class Failed(RuntimeError):
    """The call raised, was stopped, or took its process with it; the message says which."""


def call_apart(function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
    """``function(*arguments)`` in a fresh Python process.

    Args:
        function: at the top of a module; it, its arguments and its result, which should be small, are pickled.
        seconds: the process is ended after this time.

    Raises:
        Failed: there is no result, with the reason.
    """
    context = multiprocessing.get_context("spawn")  # a fork cannot use a GPU that its parent has used
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments), daemon=False)
    process.start()
    sender.close()  # of this process, so that the end of the other one is noticed
    answered = False
    try:
        # Not for the answer alone: processes that it has started may hold its end of the pipe when it is gone.
        if not wait([receiver, process.sentinel], seconds):
            raise Failed(f"stopped after {seconds:.0f} s")
        try:
            answered = receiver.poll()
            result, error = receiver.recv() if answered else (None, None)
        except (EOFError, OSError):  # OSError in the middle of an answer
            answered = False
        process.join(AFTER_ANSWER)
        if not answered:
            process.kill()
            process.join()
            raise Failed(f"its process ended with {_exit(process.exitcode)}")
    finally:
        process.kill()
        process.join()
        receiver.close()
    if error is not None:
        raise Failed(error)
    return result


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        sender.send((function(*arguments), None))
    except Exception as error:
        sender.send((None, _in_words(error)))


def _end_with_parent() -> None:
    """It may be killed, and ends nothing then."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _in_words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    name = type(error).__name__
    if isinstance(error, ValueError) and lines[0]:  # messages of our own explain themselves
        text = lines[0]
    else:  # compilers begin with the place, and end with the reason
        text = f"{name}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}"
    return text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + "..."


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        known = -code in set(signal.Signals)
        return f"signal {signal.Signals(-code).name if known else -code}"
    return f"exit status {code}"
