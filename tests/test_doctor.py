"""ijepa-fast doctor: a reason beside everything that is missing."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch

from ijepa_fast import doctor
from ijepa_fast.attention import dispatch as attention


@pytest.fixture(scope="module")
def found():
    return doctor.report()


def test_report_is_json_and_names_the_versions_in_use(found):
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["numpy"] == numpy.__version__
    assert found["versions"]["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")


def test_every_backend_is_listed_and_the_one_taken_is_usable(found):
    assert list(found["attention"]) == list(attention.BACKENDS)
    assert found["attention"][found["attention_auto"]] is None


def test_text_holds_every_fact_and_every_reason(found):
    printed = doctor.text(found)
    for name in [*found["versions"], *found["optional"], *found["attention"]]:
        assert name in printed
    reasons = [found["gpu"], found["triton"], *found["extension"].values(), *found["attention"].values()]
    assert all(reason in printed for reason in reasons if reason)


def test_gpu_and_triton_are_usable_exactly_where_torch_sees_a_device(found):
    assert (found["gpu"] is None) == torch.cuda.is_available() == bool(found["gpus"])
    if not torch.cuda.is_available():
        assert "no CUDA device" in found["triton"]


def fake_torch(cuda: str | None, available: bool):
    gpu = SimpleNamespace(name="NVIDIA T4", major=7, minor=5, total_memory=16 * 2**30)
    return SimpleNamespace(
        __version__="2.99.0",
        version=SimpleNamespace(cuda=cuda),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: False)),
        cuda=SimpleNamespace(
            is_available=lambda: available, device_count=lambda: 1, get_device_properties=lambda index: gpu
        ),
    )


def test_reasons_for_a_missing_gpu_tell_the_build_of_torch_from_the_driver(monkeypatch):
    monkeypatch.setattr(doctor, "_driver_version", lambda: "570.1")
    assert "install a CUDA build" in doctor._why_no_gpu(fake_torch(None, False))
    assert "CUDA 13.0) sees no device (driver 570.1)" in doctor._why_no_gpu(fake_torch("13.0", False))
    monkeypatch.setattr(doctor, "_driver_version", lambda: None)
    assert "install" not in doctor._why_no_gpu(fake_torch(None, False))
    assert "no driver" in doctor._why_no_gpu(fake_torch("13.0", False))


def test_a_gpu_that_is_too_old_or_a_missing_compiler_is_named(monkeypatch):
    pytest.importorskip("triton", reason="triton is installed on Linux only")
    gpus = doctor._gpus(fake_torch("13.0", True))
    assert "T4, sm_75, 16 GiB" in doctor._why_no_triton(gpus)
    gpus[0]["capability"] = "9.0"
    monkeypatch.setenv("CC", "")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "C compiler" in doctor._why_no_triton(gpus)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name or None)
    assert doctor._why_no_triton(gpus) is None


def test_a_torch_that_cannot_be_loaded_is_a_line_of_the_report():
    code = """
import sys
sys.modules["torch"] = None  # import torch raises ImportError
from ijepa_fast import doctor
print(doctor.text(doctor.report()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be imported" in done.stdout and "Optional packages" in done.stdout
