"""Schedules against the official formulas and index conventions, evaluated by hand."""

import math

import pytest

from ijepa_fast.optim.schedules import Schedules

OFFICIAL = Schedules(total_steps=1000, warmup_steps=100)


def test_lr_warms_up_linearly_and_is_advanced_before_use():
    assert OFFICIAL.lr_at(0) == pytest.approx(2e-4 + (1e-3 - 2e-4) * 1 / 100)
    assert OFFICIAL.lr_at(49) == pytest.approx(2e-4 + (1e-3 - 2e-4) * 50 / 100)
    assert OFFICIAL.lr_at(99) == pytest.approx(1e-3)


def test_lr_follows_half_a_cosine_to_its_end_and_stays_there():
    middle = 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * 0.5))
    assert OFFICIAL.lr_at(549) == pytest.approx(middle)
    assert OFFICIAL.lr_at(999) == pytest.approx(1e-6)
    assert OFFICIAL.lr_at(5000) == pytest.approx(1e-6)


def test_weight_decay_is_advanced_before_use():
    expected = 0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi / 1000))
    assert OFFICIAL.weight_decay_at(0) == pytest.approx(expected, rel=1e-12)
    assert OFFICIAL.weight_decay_at(999) == pytest.approx(0.4)


def test_momentum_starts_at_its_first_value():
    assert OFFICIAL.momentum_at(0) == 0.996
    assert OFFICIAL.momentum_at(500) == pytest.approx(0.998)
    assert OFFICIAL.momentum_at(1000) == 1.0


def test_shapes_can_be_exchanged():
    paper = Schedules(total_steps=10, weight_decay_shape="linear", momentum_shape="cosine")
    assert paper.weight_decay_at(4) == pytest.approx(0.22)
    assert paper.momentum_at(5) == pytest.approx(0.998)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 0}, "at least 1 step, got 0"),
        ({"total_steps": 10, "warmup_steps": 10}, "warm-up of 10 steps does not fit into 10"),
        ({"total_steps": 10, "lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"total_steps": 10, "lr": float("nan")}, "lr must not be negative, got nan"),
        ({"total_steps": 10, "lr_ends": (0.0, -1.0)}, r"lr_ends must not be negative, got \(0.0, -1.0\)"),
        ({"total_steps": 10, "weight_decay": 0.04}, "weight_decay must be two numbers, at the start and .* got 0.04"),
        ({"total_steps": 10, "momentum": (0.9, 1.5)}, r"momentum must lie in \[0, 1\], got \(0.9, 1.5\)"),
        ({"total_steps": 10, "momentum_shape": "step"}, "must be cosine or linear, got 'step'"),
    ],
)
def test_impossible_schedules_are_refused_with_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedules(**settings)
