"""Lists of files, tables of classes, and folders as people have them."""

import os
import shutil

import pytest
from image_files import put, write_folder

from ijepa_fast.data import ImageFolder, find_split, lists
from ijepa_fast.data.datasets import open_sources
from ijepa_fast.data.folder import in_order
from ijepa_fast.data.lists import ImageList, read_table


def written(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def classes_of(source):
    """Relative path -> class."""
    names = [None if label < 0 else source.classes[label] for label in source.labels]
    return dict(zip(source.relative_paths(), names, strict=True))


def test_a_list_of_files(tmp_path):
    put(tmp_path, "photos/b.png", "photos/a.png", "photos/c.png", "more/d.png")
    data = written(tmp_path / "list.txt", "photos/b.png", "", "./photos/a.png", str(tmp_path / "more" / "d.png"))
    train, test = open_sources(data)
    assert train.relative_paths() == ["more/d.png", "photos/a.png", "photos/b.png"] and train.root == tmp_path
    assert train.labels is None and test is None
    with train.open(0) as image:
        assert image.size == (8, 8)


def test_lists_that_cannot_be_used_say_why(tmp_path):
    put(tmp_path, "a.png", "b.png")
    with pytest.raises(
        FileNotFoundError, match=r"2 of the 3 files in .*list.txt do not exist, the first being .*x.png"
    ):
        open_sources(written(tmp_path / "list.txt", "a.png", "x.png", "y.png"))
    with pytest.raises(ValueError, match="lists an image twice: .*a.png"):
        open_sources(written(tmp_path / "list.txt", "a.png", "./a.png"))
    with pytest.raises(ValueError, match="names no images"):
        open_sources(written(tmp_path / "list.txt"))
    with pytest.raises(ValueError, match=r"no column of paths: call one of label, split path"):
        open_sources(written(tmp_path / "list.csv", "label,split", "cat,train"))
    with pytest.raises(ValueError, match="a line without a path: ',cat'"):
        open_sources(written(tmp_path / "list.csv", "path,label", "a.png,cat", ",cat"))
    with pytest.raises(ValueError, match="neither train, val nor test: 'best'"):
        open_sources(written(tmp_path / "list.csv", "path,split", "a.png,best"))
    with pytest.raises(ValueError, match="list.csv is no table, line 3: unexpected end of data"):
        open_sources(written(tmp_path / "list.csv", "path,label", '"a.png,cat', "b.png,dog"))
    (tmp_path / "list.csv").write_bytes(b"path\n\xff\xfe\x00.png")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        open_sources(str(tmp_path / "list.csv"))
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        open_sources(str(tmp_path / "nowhere.csv"))


@pytest.mark.parametrize("between", [",", ";", "\t"])
def test_a_table_with_classes_and_splits_is_all_that_is_needed(tmp_path, between):
    put(tmp_path, "a.png", "b.png", "c, d.png", "e.png", "f.png")
    rows = ["Split;Label;File_Name", "train;10;a.png", "train;9;b.png", "val;9;e.png", "test;10;f.png"]
    data = written(tmp_path / "table.csv", *(row.replace(";", between) for row in rows))
    train, test = open_sources(data)
    assert train.classes == ["9", "10"] == test.classes
    assert classes_of(train) == {"a.png": "10", "b.png": "9"} and classes_of(test) == {"e.png": "9"}
    assert open_sources(data).train.fingerprint == train.fingerprint


def test_a_table_without_names_of_columns(tmp_path):
    put(tmp_path, "a.png", "b.png", "c.png")
    table = read_table(written(tmp_path / "table.csv", "a.png,ant", '"b.png","bee, or wasp"', ""))
    assert table.paths == ["a.png", "b.png"] and table.labels == ["ant", "bee, or wasp"] and table.splits is None
    table = read_table(written(tmp_path / "table.csv", "\ufeffpath,label", "a.png,ant", "b.png,", "c.png,bee"))
    assert table.labels == ["ant", None, "bee"]
    assert ImageList(tmp_path / "table.csv").labels.tolist() == [0, -1, 1]


def test_odd_names_and_notes_of_several_lines(tmp_path):
    put(tmp_path, "~a.png", "b\x85.png")
    assert len(ImageList(written(tmp_path / "list.txt", "~a.png", "b\x85.png"))) == 2
    rows = ["path,note,label", '~a.png,"one\ntwo",ant', "b\x85.png,three\u2028four,bee"]
    assert classes_of(ImageList(written(tmp_path / "list.csv", *rows))) == {"~a.png": "ant", "b\x85.png": "bee"}
    double = written(tmp_path / "list.txt", f"/{tmp_path}/~a.png")
    assert ImageList(double).path(0) == str(tmp_path / "~a.png")


def test_a_list_is_read_once_for_each_set(tmp_path, monkeypatch):
    put(tmp_path, "a.png", "b.png", "c.png")
    data, read = written(tmp_path / "list.csv", "path,label,split", "a.png,x,train", "c.png,y,train", "b.png,x,val"), []
    monkeypatch.setattr(lists, "read_table", lambda file: read.append(file) or read_table(file))
    train, test = open_sources(data)
    assert (len(train), len(test), len(read)) == (2, 1, 2)
    only = open_sources(data, written(tmp_path / "other.csv", "path,label,split", "b.png,x,train")).test
    assert only.relative_paths() == ["b.png"]


def test_the_order_of_classes_does_not_depend_on_hashes():
    assert in_order(["10", "1", "01", "001"]) == in_order(["001", "1", "10", "01"]) == ["001", "01", "1", "10"]


def test_test_images_of_a_list_need_known_classes(tmp_path):
    put(tmp_path, "a.png", "b.png", "c.png")
    train = written(tmp_path / "train.csv", "a.png,ant", "b.png,bee")
    test = written(tmp_path / "test.csv", "c.png,bee")
    assert classes_of(open_sources(train, test).test) == {"c.png": "bee"}
    with pytest.raises(ValueError, match=r"outside the classes \['ant', 'bee'\]: in \['cow'\]"):
        open_sources(train, written(tmp_path / "test.csv", "c.png,cow"))
    with pytest.raises(ValueError, match="names no classes"):
        open_sources(train, written(tmp_path / "test.txt", "c.png"))


@pytest.mark.parametrize(
    "rows",
    [
        ["a.png,ant", "sub/b.png,bee", "c.png,ant"],
        ["train/a.png,ant", "train/sub/b.png,bee", "test/c.png,ant"],
        ["data/train/a.png,ant", "data/train/sub/b.png,bee", "data/test/c.png,ant"],
        ["path,label", "a,ant", "b,bee", "c,ant"],
        ["id;class", "A.PNG;ant", ".\\sub\\b.png;bee", "C.png;ant"],
    ],
)
def test_classes_from_a_table_for_a_folder_however_its_paths_begin(tmp_path, rows):
    put(tmp_path / "data", "train/a.png", "train/sub/b.png", "test/c.png")
    (tmp_path / "elsewhere").mkdir()
    labels = written(tmp_path / "elsewhere" / "labels.csv", *rows)
    train, test = open_sources(str(tmp_path / "data"), labels=labels)
    assert classes_of(train) == {"a.png": "ant", "sub/b.png": "bee"}
    assert classes_of(test) == {"c.png": "ant"} and test.classes == ["ant", "bee"]


def test_rows_and_images_without_each_other_are_told(tmp_path, caplog):
    put(tmp_path / "data", "a.png", "b.png", "c.png")
    labels = written(tmp_path / "labels.csv", "a.png,ant", "b.png,bee", "gone.png,bee")
    train, test = open_sources(str(tmp_path / "data"), labels=labels)
    assert classes_of(train) == {"a.png": "ant", "b.png": "bee", "c.png": None} and test is None
    assert "1 of the 3 images below" in caplog.text and "have no class in" in caplog.text
    assert "1 of the 3 rows of" in caplog.text and "no image that is there, the first being gone.png" in caplog.text
    with pytest.raises(ValueError, match=r"none of the 1 rows .* a row is 'photos/9.png', an image 'a.png'"):
        open_sources(str(tmp_path / "data"), labels=written(tmp_path / "labels.csv", "photos/9.png,ant"))
    with pytest.raises(ValueError, match="gives a.png two classes: ant and bee"):
        open_sources(str(tmp_path / "data"), labels=written(tmp_path / "labels.csv", "a.png,ant", "a.png,bee"))
    with pytest.raises(ValueError, match="names no classes: columns path and label"):
        open_sources(str(tmp_path / "data"), labels=written(tmp_path / "labels.csv", "path", "a.png"))
    put(tmp_path / "data", "deep/a.png")
    with pytest.raises(ValueError, match=r"the row 'a' of .* fits several images: .*data/a.png and .*deep/a.png"):
        open_sources(str(tmp_path / "data"), labels=written(tmp_path / "labels.csv", "a,ant", "b,bee"))
    with pytest.raises(ValueError, match="labels are for folders and lists"):
        open_sources(shard(tmp_path), labels=labels)


def test_two_classes_of_the_training_images_are_needed(tmp_path, caplog):
    put(tmp_path / "data", "train/a.png", "train/b.png", "test/c.png")
    one = written(tmp_path / "labels.csv", "a.png,ant", "b.png,ant", "c.png,ant")
    train, test = open_sources(str(tmp_path / "data"), labels=one)
    assert train.labels is None and test is None and "names no two classes of the images of" in caplog.text
    train, test = open_sources(str(tmp_path / "data"), labels=written(tmp_path / "labels.csv", "c.png,ant"))
    assert train.labels is None and test is None


def test_a_row_is_of_one_image_in_training_and_test_images_together(tmp_path):
    put(tmp_path / "data", "train/a.png", "train/b.png", "test/a.png", "test/B.png")
    data = str(tmp_path / "data")
    with pytest.raises(ValueError, match=r"the row 'b.png' .* fits several images: .*train/b.png and .*test/B.png"):
        open_sources(data, labels=written(tmp_path / "labels.csv", "a.png,ant", "b.png,bee"))
    labels = written(tmp_path / "labels.csv", "train/a.png,ant", "train/b.png,bee", "test/a.png,ant", "test/B.PNG,bee")
    assert classes_of(open_sources(data, labels=labels).test) == {"B.png": "bee", "a.png": "ant"}
    # Of two rows that differ in case, neither is that of a third spelling.
    rows = ["train/a.png,ant", "train/b.png,bee", "test/a.png,ant", "test/b.png,bee", "test/b.PNG,cow"]
    labels = written(tmp_path / "labels.csv", *rows)
    assert classes_of(open_sources(data, labels=labels).test) == {"B.png": None, "a.png": "ant"}


def shard(tmp_path):
    pytest.importorskip("webdataset")
    import tarfile

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "data" / "a.png", "a.png")
    return str(tmp_path / "x.tar")


