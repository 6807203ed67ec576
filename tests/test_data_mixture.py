"""Mixtures: which image is the n-th of a run, whatever the ranks, workers and restarts."""

import io
import tarfile
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from image_files import write_folder
from PIL import Image
from tiny import tiny_run

from ijepa_fast.config import from_dict
from ijepa_fast.data import ImageFolder, Mixture, TrainLoader
from ijepa_fast.data.bands import Pixels
from ijepa_fast.data.datasets import open_sources
from ijepa_fast.data.indexed import write_index
from ijepa_fast.data.order import epoch_permutation
from ijepa_fast.run.callbacks import Callback
from ijepa_fast.run.checkpoint import CheckpointError
from ijepa_fast.train import pretrain
from ijepa_fast.weights.runs import load_run

SEED = 3


class Numbered:
    """A source of so many images, none of which is ever opened."""

    labels = classes = None

    def __init__(self, count):
        self.count, self.fingerprint = count, f"numbered:{count}"

    def __len__(self):
        return self.count


def sequence(mixture, count, batch=40, first=0):
    """(source, image of it, its epoch) of the images ``first`` to ``count``."""
    steps = [mixture.sample_indices(step, batch, SEED) for step in range(first // batch, count // batch)]
    indices, epochs = (np.concatenate([getattr(step, name) for step in steps]) for name in ("indices", "epochs"))
    ends = np.cumsum([len(source) for source in mixture.sources])
    sources = np.searchsorted(ends, indices, side="right")
    return sources, indices - (ends - np.diff(ends, prepend=0))[sources], epochs


@pytest.mark.parametrize(
    "weights", [(1, 1), (0.7, 0.3), (2, 1, 1), (5, 3, 0.5, 1.5), (1, 1000), (1 / 3, 1), (1, 1, 1, 1, 1, 1, 1)]
)
def test_every_stretch_has_its_shares(weights):
    mixture = Mixture([Numbered(17 + 5 * number) for number in range(len(weights))], weights)
    assert np.allclose(mixture.shares, np.array(weights) / sum(weights), rtol=1e-12)
    sources, _, _ = sequence(mixture, 20_000)
    for number, share in enumerate(mixture.shares):
        counts = np.concatenate([[0], np.cumsum(sources == number)])
        for length in (10, 137, 2000, 20_000):
            had = counts[length:] - counts[:-length]
            assert np.abs(had - length * share).max() <= (1 if len(weights) == 2 else 2.5), (number, length)
    if weights == (0.7, 0.3):
        assert [int((sources[:n] == 0).sum()) for n in (10, 1000, 20_000)] == [7, 700, 14_000]


def test_each_source_keeps_the_order_of_its_epochs():
    mixture = Mixture([Numbered(7), Numbered(150), Numbered(31)], (1, 5, 2))
    sources, images, epochs = sequence(mixture, 4000)
    for number, source in enumerate(mixture.sources):
        mine, when = images[sources == number], epochs[sources == number]
        alone = [image for epoch in range(when[-1] + 1) for image in epoch_permutation(SEED, epoch, len(source))]
        assert mine.tolist() == alone[: len(mine)]
        assert when.tolist() == (np.arange(len(mine)) // len(source)).tolist()


@pytest.mark.parametrize("batch", [1, 8, 250, 1000])
def test_the_batch_changes_nothing_and_any_step_comes_at_once(batch):
    sources = [Numbered(70), Numbered(333)]
    whole = sequence(Mixture(sources, (0.3, 0.7)), 2000)
    for one, other in zip(whole, sequence(Mixture(sources, (0.3, 0.7)), 2000, batch), strict=True):
        assert np.array_equal(one, other)
    for one, other in zip(whole, sequence(Mixture(sources, (0.3, 0.7)), 2000, batch, 1000), strict=True):
        assert np.array_equal(one[1000:], other)


def test_ten_billion_images_later():
    mixture = Mixture([Numbered(70), Numbered(333)], (1 / 3, 0.123456789))
    step, batch = 10**7, 1024
    indices, epochs = mixture.sample_indices(step, batch, SEED)[2:]
    before = step * batch * mixture.shares[0] / 70
    assert abs(epochs[indices < 70][0] - before) < 2
    one, other = (mixture.sample_indices(at, batch // 2, SEED).indices for at in (2 * step, 2 * step + 1))
    assert np.array_equal(np.concatenate([one, other]), indices)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    places = [tmp_path_factory.mktemp(name) for name in ("few", "many", "plain")]
    write_folder(places[0], 6)
    write_folder(places[1], 14)
    write_folder(places[2], 8, classes=())
    return places


def loader(folders, rank=0, world_size=1, workers=0, start=0, steps=8):
    mixture = Mixture([ImageFolder(folder) for folder in folders], (1, 2, 1))
    at = {"rank": rank, "world_size": world_size, "workers": workers, "start_step": start, "num_steps": steps - start}
    return list(TrainLoader(mixture, image_size=16, global_batch=8, seed=SEED, **at))


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("images", "labels", "indices"))


def test_ranks_workers_and_restarts_see_the_same_crops(folders):
    whole = loader(folders)
    for batch, *parts in zip(whole, *(loader(folders, rank, 2, workers=1) for rank in range(2)), strict=True):
        for name in ("images", "labels", "indices"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(part, name) for part in parts]))
    assert all(map(same, whole[5:], loader(folders, start=5)))
    # The six images of the first source come round: none looks as it did an epoch before.
    seen = [(index, crop) for b in whole for index, crop in zip(b.indices.tolist(), b.images, strict=True)]
    again = [[crop for index, crop in seen if index == number] for number in range(6)]
    assert all(len(crops) > 1 for crops in again)
    assert not any(torch.equal(one, other) for crops in again for one, other in pairwise(crops))


def test_a_bad_image_is_replaced_by_one_of_its_source(folders, tmp_path):
    write_folder(tmp_path, 3, classes=())
    (tmp_path / "bad.png").write_bytes(b"no image")
    mixture = Mixture([ImageFolder(tmp_path), ImageFolder(folders[1])], (1, 1))
    settings = {"image_size": 16, "global_batch": 8, "seed": SEED, "max_bad_share": 0.5, "num_steps": 6}
    batches = list(TrainLoader(mixture, **settings))
    assert any(batch.failures for batch in batches)
    for batch in batches:
        assert (batch.indices < 4).sum() == 4


def test_labels_stay_where_all_have_the_same_classes(folders, caplog):
    few, many, plain = map(ImageFolder, folders)
    mixture = Mixture([few, many], (1, 1))
    assert mixture.classes == ["ant", "bee"]
    assert mixture.labels.tolist() == few.labels.tolist() + many.labels.tolist()
    with mixture.open(6) as image, many.open(0) as other:
        assert image.tobytes() == other.tobytes()
    assert mixture.describe(19) == many.describe(13)
    caplog.set_level("INFO")
    without = Mixture([few, plain], (1, 1), ["few", "plain"])
    assert without.labels is None and without.classes is None
    assert "do not all have the same classes, so labels are not used: plain differs" in caplog.text
    with pytest.raises(IndexError):
        mixture.open(20)


def test_the_fingerprint_knows_sources_shares_and_their_order(folders):
    few, many, _ = map(ImageFolder, folders)
    prints = [Mixture(*parts).fingerprint for parts in (([few, many], (1, 2)), ([few, many], (2, 1)),
                                                        ([many, few], (2, 1)), ([few, many], (2, 4)))]  # fmt: skip
    assert prints[0] == prints[3] and len(set(prints)) == 3


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "2", True, None])
def test_weights_are_positive_numbers(weight, tmp_path):
    parts = [{"path": str(tmp_path / "not there")}, {"path": "b", "weight": weight}]
    with pytest.raises(ValueError, match=r"the weight of b must be a positive number, got"):
        open_sources(parts)


