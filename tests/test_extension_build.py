"""IJEPA_FAST_BUILD_EXT=1: what is built and packed, and that a build that cannot succeed says so."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.so", "build", "dist", "runs", "results")


def run(*arguments, cwd=ROOT, **environment):
    environ = {**os.environ, **environment}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environ, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    copy = tmp_path_factory.mktemp("extension") / "checkout"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    return copy


@pytest.mark.slow
def test_a_wheel_with_the_extension_serves_every_python_and_is_used(checkout, tmp_path):
    pip = "-m pip wheel . --no-deps --no-build-isolation --no-cache-dir --wheel-dir dist"
    done = run(*pip.split(), cwd=checkout, IJEPA_FAST_BUILD_EXT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        assert "ijepa_fast/_block_masks.abi3.so" in archive.namelist()
        assert not [name for name in archive.namelist() if name.startswith("csrc")]
    code = """
from ijepa_fast import doctor
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
print(MaskSampler(MaskConfig(), (14, 14), implementation="extension").counts(8, seed=1, step=2))
print(MaskSampler(MaskConfig(), (14, 14), implementation="torch").counts(8, seed=1, step=2))
print(doctor.text(doctor.report()))
"""
    done = run("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    ours, torchs, report = done.stdout.split("\n", 2)
    assert ours == torchs and "cpu   C++/CUDA extension" in report


def test_the_source_distribution_holds_what_the_extension_is_built_from(checkout):
    done = run("-c", "from setuptools import build_meta; print(build_meta.build_sdist('dist'))", cwd=checkout)
    assert done.returncode == 0, done.stderr
    with tarfile.open(checkout / "dist" / done.stdout.split()[-1]) as archive:
        packed = {path.partition("/")[2] for path in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()}
    assert sources and sources <= packed


@pytest.mark.slow
def test_a_build_without_a_compiler_fails(tmp_path):
    build = ["build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    done = run("setup.py", *build, IJEPA_FAST_BUILD_EXT="1", CXX="no-such-compiler")
    assert done.returncode != 0 and not list(tmp_path.rglob("*.so"))


def test_a_build_without_torch_says_what_is_missing():
    code = """
import runpy, sys
sys.modules["torch"] = None  # import torch raises ImportError
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py")
"""
    done = run("-c", code, IJEPA_FAST_BUILD_EXT="1")
    assert done.returncode != 0 and "--no-build-isolation" in done.stderr
    done = run("-c", code, IJEPA_FAST_BUILD_EXT="0")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA toolkit as on a machine with nvcc and headers, but without libcudart."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime_api.h").write_text('extern "C" int cudaGetDeviceCount(int *);\n')
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.1\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    return tmp_path


def cuda_problem(toolkit, cuda="13.0"):
    """The answer of setup.py for a torch built for this CUDA and the toolkit in this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **_: None)
        patch.setenv("IJEPA_FAST_BUILD_EXT", "0")
        found = runpy.run_path(str(ROOT / "setup.py"))
        torch = SimpleNamespace(version=SimpleNamespace(cuda=cuda))
        paths = {
            "include_paths": lambda _: [f"{toolkit}/include"],
            "library_paths": lambda _: [f"{toolkit}/lib64"],
        }
        return found["cuda_problem"](torch, SimpleNamespace(CUDA_HOME=toolkit and str(toolkit), **paths))


def test_without_libcudart_no_cuda_code_is_built(toolkit):
    assert "libcudart cannot be linked with" in cuda_problem(toolkit)
    assert "not a CUDA build" in cuda_problem(toolkit, cuda=None)
    assert "another CUDA" in cuda_problem(toolkit, cuda="12.8")
    assert "no CUDA toolkit" in cuda_problem(None)
    (toolkit / "bin" / "nvcc").unlink()
    assert "does not run" in cuda_problem(toolkit)


def test_cuda_code_is_built_where_libcudart_links(toolkit):
    (toolkit / "lib64").mkdir()
    source = toolkit / "cudart.c"
    source.write_text("int cudaGetDeviceCount(int *n) { return *n = 0; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", toolkit / "lib64" / "libcudart.so"], check=True)
    assert cuda_problem(toolkit) is None
