"""The command evaluate, features and neighbours: encoders of any origin, judged on scenes with known answers."""

import importlib.util
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from gaussian_classes import blobs
from PIL import Image
from rendered_scenes import CLASSES, SIDE, scene, trained_encoder, write_classes

from ijepa_fast import cli
from ijepa_fast.config import ModelConfig, RunConfig
from ijepa_fast.data import ImageFolder
from ijepa_fast.downstream import store
from ijepa_fast.downstream.classify import classifier, drawn, open_classes
from ijepa_fast.downstream.command import evaluate
from ijepa_fast.downstream.embed import nearest
from ijepa_fast.downstream.encoders import digest, load_any, untrained
from ijepa_fast.downstream.results import table
from ijepa_fast.downstream.subject import Options, Subject
from ijepa_fast.downstream.tasks import named_tasks
from ijepa_fast.evaluate import linear_probe
from ijepa_fast.interop.huggingface import to_huggingface
from ijepa_fast.jepa_model import JEPAModel
from ijepa_fast.model.jepa import Objective
from ijepa_fast.weights.encoder_file import save_encoder
from ijepa_fast.weights.runs import save_run

needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
QUICK = Options(workers=0, draws=2, shots="10%,5")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("scenes"), train=240, test=120)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "trained.safetensors"
    save_encoder(path, trained_encoder(), {"encoder": "target"})
    return path


def beats(entry, label, margin=0.1):
    """Whether a figure is well above chance and above that of the untrained encoder."""
    figure = entry["trained"]["figures"][label]
    others = entry["untrained"]["figures"][label], entry["trained"]["chance"][label]
    return figure > max(others) + margin


@pytest.mark.parametrize("tasks", ["knn,linear", pytest.param("lowshot", marks=needs_sklearn)])
def test_tasks_beat_chance_and_the_untrained_encoder_once(scenes, weights, tmp_path, monkeypatch, tasks):
    loaded = load_any(weights)
    report = evaluate(loaded, tasks, str(scenes), options=QUICK, out=tmp_path, device="cpu", compare=True)
    for name in tasks.split(","):
        for label in report["tasks"][name]["trained"]["figures"]:
            assert beats(report["tasks"][name], label), table(report)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == report
    assert (tmp_path / "evaluation.md").read_text() == table(report)
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")

    # What is there is not computed again, other tasks take the features that are there, other settings do not.
    monkeypatch.setattr(store, "EvalLoader", None)
    assert evaluate(loaded, tasks, str(scenes), options=QUICK, out=tmp_path, device="cpu", compare=True) == report
    again = evaluate(loaded, "knn", str(scenes), options=replace(QUICK, seed=1), out=tmp_path, device="cpu")
    assert set(again["tasks"]) == {*tasks.split(","), "knn"} and "untrained" not in again["tasks"]["knn"]
    with pytest.raises(TypeError):
        evaluate(loaded, "knn", str(scenes), options=replace(QUICK, image_size=40), out=tmp_path, device="cpu")
    # Results of other weights are not those of these.
    monkeypatch.undo()
    other = replace(loaded, encoder=untrained(loaded.encoder))
    assert set(evaluate(other, "knn", str(scenes), options=QUICK, out=tmp_path, device="cpu")["tasks"]) == {"knn"}


def averages(images):
    encoder = trained_encoder()
    with torch.no_grad():
        return encoder(images).mean(1)


def extracted(folder, source, function=averages):
    options = {"image_size": SIDE, "resize_ratio": 1.0, "key": {"of": 1}}
    return store.extract(folder, source, function, torch.device("cpu"), **options)


def test_features_are_those_of_the_encoder_to_the_bit(scenes, tmp_path):
    source = ImageFolder(scenes / "train")
    features = extracted(tmp_path, source)
    images = torch.stack([torch.from_numpy(np.array(source.open(i))).permute(2, 0, 1) for i in range(len(source))])
    expected = torch.cat([averages(some) for some in images.split(store.BATCH)])
    assert torch.equal(features.values, expected)
    assert features.labels.tolist() == source.labels.tolist() and features.indices.tolist() == list(range(240))


