"""FSDP2 on two processes (gloo, CPU): the checks of fsdp_checks.py, each of which both ranks must pass."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fsdp_checks import CHECKS

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent / "fsdp_checks.py"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each rank says of each check."""
    folder = tmp_path_factory.mktemp("fsdp")
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), "2", str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), errors[0][-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(outcomes, check):
    for rank, found in enumerate(outcomes):
        failure = found.get(check, "not reached")
        assert not failure, f"rank {rank}: {failure}"
