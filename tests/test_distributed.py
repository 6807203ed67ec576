"""Two ranks on gloo against one: loss curves, weights, and what goes wrong at the start."""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ijepa_fast.ranks import RankLost, Ranks, _attempt, pick_device, ranks
from ijepa_fast.run import checkpoint
from tests.image_files import write_folder

RUN_TINY = Path(__file__).parent / "run_tiny.py"
REGULARISED = ["objective.variance_weight=1.0", "objective.covariance_weight=0.1"]
LONG_INTERVALS = ["train.log_every=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_folder(root / "train", 20)
    return root


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(data, output, world_size, *settings, kill=None):
    """Standard error and exit status of each rank; the rank ``kill`` is killed when the others have ended."""
    port = free_port()
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [sys.executable, str(RUN_TINY), str(data), str(output), *settings]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
    ends = {rank: p.communicate(timeout=600)[1] for rank, p in enumerate(processes) if rank != kill}
    if kill is not None:
        processes[kill].kill()
        ends[kill] = processes[kill].communicate()[1]
    return [(ends[rank], p.returncode) for rank, p in enumerate(processes)]


def trained(data, output, world_size, *settings):
    ends = launch(data, output, world_size, *settings)
    assert all(code == 0 for _, code in ends), ends[0][0][-3000:]
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], checkpoint.load(checkpoint.find(output)).tensors


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        [],
        REGULARISED,
        ["masks.per_image=3", *REGULARISED],  # with all terms and a projector, in fp64: sharding_checks.py
        ["masks.group_size=4", 'masks.context="batch_min"'],
        ["train.accumulate=2"],
    ],
    ids=["exact", "variance-covariance", "several masks", "batch_min", "accumulate"],
)
def test_two_ranks_train_like_one(data, tmp_path, settings):
    settings = settings + LONG_INTERVALS
    one, weights = trained(data, tmp_path / "one", 1, *settings)
    two, weights_of_two = trained(data, tmp_path / "two", 2, *settings)
    assert len(one) == len(two) == 12
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "loss_prediction", "loss_variance", "loss_covariance", "loss_invariance"):
            assert b[name] == pytest.approx(a[name], rel=2e-5, abs=1e-7), (a["step"], name)
    for name, value in weights.items():
        if name.startswith("model."):
            torch.testing.assert_close(weights_of_two[name], value, rtol=1e-2, atol=5e-4, msg=name)


@pytest.mark.slow
def test_a_loader_that_fails_on_one_rank_saves_first_and_ends_all(data, tmp_path):
    ends = launch(data, tmp_path / "run", 2, "fail=[1, 7]")
    assert [code for _, code in ends] == [1, 1]
    assert "LoaderError: no images on rank 1: a test broke it" in ends[0][0] and "a test broke it" in ends[1][0]
    assert checkpoint.load(checkpoint.find(tmp_path / "run")).step == 7
    trained(data, tmp_path / "run", 2)


def test_an_incomplete_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="missing LOCAL_RANK, MASTER_ADDR, MASTER_PORT"), ranks("cpu"):
        pass


def test_a_failed_rendezvous_is_an_error(monkeypatch):
    from datetime import timedelta

    values = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError), ranks("cpu", timeout=timedelta(seconds=2)):
        pass
    assert not torch.distributed.is_initialized()


def test_ranks_that_start_again_agree_on_a_name_that_is_new():
    """Although the store is that of the start before, in which a rank asked for the name and was gone."""
    store, names = dist.HashStore(), []
    store.set("asks_1", "of a rank that is gone")
    for _ in range(2):
        with ThreadPoolExecutor() as pool:
            found = {pool.submit(_attempt, store, rank, 3, timedelta(seconds=30)) for rank in (2, 1, 0)}
        names.append({future.result() for future in found})
    assert len(names[0]) == len(names[1]) == 1 and names[0] != names[1]
    with pytest.raises(RankLost, match=r"rank 1, 2 of 3 did not start within 0.001 minutes \(train.timeout\)"):
        _attempt(store, 0, 3, timedelta(seconds=0.06))


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1", True),
        ("[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 60000ms", True),
        ("/data/gloo/cats.tar is cut off", False),
    ],
)
def test_an_error_of_gloo_is_known_by_its_place_in_the_sources(text, lost, monkeypatch):
    monkeypatch.setattr("ijepa_fast.ranks._lost", lambda: "rank 1 does not answer")
    me = Ranks(0, 2, torch.device("cpu"))
    with pytest.raises(RankLost if lost else RuntimeError) as raised, me.naming_the_lost():
        raise RuntimeError(text)
    assert type(raised.value) is (RankLost if lost else RuntimeError)


def test_alone_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with ranks("cpu") as me:
        assert (me.rank, me.world_size, me.is_main, me.device.type) == (0, 1, True, "cpu")
        assert me.any(True) and not me.any(False)
        assert me.from_main("x") == "x"


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU can one be missing")
def test_a_missing_gpu_is_named():
    assert pick_device("auto", 0).type == "cpu"
    with pytest.raises(ValueError, match="this torch sees no GPU"):
        pick_device("cuda", 0)


@pytest.mark.slow
def test_an_interrupt_of_torchrun_saves(data, tmp_path):
    """It hands the signal on to its ranks and waits for them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    settings = ["train.steps=1000", "train.save_every=1000", "loader.workers=1"]
    process = subprocess.Popen(
        [*command, str(RUN_TINY), str(data), str(tmp_path / "run"), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    for _ in range(4):
        process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    (step,) = checkpoint.list_steps(tmp_path / "run" / "checkpoints")
    assert 1 <= step < 1000


def test_hosts_give_up_before_the_gpus(monkeypatch):
    """NCCL would end the process before anyone has asked who is lost."""
    waits = {}
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "here", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("ijepa_fast.ranks.pick_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr("ijepa_fast.ranks._set_device", lambda device: device)
    meeting = (torch.distributed.HashStore(), 0, 2)
    monkeypatch.setattr("ijepa_fast.ranks._attempt", lambda *_: "first")
    monkeypatch.setattr("torch.distributed.rendezvous", lambda *_, **__: iter([meeting]))
    monkeypatch.setattr(
        "torch.distributed.init_process_group", lambda kind, timeout, **_: waits.update({kind: timeout})
    )
    monkeypatch.setattr("torch.distributed.new_group", lambda backend, timeout: waits.update({backend: timeout}))
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    with ranks("cuda", timedelta(minutes=5)):
        assert waits["gloo"] == timedelta(minutes=5) < waits["nccl"]