def test_what_cannot_be_mixed(folders):
    few, many = (ImageFolder(folder) for folder in folders[:2])
    with pytest.raises(ValueError, match="less than a millionth of all, got 1"):
        Mixture([few, many], (1, 10**7))
    with pytest.raises(ValueError, match="got 2 and 1"):
        Mixture([few, many], (1,))
    many.pixels = Pixels(channels=1)
    with pytest.raises(ValueError, match=r"the pixels of source 1 are Pixels\(channels=1"):
        Mixture([few, many], (1, 1))
    with pytest.raises(FileNotFoundError, match="not there"):
        open_sources([{"path": str(folders[0])}, {"path": "not there"}])
    with pytest.raises(ValueError, match="is read front to back and cannot be mixed"):
        open_sources([{"path": str(folders[0])}, {"path": "pipe:cat x.tar"}])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], r"a list of \{path: PLACE, weight: NUMBER\}, got \(\)"),
        (["a"], r"each part of data must be \{path: PLACE, weight: NUMBER\}, got 'a'"),
        ([{"path": "a", "wieght": 1}], "got .*wieght"),
        ([{"weight": 1}], "got .*weight"),
        ([{"path": "a"}, {"pth": "b"}], "got .*pth"),
        ([{"path": "a"}, "b"], "got 'b'"),
        ([{"path": "rendered"}], "not 'rendered'"),
        ([{"path": "a"}, {"path": "a", "weight": 2}], "data names a twice"),
        ({"path": "a"}, "must be a place, or a list"),
        (3, "must be a place, or a list"),
    ],
)
def test_settings_that_name_no_mixture(data, said):
    with pytest.raises(ValueError, match=said):
        from_dict({"data": data})


