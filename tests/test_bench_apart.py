"""Calls in processes of their own: what comes back, and what is said when nothing does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ijepa_fast.bench.child_process import MOST_TEXT, Failed, call_apart


def add(a, b):
    return a + b, os.getpid()


def refuse(message):
    raise ValueError(message)


def divide(a, b):
    return a / b


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def fail_as_a_compiler():
    raise RuntimeError("at 12:34:\n  x = tl.load(p)\n  ^\nunsupported thing")


def leave_with_a_child():
    """Which holds the pipe."""
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    os._exit(3)


def test_a_result_comes_back_from_another_process():
    total, process = call_apart(add, 2, 3, seconds=60)
    assert total == 5 and process != os.getpid()


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (refuse, ("width 3 is odd\nand more",), "^width 3 is odd$"),
        (refuse, ("x" * 1000,), f"^x{{{MOST_TEXT}}}...$"),
        (divide, (1, 0), "^ZeroDivisionError: division by zero$"),
        (fail_as_a_compiler, (), r"^RuntimeError: at 12:34: \.\.\. unsupported thing$"),
        (crash, (), "^its process ended with signal SIGSEGV$"),
        (leave_with_a_child, (), "^its process ended with exit status 3$"),
    ],
)
def test_what_went_wrong_is_said(function, arguments, message):
    with pytest.raises(Failed, match=message):
        call_apart(function, *arguments, seconds=60)


def test_a_call_that_takes_too_long_is_ended():
    started = time.monotonic()
    with pytest.raises(Failed, match="stopped after 0 s"):
        call_apart(time.sleep, 600, seconds=0.1)
    assert time.monotonic() - started < 30


def write_and_wait(path):
    path.write_text(str(os.getpid()))
    time.sleep(60)


def test_a_process_ends_with_its_parent(tmp_path):
    path = tmp_path / "pid"
    code = f"from tests.test_bench_apart import *; call_apart(write_and_wait, Path({str(path)!r}), seconds=60)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    try:
        wait_for(path.exists)
        child = int(path.read_text() or 0)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: ended(child))


def ended(process):
    """Where nobody waits for it, it stays as a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
