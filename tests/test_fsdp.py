"""FSDP2 on gloo: the optimizer on two processes, training and checkpoints on four; all ranks must pass each check."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fsdp_checks, sharding_checks

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent


def outcomes(checks, world_size, folder):
    """What each rank says of each check."""
    worker = str(FOLDER / checks)
    processes = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), str(world_size), str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        errors = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = [folder / f"{rank}.json" for rank in range(world_size)]
    assert all(file.exists() for file in said), errors[0][-3000:]
    return [json.loads(file.read_text()) for file in said]


@pytest.fixture(scope="module")
def of_optimizer(tmp_path_factory):
    return outcomes("fsdp_checks.py", 2, tmp_path_factory.mktemp("fsdp"))


@pytest.fixture(scope="module")
def of_training(tmp_path_factory):
    return outcomes("sharding_checks.py", 4, tmp_path_factory.mktemp("sharding"))


@pytest.mark.parametrize("check", fsdp_checks.CHECKS)
def test_optimizer_on_two_ranks(of_optimizer, check):
    assert_passed(of_optimizer, check)


@pytest.mark.parametrize("check", sharding_checks.CHECKS)
def test_training_on_four_ranks(of_training, check):
    assert_passed(of_training, check)


def assert_passed(found, check):
    for rank, of_rank in enumerate(found):
        failure = of_rank.get(check, "not reached")
        assert not failure, f"rank {rank}: {failure}"
