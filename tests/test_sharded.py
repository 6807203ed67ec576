"""Checkpoints in shards, in one process: what they look like, who reads them, and what is said of damaged ones."""

import json
import shutil
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from ijepa_fast import cli, train
from ijepa_fast.model.vit import cast_weights
from ijepa_fast.optim import FusedAdamW, parameter_groups
from ijepa_fast.optim.step_tensors import local
from ijepa_fast.ranks import Ranks, ranks
from ijepa_fast.run import checkpoint as checkpoints
from ijepa_fast.run import sharded
from ijepa_fast.run.build import check_batches, mesh_of
from ijepa_fast.run.checkpoint import Checkpoint, CheckpointDamaged
from ijepa_fast.run.saving import Saver
from ijepa_fast.step.sharding import shard, shard_mesh
from ijepa_fast.train import pretrain
from ijepa_fast.weights.any_format import read_any
from ijepa_fast.weights.runs import NETWORKS, full_precision, load_run, restore, training_tensors
from tests.image_files import write_folder
from tests.test_distributed import free_port
from tests.tiny import tiny_run

TENSORS = {"a": torch.arange(35.0).view(7, 5), "b": torch.arange(3.0).bfloat16(), "step": torch.tensor(4.0)}
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def saver(folder, keep=2, background=False):
    return Saver(folder, keep, ALONE, shards=True, background=background)


def write(folder, step, **settings):
    saver(folder, **settings).save(Checkpoint(step, TENSORS, {"note": "x"}), best=False)
    return folder / f"step_{step:09d}"


def test_found_and_read_like_a_file(folder):
    path = write(folder, 7)
    assert checkpoints.list_steps(folder) == [7] and checkpoints.find(folder) == checkpoints.find(path) == path
    state = checkpoints.load(path)
    assert state.step == 7 and state.extra == {"note": "x"} and state.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(state.tensors[name], value) for name, value in TENSORS.items())
    assert checkpoints.load(path, values=lambda name: name != "a").tensors["a"].is_meta
    assert not list(folder.glob("*.partial"))


def assert_ranks_read_their_shares(path, expected, ranks):
    """Tensors of these names in a checkpoint, divided among so many ranks, are those values to the bit."""
    for rank in range(ranks):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        try:
            mesh = shard_mesh(ranks, ranks, "cpu")
            into = {
                name: distribute_tensor(torch.full_like(value, -1), mesh, [Shard(0)], src_data_rank=None)
                for name, value in expected.items()
            }
            sharded.read_into(path, into)
            for name, value in expected.items():
                chunks = value.chunk(ranks)
                assert torch.equal(into[name].to_local(), chunks[rank] if rank < len(chunks) else value[:0])
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_any_number_of_ranks_reads_its_own_share(folder, ranks):
    assert_ranks_read_their_shares(write(folder, 1), {name: TENSORS[name] for name in ("a", "b")}, ranks)


def test_one_of_an_earlier_version_has_no_checksums(folder):
    path = write(folder, 1)
    about = json.loads((path / sharded.ABOUT).read_text())
    assert about.pop("sha256").keys() == about["files"].keys()
    (path / sharded.ABOUT).write_text(json.dumps(about))
    flip_a_bit(next(path.glob("shard-*")))
    assert sharded.changed(path) == [] and checkpoints.load(path).step == 1


def test_old_ones_go_and_the_best_stays(folder):
    for step in (1, 2, 3):
        saver(folder).save(Checkpoint(step, TENSORS, {}), best=step == 1)
    assert checkpoints.list_steps(folder) == [2, 3]
    assert checkpoints.load(checkpoints.find(folder, "best")).step == 1
    saver(folder).save(Checkpoint(4, TENSORS, {}), best=True)
    assert checkpoints.load(checkpoints.find(folder.parent, "best")).step == 4
    assert {path.name for path in folder.iterdir()} == {"step_000000003", "step_000000004", "best"}


def flip_a_bit(file):
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 1
    file.write_bytes(contents)


