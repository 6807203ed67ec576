import os
import pickle

import numpy as np
import pytest
from image_files import PNG, encoded, put, tiff, write_folder
from PIL import Image

from ijepa_fast.data import ImageFolder, Source, find_split
from ijepa_fast.data.datasets import open_sources
from ijepa_fast.data.decode import image_extensions
from ijepa_fast.data.survey import announce


def names(folder):
    return [os.path.relpath(folder.path(index), folder.root) for index in range(len(folder))]


def test_class_folders_nested_and_sorted(tmp_path):
    put(tmp_path, "cat/z.png", "cat/deep/er/a.png", "ant/b.PNG", "cat/a.jpg.png", "ant/notes.txt", "empty/readme.md")
    folder = ImageFolder(tmp_path)
    assert names(folder) == ["ant/b.PNG", "cat/a.jpg.png", "cat/deep/er/a.png", "cat/z.png"]
    assert folder.classes == ["ant", "cat"]
    assert folder.labels.tolist() == [0, 1, 1, 1]
    assert folder.labels.dtype == np.int64
    assert folder.describe(1) == str(tmp_path.resolve() / "cat" / "a.jpg.png")
    assert "4 images, 2 classes" in repr(folder)
    assert isinstance(folder, Source)


@pytest.mark.parametrize(
    "files", [["a.png", "b.png"], ["a.png", "cat/b.png", "dog/b.png"], ["photos/a.png", "photos/b/c.png"]]
)
def test_no_classes_without_at_least_two_class_folders_and_nothing_beside_them(tmp_path, files):
    put(tmp_path, *files)
    folder = ImageFolder(tmp_path)
    assert len(folder) == len(files)
    assert folder.labels is None
    assert folder.classes is None


def test_classes_ignored_or_prescribed(tmp_path):
    put(tmp_path, "ant/a.png", "bee/a.png")
    assert ImageFolder(tmp_path, class_folders=False).labels is None
    assert ImageFolder(tmp_path, classes=["cat", "bee", "ant"]).labels.tolist() == [2, 1]
    with pytest.raises(ValueError, match=r"outside the classes \['ant'\]: in \['bee'\]"):
        ImageFolder(tmp_path, classes=["ant"])
    put(tmp_path, "stray.png")
    with pytest.raises(ValueError, match="no folder"):
        ImageFolder(tmp_path, classes=["ant", "bee"])


def test_extensions_come_from_pillow():
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".gif", ".ppm"} <= image_extensions()
    assert not {".txt", ".pdf", ".eps", ".ps", ".mpg", ".npz", ".wmf"} & image_extensions()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA"])
def test_usual_formats_open(tmp_path, file_format):
    extension = next(ext for ext, name in Image.registered_extensions().items() if name == file_format)
    write_folder(tmp_path, 1, size=(20, 16), classes=None, file_format=file_format, extension=extension.upper())
    with ImageFolder(tmp_path).open(0) as image:
        assert image.format == file_format
        assert image.size == (20, 16)
        image.load()


def test_hidden_names_and_what_systems_leave_behind_are_passed_over(tmp_path):
    put(tmp_path, "a.png", "._a.png", ".thumbnails/a.png", "__MACOSX/a.png", "lost+found/a.png", "@eaDir/a.png")
    assert names(ImageFolder(tmp_path)) == ["a.png"]


def test_what_is_passed_over_is_counted_by_kind(tmp_path):
    put(tmp_path, "a.png", "b.CR2", "c.cr2", "readme")
    (tmp_path / "d.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert ImageFolder(tmp_path).passed_over == {".cr2": 2, "no extension": 1, "dangling link": 1}
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"4 other files are 2 \.cr2, 1 dangling link, 1 no ext"):
        ImageFolder(tmp_path)


def test_class_names_are_printable(tmp_path):
    for name in (b"caf\xe9", "th\u00e9".encode()):
        os.mkdir(os.path.join(os.fsencode(tmp_path), name))
        with open(os.path.join(os.fsencode(tmp_path), name, b"a.png"), "wb") as file:
            file.write(PNG)
    folder = ImageFolder(tmp_path)
    assert folder.classes == ["caf\u00e9", "th\u00e9"]
    assert ImageFolder(tmp_path, classes=folder.classes).labels.tolist() == folder.labels.tolist()


