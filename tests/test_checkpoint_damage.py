"""Damaged checkpoints, with fixed seeds: each is refused, or the one before it is taken, or nothing was lost."""

import json
import os
import shutil
import stat
import subprocess
import sys
from errno import EINVAL, EIO, ENOSPC
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ijepa_fast.ranks import Ranks
from ijepa_fast.run import checkpoint, files
from ijepa_fast.run.checkpoint import Checkpoint, CheckpointDamaged, CheckpointError
from ijepa_fast.run.folder import claim, locked
from ijepa_fast.train import pretrain, setup
from ijepa_fast.weights.reading import WeightsError
from ijepa_fast.weights.runs import check_training, load_run
from tests.tiny import tiny_run


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run of 6 steps with checkpoints after 5 and 6."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pretrain(tiny_run(data, folder, steps=6))
    return folder


@pytest.fixture
def copied(run, data, tmp_path):
    """A copy of the run; ``copied(alone)`` gives the folder, the newest file, and what a start would continue from."""
    config = tiny_run(data, tmp_path / "run", steps=6)
    parts = setup(config, Ranks(0, 1, torch.device("cpu")))

    def check(state, path):
        check_training(state, path, parts.model, parts.optimizer, parts.scaler, parts.total_steps)

    def copy(alone: bool = False):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(run, tmp_path / "run")
        newest = checkpoint.find(tmp_path / "run")
        if alone:
            checkpoint.path_of(newest.parent, 5).unlink()
        return newest, lambda: claim(config, parts.sources.train.fingerprint, check)

    return copy


def damaged(content: bytearray, rng: np.random.Generator) -> bytearray:
    header = 8 + int.from_bytes(content[:8], "little")
    kind = rng.integers(6)
    if kind < 3:
        place = rng.integers(header) if kind == 0 else rng.integers(header, len(content))
        content[place] ^= 1 << rng.integers(8)
    elif kind == 3:
        start = rng.integers(len(content))
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    elif kind == 4:
        del content[rng.integers(len(content)) :]
    else:
        content += bytes(rng.integers(1, 100))
    return content


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 300), marks=pytest.mark.slow)], ids=len)
def test_bits_that_changed_are_noticed(run, copied, seeds):
    """Whatever changes, the file is refused and the one before it is taken, bit for bit as it was."""
    whole = {step: checkpoint.load(checkpoint.path_of(run / "checkpoints", step)).tensors for step in (5, 6)}
    newest, take = copied()
    original = newest.read_bytes()
    for seed in seeds:
        content = damaged(bytearray(original), np.random.default_rng(seed))
        newest.write_bytes(content)
        if content == original:
            continue
        state = take()
        assert state.step == 5, seed
        assert all(torch.equal(value, whole[5][name]) for name, value in state.tensors.items()), seed


def rewritten(path, change):
    """The file as an earlier version wrote it, without a checksum, changed by ``change(about, tensors)``."""
    state = checkpoint.load(path)
    about = {"format": checkpoint.WITHOUT_CHECKSUM, "step": state.step, "extra": state.extra}
    tensors = dict(state.tensors)
    about = change(about, tensors) or about
    save_file(tensors, path, {"ijepa_fast": about if isinstance(about, str) else json.dumps(about)})


def test_files_without_a_checksum_still_load_and_it_is_said(copied, caplog):
    newest, take = copied()
    rewritten(newest, lambda about, tensors: None)
    with caplog.at_level("INFO"):
        assert take().step == 6
    assert "has no checksum" in caplog.text


METADATA = [
    *(lambda about, _, step=step: about | {"step": step} for step in ("6", 6.0, True, None, -1, 5, 7, 10**12, [])),
    *(lambda *_, value=value: json.dumps(value) for value in ([], None, "text", 3, {})),
    lambda *_: "{",
    lambda *_: "[" * 100_000,
    *(lambda about, _, extra=extra: about | {"extra": extra} for extra in ([], None, "x", {})),
    *(
        lambda about, _, name=name, value=value: about | {"extra": about["extra"] | {name: value}}
        for name in ("settings", "config", "bad_files", "data", "scaler")
        for value in ([], "x", 1)
        if (name, value) != ("data", "x")
    ),
    *(lambda about, _, s=s: about | {"extra": about["extra"] | {"seconds": s}} for s in ("x", -1, float("nan"))),
]