@pytest.mark.parametrize("damage", ["cut", "missing", "about", "a bit"])
def test_a_damaged_one_is_told_and_names_an_older_one(folder, damage):
    write(folder, 1)
    path = write(folder, 2)
    file = next(path.glob("shard-*"))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    elif damage == "a bit":
        flip_a_bit(file)
    else:
        (path / sharded.ABOUT).write_text(json.dumps({"format": "another"}))
    with pytest.raises(CheckpointDamaged, match=r"(?s)not a checkpoint in shards.*step_000000001 beside it is whole"):
        checkpoints.load(path)


def test_a_save_that_was_cut_off_is_none_and_goes_with_the_next(folder):
    (folder / "step_000000009.partial").mkdir(parents=True)
    (folder / "step_000000009.partial" / "shard-00003-model-00001-of-00001.safetensors").write_bytes(b"x")
    (folder / "step_000000008").mkdir()  # without about.json
    assert checkpoints.list_steps(folder) == []
    path = write(folder, 9)
    assert checkpoints.list_steps(folder) == [9] and len(list(path.glob("shard-*"))) == 1
    assert not list(folder.glob("*.partial"))
    (path / sharded.ABOUT).unlink()  # what is not whole does not stand in the way
    write(folder, 9)
    assert checkpoints.load(path).step == 9 and not list(folder.glob("*.partial"))


def test_what_is_not_there_is_an_ordinary_error(folder):
    with pytest.raises(ValueError, match="another"):
        sharded.read_into(write(folder, 1), {"another": torch.zeros(2)})


def test_a_save_in_the_background_says_how_it_was_when_it_began(folder, monkeypatch):
    goes_on, write_json, extra = threading.Event(), sharded.write_json, {"scores": [1.0]}
    monkeypatch.setattr(sharded, "write_json", lambda *of: goes_on.wait(60) and write_json(*of))
    slow = saver(folder, background=True)
    slow.save(Checkpoint(1, TENSORS, extra), best=False)
    extra["scores"].append(2.0)
    goes_on.set()
    slow.wait()
    assert checkpoints.load(folder / "step_000000001").extra == {"scores": [1.0]}


@pytest.fixture
def one_rank(monkeypatch):
    """A rank of torchrun, alone."""
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with ranks("cpu") as me:
        yield me


def test_a_rank_alone_saves_in_a_group_of_the_cpu(folder, one_rank):
    """Which that of a GPU is not."""
    slow = Saver(folder, 2, one_rank, shards=True, background=True)
    assert dist.get_backend(slow._group) == "gloo" and slow._group is not dist.group.WORLD
    slow.save(Checkpoint(1, TENSORS, {}), best=False)
    slow.wait()
    assert checkpoints.list_steps(folder) == [1]


def test_masters_of_bf16_go_to_shards_and_back(tmp_path, folder, one_rank):
    write_folder(tmp_path / "images" / "train", 20)
    run = tiny_run(tmp_path / "images", tmp_path / "out", precision="bf16", steps=3)
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr(dist, "is_initialized", lambda: False)
        alone.delenv("RANK")
        alone.delenv("WORLD_SIZE")
        pretrain(run)
    file = checkpoints.find(tmp_path / "out")
    whole = checkpoints.load(file)

    model = run.model.build(run.objective)
    shard(model, shard_mesh(1, 1, "cpu"), torch.bfloat16)
    optimizer = FusedAdamW(parameter_groups(model))
    restore(file, model, optimizer, None, None)
    for part in NETWORKS:
        masters = full_precision(whole.tensors, part)
        weights = getattr(model, part).state_dict()
        assert all(torch.equal(local(weights[name]), value) for name, value in masters.items())

    extra = whole.extra | {"settings": whole.extra["settings"] | {"train.parallel": "fsdp"}}
    of_shards = Saver(folder, 2, one_rank, shards=True, background=False)
    of_shards.save(Checkpoint(3, training_tensors(model, optimizer), extra), best=False)
    model = run.model.build(run.objective)
    cast_weights(model, torch.bfloat16)
    optimizer = FusedAdamW(parameter_groups(model))
    restore(checkpoints.find(folder), model, optimizer, None, None)
    for name, value in training_tensors(model, optimizer).items():
        assert value.dtype == whole.tensors[name].dtype and torch.equal(value, whole.tensors[name]), name


