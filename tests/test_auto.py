"""Settings that are chosen where nobody names them."""

from dataclasses import replace

import pytest
import torch
import yaml

from ijepa_fast import cli
from ijepa_fast.config import RunConfig, from_dict, read_recipe, with_settings
from ijepa_fast.configure import configure
from ijepa_fast.data import ImageFolder
from ijepa_fast.run import auto
from ijepa_fast.train import pretrain
from tests.tiny import tiny_run

TINY = "--model.embed_dim 16 --model.depth 1 --model.num_heads 2 --model.predictor_embed_dim 8 --train.steps 2".split()
BASE = from_dict(read_recipe(auto.RECIPE))
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "hardware", "precision"),
    [(CPU, (False, False), "fp32"), (CPU, (True, False), "bf16"), (CPU, (False, True), "bf16")]
    + [(CUDA, (7, 5), "fp32"), (CUDA, (8, 0), "bf16"), (CUDA, (9, 0), "bf16")],
)
def test_precision_is_what_the_hardware_multiplies(monkeypatch, device, hardware, precision):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: hardware[0])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: hardware[1])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: hardware)
    assert auto.supported_precision(device)[0] == precision
    assert auto.resolved(RunConfig(), device).train.precision == precision
    asked = with_settings(RunConfig(), {"train.precision": "fp16"})
    assert auto.resolved(asked, device) is asked


@pytest.mark.parametrize(("side", "size", "patch"), [(20, 32, 4), (63, 32, 4), (64, 64, 8), (300, 96, 12)])
def test_on_a_cpu_every_size_has_64_patches_and_the_run_fits_its_time(side, size, patch):
    settings = auto.own_images(BASE, auto.Images(5000, side), CPU, lambda device: 1e12)
    config = with_settings(BASE, settings)
    assert (config.model.img_size, config.model.patch_size) == (size, patch)
    slower = auto.own_images(BASE, auto.Images(5000, side), CPU, lambda device: 2e11)
    assert settings["train.steps"] == pytest.approx(5 * slower["train.steps"], rel=0.1)
    assert config.optim.schedules(config.train.steps, 5000 // config.train.batch_size)  # the warm-up fits


@pytest.mark.parametrize(("count", "batch"), [(16, 4), (100, 16), (600, 64), (10**6, 64)])
def test_a_batch_is_at_most_a_quarter_of_the_set(count, batch):
    assert auto.own_images(BASE, auto.Images(count, 96), CPU, lambda device: 1e11)["train.batch_size"] == batch


def test_on_a_gpu_it_is_a_vit_s_of_the_images_size():
    settings = auto.own_images(BASE, auto.Images(9469, 250), CUDA, None)
    config = with_settings(BASE, settings)
    assert (config.model.img_size, config.model.patch_size, config.model.embed_dim) == (224, 16, 384)
    assert config.train.steps == pytest.approx(300 * 9469 / 256, abs=100)


def test_length_and_warm_up_follow_what_is_named():
    def settled(**given):
        given = {f"train.{name}": value for name, value in given.items()}
        chosen = auto.own_images(BASE, auto.Images(600, 96), CPU, lambda device: 1e11, given)
        config = with_settings(BASE, chosen | given)
        per_epoch = 600 // config.train.batch_size
        total = config.train.total_steps(per_epoch)
        assert config.optim.schedules(total, per_epoch).warmup_steps == pytest.approx(total / 10, abs=2, rel=0.1)
        return config.train.batch_size, total

    assert settled(steps=20) == (64, 20)
    assert settled(epochs=5.0) == (64, 45)
    assert settled(epochs=5.0, steps=30)[1] == 30
    assert settled(batch_size=8)[0] == 8


def test_a_run_keeps_its_precision_where_none_is_named(data, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    config = tiny_run(data, tmp_path / "run", steps=2)
    pretrain(config)
    monkeypatch.setattr(auto, "supported_precision", lambda device: ("bf16", "a test says so"))
    pretrain(with_settings(config, {"train.precision": "auto"}))
    assert "is trained: all 2 steps are done" in caplog.text


def test_too_few_images_are_an_error_with_their_number():
    with pytest.raises(ValueError, match="there are 15 images"):
        auto.own_images(BASE, auto.Images(15, 96), CPU, lambda device: 1e11)


def test_sizes_are_the_median_of_what_can_be_read(data):
    assert auto.look_at(ImageFolder(data / "train")).count == 20


def test_images_alone_are_enough_and_the_same_command_continues(data, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    out = tmp_path / "run"
    few = ["--evaluation.results", "none", "--optim.warmup_epochs", "0.1"]
    anew = ["--resume", "overwrite"]
    assert cli.main(["pretrain", "--data", str(data), "--output", str(out), *TINY, *few, *anew]) == 0
    assert "for these images on this machine: --config own_images --model.img_size" in caplog.text
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written["train"]["precision"] in ("fp32", "bf16")
    assert written["model"]["embed_dim"] == 16  # a flag wins over what was chosen
    assert written["resume"] == "auto"  # the file continues the run
    # Earlier versions wrote what was asked for, which must not remove the run now.
    (out / "config.yaml").write_text(yaml.safe_dump(written | {"resume": "never", "overwrite": True, "output": "old"}))
    # Its own settings stand in for a recipe now: nothing is chosen anew, and nothing has changed.
    monkeypatch.setattr(auto, "product_rate", None)
    assert cli.main(["pretrain", "--data", str(data), "--output", str(out)]) == 0
    assert "is trained: all 2 steps are done" in caplog.text


def test_several_processes_must_name_a_recipe(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["pretrain", "--data", str(data), "--output", str(tmp_path / "run")]) == 2
    assert "several processes need a recipe" in capsys.readouterr().err


def test_settings_given_in_python_may_be_nested_or_have_former_names():
    demo = from_dict(read_recipe("demo"))
    config = configure("demo", {"train": {"steps": 7}, "train.fused": True, "optim.momentum": 0.99})
    assert config.train == replace(demo.train, steps=7) and config.step.blocks == "fused"
    assert config.optim.momentum == (0.99, demo.optim.momentum[1])
    with pytest.raises(ValueError, match="config must be a RunConfig, .*, got 5"):
        configure(5, {})
