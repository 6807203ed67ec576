"""Calls in processes of their own: what comes back, and what is said when nothing does."""

import os
import signal
import time

import pytest

from ijepa_fast.bench.apart import MOST_TEXT, Failed, call_apart


def add(a, b):
    return a + b, os.getpid()


def refuse(message):
    raise ValueError(message)


def divide(a, b):
    return a / b


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def leave():
    os._exit(3)


def unpicklable():
    return lambda: None


def test_a_result_comes_back_from_another_process():
    total, process = call_apart(add, 2, 3, seconds=60)
    assert total == 5 and process != os.getpid()


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (refuse, ("width 3 is odd\nand more",), "^width 3 is odd$"),
        (refuse, ("x" * 1000,), f"^x{{{MOST_TEXT}}}...$"),
        (divide, (1, 0), "^ZeroDivisionError: division by zero$"),
        (crash, (), "^its process ended with signal SIGSEGV$"),
        (leave, (), "^its process ended with exit status 3$"),
        (unpicklable, (), "pickle"),
    ],
)
def test_what_went_wrong_is_said(function, arguments, message):
    with pytest.raises(Failed, match=message):
        call_apart(function, *arguments, seconds=60)


def test_a_call_that_takes_too_long_is_ended(tmp_path):
    started = time.monotonic()
    with pytest.raises(Failed, match="stopped after 0 s"):
        call_apart(time.sleep, 600, seconds=0.1)
    assert time.monotonic() - started < 30