def test_lists_and_folders_may_move(tmp_path):
    put(tmp_path / "one", "photos/a.png", "photos/b.png")
    first = open_sources(written(tmp_path / "one" / "list.txt", "photos/a.png", "photos/b.png")).train
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "deeper")
    absolute = [str(tmp_path / "two" / "deeper" / "photos" / name) for name in ("b.png", "a.png")]
    moved = open_sources(written(tmp_path / "list.txt", *absolute)).train
    assert moved.fingerprint == first.fingerprint == ImageFolder(tmp_path / "two" / "deeper" / "photos").fingerprint


def test_a_flat_test_folder_is_left_out_with_the_remedy(tmp_path, caplog):
    put(tmp_path, "train/ant/a.png", "train/bee/b.png", "val/c.png", "val/d.png")
    assert open_sources(str(tmp_path)).test is None
    assert "the 2 images of " in caplog.text and "in no class folders" in caplog.text and "--labels FILE" in caplog.text
    labels = written(tmp_path / "val.csv", "c.png,ant", "d.png,bee", "train/ant/a.png,ant", "train/bee/b.png,bee")
    assert classes_of(open_sources(str(tmp_path), labels=labels).test) == {"c.png": "ant", "d.png": "bee"}


@pytest.mark.parametrize(
    ("files", "used"),
    [
        (["images/a.png", "labels/a.png", "classes.txt"], ["images/a.png"]),
        (["images/a.png", "masks/a.png", "images/b.png"], ["images/a.png", "images/b.png"]),
        (["JPEGImages/a.png", "SegmentationClass/a.png", "SegmentationObject/a.png"], ["JPEGImages/a.png"]),
        (["a/imgs/x.png", "a/gt/x.png", "b/imgs/x.png", "b/gt/x.png"], ["a/imgs/x.png", "b/imgs/x.png"]),
        (["labels/a.png", "masks/a.png"], ["labels/a.png", "masks/a.png"]),
    ],
)
def test_labels_and_masks_beside_images_are_no_images(tmp_path, files, used):
    put(tmp_path, *files)
    assert ImageFolder(tmp_path).relative_paths() == used