def test_links_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path / "elsewhere", "x.png")
    put(tmp_path / "root", "real/y.png")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "real" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "elsewhere" / "self").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "real" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    assert names(ImageFolder(tmp_path / "root")) == ["linked/x.png", "real/y.png"]


def test_undecodable_file_names(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"), "wb") as file:
        file.write(PNG)
    with ImageFolder(tmp_path).open(0) as image:
        assert image.size == (8, 8)


def test_missing_path_and_file_instead_of_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageFolder(tmp_path / "nowhere")
    put(tmp_path, "images.zip")
    with pytest.raises(NotADirectoryError, match=r"images\.zip \(unpack it first\)"):
        ImageFolder(tmp_path / "images.zip")


def test_no_images_says_what_is_there(tmp_path):
    with pytest.raises(ValueError, match="no images below .*holds no files"):
        ImageFolder(tmp_path)
    put(tmp_path, "a/x.txt", "a/y.txt", "z.npz", "LICENSE")
    with pytest.raises(ValueError, match=r"4 other files are 2 \.txt, 1 "):
        ImageFolder(tmp_path)


def test_index_out_of_range(tmp_path):
    put(tmp_path, "a.png")
    folder = ImageFolder(tmp_path)
    for index in (-1, 1):
        with pytest.raises(IndexError, match=f"image {index} of 1"):
            folder.open(index)


def test_fingerprint_follows_names_and_sizes_not_place_or_time(tmp_path):
    put(tmp_path / "one", "a/x.png", "b/y.png")
    put(tmp_path / "two", "b/y.png", "a/x.png")
    first = ImageFolder(tmp_path / "one").fingerprint
    assert first == ImageFolder(tmp_path / "two", class_folders=False).fingerprint
    put(tmp_path / "two", "b/y.png", data=PNG + b"\0")
    resized = ImageFolder(tmp_path / "two").fingerprint
    (tmp_path / "one" / "b" / "y.png").rename(tmp_path / "one" / "b" / "z.png")
    renamed = ImageFolder(tmp_path / "one").fingerprint
    assert len({first, resized, renamed}) == 3


def test_survives_pickling(tmp_path):
    folder = ImageFolder(write_folder(tmp_path, 5))
    copy = pickle.loads(pickle.dumps(folder))
    assert names(copy) == names(folder)
    assert copy.fingerprint == folder.fingerprint
    assert copy.labels.tolist() == folder.labels.tolist()


def test_splits(tmp_path):
    put(tmp_path, "train/ant/a.png", "test/ant/a.png")
    assert find_split(tmp_path) == (tmp_path / "train", tmp_path / "test")
    put(tmp_path, "VAL/ant/a.png")
    assert find_split(tmp_path) == (tmp_path / "train", tmp_path / "VAL")


def test_train_without_evaluation_is_a_split_only_if_alone(tmp_path):
    put(tmp_path, "train/ant/a.png")
    assert find_split(tmp_path) == (tmp_path / "train", None)
    put(tmp_path, "bus/a.png")
    assert find_split(tmp_path) == (tmp_path, None)


def test_test_without_train_is_no_split(tmp_path):
    put(tmp_path, "test/ant/a.png", "val/ant/a.png")
    assert find_split(tmp_path) == (tmp_path, None)


@pytest.mark.parametrize(
    ("files", "train", "evaluation"),
    [
        (["train2017/a.png", "val2017/a.png", "test2017/a.png"], "train2017", "val2017"),
        (["training/ant/a.png", "validation/ant/a.png"], "training", "validation"),
        (
            ["images/train/a.png", "images/val/a.png", "labels/train/a.txt", "labels/val/a.txt"],
            "images/train",
            "images/val",
        ),
        (
            ["Data/CLS-LOC/train/n1/a.png", "Data/CLS-LOC/val/a.png", "Annotations/CLS-LOC/train/n1/a.xml"],
            "Data/CLS-LOC/train",
            "Data/CLS-LOC/val",
        ),
        (["set/images/train_256/a.png", "set/images/val_256/a.png"], "set/images/train_256", "set/images/val_256"),
        (["train/ant/a.png", "annotations/a.json", "__MACOSX/train/a.png"], "train", None),
    ],
)
def test_splits_of_usual_layouts(tmp_path, files, train, evaluation):
    put(tmp_path, *files)
    assert find_split(f"{tmp_path}/") == (tmp_path / train, evaluation and tmp_path / evaluation)


@pytest.mark.parametrize(
    "files",
    [
        ["train2014/a.png", "train2017/a.png", "val2017/a.png"],
        ["cup/train/a.png", "cup/test/a.png", "pen/train/a.png", "pen/test/a.png"],
    ],
)
def test_several_splits_are_not_chosen_from(tmp_path, files):
    put(tmp_path, *files)
    with pytest.raises(ValueError, match=r"several folders of training images .*train.*, .*train.*\): name one"):
        find_split(tmp_path)


@pytest.mark.parametrize("stray", ["val/a.png", "val/cat/a.png"])
def test_test_images_without_fitting_classes_are_left_out_unless_they_are_named(tmp_path, stray, caplog):
    put(tmp_path, "train/ant/a.png", "train/bee/a.png", "val/ant/a.png", stray)
    assert open_sources(str(tmp_path)).test is None
    assert "probe and final k-NN are left out" in caplog.text and "outside the classes" in caplog.text
    with pytest.raises(ValueError, match="outside the classes"):
        open_sources(str(tmp_path / "train"), str(tmp_path / "val"))


def announced(caplog, root):
    caplog.clear()
    with caplog.at_level("INFO"):
        announce(*open_sources(str(root)))
    lines = [record for record in caplog.records if record.name == "ijepa_fast.data.survey"]
    return lines[0].getMessage(), [record.getMessage() for record in lines[1:]]


def test_one_line_says_what_is_trained_on(tmp_path, caplog):
    put(tmp_path, "train/ant/a.png", "train/bee/a.png", "val/ant/a.png")
    line, warnings = announced(caplog, tmp_path)
    assert line.startswith(f"images: 2 in 2 classes below {tmp_path}/train; test images: 1 in 2 classes below ")
    assert "PNG, 3 x 8 bits, values " in line and not warnings
    put(tmp_path, *(f"train/ant/{number}.cr2" for number in range(40)), "train/ant/x.txt")
    (tmp_path / "train" / "bee" / "link.jpg").symlink_to("nowhere.jpg")
    line, warnings = announced(caplog, tmp_path)
    assert line.endswith("passed over: 40 .cr2, 1 .txt, 1 dangling link")
    assert (
        "40 .cr2 files are not trained on" in warnings[0] and "the images of 1 dangling link are missing" in warnings[1]
    )


def test_pixels_of_an_unusual_kind_are_announced(tmp_path, caplog):
    rng = np.random.default_rng(0)
    put(tmp_path / "dark", "a.png", data=encoded(Image.fromarray(rng.integers(0, 4096, (8, 8), np.uint16))))
    line, (warning,) = announced(caplog, tmp_path / "dark")
    assert "1 x 16 bits, values 0 to 15 of 255" in line and "4095 or 16383" in warning
    put(tmp_path / "bands", "a.tif", data=tiff(rng.integers(0, 256, (8, 8, 5), np.uint8), 2, (0, 0)))
    line, (warning,) = announced(caplog, tmp_path / "bands")
    assert "TIFF, 5 x 8 bits" in line and "the first three are used" in warning
    put(tmp_path / "broken", "a.png", data=b"no image")
    assert announced(caplog, tmp_path / "broken") == (f"images: 1 below {tmp_path}/broken", [])


def test_images_in_memory_are_announced(caplog):
    line, warnings = announced(caplog, "rendered")
    assert line.startswith("images: 4000 in 8 classes; test images: 2000 in 8 classes; ") and not warnings
    assert "images in memory, 3 x 8 bits" in line


def test_the_pixel_limit_reaches_every_source(tmp_path):
    put(tmp_path, "train/a.png", "val/a.png")
    with pytest.raises(ValueError, match="8x8 pixels are more than loader.max_pixels"):
        open_sources(str(tmp_path), max_pixels=63).train.open(0)
    with pytest.raises(ValueError, match="loader.max_pixels must be at least 1, got 0"):
        open_sources(str(tmp_path), max_pixels=0)
