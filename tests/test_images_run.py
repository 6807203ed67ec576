"""Runs on images that are not square 8-bit RGB, from their settings to evaluation, pictures and exports."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_files import encoded, write_folder
from PIL import Image
from torch.testing import assert_close

from ijepa_fast.config import ModelConfig, Objective, RunConfig, from_dict, present_flags, read_recipe
from ijepa_fast.data.datasets import open_sources
from ijepa_fast.downstream.encoders import load_any
from ijepa_fast.downstream.tasks import OPENED_BY, Options
from ijepa_fast.evaluate.features import colour_histogram, pixel_features
from ijepa_fast.interop.export import export
from ijepa_fast.model.vit import IMAGENET_MEAN, IMAGENET_STD
from ijepa_fast.plots.sheet import pictures_of
from ijepa_fast.run.auto import Images, own_images
from ijepa_fast.run.checkpoint import CheckpointError
from ijepa_fast.train import load_trained, pretrain
from tests.tiny import tiny_run

IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)


def test_sizes_and_channels_of_a_model():
    model = ModelConfig(img_size=(24, 48), patch_size=8, in_chans=5)
    assert model.size == (24, 48) and model.grid == (3, 6) and model.patches == 18
    assert model.mean_std == "auto" and model.normalisation == ((0.5,) * 5, (0.5,) * 5)
    assert ModelConfig().mean_std == IMAGENET and ModelConfig(img_size=(96, 96)) == ModelConfig(img_size=96)
    assert ModelConfig(img_size=[24, 48]).size == (24, 48)
    config = from_dict({"model": {"img_size": [24, 48], "patch_size": 8, "in_chans": 1, "mean_std": [[0.5], [0.2]]}})
    assert config.model.img_size == (24, 48) and config.model.mean_std == ((0.5,), (0.2,))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"in_chans": 0}, "model.in_chans must be positive, got 0"),
        ({"img_size": (1, 2, 3)}, r"one number or \[height, width\], got \[1, 2, 3\]"),
        ({"img_size": (32, 50)}, r"model.img_size \(32, 50\) px cannot be cut into patches of 16 px"),
        ({"img_size": (32, -32)}, "model.img_size must be positive"),
        ({"mean_std": "mean"}, r"model.mean_std must be auto or \[means, deviations\], got mean"),
        ({"in_chans": 4, "mean_std": ((0.5,) * 3, (0.5,) * 3)}, "holds 3 means and 3 deviations for model.in_chans 4"),
    ],
)
def test_sizes_and_channels_that_cannot_be(model, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(model=ModelConfig(**model))


def test_labels_is_a_flag():
    assert present_flags(["--labels", "x.csv", "--seed", "1"]) == ["--evaluation.labels", "x.csv", "--seed", "1"]


@pytest.mark.parametrize(("size", "patch"), [(64, 8), ([64, 96], 8), ([60, 100], 4), (224, 14)])
def test_settings_that_are_chosen_fit_the_size_that_is_named(size, patch):
    base, given = from_dict(read_recipe("own_images")), {"model.img_size": size, "model.in_chans": 2}
    chosen = own_images(base, Images(500, 300), torch.device("cpu"), lambda device: 1e10, given)
    assert chosen["model.patch_size"] == patch and "model.img_size" not in chosen


def test_pictures_and_baselines_of_any_channels_and_depth():
    eight = torch.randint(0, 256, (3, 5, 8, 8), dtype=torch.uint8)
    sixteen = (eight.int() * 257).to(torch.uint16)
    assert np.array_equal(pictures_of(eight), pictures_of(eight[:, :3]))
    assert_close(pictures_of(sixteen), pictures_of(eight))
    assert np.array_equal(pictures_of(eight[:, :1])[..., 2], pictures_of(eight)[..., 0])
    assert_close(pixel_features(sixteen), pixel_features(eight))
    assert colour_histogram(eight).shape == (3, 40) and colour_histogram(eight[:, :1]).shape == (3, 8)
    assert_close(colour_histogram(sixteen[:, :2]), colour_histogram(eight[:, :2]))


def grey_sixteen(root, count=20):
    """12-bit values in 16-bit files, of two classes, in train/ and test/."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(count):
            values = rng.integers(0, 2000, (40, 60)) + 1000 * (number % 2)
            path = root / split / ("ant", "bee")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(Image.fromarray(values.astype(np.uint16))))
    return root


