"""Tasks that train heads, or the encoder, and those on pixels: against scenes with known answers and hand counts."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_files import coordinate_image
from PIL import Image
from rendered_scenes import CLASSES, SIDE, scene, trained_encoder, write_classes, write_dense
from test_downstream import beats

from ijepa_fast import cli
from ijepa_fast.downstream import dense_data, heads, store, subject
from ijepa_fast.downstream.command import evaluate
from ijepa_fast.downstream.dense import confusion, depth_scores, patch_votes, scores
from ijepa_fast.downstream.dense_data import DenseLoader, Pairs, open_depth, open_masks
from ijepa_fast.downstream.encoders import Loaded, digest, load_any, untrained
from ijepa_fast.downstream.finetune import Classifier, Finetuning, finetune, layer_groups
from ijepa_fast.downstream.heads import Lars
from ijepa_fast.downstream.pyramid import SimpleFeaturePyramid
from ijepa_fast.downstream.results import table
from ijepa_fast.downstream.robustness import CORRUPTIONS, corrupted
from ijepa_fast.downstream.subject import Options, Subject
from ijepa_fast.weights.encoder_file import save_encoder

QUICK = Options(workers=0, epochs=5)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("classes"), train=160, test=80)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return Loaded(trained_encoder(), {"weights": "w", "kind": "k", "encoder": None}, tmp_path_factory.mktemp("results"))


def judged(loaded, tasks, data, out, options=QUICK, compare=True):
    return evaluate(loaded, tasks, str(data), options=options, out=out, device="cpu", compare=compare)


class Stop(Exception):
    pass


def test_heads_on_crops_beat_the_untrained_encoder_and_continue_after_a_stop(classes, loaded, tmp_path, monkeypatch):
    report = judged(loaded, "attentive", classes, tmp_path / "whole")
    assert beats(report["tasks"]["attentive"], "accuracy"), table(report)
    saved, write = [], heads.write_whole

    def stopping(*arguments):
        write(*arguments)
        saved.append(arguments)
        if len(saved) == 3:
            raise Stop

    monkeypatch.setattr(heads, "write_whole", stopping)
    with pytest.raises(Stop):
        judged(loaded, "attentive", classes, tmp_path / "stopped", compare=False)
    resumed = judged(loaded, "attentive", classes, tmp_path / "stopped", compare=False)
    assert len(saved) == QUICK.epochs
    kept = resumed["tasks"]["attentive"]["trained"], report["tasks"]["attentive"]["trained"]
    assert kept[0]["validation"] == kept[1]["validation"] and kept[0]["figures"] == kept[1]["figures"]


@pytest.mark.slow
def test_the_linear_protocol_beats_the_untrained_encoder(classes, loaded, tmp_path):
    report = judged(loaded, "linear_protocol", classes, tmp_path, replace(QUICK, epochs=20))
    assert beats(report["tasks"]["linear_protocol"], "accuracy"), table(report)
    # With batch norm or without, three rates, two decays, one block.
    assert len(report["tasks"]["linear_protocol"]["trained"]["validation"]) == 12


def test_heads_see_a_large_batch_in_parts(classes, loaded, tmp_path, monkeypatch):
    """A step of the linear protocol has up to 16,384 images: neither they nor their patch features fit in memory."""
    seen, reports = [], []
    pooled = Subject.pooled

    def watched(self, images, blocks=None):
        seen.append(len(images))
        return pooled(self, images, blocks)

    monkeypatch.setattr(Subject, "pooled", watched)
    for at_once in (16, 4):
        for module in (heads, subject):
            monkeypatch.setattr(module, "BATCH", at_once)
        options = replace(QUICK, epochs=1, limit=80)
        report = judged(loaded, "linear_protocol", classes, tmp_path / str(at_once), options, compare=False)
        reports.append(report["tasks"]["linear_protocol"]["trained"])
    assert max(seen) == 16 and max(seen[len(seen) // 2 :]) == 4 and reports[0]["batch"] == reports[1]["batch"] == 16
    assert reports[1]["validation"] == pytest.approx(reports[0]["validation"], abs=0.13)  # one of eight images


def test_lars_scales_steps_of_matrices_to_their_weights():
    weight, bias = torch.nn.Parameter(torch.full((2, 2), 2.0)), torch.nn.Parameter(torch.ones(2))
    optimizer = Lars([weight, bias], lr=0.5, weight_decay=0.25, momentum=0.5, trust=0.1)
    for expected_weight, expected_bias in ((1.9, 0.5), (1.755, -0.25)):
        weight.grad, bias.grad = torch.full((2, 2), 3.0), torch.ones(2)
        optimizer.step()
        # The direction of a constant gradient is constant: the step has trust * |w| as its length.
        torch.testing.assert_close(weight.data, torch.full((2, 2), expected_weight))
        torch.testing.assert_close(bias.data, torch.full((2,), expected_bias))


def test_robustness_starts_from_the_linear_probe_and_falls_with_strength(classes, loaded, tmp_path):
    report = judged(loaded, "linear,robustness", classes, tmp_path, replace(QUICK, limit=80), compare=False)
    linear, robust = (report["tasks"][name]["trained"] for name in ("linear", "robustness"))
    assert robust["figures"]["clean"] == pytest.approx(linear["figures"]["accuracy"])
    assert robust["figures"]["mean corrupted"] < robust["figures"]["clean"]
    assert set(robust["by strength"]) == set(CORRUPTIONS)
    assert robust["by strength"]["gaussian noise"][4] < robust["by strength"]["gaussian noise"][0]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_change_images_more_with_each_strength(name):
    image = torch.from_numpy(scene(3, 64, 48)[0]).permute(2, 0, 1)
    changed = [corrupted(image, name, level, index=5) for level in range(5)]
    assert all(one.shape == image.shape and one.dtype == torch.uint8 for one in changed)
    errors = [float((one.float() - image.float()).square().mean()) for one in changed]
    assert 0 < errors[0] < errors[4] and errors == sorted(errors)
    assert torch.equal(corrupted(image, name, 2, index=5), changed[2])


@pytest.mark.parametrize(("kind", "task"), [("annotations", "segmentation"), ("depth", "depth")])
def test_dense_tasks_beat_chance_and_the_untrained_encoder(loaded, tmp_path, kind, task):
    data = write_dense(tmp_path / "data", 64, 24, kind)
    entry = judged(loaded, task, data, tmp_path / "out", replace(QUICK, epochs=20))["tasks"][task]
    for label in entry["trained"]["figures"]:
        if label.endswith("(m)"):
            mine, others = (
                entry["trained"]["figures"][label],
                (entry["untrained"]["figures"], entry["trained"]["chance"]),
            )
            assert all(mine < 0.85 * other[label] for other in others)
        else:
            assert beats(entry, label)


def test_scores_are_those_of_a_hand_count():
    target = torch.tensor([[0, 0, 1], [1, 2, -1]])
    predicted = torch.tensor([[0, 1, 1], [1, 0, 2]])
    told = scores(confusion(predicted, target, 4))
    # Class 0: 1 of 3 pixels; 1: 2 of 3; 2: 0 of 1; 3 is nowhere; the ignored pixel counts nowhere.
    assert told["mIoU"] == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert told["pixel accuracy"] == pytest.approx(3 / 5)
    assert told["IoU"] == [0.3333, 0.6667, 0.0, None]
    found = depth_scores(torch.tensor([1.0, 2.0, 4.0, 9.0]), torch.tensor([1.2, 3.0, 4.0, 0.0]))
    assert found.tolist() == pytest.approx([2 / 3, (1.04 / 3) ** 0.5])
    assert depth_scores(torch.ones(2), torch.zeros(2)).isnan().all()
    # Patches of 2 and of 1 columns: pixels count in one patch each, ignored ones in none.
    votes = patch_votes(torch.tensor([[0, 0, 1], [1, -1, 2]]), (1, 2), 3)
    assert votes.tolist() == [[2, 1, 0], [0, 1, 1]]


def test_crops_and_their_masks_show_the_same_place(tmp_path):
    coordinate_image(60, 40).save(tmp_path / "a.png")
    columns = np.tile(np.arange(60, dtype=np.uint8), (40, 1))
    Image.fromarray(columns).save(tmp_path / "m.png")
    pairs = Pairs([tmp_path / "a.png"] * 8, [tmp_path / "m.png"] * 8, "masks", ids=tuple(range(60)))
    loader, flipped = DenseLoader(pairs, 40, 4, 0), set()
    for images, targets in loader.crops(8, 0, 2):
        for image, target in zip(images, targets, strict=True):
            assert image.shape == (3, 40, 40) and torch.equal(image[0].long(), target)
            flipped.add(bool(target[0, 0] > target[0, 1]))
    assert flipped == {True, False}
    images, (target,) = next(loader.whole())
    assert images.shape == (1, 3, 40, 60) and target.shape == (40, 60)
    # The shorter side becomes 32 px, the longer one the nearest multiple of the patch.
    assert next(DenseLoader(pairs, 32, 4, 0).whole())[0].shape == (1, 3, 32, 48)


def test_pascal_voc_palettes_and_npy_depth_are_read(tmp_path):
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    for folder in ("JPEGImages", "SegmentationClass"):
        (tmp_path / folder).mkdir()
    for split, number in (("train", 0), ("val", 4)):
        image, mask, depth, *_ = scene(number)
        (tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"{number}\n")
        Image.fromarray(image).save(tmp_path / "JPEGImages" / f"{number}.jpg")
        palette = Image.fromarray(mask, "P")
        palette.putpalette([200, 0, 0, 0, 200, 0] + [7] * 756)
        palette.save(tmp_path / "SegmentationClass" / f"{number}.png")
        for name in ("images", "depth"):
            (tmp_path / "d" / split / name).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / "d" / split / "images" / "x.png")
        np.save(tmp_path / "d" / split / "depth" / "x.npy", np.where(depth > 5, np.nan, depth))
    data = open_masks(str(tmp_path), None, QUICK, {})
    assert data.test.ids == (0, 1) and np.array_equal(data.test.target(0), scene(4)[1])
    # Another class may not count: other targets, so another fingerprint, under which heads are kept.
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("0 4\n")
    Image.fromarray(np.where(scene(4)[1] == 0, 7, scene(4)[1]), "L").save(tmp_path / "SegmentationClass" / "4.png")
    one, two = (open_masks(str(tmp_path), None, replace(QUICK, ignore=value), {}).train for value in (0, 7))
    assert one.ids == (1, 7) and two.ids == (0, 1) and one.fingerprint != two.fingerprint
    assert np.array_equal(one.target(0), np.where(scene(0)[1] == 0, -1, 0)) and two.target(1).unique().tolist() == [
        -1,
        1,
    ]
    metres = open_depth(str(tmp_path / "d"), None, QUICK, {}).train.target(0)
    assert metres.max() == 1.0 and metres.min() == 0.0
    scaled = open_depth(str(tmp_path / "d"), None, replace(QUICK, depth_scale=2.0), {}).train.target(0)
    assert scaled.max() == 2.0
    ade = write_dense(tmp_path / "ade", 7, 7)
    assert len(dense_data._checked(str(ade), "masks", replace(QUICK, limit=5), {})[0]) == 5
    # Files of one name in several folders have masks of their own.
    for kind in ("images", "annotations"):
        (ade / kind / "training" / "deeper").mkdir()
        (ade / kind / "training/00001.png").rename(ade / kind / "training/deeper/00002.png")
    train = open_masks(str(ade), None, QUICK, {}).train
    row = train.images.index(ade / "images/training/deeper/00002.png")
    assert np.array_equal(train.stored(row), scene(1)[1])


def test_bad_masks_are_an_error_before_features_are_taken(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(dense_data.DenseLoader, "_load", None)

    def refused(change, message, **options):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        write_dense(root, 4, 2)
        change(root)
        with pytest.raises(ValueError, match=message):
            judged(loaded, "segmentation", root, root / "out", replace(QUICK, **options))

    def save(root, name, values):
        Image.fromarray(values).save(root / "annotations" / name)

    one = np.ones((SIDE, SIDE), np.uint8)
    refused(lambda r: save(r, "training/00001.png", one[:30]), "is 32 x 30 px, its image 32 x 32")
    refused(lambda r: save(r, "validation/05001.png", 9 * one), r"class ids that no training mask has: \[9\]")
    refused(lambda r: [save(r, f"training/0000{i}.png", one) for i in range(4)], "one class only", ignore=0)
    refused(lambda r: [save(r, f"validation/0500{i}.png", 255 * one) for i in range(2)], "no test mask .* counts")
    refused(lambda r: (r / "annotations/training/00002.png").unlink(), "00002.png has no ")
    refused(lambda r: save(r, "training/00000.png", np.stack([one] * 3, -1)), "no colours")
    refused(lambda r: [p.unlink() for p in (r / "images/validation").iterdir()], "has no test images")
    refused(lambda r: (r / "annotations").rename(r / "other"), "has no images with masks")


def test_finetuning_learns_continues_and_gives_an_encoder(classes, loaded, tmp_path, monkeypatch, capsys):
    weights, out = tmp_path / "trained.safetensors", tmp_path / "out"
    save_encoder(weights, loaded.encoder)
    flags = ["--data", str(classes), "--device", "cpu", "--workers", "0", "--epochs", "6", "--batch_size", "32"]
    flags += ["--lr", "2e-2", "--warmup_epochs", "1", "--shots", "30"]
    command = ["finetune", str(weights), *flags, "--out"]
    assert cli.main([*command, str(out)]) == 0
    report = json.loads((out / "finetune.json").read_text())
    assert report["losses"][-1] < 0.9 * report["losses"][0]
    assert report["accuracy"] > 0.4 and report["chance"] == 0.25 and report["training images"] == 120
    assert len(report["losses"]) == 6 and f"{report['accuracy']:.1%}" in capsys.readouterr().out
    tuned = load_any(out / "encoder.safetensors")
    assert tuned.about["encoder"] == "fine-tuned"

    write, saved = heads.write_whole, []

    def stopping(*arguments):
        write(*arguments)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(heads, "write_whole", stopping)
    assert cli.main([*command, str(tmp_path / "stopped")]) == 130
    assert cli.main([*command, str(tmp_path / "stopped")]) == 0
    again = json.loads((tmp_path / "stopped" / "finetune.json").read_text())
    assert again["losses"] == report["losses"] and again["accuracy"] == report["accuracy"] and len(saved) == 6
    assert cli.main([*command, str(tmp_path / "x"), "--warmup_epochs", "9"]) == 1
    assert cli.main([*command, str(tmp_path / "x"), "--label_smoothing", "1"]) == 1


def test_finetuning_trains_encoders_that_come_frozen(classes, loaded, tmp_path):
    """The target encoder of a run does."""
    encoder = untrained(loaded.encoder).requires_grad_(False)
    recipe = Finetuning(epochs=1, warmup_epochs=0, batch_size=16, shots="4", limit=40, workers=0)
    before = digest(encoder)
    finetune(replace(loaded, encoder=encoder), str(classes), None, recipe, tmp_path, "cpu")
    assert digest(load_any(tmp_path / "encoder.safetensors").encoder) != before


@pytest.mark.slow
def test_finetuning_on_two_ranks_is_that_on_one(classes, loaded, tmp_path):
    save_encoder(tmp_path / "trained.safetensors", loaded.encoder)
    flags = ["finetune", "trained.safetensors", "--data", str(classes), "--device", "cpu", "--workers", "0"]
    flags += ["--epochs", "2", "--warmup_epochs", "1", "--batch_size", "32", "--out"]
    for count in (1, 2):
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "-m", "ijepa_fast"]
        subprocess.run([sys.executable, *start, *flags, str(count)], cwd=tmp_path, check=True, timeout=600)
    one, two = (json.loads((tmp_path / name / "finetune.json").read_text()) for name in "12")
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-3)
    assert two["accuracy"] == pytest.approx(one["accuracy"], abs=0.03)


def test_learning_rates_fall_from_the_head_to_the_embedding(loaded):
    model = Classifier(loaded.encoder, CLASSES)
    groups = layer_groups(model, loaded.encoder, 0.5, 0.1)
    scale = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    names = ("head.weight", "norm.bias", "encoder.norm.weight", "encoder.blocks.1.mlp.fc1.weight",
             "encoder.blocks.0.mlp.fc1.weight", "encoder.patch_embed.proj.weight")  # fmt: skip
    assert [scale[model.get_parameter(name)] for name in names] == [1, 1, 1, 0.5, 0.25, 0.125]
    decayed = {p for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {p for p in model.parameters() if p.ndim > 1}


def test_the_pyramid_has_five_scales_for_any_image(loaded):
    encoder = loaded.encoder
    maps = SimpleFeaturePyramid(encoder, 8)(torch.randn(2, 3, 48, 64))
    assert [tuple(value.shape) for value in maps.values()] == [
        (2, 8, 48, 64), (2, 8, 24, 32), (2, 8, 12, 16), (2, 8, 6, 8), (2, 8, 3, 4)
    ]  # fmt: skip
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    # torchvision takes every stride for a power of two.
    odd = SimpleFeaturePyramid(type(encoder)(28, 14, embed_dim=32, depth=1, num_heads=2), 8)
    assert odd.strides == [4, 8, 16, 32, 64]
    shapes = [tuple(value.shape[2:]) for value in odd(torch.randn(1, 3, 64, 128)).values()]
    assert shapes == [(64 // stride, 128 // stride) for stride in odd.strides]
    with pytest.raises(ValueError, match="at least 3 px, got 2"):
        SimpleFeaturePyramid(type(encoder)(32, 2, embed_dim=32, depth=1, num_heads=2))


def test_a_part_is_a_source_of_its_own():
    from ijepa_fast.data.rendered import RenderedTextures

    source = RenderedTextures(num_images=10)
    part = store.at_most(source, 4)
    assert len(part) == 4 and part.indices.tolist() == [0, 3, 6, 9] and part.labels.tolist() == [0, 3, 6, 1]
    assert part.fingerprint != store.at_most(source, 5).fingerprint and store.at_most(source, 10) is source
    assert np.array_equal(np.asarray(part.open(1)), np.asarray(source.open(3)))
