"""What other systems do otherwise, simulated: workers that are spawned, devices that are refused, notebooks."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from ijepa_fast import doctor
from ijepa_fast.ranks import pick_device
from ijepa_fast.run import log as run_log

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "model.img_size": 24, "model.patch_size": 4, "model.embed_dim": 16, "model.depth": 1, "model.num_heads": 2,
    "model.predictor_embed_dim": 8, "model.predictor_depth": 1, "masks.min_keep": 1, "optim.warmup_epochs": 0.1,
    "train.steps": 2, "train.batch_size": 4, "train.device": "cpu", "evaluation.results": "none", "log": "none",
}  # fmt: skip
PROGRAM = """
import json, multiprocessing, sys
multiprocessing.set_start_method("spawn", force=True)
import torch
torch.set_num_threads(1)
import ijepa_fast
GUARD
    print(ijepa_fast.pretrain({}, **json.loads(sys.argv[1]))["steps"])
"""


def start(tmp_path, data, guard, **settings):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("GUARD", guard))
    settings = SETTINGS | {"data": str(data), "output": str(tmp_path / "run")} | settings
    command = [sys.executable, str(program), json.dumps(settings)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("guard", ["if __name__ == '__main__':", "if True:"])
def test_spawned_workers_load_images_or_say_what_the_program_lacks(tmp_path, data, guard):
    done = start(tmp_path, data, guard, **{"loader.workers": 1})
    if "main" in guard:
        assert done.returncode == 0 and done.stdout == "2\n", done.stderr
    else:
        assert done.returncode and "pretrain is called again by a loader worker" in done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert "a loader worker died" in last and 'if __name__ == "__main__"' in last, done.stderr


def test_no_guard_is_needed_without_workers(tmp_path, data):
    done = start(tmp_path, data, "if True:", **{"loader.workers": 0})
    assert done.returncode == 0 and done.stdout == "2\n", done.stderr


def test_other_devices_are_refused_by_name():
    with pytest.raises(ValueError, match="must be auto, cpu or cuda, got 'mps'; nothing here has run on Apple's GPUs"):
        pick_device("mps", 0)
    with pytest.raises(ValueError, match="must be auto, cpu or cuda, got 'tpu'$"):
        pick_device("tpu", 0)


def test_doctor_says_that_an_apple_gpu_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert doctor._why_no_gpu(torch).startswith("none that is used: nothing here has run on Apple's GPUs")


def test_a_notebook_has_a_bar(monkeypatch, tmp_path):
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert run_log.in_notebook()
    log = run_log.RunLog(tmp_path, 4, 0, "run")
    assert not log._bar.disable
    log.close()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert not run_log.in_notebook()
