"""Data sets of Hugging Face and parquet files."""

import io
import pickle
import sys

import numpy as np
import pytest
import torch
from image_files import encoded, smooth_image, write_folder
from PIL import Image

from ijepa_fast.data import TrainLoader
from ijepa_fast.data.datasets import open_sources
from ijepa_fast.data.tables import TableImages, names_table

CLASSES = ["ant", "bee", "cow"]
FILES = [encoded(smooth_image(40 + number, 36, seed=number), "JPEG") for number in range(12)]


@pytest.fixture(autouse=True)
def _no_cache_of_others(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def dataset(rows=range(12), labels=True, typed=True):
    import datasets

    columns = {"number": list(rows), "picture": [{"bytes": FILES[row], "path": f"{row}.jpg"} for row in rows]}
    features = {"number": datasets.Value("int64"), "picture": datasets.Image()}
    if labels:
        columns["label"] = [row % 3 for row in rows]
        features["label"] = datasets.ClassLabel(names=CLASSES) if typed else datasets.Value("int64")
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def pixels(image):
    return np.asarray(image.convert("RGB"))


def holds(source, rows):
    assert len(source) == len(rows)
    for index, row in enumerate(rows):
        with source.open(index) as image:
            assert np.array_equal(pixels(image), pixels(Image.open(io.BytesIO(FILES[row]))))


def test_a_saved_data_set(tmp_path):
    dataset().save_to_disk(tmp_path / "set")
    train, test = open_sources(str(tmp_path / "set"))
    holds(train, range(12))
    assert (train.classes, test) == (CLASSES, None)
    assert train.labels.tolist() == [row % 3 for row in range(12)] and train.labels.dtype == np.int64
    assert train.describe(4).endswith("set: row 4 (4.jpg)")
    with pytest.raises(IndexError, match="image 12 of 12"):
        train.open(12)


def test_splits_of_a_saved_set(tmp_path):
    import datasets

    parts = {"train": dataset(range(8)), "validation": dataset(range(8, 12)), "test": dataset(range(2))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    train, test = open_sources(str(tmp_path / "set"))
    holds(train, range(8))
    holds(test, range(8, 12))
    assert test.labels.tolist() == [row % 3 for row in range(8, 12)]
    datasets.DatasetDict({"old": dataset(range(8)), "new": dataset()}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="has no split train, or several to choose from: old, new"):
        open_sources(str(tmp_path / "other"))


@pytest.mark.parametrize("where", ["", "data/", "split"])
def test_parquet_files_of_the_hub(tmp_path, where):
    names = {"train-00000-of-00002": range(5), "train-00001-of-00002": range(5, 9), "test-00000-of-00001": range(9, 12)}
    for name, rows in names.items():
        folder = tmp_path / "set" / (name.partition("-")[0] if where == "split" else where)
        folder.mkdir(parents=True, exist_ok=True)
        dataset(rows).to_parquet(folder / f"{name}.parquet")
    train, test = open_sources(str(tmp_path / "set"))
    holds(train, range(9))
    holds(test, range(9, 12))
    assert train.classes == test.classes == CLASSES


def test_parquet_files_of_others(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({"id": range(12), "image": FILES, "class_name": ["b", "a", None] * 4})
    pyarrow.parquet.write_table(table, tmp_path / "some.parquet", row_group_size=5)
    train, _ = open_sources(str(tmp_path))
    holds(train, range(12))
    assert train.classes == ["a", "b"] and train.labels.tolist() == [1, 0, -1] * 4
    pyarrow.parquet.write_table(table.drop_columns(["class_name"]), tmp_path / "some.parquet")
    assert open_sources(str(tmp_path)).train.labels is None
    pyarrow.parquet.write_table(pa.table({"id": range(12)}), tmp_path / "some.parquet")
    with pytest.raises(ValueError, match="has no column of images; its columns are id"):
        open_sources(str(tmp_path))


def test_whole_numbers_are_classes_by_their_value():
    source = TableImages(dataset([9, 10, 11, 0], typed=False))
    assert source.classes == ["0", "1", "2"] and source.labels.tolist() == [0, 1, 2, 0]
    of_test = TableImages(dataset([2], typed=False), classes=["0", "1", "2"])
    assert of_test.labels.tolist() == [2]
    with pytest.raises(ValueError, match=r"outside the classes \['0', '1'\]: in \['2'\]"):
        TableImages(dataset([2], typed=False), classes=["0", "1"])


def test_batches_are_those_of_the_same_files_in_a_folder(tmp_path):
    for row, data in enumerate(FILES):
        (tmp_path / f"{row:02d}.jpg").write_bytes(data)
    settings = {"image_size": 16, "global_batch": 4, "seed": 1, "num_steps": 6}
    source = TableImages(dataset(labels=False))
    folder = open_sources(str(tmp_path)).train
    for one, other, third in zip(
        TrainLoader(source, **settings, workers=1),
        TrainLoader(folder, **settings),
        TrainLoader(pickle.loads(pickle.dumps(source)), **settings),
        strict=True,
    ):
        assert torch.equal(one.images, other.images) and torch.equal(third.images, one.images)


def test_the_fingerprint_is_that_of_the_rows(tmp_path):
    dataset().save_to_disk(tmp_path / "one")
    dataset().to_parquet(tmp_path / "two" / "a.parquet")
    prints = [open_sources(str(tmp_path / name)).train.fingerprint for name in ("one", "two")]
    assert prints[0] == prints[1] and prints[0].startswith("table:12:")
    assert TableImages(dataset([*range(11), 0])).fingerprint != prints[0]
    turned = dataset().select(list(reversed(range(12))))
    assert TableImages(turned).fingerprint == TableImages(dataset(list(reversed(range(12))))).fingerprint != prints[0]
    holds(TableImages(turned), list(reversed(range(12))))


def test_a_row_without_an_image_is_bad(tmp_path):
    import datasets

    rows = dataset().to_dict()
    rows["picture"] = [None if number == 3 else {"bytes": FILES[number], "path": None} for number in range(12)]
    source = TableImages(datasets.Dataset.from_dict(rows, dataset().features))
    loader = TrainLoader(source, image_size=16, global_batch=12, seed=0, num_steps=1, max_bad_share=0.5)
    (batch,) = loader
    assert 3 not in batch.indices and list(loader.bad.values()) == ["ValueError: the row has no image"]


def test_a_folder_of_images_is_none(tmp_path):
    write_folder(tmp_path, 4)
    (tmp_path / "labels.parquet").write_bytes(b"")
    assert not names_table(str(tmp_path)) and not names_table(str(tmp_path / "nothing"))


def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(
        RuntimeError, match=r"need the package datasets; in the checkout: pip install -e '\.\[datasets\]'"
    ):
        open_sources(str(tmp_path))


@pytest.mark.parametrize("labels", [[-1] * 12, [1] * 12, [-1, 2] * 6], ids=["unknown", "one class", "one and unknown"])
def test_a_column_that_tells_no_two_classes_apart_is_none(labels):
    unlabelled = dataset().remove_columns("label").add_column("label", labels)
    train = TableImages(unlabelled.cast_column("label", type_of_label()))
    assert train.labels is None and train.classes is None


def test_test_images_without_any_class_are_left_out(tmp_path, caplog):
    import datasets

    test = dataset().remove_columns("label").add_column("label", [-1] * 12).cast_column("label", type_of_label())
    datasets.DatasetDict({"train": dataset(), "test": test}).save_to_disk(tmp_path / "set")
    train, test = open_sources(str(tmp_path / "set"))
    assert train.labels is not None and test is None
    assert "probe and final k-NN are left out" in caplog.text


def test_the_fingerprint_of_a_table_of_paths_is_of_the_paths(tmp_path):
    import datasets

    def of(*names):
        rows = {"image": [{"bytes": None, "path": name} for name in names]}
        return TableImages(datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image()}))).fingerprint

    assert len({of("a/0.png", "a/1.png"), of("b/0.png", "b/1.png"), of("a/1.png", "a/0.png")}) == 3
    bare = datasets.Dataset.from_dict({"image": [{"bytes": file} for file in FILES[:3]]})
    assert TableImages(bare).fingerprint == TableImages(bare).fingerprint
    holds(TableImages(bare.with_format("pandas")), range(3))


def test_folders_of_images_or_shards_are_no_tables(tmp_path):
    write_folder(tmp_path / "images", 4)
    (tmp_path / "images" / "dataset_info.json").write_text("{}")
    assert not names_table(str(tmp_path / "images"))
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("00000.tar", "00000.parquet"):
        (shards / name).write_bytes(b"")
    assert not names_table(str(shards))


def type_of_label():
    import datasets

    return datasets.ClassLabel(names=CLASSES)
