"""WebDataset shards: indexed local ones against a folder of the same files, streamed ones over a local HTTP server."""

import functools
import http.server
import io
import sys
import tarfile
import threading
from dataclasses import replace

import pytest
import torch
from image_files import encoded, smooth_image
from PIL import Image
from tiny import tiny_run

from ijepa_fast.data import BadFilesError, ImageFolder, TrainLoader, shards
from ijepa_fast.data.crops import eval_crop
from ijepa_fast.data.datasets import open_sources, train_loader
from ijepa_fast.data.remote import RemoteLoader, RemoteShards
from ijepa_fast.data.shards import TarShards, expand_shards, names_shards
from ijepa_fast.run import checkpoint
from ijepa_fast.train import pretrain

PER_SHARD = 6


def write_tar(path, files, form=tarfile.GNU_FORMAT):
    """(name, content) members, in this order."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def numbered(first, count, labels=True):
    """Members of ``count`` samples: an image each, and a class 0 or 1."""
    for number in range(first, first + count):
        yield f"{number:03d}.png", encoded(smooth_image(48, 40, seed=number))
        if labels:
            yield f"{number:03d}.cls", str(number % 2).encode()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ijepa_fast" / "shards"


@pytest.fixture
def four(tmp_path):
    """24 images in 4 shards, and the same in a folder."""
    for shard in range(4):
        write_tar(tmp_path / f"set-{shard}.tar", numbered(shard * PER_SHARD, PER_SHARD))
    (tmp_path / "folder").mkdir()
    for name, content in numbered(0, 24, labels=False):
        (tmp_path / "folder" / name).write_bytes(content)
    return tmp_path


def batches(source, **options):
    defaults = {"image_size": 16, "global_batch": 8, "seed": 5, "num_steps": 7}
    return list(TrainLoader(source, **defaults | options))


# Indexed shards


def test_arrays_beside_images_are_none(tmp_path):
    image = encoded(smooth_image(8, 8))
    files = [("0.npy", b"of features"), ("0.png", image), ("0.json", b'{"label": "\\ud800"}'), ("1.npy", b"alone")]
    source = TarShards([write_tar(tmp_path / "x.tar", files)])
    assert [source.describe(index).rpartition(": ")[2] for index in range(2)] == ["0.png", "1.npy"]
    assert source.labels.tolist() == [0, -1]


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"start_step": 3, "num_steps": 4}], ids=str)
def test_batches_are_those_of_a_folder(four, options):
    """The same images in the same order, with the same crops, whatever the workers and from any step."""
    source = TarShards(expand_shards(str(four / "set-{0..3}.tar")))
    folder = ImageFolder(four / "folder")
    for got, want in zip(batches(source, **options), batches(folder)[options.get("start_step", 0) :], strict=True):
        assert torch.equal(got.images, want.images) and torch.equal(got.indices, want.indices)
        assert got.labels.tolist() == [index % 2 for index in got.indices.tolist()]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_where_tarfile_finds_them(tmp_path, form):
    deep = f"{'d' * 60}/{'e' * 50}/x.JPG"
    files = [
        ("a/one.jpg", b"1" * 700),
        ("a/one.cls", b" 3\n"),
        ("a/one.mask.png", b"not the image"),
        ("two.cls", b"0"),
        ("two.json", b"{}"),
        ("two.png", b"2" * 512),
        (deep, b"3"),
        ("text.txt", b"no image"),
        ("._two.png", b"resource fork"),
        ("__meta__/x.png", b"of the shard"),
        ("é.webp", b""),
    ]
    path = write_tar(tmp_path / "x.tar", files, form)
    source = TarShards([path])
    with tarfile.open(path) as tar:
        places = {member.name: (member.offset_data, member.size) for member in tar}
    wanted = ["a/one.jpg", "two.png", deep, "é.webp"]
    assert [source.describe(i) for i in range(len(source))] == [f"{path}: {name}" for name in wanted]
    assert [(int(o), int(s)) for o, s in zip(source._offsets, source._sizes, strict=True)] == [
        places[name] for name in wanted
    ]
    assert source.labels.tolist() == [3, 0, -1, -1] and source.classes == ["0", "1", "2", "3"]
    assert source.damaged == {}


def test_without_cls_there_are_no_labels(tmp_path):
    source = TarShards([write_tar(tmp_path / "x.tar", numbered(0, 3, labels=False))])
    assert source.labels is None and source.classes is None and len(source) == 3


def test_the_index_is_kept_and_made_anew_when_the_shard_changes(four, cache, monkeypatch):
    path = str(four / "set-0.tar")
    first, calls, read = TarShards([path]), [], shards.read_samples
    monkeypatch.setattr(shards, "read_samples", lambda *a, **k: calls.append(1) or read(*a, **k))
    again = TarShards([path])
    assert not calls and again.fingerprint == first.fingerprint and again.labels.tolist() == first.labels.tolist()
    (saved,) = cache.iterdir()
    saved.write_bytes(saved.read_bytes()[:100])
    assert TarShards([path]).fingerprint == first.fingerprint and len(calls) == 1
    write_tar(path, numbered(0, 2))
    changed = TarShards([path])
    assert len(calls) == 2 and len(changed) == 2 and changed.fingerprint != first.fingerprint


def test_without_a_home_there_is_no_cache(four, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", no_home)
    assert len(TarShards([str(four / "set-0.tar")])) == PER_SHARD


def test_names_with_dots(tmp_path):
    image = encoded(smooth_image(8, 8))
    dotted = [
        (f"photo.{number:03d}.{end}", data) for number in range(2) for end, data in (("png", image), ("cls", b"3"))
    ]
    kinds = [("b.left.png", image), ("b.png", image), ("c.mask.png", image), ("c.Image.png", image), ("c.cls", b"1")]
    odd = [("d.left.png", image), ("d.right.png", image), ("e.0.left.png", image), ("e.0.right.png", image)]
    path = write_tar(tmp_path / "x.tar", [("a.png", image), *dotted, *kinds, *odd])
    source = TarShards([path])
    names = [source.describe(index).partition(": ")[2] for index in range(len(source))]
    assert names == ["a.png", "photo.000.png", "photo.001.png", "b.png", "c.Image.png", "d.left.png", "e.0.left.png"]
    assert source.labels.tolist() == [-1, 3, 3, -1, 1, -1, -1]
    assert source.damaged == {path: "d.right.png is passed over, d.left.png taken (and 1 more like it)"}


def test_classes_in_words_and_in_json(tmp_path):
    image = encoded(smooth_image(8, 8))
    said = [("cls", b"dog\n"), ("json", b'{"caption": "x", "label": "cat"}'), ("json", b'{"class": "10"}')]
    said += [("json", b"[1]"), ("cls", "\u00e9lan".encode())]
    files = [member for n, (end, text) in enumerate(said) for member in ((f"{n}.png", image), (f"{n}.{end}", text))]
    source = TarShards([write_tar(tmp_path / "x.tar", files)])
    assert source.classes == ["10", "cat", "dog", "\u00e9lan"] and source.labels.tolist() == [2, 1, 0, -1, 3]
    assert source.damaged == {}
    numbers = [member for n in range(3) for member in ((f"{n}.png", image), (f"{n}.json", b'{"label": %d}' % n))]
    assert TarShards([write_tar(tmp_path / "y.tar", numbers)]).labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"outside the classes \['10', 'cat'\]: in \['dog', "):
        TarShards([str(tmp_path / "x.tar")], classes=["10", "cat"])
    broken = [("0.png", image), ("0.json", b"{"), ("1.png", image), ("1.cls", b"\xff\xfe")]
    source = TarShards([write_tar(tmp_path / "z.tar", broken)])
    assert list(source.damaged.values()) == ["0.json holds no class: b'{' (and 1 more like it)"]
    assert len(source) == 2 and source.labels is None


@pytest.mark.parametrize(
    ("classes", "labels"),
    [(["1", "2", "3"], [0, 1, 2]), (["0", "1", "2", "3"], [1, 2, 3]), (["ant", "bee", "cow", "doe"], [1, 2, 3])],
)
def test_numbers_are_names_of_the_training_classes_or_else_indices(tmp_path, classes, labels):
    image = encoded(smooth_image(8, 8))
    files = [member for n in (1, 2, 3) for member in ((f"{n}.png", image), (f"{n}.cls", b"%d" % n))]
    assert TarShards([write_tar(tmp_path / "x.tar", files)], classes=classes).labels.tolist() == labels


def test_a_cache_that_cannot_be_written_is_done_without(four, caplog):
    (four / "file").write_bytes(b"")
    assert len(TarShards([str(four / "set-0.tar")], cache=str(four / "file" / "below"))) == PER_SHARD
    assert "cannot be kept" in caplog.text


def broken(four, kind):
    """set-1.tar damaged; the numbers of its images that are still there, and words of what is said of it."""
    path = four / "set-1.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        third = tar.getmember("008.png")
    if kind == "header":
        content[third.offset : third.offset + 100] = b"x" * 100
        kept, words = [6, 7, 9, 10, 11], f"bytes {third.offset} to .* no readable header"
    elif kind == "cut in a member":
        del content[third.offset_data + 10 :]
        kept, words = [6, 7], "cut off in 008.png"
    elif kind == "cut between members":
        del content[third.offset :]
        kept, words = [6, 7], "without an end-of-archive mark"
    elif kind == "negative size":  # base-256 -1, with a checksum that fits
        header = content[third.offset : third.offset + 512]
        header[124:136], header[148:156] = b"\xff" * 12, b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content[third.offset : third.offset + 512] = header
        kept, words = [6, 7, 9, 10, 11], f"bytes {third.offset} to .* no readable header"
    elif kind == "empty":
        content.clear()
        kept, words = [], "without an end-of-archive mark"
    elif kind == "text":
        content[:] = b"<html>404</html>" * 100
        kept, words = [], "no readable header"
    else:
        place = content.index(b"1", tar_of(path, "007.cls").offset_data)
        content[place : place + 1] = b"?"
        kept, words = [6, 7, 8, 9, 10, 11], r"the class of 007.png is no number: '\?'"
    path.write_bytes(content)
    return kept, words


def tar_of(path, name):
    with tarfile.open(path) as tar:
        return tar.getmember(name)


DAMAGES = ["header", "negative size", "cut in a member", "cut between members", "empty", "text", "cls"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_shards_are_named_and_the_rest_is_used(four, kind, caplog):
    kept, words = broken(four, kind)
    source = TarShards(expand_shards(str(four / "set-*.tar")))
    names = [source.describe(i).rpartition("/")[2] for i in range(len(source))]
    assert names == [f"set-{n // PER_SHARD}.tar: {n:03d}.png" for n in [*range(6), *kept, *range(12, 24)]]
    (shard,) = source.damaged
    assert shard == str(four / "set-1.tar")
    assert "damaged shard" in caplog.text
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(source.damaged[shard])
    loader = TrainLoader(source, image_size=16, global_batch=8, seed=5, num_steps=3)
    assert len(list(loader)) == 3 and loader.bad == source.damaged
    if kind == "cls":
        assert source.labels[7] == -1 and source.labels[8] == 0


def test_damaged_images_are_named_with_their_shard(four):
    write_tar(four / "set-1.tar", [("bad.png", b"no image"), *numbered(7, 5)])
    source = TarShards(expand_shards(str(four / "set-{0..3}.tar")))
    loader = TrainLoader(source, image_size=16, global_batch=8, seed=5, num_steps=6, max_bad_share=0.1)
    assert all(len(batch.images) == 8 for batch in loader)
    assert list(loader.bad) == [f"{four / 'set-1.tar'}: bad.png"]


def test_a_shard_that_shrinks_after_indexing_is_a_bad_image(four):
    source = TarShards([str(four / "set-0.tar")])
    (four / "set-0.tar").write_bytes((four / "set-0.tar").read_bytes()[:900])
    with pytest.raises(EOFError, match=r"set-0.tar: 005.png"):
        source.open(5)


def test_what_names_shards():
    for data in ("x.tar", "/a/{00..11}.tar", "http://host/x", "pipe:cat x", "s3://b/x.tar", "x.TAR.gz", "a*.tar"):
        assert names_shards(data), data
    assert not any(map(names_shards, ("folder", "rendered", "tar", "/data/x.tart")))


def test_patterns(four):
    wanted = [str(four / f"set-{n}.tar") for n in range(4)]
    assert expand_shards(str(four / "set-{0..3}.tar")) == expand_shards(str(four / "*.tar")) == wanted
    assert expand_shards("::".join([wanted[2], wanted[0]])) == [wanted[2], wanted[0]]
    (four / "a[1]").mkdir()
    shard = str((four / "set-0.tar").rename(four / "a[1]" / "set-0.tar"))
    assert expand_shards(str(four / "a[1]" / "*.tar")) == expand_shards(shard) == [shard]
    assert expand_shards(str(four / "set-[12].tar")) == wanted[1:3]
    assert expand_shards("http://host/{a,b}.tar") == ["http://host/a.tar", "http://host/b.tar"]


ERRORS = {
    "missing": (lambda d: expand_shards(f"{d}/set-{{0..4}}.tar"), FileNotFoundError, "set-4.tar"),
    "no match": (lambda d: expand_shards(f"{d}/z*.tar"), ValueError, r"no shard fits .*z\*.tar"),
    "twice": (lambda d: expand_shards(f"{d}/set-1.tar::{d}/set-1.tar"), ValueError, "named twice: .*set-1.tar"),
    "mixed": (lambda d: expand_shards(f"{d}/set-1.tar::http://host/x.tar"), ValueError, "mixes local"),
    "no images": (lambda d: TarShards([write_tar(d / "t.tar", [("a.txt", b"")])]), ValueError, "no images in 1 shards"),
    "labels": (lambda d: TarShards([str(d / "set-0.tar")], classes=["0"]), ValueError, "label 1, .* 1 classes"),
    "test without cls": (
        lambda d: open_sources(str(d / "set-0.tar"), write_tar(d / "t.tar", numbered(0, 2, labels=False))),
        ValueError,
        "no .cls",
    ),
    "test from a URL": (lambda d: open_sources(str(d / "set-0.tar"), "http://h/x.tar"), ValueError, "local shards"),
    "epoch_images": (
        lambda d: train_loader(TarShards([str(d / "set-0.tar")]), epoch_images=9),
        ValueError,
        "epoch_images is for images from URLs; there are 6 images .got 9.",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_values(four, make, error, message):
    with pytest.raises(error, match=message):
        make(four)


def test_without_webdataset_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(RuntimeError, match=r"pip install -e '\.\[shards\]'"):
        expand_shards("x.tar")


def test_compressed_shards_are_refused(four):
    import gzip

    (four / "x.tar.gz").write_bytes(gzip.compress((four / "set-0.tar").read_bytes()))
    with pytest.raises(ValueError, match="x.tar.gz is compressed"):
        TarShards([str(four / "x.tar.gz")])


def test_a_run_with_probe_on_labelled_shards(four):
    config = tiny_run(four / "set-{0..2}.tar", four / "run", steps=2)
    evaluation = replace(config.evaluation, data=str(four / "set-3.tar"), results="figures")
    summary = pretrain(replace(config, evaluation=evaluation))
    assert 0 <= summary["after"]["probe"] <= 1 and summary["bad_files"] == {}


# Streamed shards


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def url(four):
    handler = functools.partial(Quiet, directory=str(four))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def stream(shards, **options):
    defaults = {"image_size": 16, "global_batch": 4, "seed": 5, "num_steps": 9, "epoch_images": 24, "shuffle": 5}
    return RemoteLoader(RemoteShards(shards), **defaults | options)


def assert_same(got, want):
    for mine, other in zip(got, want, strict=True):
        assert torch.equal(mine.images, other.images) and torch.equal(mine.labels, other.labels)


def seen(batches):
    """Numbers of the images of the batches, told by their pixels; crops must be whole images for that."""
    whole = {encoded_crop(n): n for n in range(24)}
    return [whole[image.numpy().tobytes()] for batch in batches for image in batch.images]


@functools.cache
def encoded_crop(number):

    with Image.open(io.BytesIO(encoded(smooth_image(48, 40, seed=number)))) as image:
        return eval_crop(image, (40, 48), resize_ratio=1.0).numpy().tobytes()


WHOLE = {"image_size": (40, 48), "scale": (1.0, 1.0), "ratio": (1.2, 1.2)}


def test_a_pass_shows_every_image_once_in_a_mixed_order(url):
    shards = expand_shards(f"{url}/set-{{0..3}}.tar")
    order = seen(stream(shards, **WHOLE, shuffle=24, num_steps=12))
    assert order != sorted(order)
    # The buffer holds one pass when the first image leaves it: 48 images are two passes but for what it still holds.
    assert all(1 <= order.count(number) <= 3 for number in set(order)) and len(set(order)) > 18
    without_buffer = seen(stream(shards, **WHOLE, shuffle=1, num_steps=6))
    assert sorted(without_buffer) == list(range(24))
    assert [n // PER_SHARD for n in without_buffer] != sorted(n // PER_SHARD for n in without_buffer)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_repeats_itself_and_resumes_anywhere(url, workers):
    shards = expand_shards(f"{url}/set-{{0..3}}.tar")
    whole = list(stream(shards, workers=workers))
    assert len(whole) == 9
    for start in (1, 4):
        assert_same(stream(shards, workers=workers, start_step=start, num_steps=9 - start), whole[start:])
    if not workers:
        assert_same(stream(shards, seed=5), whole)
        assert not torch.equal(next(iter(stream(shards, seed=6))).images, whole[0].images)


def test_ranks_and_workers_share_the_shards(url):
    shards = expand_shards(f"{url}/set-{{0..3}}.tar")
    parts = [seen(stream(shards, **WHOLE, rank=r, world_size=2, shuffle=1, num_steps=6)) for r in range(2)]
    assert not set(parts[0]) & set(parts[1]) and set(parts[0]) | set(parts[1]) == set(range(24))
    with pytest.raises(ValueError, match="4 shards cannot be shared by 2 ranks x 3 workers"):
        stream(shards, world_size=2, workers=3)


@pytest.mark.parametrize("kind", DAMAGES[:-1])  # classes of streams are not used
def test_damaged_streams_are_named_and_the_rest_is_used(four, url, kind):
    kept, words = broken(four, kind)
    shards = [f"{url}/set-0.tar", f"{url}/set-1.tar"]
    loader = stream(shards, **WHOLE, shuffle=1, num_steps=6)
    assert set(seen(loader)) == {*range(6), *kept}
    assert list(loader.bad) == [shards[1]]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(loader.bad[shards[1]])


def test_missing_shards_and_bad_images_of_a_stream(four, url):
    write_tar(four / "set-1.tar", [("bad.png", b"no image"), *numbered(7, 5)])
    shards = [f"{url}/set-0.tar", f"{url}/nothing.tar", f"{url}/set-1.tar"]
    loader = stream(shards, **WHOLE, shuffle=1, num_steps=6)
    assert set(seen(loader)) == {*range(6), *range(7, 12)}
    assert set(loader.bad) == {shards[1], f"{shards[2]}: bad.png"}
    assert "cannot be read" in loader.bad[shards[1]]
    whole = list(stream(shards))
    assert_same(stream(shards, start_step=5, num_steps=4), whole[5:])
    with pytest.raises(BadFilesError, match=r"of \d+ images are bad(?s:.*)bad.png"):
        list(stream(shards, min_seen=8, max_bad_share=0.0, num_steps=20))
    with pytest.raises(BadFilesError, match="none of the shards .* holds an image"):
        list(stream([shards[1]]))


def test_pipes_are_streams(four):
    pipe = f"pipe:cat {four / 'set-0.tar'}"
    assert expand_shards(pipe) == [pipe]
    assert set(seen(stream([pipe], **WHOLE))) == set(range(6))
    source = open_sources(pipe).train
    assert len(source) == 6 and source.open(2).size == (48, 40)


STREAM_ERRORS = {
    "epoch_images": ({"epoch_images": None}, "set loader.epoch_images"),
    "short epoch": ({"epoch_images": 3}, "3 images cannot fill one global batch of 4"),
    "shuffle": ({"shuffle": 0}, "at least one image, got 0"),
    "ranks": ({"world_size": 3}, "4 cannot be split evenly over 3"),
    "rank": ({"rank": 1}, "rank 1 of 1"),
    "start": ({"start_step": -1}, "start_step .* -1"),
    "share": ({"max_bad_share": 2.0}, "max_bad_share .* 2.0"),
    "crop": ({"scale": (0.5, 0.2)}, "crop scale"),
    "workers": ({"workers": -1}, "workers .* -1"),
}


@pytest.mark.parametrize(("options", "message"), STREAM_ERRORS.values(), ids=STREAM_ERRORS)
def test_stream_settings_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        stream([f"http://host/{n}.tar" for n in range(4)], **options)


def test_a_run_on_a_stream_resumes_to_the_same_weights(four, url):
    """From its checkpoint after 2 of 4 steps."""
    config = tiny_run(f"{url}/set-{{0..3}}.tar", four / "whole", steps=4, save_every=2, keep=9)
    config = replace(config, loader=replace(config.loader, epoch_images=24))
    with pytest.raises(ValueError, match="epoch_images"):
        pretrain(replace(config, loader=replace(config.loader, epoch_images=None)))
    pretrain(replace(config, evaluation=replace(config.evaluation, results="pictures")))
    assert (four / "whole" / "masks.png").exists()
    resumed = four / "resumed" / "checkpoints"
    resumed.mkdir(parents=True)
    first = checkpoint.path_of(four / "whole" / "checkpoints", 2)
    (resumed / first.name).write_bytes(first.read_bytes())
    pretrain(replace(config, output=str(four / "resumed")))
    states = [checkpoint.load(checkpoint.path_of(four / run / "checkpoints", 4)) for run in ("whole", "resumed")]
    weights = [{k: v for k, v in state.tensors.items() if k.startswith("model.")} for state in states]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
