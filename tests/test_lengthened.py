"""A run that goes on for longer than it was begun for, and runs that begin with the weights of others."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from ijepa_fast import cli
from ijepa_fast.interop.export import export
from ijepa_fast.run import checkpoint
from ijepa_fast.run.checkpoint import CheckpointError
from ijepa_fast.train import pretrain
from ijepa_fast.weights.any_format import start_from
from ijepa_fast.weights.encoder_file import load_encoder, save_encoder
from ijepa_fast.weights.reading import WeightsError
from ijepa_fast.weights.runs import load_run
from tests.tiny import MODEL, tiny_model, tiny_run


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run of 4 steps, which no test changes."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    pretrain(tiny_run(data, folder, steps=4))
    return folder


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(network, expected):
    torch.testing.assert_close(network.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_a_finished_run_is_lengthened_with_stretched_schedules(data, tmp_path, caplog):
    folder = tmp_path / "run"
    pretrain(tiny_run(data, folder, steps=4))
    assert json.loads((folder / "metrics.jsonl").read_text())["lr"] == pytest.approx(1e-6)
    with caplog.at_level("WARNING"):
        assert pretrain(tiny_run(data, folder, steps=12))["steps"] == 12
    assert "lengthened from 4 to 12 steps and its schedules are stretched: the learning rate is 0.00" in caplog.text
    assert "(it was 1e-06)" in caplog.text
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    longer = tiny_run(data, folder, steps=12).optim.schedules(12, 2)
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert [row["lr"] for row in rows[1:]] == [longer.lr_at(7), longer.lr_at(11)]
    caplog.clear()
    pretrain(tiny_run(data, folder, steps=12))  # the longer run is its settings now
    assert "lengthened" not in caplog.text


def test_an_unfinished_run_is_lengthened_in_epochs_by_the_flag_alone(data, run, tmp_path, monkeypatch):
    """Its recipe counts in steps, which would win over epochs."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    folder = tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    command = ["pretrain", "--config", str(tmp_path / "recipe.yaml"), "--output", str(folder)]
    monkeypatch.setattr("ijepa_fast.train.finish", lambda *_: {})
    assert cli.main(command) == 0
    assert cli.main(["pretrain", "--output", str(folder), "--train.epochs", "3"]) == 0
    assert checkpoint.load(checkpoint.find(folder)).step == 6
    written = yaml.safe_load((folder / "config.yaml").read_text())["train"]
    assert (written["epochs"], written["steps"]) == (3.0, None)


def test_what_cannot_go_on_is_refused_with_the_two_ways(data, run, capsys):
    before = contents(run)
    for config, message in (
        (tiny_run(data, run, steps=3), "a run of 4 steps, 4 of them done, and is not shortened to 3"),
        (
            replace(tiny_run(data, run, steps=8), seed=1),
            r"seed \(0 -> 1\); to train it for longer, change train.epochs",
        ),
        (replace(tiny_run(data, run, steps=4), seed=1), f"new run from its weights, add --init {run} and give another"),
    ):
        with pytest.raises(CheckpointError, match=message):
            pretrain(config)
        assert contents(run) == before
    for init in (run, run / "checkpoints" / "best.safetensors"):
        with pytest.raises(ValueError, match="resume overwrite would remove the weights of init"):
            pretrain(replace(tiny_run(data, run), init=str(init), resume="overwrite"))
        assert contents(run) == before


def test_a_new_run_begins_with_the_weights_of_another(data, run, tmp_path, caplog):
    weights, _, _ = load_run(run)
    config = replace(tiny_run(data, tmp_path / "new", steps=2, batch_size=4), init=str(run), seed=5)
    with caplog.at_level("INFO"):
        pretrain(replace(config, optim=replace(config.optim, lr=0.0, lr_ends=(0.0, 0.0), momentum=(1.0, 1.0))))
    assert f"encoders and predictor start from {run}, a run of ijepa_fast after step 4" in caplog.text
    assert_same(load_run(tmp_path / "new")[0], weights)  # nothing was learned since
    caplog.clear()
    # What it began with is read no more when the run goes on.
    config = replace(config, optim=replace(config.optim, lr=0.0, lr_ends=(0.0, 0.0), momentum=(1.0, 1.0)))
    with caplog.at_level("INFO"):
        pretrain(config)
    assert "start from" not in caplog.text and "is trained" in caplog.text
    # But where it is to be judged after all: by the initial encoder, not by a random one.
    (tmp_path / "new" / "summary.json").unlink()
    summary = pretrain(replace(config, evaluation=replace(config.evaluation, results="figures")))
    assert summary["before"] == summary["after"]


