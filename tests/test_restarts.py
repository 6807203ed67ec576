"""Runs of several ranks that are killed, hang, or go on with other ranks and in another mode."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ijepa_fast.interop.export import export
from ijepa_fast.run import checkpoint as checkpoints
from ijepa_fast.weights.encoder_file import load_encoder
from ijepa_fast.weights.runs import load_run
from tests.image_files import write_folder
from tests.test_distributed import RUN_TINY, launch

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", 3))
"""KILLS=20 takes a quarter of an hour of two cores."""
FSDP = 'train.parallel="fsdp"'


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_folder(root / "train", 24)
    return root


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


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
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
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "--max-restarts", str(2 * KILLS), str(RUN_TINY), str(data)]
    agent = subprocess.Popen(
        [*command, str(tmp_path / "killed"), *settings], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
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
    for ranks, parallel, broken in ((4, FSDP, 4), (2, 'train.parallel="hsdp"', 8)):
        ends = launch(data, output, ranks, parallel, f"fail=[0, {broken if ranks == 4 else broken - 4}]")
        assert all("a test broke it" in said for said, _ in ends), ends
        path = checkpoints.find(output)
        state = checkpoints.load(path)
        assert state.step == broken and len(list(path.glob("shard-*"))) == ranks
        for name, value in load_run(output)[0].state_dict().items():
            assert torch.equal(value, state.tensors[f"model.{name}"])
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