def test_trees_of_detection_and_segmentation_split_by_their_images(tmp_path):
    put(tmp_path / "yolo", "images/train/a.png", "images/val/a.png", "labels/train/a.png", "labels/val/a.png")
    assert find_split(tmp_path / "yolo") == (tmp_path / "yolo/images/train", tmp_path / "yolo/images/val")
    put(tmp_path / "roboflow", "train/images/a.png", "train/labels/a.png", "valid/images/a.png", "valid/labels/a.png")
    train, test = open_sources(str(tmp_path / "roboflow"))
    assert train.relative_paths() == ["images/a.png"] and train.passed_over == {"folder labels": 1}
    assert train.labels is None and test is None


def test_leftovers_of_systems_are_passed_over_in_any_case(tmp_path):
    names = ("__macosx/a.png", "LOST+FOUND/a.png", "@eadir/a.png", ".ipynb_checkpoints/a.png", "Thumbnails/a.png")
    put(tmp_path, "a.png", ".thumbnails/a.png", "Thumbs.db", *names)
    folder = ImageFolder(tmp_path)
    assert folder.relative_paths() == ["a.png"] and folder.passed_over == {".db": 1}


def test_one_folder_around_all_others_does_not_hide_the_classes(tmp_path):
    put(tmp_path / "train", "unpacked/set/ant/a.png", "unpacked/set/bee/b.png")
    put(tmp_path / "test", "unpacked/bee/b.png")
    assert ImageFolder(tmp_path / "train").classes == ["ant", "bee"]
    assert classes_of(open_sources(str(tmp_path)).test) == {"unpacked/bee/b.png": "bee"}


def test_class_folders_that_differ_in_case_alone_are_one(tmp_path):
    put(tmp_path, "train/Ant/a.png", "train/Bee/b.png", "test/ant/a.png", "test/BEE/b.png")
    assert open_sources(str(tmp_path)).test.labels.tolist() == [1, 0]
    assert os.listdir(tmp_path / "test")


def test_every_file_of_a_list_is_asked_once(tmp_path, monkeypatch):
    write_folder(tmp_path / "a", 5)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    (tmp_path / "list.txt").write_text("\n".join(files))
    asked, ask = [], os.stat

    def spy(path, *rest, **options):
        asked.append(str(path))
        return ask(path, *rest, **options)

    monkeypatch.setattr(os, "stat", spy)
    source = ImageList(tmp_path / "list.txt")
    listed = source.fingerprint
    monkeypatch.undo()
    assert sorted(path for path in asked if path.endswith(".png")) == [str(tmp_path / name) for name in files]
    assert listed == ImageFolder(tmp_path / "a").fingerprint
