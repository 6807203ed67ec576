import os
import pickle

import numpy as np
import pytest
from image_files import encoded, smooth_image, write_folder
from PIL import Image

from ijepa_fast.data import ImageFolder, Source, find_split
from ijepa_fast.data.decode import image_extensions

PNG = encoded(smooth_image(8, 8))


def put(root, *names, data=PNG):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


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


def test_hidden_names_are_passed_over(tmp_path):
    put(tmp_path, "a.png", "._a.png", ".thumbnails/a.png")
    assert names(ImageFolder(tmp_path)) == ["a.png"]


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