def test_settings_name_a_mixture(folders, caplog):
    caplog.set_level("INFO")
    data = [{"path": str(folders[0]), "weight": 3}, {"path": str(folders[1])}]
    config = from_dict({"data": data})
    assert config.data == ({"path": str(folders[0]), "weight": 3}, {"path": str(folders[1]), "weight": 1})
    train, test = open_sources(**config.images)
    assert (len(train), train.shares, test) == (20, [0.75, 0.25], None)
    assert f"75 % of the images come from {folders[0]}, which has 6" in caplog.text


def test_folders_lists_shards_and_indexes_together(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = sorted(folders[1].rglob("*.png"))
    (tmp_path / "list.csv").write_text("".join(f"{path},{path.parent.name}\n" for path in files))
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for number, path in enumerate(files[4:9]):
                tar.add(path, f"{number}.png")
                about = tarfile.TarInfo(f"{number}.cls")
                about.size = 3
                tar.addfile(about, io.BytesIO(path.parent.name.encode()))
    write_index([tmp_path / "b.tar"], tmp_path / "b.index.npz")
    places = [folders[0], tmp_path / "list.csv", tmp_path / "a.tar", (tmp_path / "b.index.npz").as_uri()]
    train, _ = open_sources([{"path": str(place)} for place in places])
    kinds = [type(source).__name__ for source in train.sources]
    assert kinds == ["ImageFolder", "ImageList", "TarShards", "IndexedShards"]
    assert (len(train), train.classes) == (6 + 14 + 5 + 5, ["ant", "bee"])
    with train.open(20) as one, train.open(25) as other, Image.open(files[4]) as expected:
        assert one.tobytes() == other.tobytes() == expected.tobytes()
    (batch,) = TrainLoader(train, image_size=16, global_batch=8, seed=SEED, num_steps=1)
    counts = [sum(low <= i < high for i in batch.indices.tolist()) for low, high in pairwise((0, 6, 20, 25, 30))]
    assert counts == [2, 2, 2, 2] and not batch.failures


def test_a_run_on_a_mixture_resumes_and_refuses_other_weights(folders, tmp_path):
    parts = [{"path": str(folders[0]), "weight": 0.7}, {"path": str(folders[1]), "weight": 0.3}]
    config = replace(tiny_run(str(folders[0]), tmp_path / "whole", steps=4), data=parts)
    assert pretrain(config)["steps"] == 4
    halves = replace(config, output=str(tmp_path / "halves"), train=replace(config.train, save_every=2))

    def interrupt(_self, _run, _path):
        raise KeyboardInterrupt

    first = type("Stop", (Callback,), {"on_save": interrupt})()
    with pytest.raises(KeyboardInterrupt):
        pretrain(halves, [first])
    assert pretrain(halves)["steps"] == 4
    weights = [load_run(tmp_path / name)[0].state_dict() for name in ("whole", "halves")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(CheckpointError, match="20 as well, but files or weights of"):
        pretrain(replace(halves, data=[parts[0], parts[1] | {"weight": 0.4}]))