def grey_run(data, output, **train):
    config = tiny_run(data, output, **train)
    return replace(
        config,
        model=replace(config.model, img_size=(24, 32), in_chans=1, mean_std="auto"),
        loader=replace(config.loader, value_range=(0.0, 4095.0)),
    )


def test_a_run_on_sixteen_bit_grey_from_start_to_export(tmp_path):
    data, output = grey_sixteen(tmp_path / "data"), tmp_path / "run"
    config = grey_run(data, output, steps=2)
    config = replace(config, evaluation=replace(config.evaluation, results="all"))
    summary = pretrain(config)
    assert summary["after"].keys() == {"knn", "probe", "rank"} and not summary["bad_files"]
    written = json.loads((output / "config.yaml").read_text())
    ((mean,), (std,)) = written["model"]["mean_std"]
    assert 0.3 < mean < 0.42 and 0.1 < std < 0.2 and written["model"]["img_size"] == [24, 32]
    model, trained, _ = load_trained(output)
    assert model.target_encoder.grid == (6, 8) and model.target_encoder.patch_embed.mean == [mean]

    # The data has moved, and mean and deviation are those that were measured then.
    shutil.move(data, tmp_path / "moved")
    longer = replace(config, data=str(tmp_path / "moved"), train=replace(config.train, steps=4))
    longer = replace(longer, evaluation=replace(longer.evaluation, results="none"))
    assert pretrain(longer)["steps"] == 4
    assert load_trained(output)[1].model.mean_std == ((mean,), (std,))
    with pytest.raises(CheckpointError, match="loader.value_range"):
        pretrain(replace(longer, loader=replace(longer.loader, value_range=None)))

    print(export(output, "safetensors", tmp_path / "encoder.safetensors"))
    loaded = load_any(tmp_path / "encoder.safetensors")
    images = OPENED_BY["classes"](str(tmp_path / "moved"), None, Options(), loaded.images(own=False))
    assert images.train.pixels.value_range == [0, 4095] and images.train.pixels.channels == 1
    with pytest.raises(ValueError, match="tasks with masks are for encoders of 8-bit RGB"):
        OPENED_BY["masks"](str(tmp_path / "moved"), None, Options(), loaded.images(own=False))
    loaded = load_any(output)
    assert loaded.pixels == {"channels": 1, "value_range": (0.0, 4095.0), "max_pixels": config.loader.max_pixels}


def test_the_processor_of_transformers_maps_the_stated_range(tmp_path):
    transformers = pytest.importorskip("transformers")
    from ijepa_fast.interop.huggingface import save_huggingface
    from ijepa_fast.interop.import_weights import import_weights
    from ijepa_fast.weights.huggingface import read_folder, value_range_of

    model = ModelConfig(
        img_size=16, patch_size=8, in_chans=1, embed_dim=16, depth=1, num_heads=2, mean_std=((0.3,), (0.2,))
    )
    save_huggingface(
        replace(model, predictor_embed_dim=8).build(Objective()).target_encoder, tmp_path / "a", (-1000, 3000)
    )
    said = json.loads((tmp_path / "a" / "preprocessor_config.json").read_text())
    assert value_range_of(tmp_path / "a") == (-1000, 3000)
    assert read_folder(tmp_path / "a").patch_embed.mean == pytest.approx([0.3])
    assert load_any(tmp_path / "a").images(own=False) == {"channels": 1, "value_range": (-1000, 3000)}
    config = import_weights(tmp_path / "a", tmp_path / "run", RunConfig(), num_heads=2)[0]
    assert config.loader.value_range == (-1000, 3000) and config.model.in_chans == 1
    transformers.AutoImageProcessor.from_pretrained(tmp_path / "a")
    value = 500.0
    theirs = (value * said["rescale_factor"] - said["image_mean"][0]) / said["image_std"][0]
    assert theirs == pytest.approx(((value + 1000) / 4000 - 0.3) / 0.2)


def test_labels_of_a_table_reach_the_run(tmp_path):
    write_folder(tmp_path / "data" / "train", 20, classes=None)
    write_folder(tmp_path / "data" / "test", 10, classes=None)
    table = tmp_path / "labels.csv"
    rows = [f"{split}/{n:03d}.png,{'ab'[n % 2]}" for split, n in (("train", 20), ("test", 10)) for n in range(n)]
    table.write_text("\n".join(rows))
    config = tiny_run(tmp_path / "data", tmp_path / "run", steps=4)
    pretrain(replace(config, evaluation=replace(config.evaluation, labels=str(table))))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["knn"] is not None
    assert open_sources(**load_trained(tmp_path / "run")[1].images).test.classes == ["a", "b"]
