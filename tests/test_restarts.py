"""Runs of several ranks that are killed, hang, or go on with other ranks and in another mode."""

import contextlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ijepa_fast.downstream.encoders import load_any
from ijepa_fast.interop.export import export
from ijepa_fast.run import checkpoint as checkpoints
from ijepa_fast.weights.encoder_file import load_encoder
from ijepa_fast.weights.runs import load_run
from tests.image_files import write_folder
from tests.test_distributed import RUN_TINY, free_port, launch
from tests.test_sharded import assert_ranks_read_their_shares

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", 3))
"""KILLS=20 takes a quarter of an hour of two cores."""
FSDP = 'train.parallel="fsdp"'


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_folder(root / "train", 24)
    return root


ELASTIC = "join_timeout=120,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"


def run(data, output, ranks, *settings):
    ends = launch(data, output, ranks, *settings)
    assert all(code == 0 for _, code in ends), ends[0][0][-3000:]
    return checkpoints.load(checkpoints.find(output))


def assert_equal(state, expected, **tolerance):
    assert state.step == expected.step and state.tensors.keys() == expected.tensors.keys()
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for name, value in expected.tensors.items():
        torch.testing.assert_close(state.tensors[name], value, **tolerance, msg=name)


def workers(agent):
    """Processes that torchrun started."""
    return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


