"""The contest of implementations at equal time or equal steps, on a few tiny steps of the embedded images."""

import json

import pytest

from benchmarks import train_to_accuracy


def run(path, *arguments):
    options = ["--recipe", "demo", "--data", "rendered", "--batch", "8", "--device", "cpu", "--json", str(path)]
    train_to_accuracy.main([*options, *arguments])
    return json.loads(path.read_text())


@pytest.mark.slow
def test_the_same_masks_and_steps_lead_to_the_same_features(tmp_path):
    """Ours and the published algorithm, which share nothing but masks, crops and first weights."""
    report = run(tmp_path / "report.json", "--steps", "3", "--impl", "batch_min,eager")
    ours, eager = report["runs"]
    assert (ours["contender"], eager["contender"]) == ("batch_min", "eager")
    assert ours["steps"] == eager["steps"] == 3
    for figure in ("probe", "knn"):
        assert ours[figure] == pytest.approx(eager[figure], abs=0.01)
    assert ours["rank"] == pytest.approx(eager["rank"], abs=0.05)


@pytest.mark.slow
def test_a_time_buys_steps(tmp_path):
    (short,) = run(tmp_path / "short.json", "--minutes", "0.01", "--impl", "exact")["runs"]
    (long,) = run(tmp_path / "long.json", "--minutes", "0.05", "--impl", "exact")["runs"]
    assert 1 <= short["steps"] < long["steps"]


def test_what_it_cannot_do_is_said(capsys):
    with pytest.raises(SystemExit):
        train_to_accuracy.main(["--data", "rendered", "--steps", "1", "--impl", "sloth"])
    assert "sloth" in capsys.readouterr().err