def test_a_run_that_fails_waits_for_its_save(tmp_path, monkeypatch):
    class Failing(train.DevicePrefetcher):
        def __iter__(self):
            for i, batch in enumerate(super().__iter__()):
                if i == 5:
                    raise RuntimeError("a test broke it")
                yield batch

    write_json = sharded.write_json
    monkeypatch.setattr(train, "DevicePrefetcher", Failing)
    monkeypatch.setattr(sharded, "write_json", lambda *of: time.sleep(1) or write_json(*of))
    write_folder(tmp_path / "images" / "train", 20)
    with pytest.raises(RuntimeError, match="a test broke it"):
        pretrain(tiny_run(tmp_path / "images", tmp_path / "out", async_save=True))
    assert checkpoints.list_steps(tmp_path / "out" / "checkpoints") == [5]


def test_a_damaged_one_goes_aside_a_second_time(tmp_path):
    write_folder(tmp_path / "images" / "train", 20)
    run = tiny_run(tmp_path / "images", tmp_path / "out", async_save=True)
    pretrain(run)
    last = tmp_path / "out" / "checkpoints" / "step_000000012"
    for damage in (lambda file: file.write_bytes(b""), flip_a_bit):
        damage(next(last.glob("shard-*")))
        pretrain(run)
        assert sharded.is_whole(last) and last.with_name(f"{last.name}.damaged").is_dir()


def test_a_full_disk_leaves_the_last_one(folder, monkeypatch):
    write(folder, 1)
    for background in (False, True):
        monkeypatch.setattr(sharded, "write_json", no_room)
        with pytest.raises(OSError, match=r"step_000000002 cannot be written: rank 0: .*No space.*000001 is untouched"):
            slow = saver(folder, background=background)
            slow.save(Checkpoint(2, TENSORS, {}), best=False)
            slow.wait()
        assert checkpoints.list_steps(folder) == [1] and not list(folder.glob("*.partial"))
        assert checkpoints.load(checkpoints.find(folder)).step == 1


def no_room(*_):
    raise OSError(28, "No space left on device")


def test_a_failed_save_in_the_background_ends_the_run_at_the_next_log(folder):
    slow, failed = saver(folder, background=True), Future()
    slow._writing = (folder / "step_000000001", failed)
    slow.check()  # under way
    failed.set_exception(OSError("the server is gone"))
    with pytest.raises(OSError, match=r"rank 0: the server is gone; there is no older checkpoint"):
        slow.check()


def test_one_save_at_a_time(folder):
    slow = saver(folder, background=True)
    for step in (1, 2, 3):
        before = slow._writing
        slow.save(Checkpoint(step, TENSORS, {}), best=False)
        assert before is None or before[1].done()
    slow.wait()
    assert checkpoints.list_steps(folder) == [2, 3]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_saves_in_the_background_is_the_same_run(tmp_path, precision):
    """Also when it goes on from shards to files, and for whoever reads its weights."""
    write_folder(tmp_path / "images" / "train", 20)
    config = tiny_run(tmp_path / "images", tmp_path / "file", precision=precision)
    pretrain(config)
    for output, first, then in (("slow", True, True), ("both", True, False)):
        run = replace(config, output=str(tmp_path / output))
        pretrain(replace(run, train=replace(run.train, async_save=first, steps=5)))
        assert (tmp_path / output / "checkpoints" / "step_000000005").is_dir()
        pretrain(replace(run, train=replace(run.train, async_save=then)))
        assert checkpoints.find(tmp_path / output).is_dir() == then
    expected = load_run(tmp_path / "both")[0].state_dict()
    found = load_run(tmp_path / "slow")[0].state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    weights = read_any(tmp_path / "slow")
    assert all(torch.equal(weights.target[name], expected[f"target_encoder.{name}"]) for name in weights.target)