def host(meeting, data, output, *settings, nodes, ranks=1, restarts=4, meets=True):
    """torchrun, as a host of a run calls it; whether the hosts ``meet`` at this one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", str(ranks)]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        meeting,
        "--rdzv-id",
        "7",
        "--rdzv-conf",
        f"{ELASTIC},is_host={int(meets)}",
    ]
    command += ["--max-restarts", str(restarts), str(RUN_TINY), str(data), str(output), *settings]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def hosts_of(data, tmp_path):
    """Starts hosts of a run; gives each, and what it says, line by line. The one with ``meets`` is where they meet."""
    meeting, hosts = f"localhost:{free_port()}", []

    def start(*settings, nodes, meets):
        agent, said = host(meeting, data, tmp_path / "run", *settings, nodes=nodes, meets=meets), queue.SimpleQueue()
        threading.Thread(target=lambda: [said.put(line) for line in agent.stdout], daemon=True).start()
        hosts.append(agent)
        return agent, said

    yield start
    for agent in hosts:
        end(agent)


def end(agent):
    """Kill a host with all that runs on it."""
    ranks = workers(agent.pid) if agent.poll() is None else []
    agent.kill()
    agent.wait()
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def wait_for_steps(said, heard, steps):
    time.sleep(0.5)
    while not said.empty():  # steps before a kill
        heard.append(said.get())
    while steps:
        heard.append(line := said.get(timeout=240))
        steps -= line.startswith("step ") and ":" not in line


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")


@needs_proc
def test_ranks_that_are_killed_on_either_of_two_hosts_change_nothing(data, tmp_path, hosts_of):
    settings = [FSDP, "train.steps=40", "train.save_every=2", "train.timeout=1.0"]
    expected = run(data, tmp_path / "calm", 2, *settings)
    # The first has rank 0, the second the store of torchrun.
    (first, said), (second, _) = (hosts_of(*settings, nodes="2", meets=meets) for meets in (False, True))
    heard = []
    for killed in (second, second, first):
        wait_for_steps(said, heard, 5)
        os.kill(workers(killed.pid)[0], signal.SIGKILL)
    assert [agent.wait(timeout=240) for agent in (first, second)] == [0, 0], "".join(heard)
    assert_equal(checkpoints.load(checkpoints.find(tmp_path / "run")), expected)


@needs_proc
def test_a_run_goes_on_when_hosts_are_lost_and_join(tmp_path, hosts_of, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    settings = [FSDP, "train.steps=4000", "train.save_every=2", "train.timeout=1.0"]
    (first, _), (second, said) = (hosts_of(*settings, nodes="1:2", meets=meets) for meets in (False, True))
    heard, shards = [], []

    def goes_on():
        wait_for_steps(said, heard, 8)
        shards.append(len(list(checkpoints.find(tmp_path / "run").glob("shard-*"))))

    goes_on()
    end(first)
    goes_on()
    third, said_by_third = hosts_of(*settings, nodes="1:2", meets=False)
    wait_for_steps(said_by_third, heard, 1)
    goes_on()
    assert shards == [2, 1, 2], "".join(heard)
    for agent in (second, third):
        agent.terminate()
    for agent in (second, third):
        agent.wait(timeout=120)
    last, lines = checkpoints.load(checkpoints.find(tmp_path / "run")), (tmp_path / "run" / "metrics.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in lines.splitlines()]
    assert last.step > 24 - 2 and steps == sorted(set(steps))


@needs_proc
@pytest.mark.parametrize("slow", [False, True], ids=["saved at once", "saved in the background"])
def test_ranks_that_are_killed_change_nothing(data, tmp_path, slow):
    settings = [
        FSDP,
        "train.batch_size=6",
        "train.steps=60",
        "train.save_every=2",
        f"train.async_save={str(slow).lower()}",
        "train.timeout=1.0",
    ]
    expected = run(data, tmp_path / "calm", 3, *settings)
    agent = host("localhost:0", data, tmp_path / "killed", *settings, nodes="1", ranks=3, restarts=2 * KILLS)
    chosen, kills, said = random.Random(0), 0, []
    until = chosen.randint(2, 10)
    for line in agent.stdout:
        said.append(line)
        until -= line.startswith("step ") and ":" not in line
        if until == 0 and kills < KILLS:
            time.sleep(chosen.uniform(0, 0.5))  # in the middle of whatever comes next
            if ranks := workers(agent.pid):
                os.kill(chosen.choice(ranks), signal.SIGKILL)
                kills += 1
            until = chosen.randint(2, 10)
    assert agent.wait() == 0, "".join(said[-50:])
    assert kills == KILLS
    assert_equal(checkpoints.load(checkpoints.find(tmp_path / "killed")), expected)
    assert not list((tmp_path / "killed" / "checkpoints").glob("*.partial"))


def test_a_run_goes_on_with_other_ranks_and_in_another_mode(data, tmp_path):
    """4 ranks, then 2 in groups of 2, then one process with everything; each reads what the others wrote."""
    output = tmp_path / "run"
    hsdp = ['train.parallel="hsdp"', "train.shards=2"]
    for ranks, parallel, broken in ((4, [FSDP], 4), (2, hsdp, 8)):
        ends = launch(data, output, ranks, *parallel, f"fail=[0, {broken if ranks == 4 else broken - 4}]")
        assert all("a test broke it" in said for said, _ in ends), ends
        path = checkpoints.find(output)
        state = checkpoints.load(path)
        assert state.step == broken and len(list(path.glob("shard-*"))) == ranks
        networks = load_run(output)[0].state_dict()
        for name, value in networks.items():
            assert torch.equal(value, state.tensors[f"model.{name}"])
        for name, value in load_any(output).encoder.state_dict().items():  # features, evaluate, finetune
            assert torch.equal(value, networks[f"target_encoder.{name}"])
        divided = {name: value for name, value in state.tensors.items() if name.startswith("model.")}
        for readers in (2, 8):
            assert_ranks_read_their_shares(path, divided, readers)
        export(output, "safetensors", tmp_path / f"{ranks}.safetensors")
        encoder = load_encoder(tmp_path / f"{ranks}.safetensors")[0]
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, state.tensors[f"model.target_encoder.{name}"])
    last, expected = run(data, output, 1), run(data, tmp_path / "calm", 1)
    assert checkpoints.find(output).is_file() and last.step == expected.step == 12
    for name, value in expected.tensors.items():
        if name.startswith("model."):
            torch.testing.assert_close(last.tensors[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_rank_that_hangs_is_named_and_ends_the_run(data, tmp_path):
    ends = launch(data, tmp_path / "run", 3, "train.batch_size=6", "train.timeout=1.0", "hang=[1, 3]", kill=1)
    assert [code for _, code in ends] == [1, -signal.SIGKILL, 1]
    assert "RankLost: rank 1 does not answer; this rank, 0, ends" in ends[0][0], ends[0][0][-3000:]
