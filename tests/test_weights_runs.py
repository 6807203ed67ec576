"""Every command that takes a run sees the same networks, bit for bit."""

import pytest
import torch

from ijepa_fast import cli
from ijepa_fast.downstream import accuracy
from ijepa_fast.report.pictures import trained_by
from ijepa_fast.report.record import read_record
from ijepa_fast.run import checkpoint
from ijepa_fast.train import load_trained, pretrain
from ijepa_fast.weights.encoder_file import load_encoder
from ijepa_fast.weights.runs import load_run
from tests.tiny import tiny_run


def assert_same(network, expected):
    torch.testing.assert_close(network.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("which", ["target", "context"])
def test_all_commands_take_the_fp32_masters_of_a_bf16_run(data, tmp_path, monkeypatch, capsys, which):
    folder = tmp_path / "run"
    pretrain(tiny_run(data, folder, steps=6, precision="bf16"))
    model, config, step = load_run(folder)
    expected = getattr(model, f"{which}_encoder")
    assert step == 6 and config.train.precision == "bf16" and load_trained is load_run

    tensors = checkpoint.load(checkpoint.find(folder)).tensors
    rounded = checkpoint.select(tensors, f"model.{which}_encoder")
    differ = [name for name, value in expected.state_dict().items() if not torch.equal(value, rounded[name].float())]
    assert differ, "the rounded copies are the masters: this run can tell nothing"

    judged = []

    def evaluate(encoder, sources, config, *, layers):
        judged.append(encoder)
        return {"knn": 0.0, "probe": 0.0, "rank": 1.0}

    monkeypatch.setattr(accuracy, "evaluate", evaluate)
    for command in ("probe", "knn"):
        assert cli.main([command, str(folder), "--encoder", which, "--device", "cpu"]) == 0
        assert_same(judged.pop(), expected)
    out = tmp_path / "encoder.safetensors"
    assert cli.main(["export", str(folder), "--to", "safetensors", "--encoder", which, "--out", str(out)]) == 0
    assert_same(load_encoder(out)[0], expected)
    trained = trained_by(read_record(folder), torch.device("cpu")).model
    assert_same(getattr(trained, f"{which}_encoder"), expected)