def test_every_command_reads_shards_as_it_reads_a_file(tmp_path, capsys):
    images = tmp_path / "images"
    for part in ("train", "val"):
        write_folder(images / part, 20)
    said = []
    for output, slow in ((tmp_path / "file", False), (tmp_path / "shards", True)):
        pretrain(tiny_run(images, output, steps=5, async_save=slow))
        assert checkpoints.find(output).is_dir() == slow
        features = ["--data", str(images / "val"), "--workers", "0", "--device", "cpu", "--out", f"{output}.npz"]
        capsys.readouterr()
        for command in (
            ["probe", str(output)],
            ["knn", str(output), "--encoder", "context"],
            ["features", str(checkpoints.find(output)), *features],
            ["export", str(output), "--to", "safetensors", "--out", f"{output}.safetensors"],
            ["export", str(output), "--to", "official", "--out", f"{output}.tar", "--steps_per_epoch", "5"],
        ):
            assert cli.main(command) == 0, command
        said.append(capsys.readouterr().out.replace(str(checkpoints.find(output)), "RUN").replace(str(output), "RUN"))
    assert said[0] == said[1]
    of_file, of_shards = (np.load(tmp_path / f"{name}.npz")["features"] for name in ("file", "shards"))
    assert np.array_equal(of_file, of_shards)
    of_file, of_shards = (load_file(tmp_path / f"{name}.safetensors") for name in ("file", "shards"))
    assert all(torch.equal(of_shards[name], value) for name, value in of_file.items())
    of_file, of_shards = (read_any(tmp_path / f"{name}.tar") for name in ("file", "shards"))
    for network in ("context", "target", "predictor"):
        of_shard = getattr(of_shards, network)
        assert all(torch.equal(of_shard[name], value) for name, value in getattr(of_file, network).items())


def test_a_best_one_that_was_about_to_be_kept_is_kept_by_the_next_start(tmp_path):
    write_folder(tmp_path / "images" / "train", 20)
    for slow in (True, False):
        run = tiny_run(tmp_path / "images", tmp_path / f"slow {slow}", steps=5, async_save=slow)
        pretrain(run)
        for best in checkpoints.find(Path(run.output), "best"), checkpoints.find(Path(run.output)):
            assert checkpoints.load(best).extra["best"]["step"] == 5
        best = checkpoints.find(Path(run.output), "best")
        shutil.rmtree(best) if slow else best.unlink()
        pretrain(run)
        assert checkpoints.load(checkpoints.find(Path(run.output), "best")).step == 5


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    run = tiny_run(tmp_path, tmp_path / "out")

    def changed(**train):
        return replace(run, train=replace(run.train, **train))

    for settings, message in (
        ({"parallel": "zero"}, "train.parallel must be ddp, fsdp or hsdp"),
        ({"shards": 2}, "train.shards 2 is for train.parallel hsdp, got ddp"),
        ({"reduce": "fp8"}, "train.reduce must be fp32 or bf16"),
        ({"timeout": 0}, "train.timeout must be positive"),
        ({"parallel": "fsdp", "precision": "fp16"}, "need train.precision bf16 or fp32, got fp16"),
    ):
        with pytest.raises(ValueError, match=message):
            changed(**settings)
    with pytest.raises(ValueError, match="train.reduce bf16 is for train.parallel fsdp and hsdp"):
        check_batches(changed(reduce="bf16"), Ranks(0, 1, torch.device("cpu")))
    for options, message in (
        ({"blocks": "fused"}, "step.blocks fused needs whole weights"),
        ({"capture": True, "device": "auto"}, "step.capture needs whole weights"),
        ({"fp8_targets": True, "precision": "bf16"}, "step.fp8_targets needs whole weights"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_run(tmp_path, tmp_path / "out", parallel="fsdp", **options)
    with pytest.raises(ValueError, match="selective needs step.blocks plain, got fused"):
        tiny_run(tmp_path, tmp_path / "out", activation_checkpointing="selective", blocks="fused")
    with pytest.raises(ValueError, match=r"train.shards 3 does not divide the 4 ranks"):
        shard_mesh(4, 3, "cpu")
    with monkeypatch.context() as of_slurm, pytest.raises(ValueError, match="hsdp .* LOCAL_WORLD_SIZE .* train.shards"):
        of_slurm.setenv("WORLD_SIZE", "4")
        mesh_of(changed(parallel="hsdp"), Ranks(0, 4, torch.device("cpu")))
    write_folder(tmp_path / "train", 8)
    with pytest.raises(ValueError, match="train.parallel fsdp is for ranks: start with torchrun"):
        pretrain(changed(parallel="fsdp"))
