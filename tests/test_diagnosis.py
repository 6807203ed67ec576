"""What a run's curves mean, in words, and which of its checkpoints is kept as the best."""

import json
import re
from dataclasses import replace

import pytest
import torch

from ijepa_fast import cli
from ijepa_fast.evaluate.health import mean_cosine
from ijepa_fast.report import write_report
from ijepa_fast.run import checkpoint
from ijepa_fast.run.best import Best
from ijepa_fast.run.checkpoint import CheckpointError
from ijepa_fast.run.diagnosis import diagnose
from ijepa_fast.train import Stopped, pretrain
from ijepa_fast.weights.runs import load_run
from tests.tiny import tiny_run


def records(**series) -> list[dict]:
    rows = zip(*series.values(), strict=True)
    return [dict(zip(series, row, strict=True), step=10 * i) for i, row in enumerate(rows, 1)]


def stop_after(step: int):
    """A ``StopFlag.now`` for which a signal comes in that step."""

    def now(flag, doing):
        flag._asked = doing == f"step {step}" or flag._asked

    return now


def rising(start: float, end: float, count: int = 30) -> list[float]:
    return torch.linspace(start, end, count).tolist()


@pytest.mark.parametrize(
    ("series", "kinds", "words"),
    [
        # A healthy run: images become less alike, the loss falls, features improve.
        ({"cosine": rising(0.999, 0.3), "rank": rising(3, 60), "loss_prediction": rising(0.42, 0.2)}, [], ""),
        # At the start all images look alike to random weights, which is no collapse.
        ({"cosine": [0.9986, 0.998], "rank": [1.7, 1.8], "loss_prediction": [0.42, 0.41]}, [], ""),
        ({"cosine": [0.9986, 0.9999], "rank": [1.7, 1.8], "loss_prediction": [0.42, 0.1]}, ["collapse"], "0.99990 at"),
        ({"cosine": [0.99, 0.5, 0.96], "rank": [2, 50, 40]}, ["collapse"], r"at step 30 \(0.50000 at step 20\)"),
        ({"rank": [30, 1.5]}, ["collapse"], "their rank is 1.50 at step 20"),
        ({"rank": [10, 50, 20]}, ["rank"], "rank is 20.0 at step 30, after 50.0 at step 20"),
        ({"rank": [10, 11], "loss_prediction": [0.4, 0.7]}, ["rate"], "is 0.7 at step 20, above the 0.4"),
        (
            {"knn": rising(0.2, 0.5) + rising(0.49, 0.3), "rank": [20] * 60},
            ["past"],
            "31.3% now, after 48.8% around step 300",
        ),
        ({"rank": rising(10, 50) + rising(49, 30)}, ["past"], "rank is 31.3 now"),
        (
            {"knn": rising(0.2, 0.5), "loss_prediction": rising(0.4, 0.2, 10) + rising(0.2, 0.35, 20)},
            ["normal"],
            r"risen from 0.2\d* around .* That is normal",
        ),
        ({"knn": [0.3, 0.33] * 15, "loss_prediction": rising(0.2, 0.29)}, [], ""),
    ],
)
def test_curves_in_words(series, kinds, words):
    found = diagnose(records(**series))
    assert list(found) == kinds
    if words:
        assert re.search(words, found[kinds[0]]), found


def test_mean_cosine_is_that_of_all_pairs():
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) + 1
    unit = (x / x.norm(dim=1, keepdim=True)).double()
    pairs = [float(unit[i] @ unit[j]) for i in range(7) for j in range(7) if i != j]
    assert mean_cosine(x) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert mean_cosine(x[:1].expand(4, 5)) == pytest.approx(1, abs=1e-7)
    assert mean_cosine(x[:1]) != mean_cosine(x[:1])


def test_a_run_that_collapses_on_purpose_is_called_so_within_a_tenth_of_its_length(tmp_path, caplog, monkeypatch):
    """Without an average over weights and without a regulariser, at a high learning rate."""
    config = tiny_run("rendered", tmp_path / "run", steps=240, batch_size=16, log_every=8)
    optim = replace(config.optim, lr=1e-2, lr_ends=(1e-2, 1e-2), warmup_epochs=0.0, momentum=(0.0, 0.0))
    monkeypatch.setattr("ijepa_fast.run.signals.StopFlag.now", stop_after(16))
    with pytest.raises(Stopped, match="after step 16 of 240"):
        pretrain(replace(config, optim=optim))
    assert "The features have collapsed: those of different images are alike" in caplog.text
    page = write_report(tmp_path / "run", images=2, candidates=8).read_text()
    assert "The features have collapsed: those of different images are alike" in page


def test_the_best_checkpoint_is_kept_beside_the_newest(data, tmp_path, monkeypatch, capsys):
    """Regular saves are at 2, 4, 6, 8 of steps logged each; the scores of 3 and 4 are the best on average."""
    scores = iter([0.1, 0.9, 0.6, 0.7, 0.2, 0.8, 0.6, 0.6])
    monkeypatch.setattr("ijepa_fast.evaluate.OnlineKNN.accuracy", lambda self: next(scores))
    folder = tmp_path / "run"
    pretrain(tiny_run(data, folder, steps=8, log_every=1, save_every=2, keep=1))
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "best.safetensors",
        "step_000000008.safetensors",
    ]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best"] == {"step": 4, "score": pytest.approx(0.65), "by": "knn"}
    assert load_run(folder)[2] == 8 and load_run(folder / "checkpoints" / "best")[2] == 4
    for which, step in (("best", 4), ("newest", 8)):
        assert cli.main(["knn", str(folder), "--checkpoint", which, "--device", "cpu"]) == 0
        assert json.loads(capsys.readouterr().out)["step"] == step
        out = tmp_path / f"{which}.safetensors"
        assert cli.main(["export", str(folder), "--checkpoint", which, "--to", "safetensors", "--out", str(out)]) == 0
        assert f"after step {step}" in capsys.readouterr().out
    page = write_report(folder, checkpoint="best", images=2, candidates=8).read_text()
    assert "checkpoint at step 4" in page and "step 4, online k-NN 65.0%" in page
    (folder / "checkpoints" / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no best.safetensors"):
        checkpoint.find(folder, "best")


def test_a_stop_between_saves_changes_nothing_about_the_best(data, tmp_path, monkeypatch):
    def scored(self):
        return (int(self._ring._pushed) % 7) / 7

    monkeypatch.setattr("ijepa_fast.evaluate.OnlineKNN.accuracy", scored)
    config = replace(tiny_run(data, tmp_path / "straight", log_every=1, save_every=4))
    pretrain(config)
    stopped = replace(config, output=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        patch.setattr("ijepa_fast.run.signals.StopFlag.now", stop_after(6))
        with pytest.raises(Stopped):
            pretrain(stopped)
    assert len(checkpoint.load(checkpoint.find(tmp_path / "stopped")).extra["scores"]) == 2
    pretrain(stopped)
    best = [json.loads((tmp_path / name / "summary.json").read_text())["best"] for name in ("straight", "stopped")]
    assert best[0] == best[1] is not None


def test_another_rule_begins_anew():
    best = Best("rank", [3.0], {"step": 4, "score": 0.4, "by": "knn"})
    assert best.is_beaten_at(5) and best.so_far == {"step": 5, "score": 3.0, "by": "rank"} and best.scores == []
    best.see({"rank": 2.0, "knn": 0.9})
    best.see({"rank": float("nan")})
    assert best.scores == [2.0] and not best.is_beaten_at(6) and best.so_far["step"] == 5