def test_features_continue_after_a_stop_and_leave_out_bad_files(tmp_path, monkeypatch):
    root = tmp_path / "images"
    for number in range(194):
        (root / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(number)[0]).save(root / "ab"[number % 2] / f"{number:03d}.png")
    for bad in ("099", "191", "193"):  # the last two are all that is left after the second stop
        (root / "b" / f"{bad}.png").write_bytes(b"no image")
    source = ImageFolder(root)
    stops, seen, opened = [192, 130], [], source.open

    def stopping(index):
        if stops and index == stops[-1]:
            stops.pop()
            raise KeyboardInterrupt
        return opened(index)

    def noting(images):
        seen.append(len(images))
        return averages(images)

    monkeypatch.setattr(source, "open", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            extracted(tmp_path / "stopped", source, noting)
    features = extracted(tmp_path / "stopped", source, noting)
    assert seen == [64, 64, 63]
    whole = extracted(tmp_path / "whole", source)
    assert torch.equal(features.values, whole.values) and torch.equal(features.indices, whole.indices)
    assert len(features.indices) == 191 and 146 not in features.indices
    assert "099.png" in (tmp_path / "stopped" / "bad.txt").read_text()


def formats(root, encoder):
    """Paths with the weights of one encoder, by format."""
    state = encoder.state_dict()
    torch.save({"state_dict": state}, root / "timm.pth")
    torch.save({"encoder": untrained(encoder).state_dict(), "target_encoder": state}, root / "both.pth.tar")
    to_huggingface(encoder).save_pretrained(root / "hf")
    save_encoder(root / "own.safetensors", encoder)
    shape = {"img_size": SIDE, "patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3}
    config = RunConfig(model=ModelConfig(**shape, predictor_embed_dim=12, predictor_depth=1))
    model = config.model.build(Objective())
    model.target_encoder.load_state_dict(state)
    save_run(root / "run", model, config, 7)
    jepa = JEPAModel({"img_size": SIDE, "patch_size": 4, "encoder_dim": 192, "encoder_depth": 12, "encoder_heads": 3})
    jepa.target_encoder.load_state_dict(state)
    jepa.save(root / "jepa.safetensors")
    return [root / name for name in ("timm.pth", "both.pth.tar", "hf", "own.safetensors", "run", "jepa.safetensors")]


def test_every_format_gives_the_same_encoder(tmp_path):
    torch.manual_seed(0)
    encoder = type(trained_encoder())(SIDE, 4, embed_dim=192, depth=12, num_heads=3).eval()
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    kinds = set()
    for path in formats(tmp_path, encoder):
        loaded = load_any(path)
        kinds.add(loaded.about["kind"])
        assert torch.equal(loaded.encoder(images), encoder(images)), path
        assert digest(loaded.encoder) == digest(encoder), path
    assert len(kinds) == 6
    assert load_any(tmp_path / "run").about["step"] == 7
    assert load_any(tmp_path / "run").results == tmp_path / "run" / "evaluation"
    context = load_any(tmp_path / "both.pth.tar", "context").encoder
    assert torch.equal(context(images), untrained(encoder)(images))


def test_draws_hold_what_was_asked_for_and_differ():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3 + [-1] * 5)
    assert labels[drawn(labels, "5", 0, 0)].bincount().tolist() == [5, 5, 3]
    assert labels[drawn(labels, "10%", 0, 0)].bincount().tolist() == [5, 3, 1]
    first = drawn(labels, "5", 0, 0)
    assert torch.equal(first, drawn(labels, "5", 0, 0)) and first.unique().numel() == len(first)
    assert not torch.equal(first, drawn(labels, "5", 0, 1)) and not torch.equal(first, drawn(labels, "5", 1, 0))


@needs_sklearn
def test_linear_probe_and_lowshot_agree_with_scikit_learn(scenes, weights, tmp_path):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, labels = blobs(1500, 24, 6, 3.5, seed=1)
    test, answers = blobs(6000, 24, 6, 3.5, seed=2)
    scaler = StandardScaler().fit(train)
    for decay in (1e-2, 1e-1):
        ours = linear_probe(train, labels, test, answers, weight_decays=[decay]).accuracy
        model = LogisticRegression(C=1 / (decay * len(train)), max_iter=1000).fit(scaler.transform(train), labels)
        assert abs(ours - model.score(scaler.transform(test), answers)) <= 0.002
        assert 0.5 < ours < 0.95

    options = replace(QUICK, shots="3", draws=1)
    report = evaluate(load_any(weights), "lowshot", str(scenes), options=options, out=tmp_path, device="cpu")
    loaded = load_any(weights)
    sources = open_classes(str(scenes), None, options, {})
    subject = Subject(loaded.encoder, "w", sources, tmp_path / "own", options, loaded.resize_ratio)
    fit, tested = subject.features("train"), subject.features("test")
    rows = drawn(fit.labels, "3", 0, 0)
    model = classifier().fit(fit.values[rows].numpy(), fit.labels[rows].numpy())
    expected = model.score(tested.values.numpy(), tested.labels.numpy())
    assert report["tasks"]["lowshot"]["trained"]["figures"]["3"] == pytest.approx(expected, abs=1e-9)


def test_bad_input_is_an_error_before_features_are_taken(scenes, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "EvalLoader", None)
    folders = ["one/train/a", "one/val/a", "flat", "empty/train/a", "empty/train/b"]
    folders += [f"few/{name}" for name in ("train/a", "train/b", "val/a")]
    for name in [*folders, "new/train/a", "new/train/b", "new/val/c"]:
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(scene(0)[0]).save(tmp_path / name / "1.png")
    (tmp_path / "empty/val/a").mkdir(parents=True)
    few = f"3 training images are fewer than the {CLASSES} classes"
    for arguments, message in (
        (["--data", str(tmp_path / "one")], "no classes"),
        (["--data", str(tmp_path / "flat")], "no classes"),
        (["--data", str(tmp_path / "empty")], "no labelled test images"),
        (["--data", str(tmp_path / "new")], "no labelled test images"),
        (["--data", str(tmp_path / "new/train"), "--test", str(tmp_path / "new/val")], "outside the classes"),
        (["--data", str(tmp_path / "few"), "--tasks", "linear"], "needs a class of two training images; there are 2"),
        (
            ["--data", str(tmp_path / "few"), "--tasks", "attentive"],
            "needs a class of two training images; there are 2",
        ),
        (["--data", str(scenes), "--limit", "3"], few),
        (["--data", str(scenes), "--limit", "0"], "limit must be at least 1, got 0"),
        (["--data", str(scenes), "--depth_scale", "0"], "depth_scale must be positive, got 0"),
        (["--data", str(scenes), "--tasks", "knn,liner"], "no task 'liner'; did you mean linear?"),
        (["--data", str(scenes), "--tasks", ","], "no task is named"),
        (["--data", str(scenes), "--layers", "last4"], "layers last4 needs an encoder of 4 blocks, this one has 2"),
        (["--data", str(scenes), "--image_size", "30"], "cannot be cut into patches of 4 px"),
        (["--data", str(scenes), "--shots", "1%,x"], "got 'x'"),
        ([], "no images are given"),
    ):
        assert cli.main(["evaluate", str(weights), *arguments, "--out", str(tmp_path / "out")]) in (1, 2)
        assert message in " ".join(capsys.readouterr().err.split()), arguments
    assert cli.main(["evaluate", str(tmp_path / "none"), "--data", str(scenes)]) == 1
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["evaluate", str(weights), "--data", str(scenes), "--tasks", "lowshot"]) == 1
    assert "pip install -e '.[evaluate]'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no task"):
        named_tasks("")


