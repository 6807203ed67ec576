"""Time per token over batch and image size, on steps small enough for a CPU."""

import json
from argparse import Namespace

import pytest
import torch

from benchmarks import scaling
from ijepa_fast.config import ModelConfig
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.step import captured
from tests.test_captured import Recorder

CPU = torch.device("cpu")


def small(name, img_size):
    return ModelConfig(img_size, 4, embed_dim=24, depth=2, num_heads=2, predictor_embed_dim=16, predictor_depth=2)


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setattr(scaling, "model_config", small)


def run(*arguments):
    fixed = ["--device", "cpu", "--rounds", "2", "--warm-up", "1"]
    return scaling.main([*fixed, *arguments])


def test_points_are_measured_and_written(tmp_path, capsys):
    path = tmp_path / "scaling.json"
    run("--sizes", "48", "64", "--batches", "4", "2", "--json", str(path))
    report = json.loads(path.read_text())
    found = report["points"]
    assert [(p["img_size"], p["batch"]) for p in found] == [(48, 2), (48, 4), (64, 2), (64, 4)]
    for point in found:
        sampler = MaskSampler(MaskConfig(), (point["img_size"] // 4,) * 2)
        drawn = [sampler.sample(point["batch"], seed=0, step=n) for n in range(3)]
        context, targets = (
            sum(int(part.cu_seqlens[-1]) for part in parts) / 3 / point["batch"]
            for parts in ([m.context for m in drawn], [m.targets for m in drawn])
        )
        tokens = sampler.num_patches + 5 * context + targets
        assert point["tokens_per_image"] == pytest.approx(tokens)
        rest = point["ms"] - point["update_ms"] - point["attention_ms"]
        assert point["us_per_token"] == pytest.approx(1e3 * rest / tokens / point["batch"])
        assert point["update_ms"] > 0 and point["attention_ms"] > 0
    values = [point["us_per_token"] for point in found]
    assert report["spread"] == pytest.approx(max(values) / min(values) - 1)
    assert "us per token" in capsys.readouterr().out


def test_captured_steps_are_replayed_and_their_update_timed(monkeypatch):
    recorders = []
    monkeypatch.setattr(captured, "CudaGraphs", lambda device: recorders.append(Recorder()) or recorders[-1])
    options = Namespace(model="", impl="ours+capture", sizes=[48], batches=[2], rounds=2, warm_up=1, seconds=100)
    (point,) = scaling.points(options, CPU, "fp32")
    assert recorders[0].replayed and 0 < point["update_ms"] < point["ms"]


def test_what_does_not_fit_is_said_and_ends_no_run(monkeypatch, capsys):
    def limited(case, *rest):
        if case.batch * case.grid[0] ** 2 > 3 * 144:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"us_per_token": 1.0 + 0.01 * case.batch}

    monkeypatch.setattr(scaling, "measure_point", limited)
    monkeypatch.setattr(scaling, "line", str)
    report = run("--sizes", "48", "64", "--batches", "1", "2", "4", "8")
    assert [point.get("not_run") for point in report["points"]] == [
        *(None, None, "does not fit into memory", "a smaller batch did not fit"),
        *(None, "does not fit into memory", "a smaller batch did not fit", "a smaller batch did not fit"),
    ]
    assert report["spread"] == pytest.approx(1.02 / 1.01 - 1)
    with pytest.raises(SystemExit):
        run("--impl", "eager")
    assert "must be ours" in capsys.readouterr().err
    late = run("--sizes", "48", "--batches", "1", "--seconds", "-1")
    assert late["points"][0]["not_run"] == "no time after -1 s" and late["spread"] is None
