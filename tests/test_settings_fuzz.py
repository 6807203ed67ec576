"""Wrong settings, drawn at random and typed as a user would: each ends in a message that names them, and in no file."""

import random
from dataclasses import replace

import pytest
import torch
import yaml

from ijepa_fast import cli
from ijepa_fast.config import LIMITS, RunConfig, as_dict, flatten, from_dict, nested
from tests.tiny import tiny_run

VALUES = ["abc", "", "null", "[]", "{}", "[1]", "[1, 2, 3]", "[[1, 2], 3]", "-1", "0", "0.5", "1.5", "7", "1e-3", "nan",
          "inf", "-inf", "1e400", "true", "'", "[", "{a: 1}", "[nan, 1]", "[2, 1]", "-0.1", "\x00", "ä"]  # fmt: skip
NOT_DRAWN = {"output", "resume", "data", "init", "train.deterministic", "train.device", "step.blocks"}
"""What is a path, changes torch for good, or compiles."""


def settled(run):
    """In place of training: the schedules must have values at every step, the optimizer too."""
    for step in range(run.total_steps):
        values = [run.schedules.lr_at(step), run.schedules.weight_decay_at(step), run.schedules.momentum_at(step)]
        assert all(torch.tensor(values).isfinite()), values


def wrong_settings(count: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    names = sorted(flatten(RunConfig()).keys() - NOT_DRAWN)
    return [{draw.choice(names): draw.choice(VALUES) for _ in range(draw.choice((1, 1, 2)))} for _ in range(count)]


def test_no_number_may_be_infinite_or_beyond_its_limits():
    for name, now in flatten(RunConfig()).items():
        wrong = [float("nan"), float("inf")] if isinstance(now, (float, list)) else []
        for number in wrong + [-1] * (name in LIMITS):
            value = [number, number] if isinstance(now, list) and len(now) == 2 else number
            with pytest.raises((ValueError, TypeError), match=name.rpartition(".")[2]):
                from_dict(nested({name: value}))


@pytest.mark.parametrize(
    ("count", "seed"), [(40, 0), pytest.param(300, 1, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_wrong_settings_are_named_and_nothing_is_written(data, tmp_path, monkeypatch, capsys, count, seed):
    monkeypatch.setattr("ijepa_fast.train.train", settled)
    monkeypatch.setattr("ijepa_fast.train.finish", lambda run, encoder: {})
    recipe, output = tmp_path / "tiny.yaml", tmp_path / "run"
    config = tiny_run(data, output, steps=4)
    recipe.write_text(yaml.safe_dump(as_dict(replace(config, resume="overwrite"))))
    found = []
    for settings in [{"optim.lr": "0.5"}, *wrong_settings(count, seed)]:  # a right one first: every stage is reached
        flags = [f"--{name}={value}" for name, value in settings.items()]
        existed = output.exists()
        try:
            status = cli.main(["pretrain", "--config", str(recipe), *flags])
        except BaseException as error:
            found.append(f"{flags}: {type(error).__name__}: {error}")
            continue
        said = capsys.readouterr().err
        if status == 0:
            below = any(value.startswith("-") for name, value in settings.items() if name != "seed")
            if below or any(text in value for value in settings.values() for text in ("nan", "inf", "1e400")):
                found.append(f"{flags}: taken")
            continue
        if not any(name.rpartition(".")[2] in said or f": {value}" in said for name, value in settings.items()):
            found.append(f"{flags}: not named in {said[-300:]!r}")
        if output.exists() and not existed:
            found.append(f"{flags}: files were written")
    assert not found, "\n" + "\n".join(found)