def test_the_settings_of_the_other_run_stand_in_for_a_recipe(data, run, tmp_path, capsys):
    command = ["pretrain", "--data", str(data), "--output", str(tmp_path / "new"), "--init", str(run)]
    assert cli.main([*command, "--optim.lr", "1e-5"]) == 0
    written = yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())
    assert written["model"]["embed_dim"] == 16 and written["init"] == str(run) and written["optim"]["lr"] == 1e-5


def test_weights_of_every_kind_begin_a_run(run, tmp_path):
    expected = load_run(run)[0]
    for form, name in (("official", "a.pth.tar"), ("timm", "b.safetensors"), ("huggingface", "folder")):
        export(run, form, tmp_path / name, steps_per_epoch=2)
        model = tiny_model(seed=3)
        fresh = {name: value.clone() for name, value in model.predictor.state_dict().items()}
        said = start_from(model, MODEL, tmp_path / name)
        assert_same(model.target_encoder, expected.target_encoder)
        if form == "official":
            assert_same(model.context_encoder, expected.context_encoder)
            assert_same(model.predictor, expected.predictor)
        else:
            assert_same(model.context_encoder, expected.target_encoder)  # there is one encoder in the file
            torch.testing.assert_close(model.predictor.state_dict(), fresh, rtol=0, atol=0)
            assert said.endswith("the predictor is new")


def test_weights_that_do_not_fit_are_refused_with_their_numbers_and_nothing_is_written(data, run, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    encoder, _ = load_encoder(_encoder_file(run, tmp_path))
    encoder.patch_embed.mean = (0.1, 0.2, 0.3)
    save_encoder(tmp_path / "dark.safetensors", encoder)
    wide = replace(MODEL, embed_dim=32)
    for init, model, message in (
        (run, wide, "it has width 16, 2 blocks, .*; the model has width 32, 2 blocks"),
        (run, replace(MODEL, img_size=32), "36 patches of 4 px.*the model has .* 64 patches of 4 px"),
        (run, replace(MODEL, num_heads=4), "num_heads 2, and the model 4"),
        (
            run,
            replace(MODEL, predictor_embed_dim=16),
            "predictor.* does not fit .*(?s:.*)or begin with the encoder alone",
        ),
        (tmp_path / "dark.safetensors", MODEL, r"mean \[0.1, 0.2, 0.3\], and the model \[0.485, 0.456, 0.406\]"),
        (tmp_path / "other.safetensors", MODEL, "not the weights of a ViT encoder"),
    ):
        config = replace(tiny_run(data, tmp_path / "new"), init=str(init), model=model)
        with pytest.raises(WeightsError, match=message):
            pretrain(config)
        assert not (tmp_path / "new").exists()
    with pytest.raises(FileNotFoundError, match="no file or folder /nowhere"):
        pretrain(replace(tiny_run(data, tmp_path / "new"), init="/nowhere"))


def _encoder_file(run, tmp_path):
    export(run, "safetensors", tmp_path / "encoder.safetensors")
    return tmp_path / "encoder.safetensors"


def test_a_short_trial_needs_no_other_warm_up(data, tmp_path, caplog):
    config = tiny_run(data, tmp_path / "run", steps=20)
    pretrain(replace(config, optim=replace(config.optim, warmup_epochs=40.0), train=replace(config.train, steps=20)))
    said = (
        "warmup_epochs 40 (80 steps, with 2 in an epoch) does not fit into the 20 steps of the run: its warm-up takes 2"
    )
    assert said in caplog.text
