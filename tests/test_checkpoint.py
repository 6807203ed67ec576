"""Checkpoint files: whole or not there, never unpickled, and clear about what is wrong with them."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ijepa_fast.optim import FusedAdamW
from ijepa_fast.run import checkpoint
from ijepa_fast.run.checkpoint import Checkpoint, CheckpointError


def example(step=7):
    tensors = {"model.a": torch.arange(6.0).view(2, 3), "model.b": torch.ones(4, dtype=torch.bfloat16)}
    return Checkpoint(step, tensors, {"settings": {"seed": 1}, "nested": [1, None, "x"]})


def test_round_trip(tmp_path):
    path = checkpoint.save(tmp_path, example(), keep=2)
    loaded = checkpoint.load(path)
    assert (loaded.step, loaded.extra) == (7, example().extra)
    for name, value in example().tensors.items():
        assert torch.equal(loaded.tensors[name], value) and loaded.tensors[name].dtype == value.dtype
    assert set(checkpoint.select(loaded.tensors, "model")) == {"a", "b"}


def test_newest_are_kept_and_leftovers_removed(tmp_path, monkeypatch):
    (tmp_path / "step_000000001.partial").write_bytes(b"a save that was killed")
    (tmp_path / "download.partial").write_bytes(b"of somebody else")
    for step in (5, 10, 15, 20):
        checkpoint.save(tmp_path, example(step), keep=2)
    assert checkpoint.list_steps(tmp_path) == [15, 20]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "download.partial",
        "step_000000015.safetensors",
        "step_000000020.safetensors",
    ]
    tmp_path.with_name(f"{tmp_path.name}.safetensors").write_bytes(b"an encoder of this run, exported beside it")
    assert checkpoint.find(tmp_path).name == "step_000000020.safetensors"
    monkeypatch.chdir(tmp_path)
    assert checkpoint.find(Path(".")).name == "step_000000020.safetensors"


def test_a_save_that_dies_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, example(5), keep=1)

    def die(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, example(10), keep=1)
    assert checkpoint.load(checkpoint.find(tmp_path)).step == 5


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at .*nowhere: it does not exist"):
        checkpoint.find(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "step_000000001.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated(tmp_path, kept):
    path = checkpoint.save(tmp_path, example(), keep=1)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        checkpoint.load(path)


def test_the_newest_older_one_that_is_whole_is_named(tmp_path):
    paths = [checkpoint.save(tmp_path, example(step), keep=4) for step in (5, 10, 15, 20)]
    for path in (paths[1], paths[2]):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged.*; step_000000005.safetensors beside it is whole: remove or"):
        checkpoint.load(paths[2])
    paths[0].write_bytes(b"")
    with pytest.raises(CheckpointError) as refusal:
        checkpoint.load(paths[2])
    assert "beside it" not in str(refusal.value)  # step 20, which is whole, is newer


def test_foreign_files(tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(2)}, foreign)
    with pytest.raises(CheckpointError, match="not a checkpoint of ijepa_fast"):
        checkpoint.load(foreign)
    save_file({"weight": torch.ones(2)}, foreign, metadata={"ijepa_fast": '{"format": "ijepa_fast-99"}'})
    with pytest.raises(CheckpointError, match="format 'ijepa_fast-99'"):
        checkpoint.load(foreign)


class _Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (_Evil, "ran", True))


def test_a_pickle_is_refused_and_not_run(tmp_path):
    path = tmp_path / "step_000000003.safetensors"
    path.write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        checkpoint.load(path)
    assert not _Evil.ran


def test_optimizer_state_that_does_not_fit_is_refused():
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = FusedAdamW([parameter])
    names = {parameter: "w"}
    whole = checkpoint.optimizer_tensors(optimizer, names)
    checkpoint.load_optimizer_tensors(optimizer, names, whole)
    with pytest.raises(CheckpointError, match="there is no optimizer.w.step; there is no optimizer.w.exp_avg;"):
        checkpoint.load_optimizer_tensors(optimizer, names, {})
    for wrong, said in (
        (torch.zeros(()), r"float32 \[\]"),
        (torch.zeros(3).int(), r"int32 \[3\]"),
        (torch.zeros(4), r"float32 \[4\]"),
    ):
        with pytest.raises(CheckpointError, match=rf"exp_avg is {said}, not float32 \[3\]"):
            checkpoint.load_optimizer_tensors(optimizer, names, whole | {"optimizer.w.exp_avg": wrong})
