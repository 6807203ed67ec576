"""What a run leaves to read, and what stands on the terminal meanwhile."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch

from ijepa_fast.model.jepa import Losses
from ijepa_fast.ranks import Ranks
from ijepa_fast.run.log import RunLog, known, rate
from ijepa_fast.run.meter import Meter
from ijepa_fast.run.signals import StopFlag
from ijepa_fast.step.train_step import StepResult


def test_rates_below_one_are_shown_as_such():
    assert [rate(value) for value in (12345.6, 10.4, 9.96, 1.26, 0.0214)] == ["12346", "10", "10", "1.3", "0.021"]


def test_metrics_of_later_steps_are_dropped_and_the_last_is_known(tmp_path):
    lines = [{"step": step, "loss": step / 10} for step in (4, 8, 12)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    log = RunLog(tmp_path, 20, 8, "run")
    assert log.records[-1] == lines[1]
    log.on_log(None, known({"step": 12, "loss": float("nan"), "images_per_second": 0.02, "knn": None}))
    log.close()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == [*lines[:2], {"step": 12, "images_per_second": 0.02}]


BAR = """
import logging, pathlib, sys, time
from ijepa_fast.run.log import RunLog, heard
if sys.argv[2] == "command":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
with heard():
    log = RunLog(pathlib.Path(sys.argv[1]), 100, 0, "run")
    log.on_step()
    logging.getLogger("ijepa_fast.any").info("attention with heads of width 7 takes sdpa")
    time.sleep(2.5)
    log.close()
"""


@pytest.mark.parametrize("by", ["command", "python"])
def test_log_lines_stand_once_above_the_bar_and_its_clock_moves(tmp_path, by):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    subprocess.run([sys.executable, "-c", BAR, str(tmp_path), by], stderr=theirs, check=True, timeout=120)
    os.close(theirs)
    text = b""
    try:
        while chunk := os.read(ours, 65536):
            text += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    written = text.decode()
    assert written.count("takes sdpa") == 1, written
    before, _, after = written.partition("attention with heads of width 7 takes sdpa")
    assert before.endswith("\r") and after.startswith("\r\n"), written
    assert "[00:02<" in after, written


def test_log_lines_are_heard_where_a_program_has_no_logging_of_its_own():
    code = """
from ijepa_fast.run.log import heard
import logging
log = logging.getLogger("ijepa_fast.train")
log.info("before")
with heard():
    log.info("within")
log.info("after")
logging.basicConfig(level=logging.WARNING)
with heard():
    log.info("not asked for")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "within\n"


def test_an_interval_that_is_continued_has_the_same_means():
    def result(number):
        return StepResult(
            (torch.tensor(number / 3),) * len(Losses._fields),
            torch.tensor(number / 7),
            torch.zeros(2, 3),
            (10 * number, number),
        )

    me = Ranks(0, 1, torch.device("cpu"))
    straight, first, second = (Meter(me, 4) for _ in range(3))
    assert first.state() is None
    for number in range(1, 6):
        straight.add(result(number), 4)
        (first if number < 3 else second).add(result(number), 4)
        if number == 2:
            second.restore(json.loads(json.dumps(first.state())), me.device)
    times = ("images_per_second", "data_wait_share")
    a, b = ({k: v for k, v in meter.read().items() if k not in times} for meter in (straight, second))
    assert a == b and a["context_tokens_per_image"] == 7.5


def test_the_first_interrupt_says_what_is_running_and_for_how_long(capfd):
    with StopFlag(speak=True) as stop:
        stop.now("step 7")
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
    assert "stopping: step 7 has run for 0.3 s; what is done is saved first; Ctrl-C again" in capfd.readouterr().err


def test_signals_that_a_system_lacks_are_not_needed():
    code = "import signal; del signal.SIGUSR1; import ijepa_fast.run.signals as s; print(len(s.STOP_SIGNALS))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