@pytest.mark.parametrize("alone", [True, False])
def test_metadata_of_other_types_are_noticed_without_a_checksum(copied, alone):
    for number, change in enumerate(METADATA):
        newest, take = copied(alone)
        rewritten(newest, change)
        if alone:
            with pytest.raises(CheckpointError):
                take()
            with pytest.raises(CheckpointError):
                load_run(newest)
        else:
            assert take().step == 5, number


def scalar(value):
    return torch.zeros((), dtype=value.dtype)


CHANGES = (torch.Tensor.int, torch.Tensor.bfloat16, torch.Tensor.double, scalar, lambda value: value[None], None)


def test_tensors_that_are_missing_or_of_another_kind_are_noticed_without_a_checksum(copied):
    newest, take = copied()
    whole = newest.read_bytes()
    names = [name for name in sorted(checkpoint.load(newest).tensors) if not name.startswith("knn.")]
    rng = np.random.default_rng(0)
    for number in range(60):
        name, change = names[rng.integers(len(names))], CHANGES[number % len(CHANGES)]

        def damage(about, tensors, name=name, change=change):
            value = tensors.pop(name)
            changed = None if change is None else change(value)
            if changed is not None and (changed.shape, changed.dtype) != (value.shape, value.dtype):
                tensors[name] = changed

        newest.write_bytes(whole)
        rewritten(newest, damage)
        assert take().step == 5, (name, change)


def test_what_evaluates_a_checkpoint_refuses_integers(copied):
    newest, _ = copied()
    name = "model.target_encoder.norm.weight"
    rewritten(newest, lambda about, tensors: tensors.update({name: tensors[name].int()}))
    with pytest.raises(CheckpointDamaged, match="target_encoder.norm.weight holds torch.int32"):
        load_run(newest)
    newest, _ = copied()
    rewritten(newest, lambda about, tensors: tensors.__delitem__(name))
    with pytest.raises(WeightsError, match="norm.weight"):
        load_run(newest)


def example(step=7):
    return Checkpoint(step, {"model.a": torch.arange(6.0).view(2, 3)}, {})


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    kept = checkpoint.save(tmp_path, example(5), keep=1)

    def full(tensors, file, metadata):
        file.write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    said = r"step_000000010.safetensors cannot be written: No space left .* 24 bytes are needed, [\d,]+ are free"
    with pytest.raises(OSError, match=f"{said}.*{kept}"):
        checkpoint.save(tmp_path, example(10), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert checkpoint.load(kept).step == 5


@pytest.mark.parametrize(("number", "ends"), [(EINVAL, False), (EIO, True)])
def test_a_file_system_without_fsync_ends_no_run(tmp_path, monkeypatch, number, ends):
    def fsync(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if ends:
        with pytest.raises(OSError, match=os.strerror(EIO)):
            checkpoint.save(tmp_path, example(), keep=1)
        assert not list(tmp_path.iterdir())
    else:
        assert checkpoint.load(checkpoint.save(tmp_path, example(), keep=1)).step == 7


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = checkpoint.save(tmp_path, example(), keep=1)
        files.write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (path, tmp_path / "x.json")} == {0o640}


def test_no_room_for_a_small_file_is_one_line_too(tmp_path):
    def write(file):
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    with pytest.raises(OSError, match=r"a.json cannot be written: No space left on device; [\d,]+ are free there"):
        files.write_whole(tmp_path / "a.json", write)


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 4711 on elsewhere")
file.flush()
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fcntl")
def test_a_folder_in_use_is_refused_and_a_crash_leaves_no_lock(data, tmp_path):
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        try:
            other.stdout.readline()
            with pytest.raises(CheckpointError, match="is in use by process 4711 on elsewhere"):
                pretrain(tiny_run(data, tmp_path / "run", steps=4))
            assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        finally:
            other.kill()
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_in_use_is_refused_where_locks_are_those_of_windows(tmp_path, monkeypatch):
    held = set()

    def locking(descriptor, mode, count):
        if (number := os.fstat(descriptor).st_ino) in held:
            raise PermissionError(13, "Permission denied")
        held.add(number)

    def unlink(path, missing_ok=False):
        raise PermissionError(13, "used by another process")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    with monkeypatch.context() as patch, locked(tmp_path):
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(CheckpointError, match=f"is in use by process {os.getpid()} on "), locked(tmp_path):
            pass
    held.clear()  # as closing the file does there
    with locked(tmp_path):
        pass