def test_features_command_writes_what_it_names(scenes, weights, tmp_path, capsys):
    (tmp_path / "set" / "a").mkdir(parents=True)
    for number in range(5):
        Image.fromarray(scene(number)[0]).save(tmp_path / "set" / "a" / f"{number}.png")
    (tmp_path / "set" / "a" / "9.png").write_bytes(b"no image")
    out = tmp_path / "f.npz"
    common = ["--data", str(tmp_path / "set"), "--workers", "0", "--device", "cpu"]
    assert cli.main(["features", str(weights), *common, "--out", str(out), "--patches", "true"]) == 0
    written = np.load(out)
    assert written["features"].shape == (5, 64, 32) and written["labels"].tolist() == [""] * 5
    assert [path[-5:] for path in written["paths"]] == [f"{number}.png" for number in range(5)]
    assert "9.png" in (tmp_path / "f.npz.bad.txt").read_text() and not (tmp_path / "f.npz.work").exists()
    assert cli.main(["features", str(weights), *common, "--out", str(tmp_path / "f.csv")]) == 1
    assert "written as .npz or .parquet" in capsys.readouterr().err
    assert cli.main(["features", "none", "--out", str(out), "--patches", "true", "--layers", "last4"]) == 1
    assert "--layers last4 averages of four" in capsys.readouterr().err


@needs_pyarrow
def test_features_as_parquet(scenes, weights, tmp_path):
    import pyarrow.parquet

    common = ["--data", str(scenes), "--limit", "70", "--workers", "0", "--device", "cpu"]
    for out in ("f.npz", "f.parquet"):
        assert cli.main(["features", str(weights), *common, "--out", str(tmp_path / out)]) == 0
    npz, rows = np.load(tmp_path / "f.npz"), pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pydict()
    assert np.array_equal(np.array(rows["feature"], np.float32), npz["features"])
    assert rows["path"] == npz["paths"].tolist() and rows["label"] == npz["labels"].tolist()


def test_neighbours_are_the_most_similar_in_parts_as_in_one(scenes, weights, tmp_path, monkeypatch, capsys):
    features = torch.nn.functional.normalize(torch.randn(100, 6), dim=1)
    similarity = features[:3] @ features.T
    expected = similarity.topk(5, dim=1)
    monkeypatch.setattr("ijepa_fast.downstream.embed._ROWS_AT_ONCE", 7)
    rows, values = nearest(features, features[:3], 5)
    assert torch.equal(rows, expected.indices) and rows[:, 0].tolist() == [0, 1, 2]
    torch.testing.assert_close(values, expected.values)

    image = scenes / "train" / "class1" / "00001.png"
    command = ["neighbours", str(weights), "--data", str(scenes), "--image", str(image), "--k", "4", "--workers", "0"]
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(image) and lines[1] == f"  1.000 {image}" and lines[-1] == "neighbours.png"
    assert sum("class1" in line for line in lines[1:5]) >= 3
    assert (tmp_path / "neighbours.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*command[:4], "--image", str(tmp_path / "no.png"), "--device", "cpu"]) == 1
    assert "no.png" in capsys.readouterr().err
