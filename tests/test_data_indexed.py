"""Shards at URLs by their index: over a loopback server that fails now and then, exact as on the disk."""

import http.server
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from test_data_shards import numbered, write_tar

from ijepa_fast.data import TrainLoader, indexed
from ijepa_fast.data.datasets import open_sources
from ijepa_fast.data.indexed import IndexedShards, write_index
from ijepa_fast.data.shards import TarShards


class Server(http.server.ThreadingHTTPServer):
    """Serves byte ranges of a folder's files. ``faults`` are what happens to the next requests."""

    def __init__(self, folder):
        self.folder, self.faults, self.ranges = folder, [], []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        file, fault = self.server.folder / self.path.strip("/"), None
        if self.server.faults:
            fault = self.server.faults.pop(0)
        if not file.is_file():
            return self.send_error(404)
        if fault == "busy":
            return self.send_error(503)
        content = file.read_bytes()
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            self.server.ranges.append((file.name, int(match[1]), int(match[2]) + 1))
            content = content[int(match[1]) : int(match[2]) + 1]
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "cut":
            content = content[: len(content) // 2]
            self.close_connection = True
        elif fault == "slow":
            threading.Event().wait(0.3)
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(indexed, "FIRST_WAIT", 0.01)
    folder = tmp_path / "store"
    folder.mkdir()
    for shard in range(2):
        write_tar(folder / f"set-{shard}.tar", numbered(shard * 6, 6))
    server = Server(folder)
    assert write_index([folder / "set-0.tar", folder / "set-1.tar"], folder / "train.index.npz") == 12
    yield server
    server.shutdown()


def local(server):
    return TarShards([str(server.folder / f"set-{shard}.tar") for shard in range(2)])


def test_the_same_source_as_local_shards(server):
    expected, found = local(server), IndexedShards(f"{server.url}/train.index.npz")
    assert found.fingerprint == expected.fingerprint  # so a run may go on from the disk to the store
    assert found.classes == expected.classes and np.array_equal(found.labels, expected.labels)
    for index in (11, 0, 7):
        assert np.array_equal(np.asarray(found.open(index)), np.asarray(expected.open(index)))
    (name, start, end), *_ = server.ranges
    assert name == "set-1.tar" and end - start == expected._sizes[11]  # that image and nothing else
    assert found.describe(0) == f"{server.url}/set-0.tar: 000.png"


def test_from_the_disk_too(server):
    source = open_sources(str(server.folder / "train.index.npz")).train
    assert isinstance(source, IndexedShards) and source.fingerprint == local(server).fingerprint


def test_faults_are_tried_again_counted_and_named(server, caplog):
    source = IndexedShards(f"{server.url}/train.index.npz")
    server.faults = ["busy", "cut", "slow"]
    assert np.array_equal(np.asarray(source.open(3)), np.asarray(local(server).open(3)))
    assert source.retries == 2 and not server.faults
    assert re.search(r"set-0.tar, bytes \d+ to \d+: .*503.*again in 0\.0 s \(1 times so far\)", caplog.text)
    assert "(2 times so far)" in caplog.text


def test_what_cannot_be_read_is_an_error_in_the_end(server):
    source = IndexedShards(f"{server.url}/train.index.npz")
    server.faults = ["busy"] * 50
    with pytest.raises(OSError, match=r"set-0.tar, bytes \d+ to \d+ cannot be read after 6 tries: .*503"):
        source.open(0)
    server.faults = []
    (server.folder / "set-0.tar").unlink()
    with pytest.raises(FileNotFoundError):
        source.open(0)
    assert source.retries == 5  # what is not there is asked for once


def test_batches_are_those_of_the_disk_whatever_the_ranks(server):
    def batches(source, rank=0, ranks=1, **settings):
        return list(
            TrainLoader(
                source, image_size=24, global_batch=4, seed=3, rank=rank, world_size=ranks, num_steps=5, **settings
            )
        )

    expected = batches(local(server), workers=0)
    server.faults = ["busy", "cut"]
    source = IndexedShards(f"{server.url}/train.index.npz")
    for rank in range(2):
        for found, batch in zip(batches(source, rank, 2, workers=1), expected, strict=True):
            assert np.array_equal(found.images, batch.images[2 * rank : 2 * rank + 2])
    (resumed,) = batches(source, start_step=4, workers=0)[:1]
    assert np.array_equal(resumed.images, expected[4].images)


def test_what_is_no_index_is_refused(server, tmp_path):
    (server.folder / "bad.index.npz").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"bad.index.npz is no index of shards"):
        IndexedShards(f"{server.url}/bad.index.npz")
    with pytest.raises(ValueError, match=r"must end in .index.npz, got .*index.txt"):
        write_index([server.folder / "set-0.tar"], tmp_path / "index.txt")


@pytest.mark.slow
def test_the_command(server):
    out = server.folder / "again.index.npz"
    command = [sys.executable, "-m", "ijepa_fast.data.indexed", f"{server.folder}/set-{{0..1}}.tar", str(out)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    assert said == f"12 images in {out}\n"
    assert IndexedShards(str(out)).fingerprint == local(server).fingerprint
