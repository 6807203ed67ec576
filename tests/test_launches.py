"""Launches of kernels by the way they take on a GPU, with a stand-in for the driver of CUDA at its end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_check import unpack

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CC", "cc")), reason="needs a C compiler")
STREAM = 0x57
LARGEST = (2**31 - 1, 65535, 65535)
# Launches of one step of a context encoder, a target encoder and a predictor of one block each.
ATTENTION = {"forward_kernel": 3, "dq_kernel": 2, "dkdv_kernel": 2}
ENDS = {"gather_patches_kernel": 2, "gather_add_kernel": 2, "masked_copy_kernel": 1, "predictor_tokens_kernel": 1}
ENDS |= {"sum_copies_kernel": 1, "sum_mask_tokens_kernel": 1, "sum_rows_kernel": 1}
LOSS = {"target_loss_kernel": 1, "sum_kernel": 1, "target_loss_backward_kernel": 1}
UPDATE = {"block_norms_kernel": 1, "root_of_sum_kernel": 1, "adamw_ema_kernel": 1}
PLAIN = ATTENTION | ENDS | LOSS | UPDATE
FUSED = {"layer_norm_kernel": 9, "layer_norm_backward_kernel": 6, "linear_gelu_kernel": 3, "hidden_gradient_kernel": 2}
FUSED |= {"weight_gradient_kernel": 1, "sum_splits_kernel": 1, "sum_rows_kernel": 10}


def run(*command: str) -> subprocess.CompletedProcess:
    """A process in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def launched(*what: str) -> dict:
    done = run("tests/launches.py", *what)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for launch in found["launches"]:
        grid = launch["grid"]
        assert all(0 < size <= most for size, most in zip(grid, LARGEST, strict=True)), launch
        # Triton multiplies the three in 32 bits, and launches nothing where that overflows.
        assert grid[0] * grid[1] * grid[2] < 2**31 and launch["threads"] <= 1024, launch
        assert launch["stream"] == STREAM, launch
        # Whole 64-bit addresses, and each number in its place.
        assert launch["handed"] == launch["received"] and launch["handed"], launch
    return found


def test_fused_steps_launch_and_compile_nothing_after_the_first():
    """Whatever compiles in the middle of training stops it for seconds. 50 steps."""
    assert launched("fused")["steps"]["fused"] == {"launches": PLAIN | FUSED, "rows": 1, "compiled": []}


@pytest.mark.slow
def test_other_steps_launch_and_compile_nothing_after_the_first():
    steps = launched("plain", "any rows", "capture")["steps"]
    assert all(found["launches"] == PLAIN and found["compiled"] == [] for found in steps.values())
    assert steps["plain"]["rows"] == 1 < steps["capture"]["rows"] < 20 < steps["any rows"]["rows"]


@pytest.mark.slow
def test_everything_that_is_compiled_for_sm_90_launches():
    assert len(launched("listed")["launches"]) > 200


@pytest.mark.slow
def test_a_packed_cache_has_every_kernel_and_says_what_it_lacks(tmp_path):
    archive = str(tmp_path / "cache.tar.xz")
    done = run("-m", "benchmarks.gpu_cache", archive, "--files", "ema")
    assert done.returncode == 0 and "0 kernels are not in" in done.stdout, done.stdout + done.stderr
    assert unpack(Path(archive), tmp_path / "cache") == 3
    done = run("-m", "benchmarks.gpu_cache", archive, "--files", "grad_norm", "--check")
    assert done.returncode == 1 and "4 kernels are not in" in done.stdout and "block_norms_kernel" in done.stdout
