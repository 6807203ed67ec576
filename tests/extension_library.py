"""Builds the C++/CUDA extension of this checkout for the tests, once per state of its sources."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["setup.py", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").iterdir()))]


def build(cache: Path) -> Path:
    """The library, from `cache` if these very sources were built with this torch before.

    Raises:
        AssertionError: the build failed, for example because there is no C++ compiler; with its output.
    """
    state = hashlib.sha256(f"{torch.__version__} {sys.version}".encode())
    for name in SOURCES:
        state.update((ROOT / name).read_bytes())
    folder = cache / state.hexdigest()[:16]
    if not list(folder.glob("ijepa_fast/*.so")):
        command = ["setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "objects")]
        environ = {**os.environ, "IJEPA_FAST_BUILD_EXT": "1"}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, (
            f"the extension does not build (a C++ compiler is needed):\n{done.stdout}{done.stderr}"
        )
    (library,) = folder.glob("ijepa_fast/*.so")
    return library
