"""What `pip install .` from a clean checkout installs: every module, kernels and recipes inside, and nothing else."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "results")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    environ = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy without leftovers of earlier builds, which setuptools would pack again; with one more, nested recipe."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    nested = copy / "ijepa_fast" / "recipes" / "ablations" / "nested.yaml"
    nested.parent.mkdir(parents=True, exist_ok=True)
    nested.write_text("{}\n")
    return copy


@pytest.fixture(scope="module")
def expected(checkout) -> set[str]:
    """The files that belong into the package, by their path inside the wheel."""
    package, kernels = checkout / "ijepa_fast", checkout / "kernels"
    files = [*package.rglob("*.py"), *(package / "recipes").rglob("*.yaml")]
    inside = {str(path.relative_to(checkout)) for path in files}
    return inside | {f"ijepa_fast/kernels/{path.relative_to(kernels)}" for path in kernels.rglob("*.py")}


@pytest.fixture(scope="module")
def wheel(checkout) -> Path:
    command = "-m pip wheel . --no-deps --no-build-isolation --no-cache-dir --wheel-dir dist".split()
    run(sys.executable, *command, cwd=checkout)
    (built,) = (checkout / "dist").glob("*.whl")
    return built


def test_wheel_holds_the_package_with_kernels_and_recipes_and_nothing_else(wheel, expected):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        lines = archive.read(metadata).decode().splitlines()
        assert b"ijepa-fast = ijepa_fast.cli:main" in archive.read(metadata.replace("METADATA", "entry_points.txt"))
    assert packed == expected
    assert {
        "ijepa_fast/cli.py",
        "ijepa_fast/kernels/__init__.py",
        "ijepa_fast/recipes/demo.yaml",
        "ijepa_fast/recipes/ablations/nested.yaml",
    } <= packed
    required = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert sorted(line.split()[1].split(">")[0] for line in required) == ["numpy", "torch", "triton"]


def test_unpacked_wheel_is_imported_whole_from_where_it_stands(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import ijepa_fast, ijepa_fast.kernels as k, ijepa_fast.ops as o; print(k.__file__, o.__file__)"
    files = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path)).split()
    assert all(Path(file).is_relative_to(tmp_path / "ijepa_fast") for file in files)


def test_source_distribution_suffices_to_build_and_leaves_the_tests_out(checkout, expected):
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    name = run(sys.executable, "-c", code, cwd=checkout).split()[-1]
    with tarfile.open(checkout / "dist" / name) as archive:
        packed = {path.partition("/")[2] for path in archive.getnames()}
    sources = {path.replace("ijepa_fast/kernels/", "kernels/") for path in expected}
    assert sources | {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE"} <= packed
    assert not [path for path in packed if path.startswith(("tests", "benchmarks/results"))]
    assert not [path for path in packed if path.startswith("ijepa_fast/kernels/")]
