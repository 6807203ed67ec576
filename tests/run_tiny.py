"""Pretrain the tiny configuration; started as a process by tests that kill it or run several ranks of it.

    python tests/run_tiny.py DATA OUTPUT [name=value ...]

Prints one line before each step, so that a test knows when to act. Settings are dotted names with JSON values.
"""

import json
import os
import sys
import time
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ijepa_fast import train
from ijepa_fast.data import DevicePrefetcher
from ijepa_fast.step.train_step import TrainStep
from ijepa_fast.train import Stopped, pretrain
from tests.tiny import tiny_run


def changed(config, name, value):
    first, _, rest = name.partition(".")
    current = getattr(config, first)
    if rest:
        value = changed(current, rest, value)
    assert first in {f.name for f in fields(config)} and is_dataclass(config)
    return replace(config, **{first: value})


def fail(rank, step):
    """Let the loader of a rank break before a step."""

    class Failing(DevicePrefetcher):
        def __iter__(self):
            for i, batch in enumerate(super().__iter__()):
                if i == step:
                    raise RuntimeError("a test broke it")
                yield batch

    if int(os.environ["RANK"]) == rank:
        train.DevicePrefetcher = Failing


def hang(rank, step):
    """Let a rank fall asleep before a step."""
    run = TrainStep.__call__

    def sleeping(self, images, number, first_image=0, **settings):
        if number == step and int(os.environ["RANK"]) == rank:
            time.sleep(3600)
        return run(self, images, number, first_image, **settings)

    TrainStep.__call__ = sleeping


def main():
    data, output, *settings = sys.argv[1:]
    torch.set_num_threads(1)
    config = tiny_run(data, output)
    for setting in settings:
        name, _, value = setting.partition("=")
        if name in ("fail", "hang"):
            {"fail": fail, "hang": hang}[name](*json.loads(value))
            continue
        config = changed(config, name, json.loads(value))
    run = TrainStep.__call__

    def announced(self, images, step, first_image=0, **settings):
        print(f"step {step}", flush=True)
        return run(self, images, step, first_image, **settings)

    TrainStep.__call__ = announced
    try:
        pretrain(config)
    except Stopped:
        sys.exit(75)


if __name__ == "__main__":
    main()
